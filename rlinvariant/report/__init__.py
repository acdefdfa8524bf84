"""Views of metrics.jsonl: what a run leaves behind, and what it prints."""
