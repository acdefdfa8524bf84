"""What a run leaves behind and what it prints: views of metrics.jsonl."""
