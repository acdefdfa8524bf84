"""Parts of the procedural recipes: a character tokenizer, a tiny Qwen3, problems drawn without a leak, a warm start.

A recipe says what a problem is (`Task`), how an answer is graded, and its defaults; two CPU cores do the rest in minutes.
"""

import inspect
import json
import os
import random
import re
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import chz

from rlinvariant.config import Config
from rlinvariant.config import Data as BaseData
from rlinvariant.errors import UserError
from rlinvariant.recipes import _rows
from rlinvariant.text import say, shown
from rlinvariant.warmstart import warm_start

if TYPE_CHECKING:
    from datasets import Dataset

DEFAULTS = {
    "steps": 120,
    "trainer.learning_rate": 6e-4,
    "trainer.adam_beta2": 0.99,  # a run of 120 steps is short for 0.999
    "trainer.warmup_steps": 10,
    "trainer.num_generations": 8,
    "trainer.per_device_train_batch_size": 128,  # 16 prompts x 8 samples
    "trainer.max_completion_length": 48,
    "trainer.loss_type": "dapo",
    "trainer.gradient_checkpointing": False,  # the model is small
    "sampler.max_model_len": 128,
    "sampler.max_num_seqs": 128,
    "sampler.kv_cache_gib": 0.5,
}


@chz.chz
class Data(BaseData):
    train_size: int = chz.field(default=8192, doc="Training prompts.")
    eval_size: int = chz.field(default=256, doc="Held-out prompts; their problems are not trained on.")
    seed: int = chz.field(default=0, doc="Seed of the problems and of the supervised stage.")
    path: str | None = chz.field(default=None, doc="JSON lines, one problem each, in place of drawn training problems.")


