"""`train.py`'s command for each kind of recipe, one step, all in one process: run_recipes.py EMPTY-DIRECTORY."""

import os
import random
import sys

import torch

from rlinvariant.cli import main
from rlinvariant.recipes import _math
from rlinvariant.recipes._tiny import build_model
from rlinvariant.warmstart import supervised
from tests.recipes.hub_rows import ROWS, chat_tokenizer, write

SMALL = (
    "steps=1",
    "wandb.mode=disabled",
    "data.eval_size=4",
    "trainer.per_device_train_batch_size=16",
    "trainer.warmup_steps=0",
    "trainer.gradient_accumulation_steps=1",
    "trainer.num_generations=4",
    "trainer.max_completion_length=12",
    "trainer.learning_rate=1e-3",
    "trainer.save_strategy=no",
    "sampler.max_model_len=256",
    "sampler.kv_cache_gib=0.05",
    "sampler.enforce_eager=true",
)


def chatty_model(directory: str) -> str:
    """A small model with a chat template that often puts 6 in a box, whatever it is asked."""
    torch.manual_seed(0)
    (model, _), tokenizer = build_model(), chat_tokenizer()

    def example(generator: random.Random) -> tuple[str, str]:
        messages = [{"role": "system", "content": _math.SYSTEM}, {"role": "user", "content": f"{generator.random()}?"}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return text, r"\boxed{6}"

    supervised(model, tokenizer, example, stop_at=0.2, max_steps=100, batch_size=8, learning_rate=3e-3, seed=0)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


if __name__ == "__main__":
    os.chdir(sys.argv[1])
    model = chatty_model("model")
    runs: dict[str, list[str]] = {recipe: ["data.train_size=32"] for recipe in ("countdown", "countdown_ppo")}
    for recipe, ending in (("gsm8k", "jsonl"), ("math", "jsonl"), ("dapo_math", "parquet")):
        six = {"gsm8k": {"answer": "It is so.\n#### 6"}, "math": {"answer": r"\frac{12}{2}"}, "dapo_math": {"solution": "6.0"}}
        runs[recipe] = ["data.path=" + write([row | six[recipe] for row in ROWS[recipe](36)], f"{recipe}.{ending}")]
    for recipe, data in runs.items():
        if code := main(["train", f"recipe={recipe}", f"run={recipe}", f"model={model}", *data, *SMALL], script="train.py"):
            sys.exit(code)
