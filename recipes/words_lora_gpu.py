"""words_lora on a GPU: 256 completions a step."""

BASE = "words_gpu"
DEFAULTS = {
    "lora.r": 16,
    "trainer.learning_rate": 3e-5,
}
