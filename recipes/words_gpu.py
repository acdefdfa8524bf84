"""words on a GPU: 256 completions a step, a learning rate for that many, and larger numbers."""

BASE = "words"
DEFAULTS = {
    "steps": 150,
    "data.largest": 20,
    "data.eval_size": 48,
    "trainer.learning_rate": 3e-6,
    "trainer.per_device_train_batch_size": 256,  # 32 prompts x 8 samples
    "sampler.max_num_seqs": 256,
    "sampler.kv_cache_gib": 4.0,
}
