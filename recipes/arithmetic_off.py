"""arithmetic with stock kernels on both sides, and nothing done about the drift."""

BASE = "arithmetic"
DEFAULTS = {"invariance": "off"}
