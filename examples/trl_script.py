"""A TRL script as TRL's users write it; which trainer it takes is one import.

    python examples/trl_script.py MODEL

MODEL is a directory or hub id; a run of `rlinvariant train recipe=arithmetic` leaves a tiny one in runs/.cache. The reward
counts the different characters of a completion, so that there is something to learn for any model.
"""

import sys

from datasets import Dataset

from rlinvariant import GRPOConfig, GRPOTrainer  # before: from trl import GRPOConfig, GRPOTrainer

dataset = Dataset.from_list([{"prompt": f"{a}+{b}="} for a in range(10) for b in range(10)])


def different_characters(completions, **kwargs):
    return [len(set(completion)) / 10 for completion in completions]


args = GRPOConfig(
    output_dir="trl-script",
    max_steps=4,
    per_device_train_batch_size=8,
    num_generations=4,
    max_completion_length=12,
    learning_rate=1e-4,
)
trainer = GRPOTrainer(
    model=sys.argv[1],
    reward_funcs=different_characters,
    args=args,
    train_dataset=dataset,
)
trainer.train()
