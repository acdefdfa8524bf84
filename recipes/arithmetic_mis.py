"""arithmetic with stock kernels on both sides, sequences whose importance ratio is too large left out of the loss."""

BASE = "arithmetic_tis"
DEFAULTS = {"trainer.vllm_importance_sampling_mode": "sequence_mask"}
