"""Competition problems, MATH: `rlinvariant train recipe=math model=Qwen/Qwen3-1.7B` on a GPU.

nlile/hendrycks-MATH-benchmark, 12,000 rows in train and the 500 of MATH-500 in test: `problem`, `solution` with the answer in
its last \\boxed{}, `answer`, `subject`, `level`, `unique_id`
(https://huggingface.co/datasets/nlile/hendrycks-MATH-benchmark; Hendrycks et al. 2021, arXiv:2103.03874; the split of Lightman
et al. 2023, arXiv:2305.20050). Rows without `answer`, as in EleutherAI/hendrycks_math, will do for data.path=.
"""

from typing import Any

from rlinvariant.config import Config
from rlinvariant.recipes import _math
from rlinvariant.recipes._math import Data
from rlinvariant.rewards import final_answer, math_answer

__all__ = ["DEFAULTS", "Data", "check", "datasets", "reward_funcs"]
DEFAULTS = _math.DEFAULTS | {"trainer.max_completion_length": 2048, "sampler.max_model_len": 4096}
SOURCE = _math.Source(
    hub="nlile/hendrycks-MATH-benchmark",
    subset=None,
    test="test",
    columns=("problem", "answer|solution"),
    question=lambda row: row["problem"],
    answer=lambda row: row.get("answer") or final_answer(row.get("solution") or ""),
)
check, datasets = SOURCE.check, SOURCE.datasets


def reward_funcs(config: Config) -> list[Any]:
    return [math_answer]
