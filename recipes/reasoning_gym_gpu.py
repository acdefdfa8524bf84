"""reasoning_gym on a GPU: 256 completions a step."""

BASE = "reasoning_gym"
DEFAULTS = {
    "steps": 150,
    "data.eval_size": 48,
    "trainer.learning_rate": 3e-6,
    "trainer.per_device_train_batch_size": 256,  # 32 prompts x 8 samples
    "trainer.gradient_accumulation_steps": 1,
    "sampler.max_num_seqs": 256,
    "sampler.kv_cache_gib": 4.0,
}
