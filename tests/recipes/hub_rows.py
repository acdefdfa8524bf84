"""A few rows of the schema that each dataset has on the hub, written for these tests, and a small model that can chat."""

import json
from pathlib import Path
from typing import Any

FRAME = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: $Answer "
    "(without quotes) where $Answer is the answer to the problem.\n\n{}\n\n"
    'Remember to put your answer on its own line after "Answer:".'
)
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def gsm8k(count: int) -> list[dict[str, Any]]:
    return [
        {
            "question": f"Ann has {n} pens and buys 2 boxes of {n}. How many pens has she?",
            "answer": f"The boxes hold 2*{n}=<<2*{n}={2 * n}>>{2 * n} pens.\n"
            f"She has {n}+{2 * n}=<<{n}+{2 * n}={3 * n}>>{3 * n}.\n#### {3 * n:,}",
        }
        for n in range(1, count + 1)
    ]


def math(count: int) -> list[dict[str, Any]]:
    return [
        {
            "problem": rf"What is half of $\frac{{1}}{{{n}}}$?",
            "solution": rf"It is $\frac{{1}}{{2}} \cdot \frac{{1}}{{{n}}} = \boxed{{\frac{{1}}{{{2 * n}}}}}$.",
            "answer": rf"\frac{{1}}{{{2 * n}}}",
            "subject": "Prealgebra",
            "level": 1,
            "unique_id": f"train/prealgebra/{n}.json",
        }
        for n in range(1, count + 1)
    ]


def dapo_math(count: int) -> list[dict[str, Any]]:
    return [
        {
            "prompt": f"How many divisors has $2^{{{n}}}$?",
            "solution": str(n + 1),
            "data_source": "math_dapo",
            "source_prompt": [{"content": FRAME.format(f"How many divisors has $2^{{{n}}}$?"), "role": "user"}],
            "ability": "MATH",
            "reward_model": {"ground_truth": str(n + 1), "style": "rule-lighteval/MATH_v2"},
            "extra_info": {"index": f"{n:08x}"},
        }
        for n in range(1, count + 1)
    ]


def original_dapo_math(count: int) -> list[dict[str, Any]]:
    """Return the rows as BytedTsinghua-SIA/DAPO-Math-17k has them, each many times."""
    rows = [
        {"prompt": row["source_prompt"], **{k: row[k] for k in ("data_source", "ability", "reward_model", "extra_info")}}
        for row in dapo_math(count)
    ]
    return rows * 3


ROWS = {"gsm8k": gsm8k, "math": math, "dapo_math": dapo_math}


def write(rows: list[dict[str, Any]], path: Path | str) -> str:
    """Write the rows as JSON lines or parquet, by the ending of `path`, and return the path."""
    if str(path).endswith(".parquet"):
        from datasets import Dataset

        Dataset.from_list(rows).to_parquet(str(path))
    else:
        Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def chat_tokenizer() -> Any:
    from rlinvariant.recipes._tiny import build_tokenizer

    tokenizer = build_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer
