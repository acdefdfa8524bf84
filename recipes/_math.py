"""Parts of the recipes on mathematical problems: rows of the hub or of a file, chat messages, a held-out split."""

import importlib.util
import os
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import chz

from rlinvariant.config import Config
from rlinvariant.config import Data as BaseData
from rlinvariant.errors import UserError
from rlinvariant.install import install_hint
from rlinvariant.recipes import _rows
from rlinvariant.text import shown

if TYPE_CHECKING:
    from datasets import Dataset

SYSTEM = r"Reason step by step, and put the final answer, alone, in \boxed{}."
FILES = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
DEFAULTS = {
    "steps": 200,
    "trainer.learning_rate": 1e-6,
    "trainer.lr_scheduler_type": "constant_with_warmup",
    "trainer.warmup_steps": 10,
    "trainer.num_generations": 8,
    "trainer.per_device_train_batch_size": 8,
    "trainer.gradient_accumulation_steps": 16,  # 16 prompts x 8 samples
    "trainer.loss_type": "dapo",
    "sampler.max_num_seqs": 128,
}


@chz.chz
class Data(BaseData):
    path: str | None = chz.field(default=None, doc="JSON lines or parquet with the hub's columns, in place of the hub.")
    eval_size: int = chz.field(default=256, doc="Held-out prompts: from the test split if there is one, else from the rows.")
    seed: int = chz.field(default=0, doc="Seed of the choice of held-out prompts.")


@dataclass(frozen=True)
class Source:
    """Describes a dataset on the hub.

    Args:
        hub: the dataset's id.
        subset: name of its configuration.
        test: name of the split to hold out; None: there is one split.
        columns: names that a row must have; `a|b`: one of the two.
        question: row -> the question; empty or None if the row has none.
        answer: row -> the right answer; empty or None if the row has none.
    """

    hub: str
    subset: str | None
    test: str | None
    columns: tuple[str, ...]
    question: Callable[[Mapping[str, Any]], Any]
    answer: Callable[[Mapping[str, Any]], Any]

    def check(self, config: Config) -> list[str]:
        """List what is wrong with a configuration before anything is loaded, one line each."""
        data, errors = config.data, []
        if not 1 <= data.eval_size <= 10**5:
            errors.append(f"data.eval_size={data.eval_size}: expected 1 to 100000")
        if not 0 <= data.seed < 2**32:
            errors.append(f"data.seed={data.seed}: expected 0 to 4294967295")
        if data.path is not None and not (os.path.isfile(data.path) and Path(data.path).suffix in FILES):
            errors.append(f"data.path={shown(data.path)}: expected a file, .jsonl or .parquet, with the columns of {self.hub}")
        if importlib.util.find_spec("math_verify") is None:
            errors.append(f"recipe={config.recipe}: needs math-verify to grade; {install_hint('math')}")
        return errors

    def datasets(self, config: Config, tokenizer: Any) -> "tuple[Dataset, Dataset]":
        """Return training and held-out rows, `prompt` (chat messages) and `answer`; no question is in both, or twice in one."""
        from datasets import Dataset

        if not tokenizer.chat_template:
            model = f"model={config.model}: its tokenizer has no chat template"
            raise UserError(f"{model}; choose an instruction-tuned model, or save the tokenizer with a chat_template")
        held_out: dict[str, str] = {}
        if config.data.path is None and self.test is not None:
            held_out = self._problems(config, self.test)
        problems = {q: a for q, a in self._problems(config, "train").items() if q not in held_out}
        pool = held_out or problems
        # at least one prompt is left to train on
        if (size := config.data.eval_size) > (most := len(pool) - (pool is problems)):
            raise UserError(f"data.eval_size={size}: expected at most {most}, of {len(pool)} different problems; lower it")
        chosen = set(random.Random(f"eval {config.data.seed}").sample(sorted(pool), size))
        evaluation = [_row(q, a) for q, a in pool.items() if q in chosen]
        train = [_row(q, a) for q, a in problems.items() if q not in chosen]
        return Dataset.from_list(train), Dataset.from_list(evaluation)

    def _problems(self, config: Config, split: str) -> dict[str, str]:
        """Map each question of a split to its answer, the first if there are several."""
        rows, where = self._load(config, split)
        for column in self.columns:
            if not set(column.split("|")) & set(rows.column_names):
                names, found = column.replace("|", "` or `"), ", ".join(rows.column_names)
                raise UserError(f"{where}: no `{names}`; columns found: {found}; expected those of {self.hub}")
        problems: dict[str, str] = {}
        for index, row in enumerate(rows):
            question, answer = (str(text or "").strip() for text in (self.question(row), self.answer(row)))
            if not question or not answer:
                missing = "question" if not question else "answer"
                raise UserError(f"{where}, row {index}: empty {missing}; expected rows as in {self.hub}")
            problems.setdefault(question, answer)
        return problems

    def _load(self, config: Config, split: str) -> tuple[Any, str]:
        """Return the rows of a split, and what to call them in an error."""
        if (path := config.data.path) is not None:
            return _rows.read(FILES[Path(path).suffix], path), f"data.path={path}"
        rows = _rows.of_hub(self.hub, self.subset, split, "give data.path=FILE with its rows")
        return rows, f"{self.hub}, {split}"


def _row(question: str, answer: str) -> dict[str, Any]:
    return {"prompt": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}], "answer": answer}
