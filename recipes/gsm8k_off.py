"""gsm8k with stock kernels on both sides, and nothing done about the drift."""

BASE = "gsm8k"
DEFAULTS = {"invariance": "off"}
