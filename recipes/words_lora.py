"""words with LoRA adapters on a frozen base: ten times the learning rate, since an adapter's B begins at zero."""

BASE = "words"
DEFAULTS = {
    "lora.r": 16,
    "trainer.learning_rate": 1e-4,
}
