"""A tokenizer whose template knows tools, and a trainer whose tiny random model calls one every few turns."""

import json
import random
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlinvariant.models.random import save_random
from rlinvariant.recipes._tiny import build_tokenizer
from tests.parity.harness import Run, new_trainer

TEMPLATE = (
    "{%- for m in messages -%}"
    "{%- if m.role == 'user' -%}U:{{ m.content }};"
    "{%- elif m.role == 'assistant' -%}A:{{ m.content }}"
    "{%- for call in m.tool_calls or [] -%}{{ call.function.name }} {{ call.function.arguments | tojson }}{%- endfor -%}<eos>"
    "{%- else -%}T:{{ m.content }};{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}A:{%- endif -%}"
)
ENDS = "<eos>" + "abcdefghijklmnopqrst"  # tokens that end a turn: the random model draws one every few tokens
PARSED = {
    "defaults": {"role": "assistant"},
    "start_anchor": "A:",
    "fields": {
        "tool_calls": {
            "open_pattern": "[0-9A-Z]",  # so many characters that most turns call the tool
            "repeats": True,
            "content": "text",
            "transform": {"type": "function", "function": {"name": "reversed_text", "arguments": {"text": "{content}"}}},
        },
        "content": {"close_pattern": "<eos>", "content": "text"},
    },
}


def reversed_text(text: str) -> str:
    """Turn a text round.

    Args:
        text: what to turn round.

    Returns:
        The text, from its end to its beginning.
    """
    return text[::-1] * 2


class Echo:
    """Turns texts round, up to three times an episode; says the seed at the start."""

    seeds: list[int] = []

    def reset(self, seed: int, **_: object) -> str:
        Echo.seeds.append(seed)
        self.left = 3
        return f" {seed % 1000}"

    def reversed_text(self, text: str) -> str:
        """Turn a text round.

        Args:
            text: what to turn round
        """
        if not self.left:
            raise ValueError("over")
        self.left -= 1
        return text[::-1]

    def get_reward(self) -> float:
        return float(self.left)


def questions(count: int = 16) -> Dataset:
    """Prompts of one message, of several lengths."""
    rng = random.Random(3)
    return Dataset.from_list(
        [{"prompt": [{"role": "user", "content": str(rng.randrange(10 ** rng.randint(1, 4)))}]} for _ in range(count)]
    )


def talkative(completions: list[Any], **_: Any) -> list[float]:
    """Reward what differs between the samples of a group: how many messages there are, and how long they are."""
    return [len(said) + sum(len(m["content"]) for m in said) / 50 for said in completions]


def tool_tokenizer(path: str) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template, tokenizer.response_template = TEMPLATE, PARSED
    return tokenizer


def end_tokens(tokenizer: Any) -> list[int]:
    return [tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(list(ENDS[5:]))]


def tool_trainer(path: str, engine: Any, output_dir: Path | str, **changes: Any) -> Run:
    """A trainer with the tool; settings as for `new_trainer`."""
    tokenizer = tool_tokenizer(path)
    model: Any = AutoModelForCausalLM.from_pretrained(path)
    model.generation_config.eos_token_id = end_tokens(tokenizer)
    settings = {"tools": [reversed_text], "max_completion_length": 80, "reward_funcs": talkative, "train_dataset": questions()}
    return new_trainer(path, engine, output_dir, model=model, processing_class=tokenizer, **(settings | changes))


def tool_run(directory: Path, config: Any) -> list[str]:
    """Save a random model of a configuration and rows, and return the settings of a run in which it calls the tool.

    Args:
        directory: of the run; the settings name what lies there.
        config: transformers' configuration of the model.
    """
    tokenizer = build_tokenizer()
    tokenizer.chat_template, tokenizer.response_template = TEMPLATE, PARSED
    config.eos_token_id = end_tokens(tokenizer)
    tokenizer.save_pretrained(save_random(config, directory / "model"))
    (directory / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in questions()))
    own = [f"{key}={__file__}:{name}" for key, name in (("reward", "talkative"), ("tools", "reversed_text"))]
    data = ["model=model", "data.path=rows.jsonl", "data.eval_size=2", "wandb.mode=disabled"]
    sizes = ["trainer.num_generations=4", "trainer.max_completion_length=60", "trainer.router_aux_loss_coef=0"]
    return [*own, *data, *sizes, "trainer.learning_rate=1e-3"]
