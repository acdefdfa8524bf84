"""Any task of reasoning-gym: `rlinvariant train recipe=reasoning_gym data.task=leg_counting`.

Problems are drawn, not downloaded. A prompt is one of reasoning-gym's system lines, which ask for `<answer>` tags, and the
question; the reward is the task's own score, 0 to 1, of what stands in the last pair of tags. Tasks are sympy and the like
that read what a model writes, so they score in a process of its own, and what they fail on counts 0.
(https://github.com/open-thought/reasoning-gym; Stojanovski et al. 2025, arXiv:2505.24760)
"""

import functools
import importlib.util
import pickle
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

import chz

from rlinvariant.config import Config
from rlinvariant.config import Data as BaseData
from rlinvariant.errors import UserError
from rlinvariant.install import install_hint
from rlinvariant.launch import rank
from rlinvariant.recipes._gym import Problem, Tasks, draw, read_tasks
from rlinvariant.text import say, shown

if TYPE_CHECKING:
    from datasets import Dataset

DEFAULTS = {
    "model": "smollm2-135m-instruct",
    "dtype": "float32",
    "reward_cage": 1,
    "reward_timeout": 60.0,
    "reward_errors": "zero",
    "trainer.learning_rate": 3e-6,
    "trainer.lr_scheduler_type": "constant_with_warmup",
    "trainer.warmup_steps": 5,
    "trainer.num_generations": 8,
    "trainer.per_device_train_batch_size": 8,
    "trainer.gradient_accumulation_steps": 4,  # 4 prompts x 8 samples
    "trainer.max_completion_length": 128,
    "trainer.loss_type": "dapo",
    "sampler.max_model_len": 2048,
    "sampler.kv_cache_gib": 1.0,
}
HELD_OUT_SEED = 2**30  # added to data.seed: reasoning-gym seeds problem i by seed + i, so that a near seed gives the same ones
DRAWS_PER_ROW = 4  # problems drawn, at most, for each that is wanted


@chz.chz
class Data(BaseData):
    task: str = chz.field(default="chain_sum", doc="A task of reasoning-gym, or several with weights: chain_sum:2,lcm:1.")
    config: dict[str, Any] = chz.field(
        default_factory=dict, doc="Fields of the task's own config, as {'max_terms': 3}; of several tasks, a dict for each."
    )
    level: int | None = chz.field(default=None, doc="Level of the tasks' own curricula, 0: the easiest; None: their defaults.")
    system: str = chz.field(default="direct", doc="Name of a system line of reasoning-gym, or a text that asks for <answer>.")
    train_size: int = chz.field(default=1024, doc="Training problems.")
    eval_size: int = chz.field(default=64, doc="Held-out problems, drawn by another seed; their questions are not trained on.")
    seed: int = chz.field(default=0, doc="Seed of the problems.")


