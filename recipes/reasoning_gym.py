"""Any task of reasoning-gym: `rlinvariant train recipe=reasoning_gym data.task=leg_counting`.

Problems are drawn, not downloaded. A prompt is one of reasoning-gym's system lines, which ask for `<answer>` tags, problems of
the same task with their answers in such tags, and the question: without these examples a small model never writes the tags. The
reward is the task's own score, 0 to 1, of what stands in the last pair of tags. Tasks are sympy and the like that read what a
model writes, so they score in a process of its own, and what they fail on counts 0.
(https://github.com/open-thought/reasoning-gym; Stojanovski et al. 2025, arXiv:2505.24760)
"""

import functools
import importlib.util
import pickle
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import chz

from rlinvariant.config import Config
from rlinvariant.config import Data as BaseData
from rlinvariant.errors import UserError
from rlinvariant.install import install_hint
from rlinvariant.launch import rank
from rlinvariant.recipes._gym import Drawer, Problem, Tasks, read_tasks
from rlinvariant.text import say, shown

if TYPE_CHECKING:
    from datasets import Dataset

DEFAULTS = {
    "model": "smollm2-135m-instruct",
    "reward_cage": 1,
    "reward_timeout": 60.0,
    "reward_errors": "zero",
    "trainer.learning_rate": 1e-5,
    "trainer.adam_beta2": 0.99,  # a run of 100 steps is short for 0.999
    "trainer.lr_scheduler_type": "constant_with_warmup",
    "trainer.warmup_steps": 5,
    "trainer.num_generations": 8,
    "trainer.per_device_train_batch_size": 8,
    "trainer.gradient_accumulation_steps": 4,  # 4 prompts x 8 samples
    "trainer.max_completion_length": 32,  # the tags and a short answer
    "trainer.loss_type": "dapo",
    "sampler.max_model_len": 2048,
    "sampler.kv_cache_gib": 0.5,
}
# Added to data.seed: reasoning-gym seeds problem i by seed + i, so that a near seed gives the same ones
HELD_OUT_SEED = 2**30
EXAMPLE_SEED = 3 * 2**29
Beginnings = Mapping[str, list[dict[str, str]]]
"""Name of a task -> the messages before a question of it."""
DRAWS_PER_ROW = 4  # problems drawn, at most, for each that is wanted
DRAWS_PER_EXAMPLE = 16


@chz.chz
class Data(BaseData):
    task: str = chz.field(default="chain_sum", doc="A task of reasoning-gym, or several with weights: chain_sum:2,lcm:1.")
    config: dict[str, Any] = chz.field(
        default_factory=dict, doc="Fields of the task's own config, as {'max_terms': 3}; of several tasks, a dict for each."
    )
    level: int | None = chz.field(default=0, doc="Level of the tasks' own curricula, 0: the easiest; None: their defaults.")
    system: str = chz.field(default="direct", doc="Name of a system line of reasoning-gym, or a text that asks for <answer>.")
    examples: int = chz.field(default=3, doc="Problems of the same task that every prompt shows with their answers.")
    train_size: int = chz.field(default=1024, doc="Training problems.")
    eval_size: int = chz.field(default=16, doc="Held-out problems, drawn by another seed; their questions are not trained on.")
    seed: int = chz.field(default=0, doc="Seed of the problems.")


