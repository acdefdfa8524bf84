"""Grade-school word problems, openai/gsm8k: `rlinvariant train recipe=gsm8k model=Qwen/Qwen3-0.6B` on a GPU.

Configuration `main`, 7,473 rows in train, 1,319 in test: `question`, and `answer`, worked out in words, its last line
`#### 18` (https://huggingface.co/datasets/openai/gsm8k; Cobbe et al. 2021, arXiv:2110.14168).
"""

from typing import Any

from rlinvariant.config import Config
from rlinvariant.recipes import _math
from rlinvariant.recipes._math import Data
from rlinvariant.rewards import math_answer

__all__ = ["DEFAULTS", "Data", "check", "datasets", "reward_funcs"]
DEFAULTS = _math.DEFAULTS | {"trainer.max_completion_length": 512, "sampler.max_model_len": 1024}
SOURCE = _math.Source(
    hub="openai/gsm8k",
    subset="main",
    test="test",
    columns=("question", "answer"),
    question=lambda row: row["question"],
    answer=lambda row: (row["answer"] or "").partition("####")[2],
)
check, datasets = SOURCE.check, SOURCE.datasets


def reward_funcs(config: Config) -> list[Any]:
    return [math_answer]