def check(config: Config) -> list[str]:
    """List what is wrong with `data.*`, one line each."""
    data, found = config.data, []
    for key, (least, most) in {"train_size": (1, 10**6), "eval_size": (1, 10**5), "seed": (0, HELD_OUT_SEED // 2)}.items():
        if not least <= (value := getattr(data, key)) <= most:
            found.append(f"data.{key}={value}: expected {least} to {most}")
    if importlib.util.find_spec("reasoning_gym") is None:
        return [*found, f"recipe={config.recipe}: needs reasoning-gym; {install_hint('gym')}"]
    from reasoning_gym.utils import SYSTEM_PROMPTS

    if data.system not in SYSTEM_PROMPTS and "<answer>" not in data.system:
        names = ", ".join(SYSTEM_PROMPTS)
        found.append(f"data.system={shown(data.system)}: expected a text that asks for <answer> tags, or one of {names}")
    return found + read_tasks(data.task, data.config, data.level)[1]


def datasets(config: Config, tokenizer: Any) -> "tuple[Dataset, Dataset]":
    """Draw training and held-out rows: `prompt` (chat messages), `task`, `answer`, and `entry` for the score."""
    from datasets import Dataset

    data, tasks = config.data, _tasks(config)
    fits = _fits(config, tokenizer)
    held_out, _ = _take(tasks, "eval_size", data.eval_size, data.seed + HELD_OUT_SEED, fits, unique=True)
    questions = {problem.question for problem in held_out}
    train, left_out = _take(tasks, "train_size", data.train_size, data.seed, fits, questions)
    if left_out and rank() == 0:
        say(f"data.task={data.task}: {left_out}")
    rows = [_row(config, problem) for problem in train], [_row(config, problem) for problem in held_out]
    return Dataset.from_list(rows[0]), Dataset.from_list(rows[1])


def _take(
    tasks: Tasks,
    key: str,
    count: int,
    seed: int,
    fits: Callable[[str], bool],
    without: Collection[str] = (),
    unique: bool = False,
) -> tuple[list[Problem], str]:
    """Draw `count` problems that fit and whose question is not among `without`, and say how many were left out for what."""
    taken, seen, long, held = list[Problem](), set[str](), 0, 0
    draws = draw(tasks, DRAWS_PER_ROW * count, seed)
    while len(taken) < count and (problem := next(draws, None)) is not None:
        if problem.question in without or (unique and problem.question in seen):
            held += 1
        elif not fits(problem.question):
            long += 1
        else:
            taken.append(problem)
            seen.add(problem.question)
    draws.close()
    why = "drawn before" if unique else "held out"
    said = f"of {len(taken) + long + held:,} problems drawn, {held:,} left out as their question is {why}, {long:,} as too long"
    if len(taken) < count:
        fix = "lower it, raise sampler.max_model_len" if long > held else "lower it"
        raise UserError(f"data.{key}={count}: expected at most {len(taken)}: {said}; {fix}, or make the task harder")
    return taken, said if long or held else ""


def _row(config: Config, problem: Problem) -> dict[str, Any]:
    row = {"prompt": _prompt(config, problem.question), "task": problem.task, "answer": problem.answer}
    return row | {"entry": problem.entry}


def _prompt(config: Config, question: str) -> list[dict[str, str]]:
    from reasoning_gym.utils import SYSTEM_PROMPTS

    system = str(SYSTEM_PROMPTS.get(config.data.system, config.data.system))
    return [{"role": "system", "content": system}, {"role": "user", "content": question}]


def _fits(config: Config, tokenizer: Any) -> Callable[[str], bool]:
    """Return a function that tells whether a question leaves room for a completion, by `sampler.max_model_len`.

    Raises:
        UserError: from the function: the tokenizer's chat template is missing or fails.
    """
    from rlinvariant.trainer.preflight.prompts import Prompts, Unreadable

    longest, completion = config.sampler.max_model_len, config.trainer.max_completion_length or 0
    kwargs: Any = config.trainer.chat_template_kwargs
    prompts = Prompts(tokenizer, template_kwargs=kwargs or {})

    def fits(question: str) -> bool:
        try:
            text = prompts.read(_prompt(config, question))[1]
        except Unreadable as error:
            raise UserError(f"model={config.model}: {error}") from error
        return longest is None or len(prompts.tokenize([text], True)[0]) + completion <= longest

    return fits


def reward_funcs(config: Config) -> list[Callable[..., list[float]]]:
    return [functools.partial(gym_score, _tasks(config))]


def gym_score(tasks: Tasks, completions: Sequence[Any], entry: Sequence[bytes], **_: object) -> list[float]:
    """Give the task's own score of what stands in the last `<answer>` tags of a completion; most tasks give 0 without them."""
    from reasoning_gym.utils import extract_answer

    texts = [completion[-1]["content"] for completion in completions]
    return [tasks.score(extract_answer(text), pickle.loads(kept)) for text, kept in zip(texts, entry, strict=True)]


def _tasks(config: Config) -> Tasks:
    return read_tasks(config.data.task, config.data.config, config.data.level)[0]