def check(config: Config) -> list[str]:
    """List what is wrong with `data.*`, one line each."""
    data, found = config.data, []
    ranges = {"examples": (0, 100), "train_size": (1, 10**6), "eval_size": (1, 10**5), "seed": (0, HELD_OUT_SEED // 2)}
    for key, (least, most) in ranges.items():
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
    with Drawer() as drawer:
        examples = _examples(drawer, tasks, data.examples, data.seed + EXAMPLE_SEED)
        beginnings = {task: _beginning(config, problems) for task, problems in examples.items()}
        take = functools.partial(_take, drawer, tasks, _fits(config, tokenizer, beginnings))
        questions = {problem.question for problems in examples.values() for problem in problems}
        held_out, _ = take("eval_size", data.eval_size, data.seed + HELD_OUT_SEED, questions, unique=True)
        questions |= {problem.question for problem in held_out}
        train, left_out = take("train_size", data.train_size, data.seed, questions)
    if rank() == 0:
        for line in filter(None, (left_out, _long_answers(config, tokenizer, train))):
            say(f"data.task={data.task}: {line}")
    rows = [[_row(beginnings, problem) for problem in part] for part in (train, held_out)]
    return Dataset.from_list(rows[0]), Dataset.from_list(rows[1])


def _examples(drawer: Drawer, tasks: Tasks, count: int, seed: int) -> dict[str, list[Problem]]:
    """Draw `count` problems of each task, whose questions differ, to be shown with their answers."""
    found: dict[str, list[Problem]] = {task: [] for task in tasks.weights}
    if not count:
        return found
    alike = Tasks(dict.fromkeys(tasks.weights, 1.0), tasks.configs)  # a task of a small weight would be long in coming
    size = DRAWS_PER_EXAMPLE * count * len(found)
    draws = drawer.draw(alike, size, seed)
    while min(map(len, found.values())) < count and (problem := next(draws, None)) is not None:
        of_task = found[problem.task]
        if problem.answer is None:
            raise UserError(f"data.examples={count}: {problem.task} gives no answers to show; write data.examples=0")
        if len(of_task) < count and problem.question not in {other.question for other in of_task}:
            of_task.append(problem)
    draws.close()
    for task, problems in found.items():
        if len(problems) < count:
            most = f"expected at most {len(problems)}, which {size:,} problems drawn gave of {task}"
            raise UserError(f"data.examples={count}: {most}; lower it, or make the task harder")
    return found


def _take(
    drawer: Drawer,
    tasks: Tasks,
    fits: Callable[[Problem], bool],
    key: str,
    count: int,
    seed: int,
    without: Collection[str] = (),
    unique: bool = False,
) -> tuple[list[Problem], str]:
    """Draw `count` problems that fit and whose question is not among `without`, and say how many were left out for what."""
    taken, seen, long, held = list[Problem](), set[str](), 0, 0
    draws = drawer.draw(tasks, DRAWS_PER_ROW * count, seed)
    while len(taken) < count and (problem := next(draws, None)) is not None:
        if problem.question in without or (unique and problem.question in seen):
            held += 1
        elif not fits(problem):
            long += 1
        else:
            taken.append(problem)
            seen.add(problem.question)
    draws.close()
    why = "drawn before" if unique else "an example or held out"
    said = f"of {len(taken) + long + held:,} problems drawn, {held:,} left out as their question is {why}, {long:,} as too long"
    if len(taken) < count:
        fix = "lower it or data.examples, raise sampler.max_model_len" if long > held else "lower it"
        raise UserError(f"data.{key}={count}: expected at most {len(taken)}: {said}; {fix}, or make the task harder")
    return taken, said if long or held else ""


def _tagged(problem: Problem) -> str:
    return f"<answer>{problem.answer}</answer>"


def _long_answers(config: Config, tokenizer: Any, problems: Sequence[Problem]) -> str:
    """Say how many right answers are longer than a completion may be; nothing where all fit."""
    most = config.trainer.max_completion_length
    texts = [_tagged(problem) for problem in problems if problem.answer is not None]
    if most is None or not texts:
        return ""
    lengths = [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    if not (long := sum(length > most for length in lengths)):
        return ""
    key = f"trainer.max_completion_length={most}"
    return f"{long:,} of {len(texts):,} right answers, up to {max(lengths):,} tokens long, do not fit in {key}; raise it"


def _beginning(config: Config, examples: Sequence[Problem]) -> list[dict[str, str]]:
    """Return the messages before a question: the system line, and the examples with their answers."""
    from reasoning_gym.utils import SYSTEM_PROMPTS

    messages = [{"role": "system", "content": str(SYSTEM_PROMPTS.get(config.data.system, config.data.system))}]
    for problem in examples:
        messages.append({"role": "user", "content": problem.question})
        messages.append({"role": "assistant", "content": _tagged(problem)})
    return messages


def _prompt(beginnings: Beginnings, problem: Problem) -> list[dict[str, str]]:
    return [*beginnings[problem.task], {"role": "user", "content": problem.question}]


def _row(beginnings: Beginnings, problem: Problem) -> dict[str, Any]:
    row = {"prompt": _prompt(beginnings, problem), "task": problem.task, "answer": problem.answer}
    return row | {"entry": problem.entry}


def _fits(config: Config, tokenizer: Any, beginnings: Beginnings) -> Callable[[Problem], bool]:
    """Return a function that tells whether a problem leaves room for a completion, by `sampler.max_model_len`.

    Raises:
        UserError: from the function: the tokenizer's chat template is missing or fails.
    """
    from rlinvariant.trainer.preflight.prompts import Prompts, Unreadable

    longest, completion = config.sampler.max_model_len, config.trainer.max_completion_length or 0
    kwargs: Any = config.trainer.chat_template_kwargs
    prompts = Prompts(tokenizer, template_kwargs=kwargs or {})

    def fits(problem: Problem) -> bool:
        try:
            text = prompts.read(_prompt(beginnings, problem))[1]
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
