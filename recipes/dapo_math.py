"""Competition problems with whole-number answers, DAPO-Math-17k: `recipe=dapo_math model=Qwen/Qwen3-4B` on a GPU.

open-r1/DAPO-Math-17k-Processed, configuration `en`, 14,116 rows, one split: `prompt`, `solution` (the answer alone), and the
columns of the original (https://huggingface.co/datasets/open-r1/DAPO-Math-17k-Processed; Yu et al. 2025, arXiv:2503.14476).
data.path= takes rows of the original too, BytedTsinghua-SIA/DAPO-Math-17k: `prompt` as messages, the answer in
`reward_model.ground_truth`; its frame around the problem, which asks for a line `Answer: ...`, is taken off.
"""

import re
from collections.abc import Mapping
from typing import Any

from rlinvariant.config import Config
from rlinvariant.recipes import _math
from rlinvariant.recipes._math import Data
from rlinvariant.rewards import math_answer

__all__ = ["DEFAULTS", "Data", "check", "datasets", "reward_funcs"]
DEFAULTS = _math.DEFAULTS | {"trainer.max_completion_length": 4096, "sampler.max_model_len": 6144}


def question(row: Mapping[str, Any]) -> str:
    text = row["prompt"] or ""
    if not isinstance(text, str):
        text = text[-1]["content"]
    text = re.sub(r"\ASolve the following math problem step by step\. The last line of your response.*\n+", "", text)
    return re.sub(r'\n+Remember to put your answer on its own line after "Answer:"\.\s*\Z', "", text)


def answer(row: Mapping[str, Any]) -> str | None:
    return row.get("solution") or (row.get("reward_model") or {}).get("ground_truth")


SOURCE = _math.Source(
    hub="open-r1/DAPO-Math-17k-Processed",
    subset="en",
    test=None,
    columns=("prompt", "solution|reward_model"),
    question=question,
    answer=answer,
)
check, datasets = SOURCE.check, SOURCE.datasets


def reward_funcs(config: Config) -> list[Any]:
    return [math_answer]
