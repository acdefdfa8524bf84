"""arithmetic with stock kernels on both sides, the drift corrected by truncated importance sampling of each token."""

BASE = "arithmetic_off"
DEFAULTS = {
    "trainer.vllm_importance_sampling_correction": True,
    "trainer.vllm_importance_sampling_mode": "token_truncate",
}
