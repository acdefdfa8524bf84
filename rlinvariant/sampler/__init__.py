"""The sampler: stock vLLM, running the same patched Hugging Face model as the trainer. Nothing else imports vllm."""