@dataclass(frozen=True)
class Task:
    """Describes a kind of problem. A problem is whatever `draw` returns, hashable and sortable.

    Args:
        name: name of the warm start's directory.
        ranges: key of `Data` that `draw` or `solution` depends on -> (least, most).
        patterns: key of `Data` that they depend on -> (regular expression, the same in words).
        problems: () -> about how many different problems there are; called when `ranges` and `patterns` are kept.
        draw: generator -> one problem.
        row: problem -> its row of the dataset: `prompt`, and what the reward needs.
        read: row of `data.path` -> its problem, or None if its prompt has another form; ValueError: no row of the task.
        solution: problem -> the completion that the supervised stage teaches.
        same: problem -> one representative of all problems that give each other's answer away.
        columns: names that `row` gives; a file of `data.path` must have them.
        stop_at: share of right samples at which the supervised stage stops, as in `warmstart.supervised`.
        max_steps: most steps of that stage.
        build: makes the untrained model and its tokenizer; None: `build_model`.
    """

    name: str
    ranges: Mapping[str, tuple[int, int]]
    problems: Callable[[], float]
    draw: Callable[[random.Random], Any]
    row: Callable[[Any], dict[str, Any]]
    solution: Callable[[Any], str]
    read: Callable[[Mapping[str, Any]], Any]
    patterns: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    same: Callable[[Any], Any] = lambda problem: problem
    columns: tuple[str, ...] = ("prompt", "answer")
    stop_at: float = 0.3
    max_steps: int = 800
    build: Callable[[], tuple[Any, Any]] | None = None

    def check(self, config: Config) -> list[str]:
        """List what is wrong with `data.*`, one line each. Reads the first line of `data.path`."""
        data, errors = config.data, []
        sizes = {"train_size": (1, 10**7), "eval_size": (1, 10**5), "seed": (0, 2**32 - 1)}
        for key, (least, most) in {**self.ranges, **sizes}.items():
            if not least <= (value := getattr(data, key)) <= most:
                errors.append(f"data.{key}={value}: expected {least} to {most}")
        for key, (pattern, expected) in self.patterns.items():
            if not re.fullmatch(pattern, value := getattr(data, key)):
                errors.append(f"data.{key}={value}: expected {expected}")
        if not errors and data.eval_size > (most := int(0.1 * self.problems())):
            keys = " ".join(f"data.{key}={getattr(data, key)}" for key in (*self.ranges, *self.patterns))
            if most:
                expected = f"data.eval_size={data.eval_size}: expected at most {most}, a tenth of the problems with {keys}"
                errors.append(f"{expected}; lower it or change those")
            else:
                errors.append(f"{keys}: next to no problem to draw; change one of them")
        if data.path is not None:
            try:
                if not self._complete(_rows.first_line(data.path)):
                    errors.append(f"data.path={shown(data.path)}, line 1: expected a JSON object with {self._columns}")
            except UserError as error:
                errors.append(f"{error}; give a JSON lines file with {self._columns}")
        return errors

    def datasets(self, config: Config) -> "tuple[Dataset, Dataset]":
        """Return training and held-out problems, the same for the same `data.*`; no problem is in both."""
        from datasets import Dataset

        held_out = self.held_out(config)
        evaluation = Dataset.from_list([self.row(problem) for problem in sorted(held_out)])
        if config.data.path is not None:
            return self._of_file(config.data.path, held_out), evaluation
        generator = random.Random(f"train {config.data.seed}")
        train = [self.row(self._training_problem(generator, held_out)) for _ in range(config.data.train_size)]
        return Dataset.from_list(train), evaluation

    def held_out(self, config: Config) -> set[Any]:
        """Draw `eval_size` problems, each the representative of those that share its answer."""
        generator, problems = random.Random(f"eval {config.data.seed}"), set()
        while len(problems) < config.data.eval_size:
            problems.add(self.same(self.draw(generator)))
        return problems

    def prepare_model(self, config: Config) -> str:
        """Return the directory of a tiny model that gets about `stop_at` of its samples right."""
        held_out = self.held_out(config)

        def example(generator: random.Random) -> tuple[str, str]:
            problem = self._training_problem(generator, held_out)
            return self.row(problem)["prompt"], self.solution(problem)

        key = {name: getattr(config.data, name) for name in (*self.ranges, *self.patterns, "eval_size")}
        return warm_start(
            self.name,
            self.build or build_model,
            example,
            key=key | {"task": Path(inspect.getfile(self.solution)).read_text()},
            stop_at=self.stop_at,
            max_steps=self.max_steps,
            batch_size=32,
            learning_rate=3e-3,
            seed=config.data.seed,
        )

    def _of_file(self, path: str, held_out: set[Any]) -> "Dataset":
        """Return the rows of a file, less those whose problem is held out."""
        rows = _rows.read("json", path)
        for column in self.columns:
            if column not in rows.column_names:
                raise UserError(f"data.path={path}: no `{column}`; columns found: {', '.join(rows.column_names)}")
        kept = []
        row: Any
        for index, row in enumerate(rows):
            try:
                problem = self.read(row)
            except ValueError as error:
                raise UserError(f"data.path={path}, row {index}: {error}") from error
            if problem is None or self.same(problem) not in held_out:
                kept.append(index)
        dropped = f"data.path={path}: {len(rows) - len(kept)} of {len(rows)} rows dropped, their problems are held out"
        if not kept:
            raise UserError(f"{dropped}; none is left to train on; change data.seed, lower data.eval_size or give other rows")
        if len(kept) < len(rows) and os.environ.get("RANK", "0") == "0":
            say(dropped)
        return rows.select(kept)

    def _training_problem(self, generator: random.Random, held_out: set[Any]) -> Any:
        while self.same(problem := self.draw(generator)) in held_out:
            pass
        return problem

    @property
    def _columns(self) -> str:
        *most, last = (f"`{column}`" for column in self.columns)
        return f"{', '.join(most)} and {last}"

    def _complete(self, line: str) -> bool:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # no JSON; a number too long to read; brackets too deep
            return False
        return isinstance(row, dict) and row.keys() >= set(self.columns)


def functions(task: Callable[[Config], Task]) -> tuple[Callable[..., Any], ...]:
    """Return a recipe's `check`, `datasets`, `prepare_model` and `untrained`, given its task for a configuration."""

    def check(config: Config) -> list[str]:
        return task(config).check(config)

    def datasets(config: Config, tokenizer: Any) -> "tuple[Dataset, Dataset]":
        return task(config).datasets(config)

    def prepare_model(config: Config) -> str:
        return task(config).prepare_model(config)

    def untrained(config: Config) -> tuple[Any, Any]:
        return (task(config).build or build_model)()

    return check, datasets, prepare_model, untrained


def read_prompt(row: Mapping[str, Any], pattern: str) -> Any:
    """Match `pattern` against a row's whole prompt without its spaces. Returns the groups, or None if it does not match."""
    if not isinstance(row["prompt"], str) or not row["prompt"]:
        raise ValueError(f"expected text as `prompt`, found {row['prompt']!r}")
    found = re.fullmatch(pattern, "".join(row["prompt"].split()))
    return found and found.groups()


def build_tokenizer() -> Any:
    """Build a tokenizer with a token per printable ASCII character, `<pad>`, `<bos>` before every prompt, `<eos>`, `<unk>`."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<bos>", "<eos>", "<unk>"]
    characters = string.digits + string.ascii_letters + string.punctuation + " \n"
    vocabulary = {token: index for index, token in enumerate([*special, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )


def build_model() -> tuple[Any, Any]:
    """Build an untrained two-layer Qwen3, 128 wide, float32, and its tokenizer."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = build_tokenizer()
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return Qwen3ForCausalLM(config), tokenizer
