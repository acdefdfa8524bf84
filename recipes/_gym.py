"""Parts of the recipe reasoning_gym: tasks as the user names them, problems drawn, answers scored."""

import contextlib
import difflib
import functools
import math
import os
import pickle
import random
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Generator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from rlinvariant.arguments import suggestion
from rlinvariant.errors import UserError, one_line
from rlinvariant.text import printable, shown

OWN_FIELDS = ("seed", "size")  # of every task's config; the recipe sets them
CODE = "import sys; from rlinvariant.recipes._gym import fork_for_each; fork_for_each(int(sys.argv[1]))"
PROTOCOL = 5  # of pickle: the bytes of a row must not change with Python's version


@dataclass(frozen=True)
class Tasks:
    """Says what problems are drawn from.

    Args:
        weights: name of a task -> its share of the problems, not normalised.
        configs: name of a task -> fields of its own config.
    """

    weights: Mapping[str, float]
    configs: Mapping[str, Mapping[str, Any]]

    def dataset(self, size: int, seed: int) -> Any:
        """Return reasoning-gym's data set of `size` problems: that of the one task, or a composite of several."""
        from reasoning_gym import create_dataset
        from reasoning_gym.composite import DatasetSpec

        if len(self.weights) == 1:
            (name,) = self.weights
            return create_dataset(name, size=size, seed=seed, **self.configs[name])
        parts = [DatasetSpec(name, weight, dict(self.configs[name])) for name, weight in self.weights.items()]
        return create_dataset("composite", size=size, seed=seed, datasets=parts)

    def score(self, answer: str | None, entry: Mapping[str, Any]) -> float:
        """Score an answer, None where there is none, as the task that made the entry does."""
        return float(self._scorers[entry["metadata"]["source_dataset"]].score_answer(answer, entry))

    @functools.cached_property
    def _scorers(self) -> Mapping[str, Any]:
        """Map each task to a data set that scores: some scores use its config, which `get_score_answer_fn` does not take."""
        from reasoning_gym import create_dataset

        return {name: create_dataset(name, size=1, seed=0, **config) for name, config in self.configs.items()}


def task_names() -> list[str]:
    """Return the names of reasoning-gym's tasks."""
    from reasoning_gym.factory import DATASETS

    return sorted(name for name in DATASETS if name != "composite")


def read_tasks(task: str, config: Mapping[str, Any], level: int | None) -> tuple[Tasks, list[str]]:
    """Read the settings `data.task`, `data.config` and `data.level`, and try each task's config.

    Returns:
        The tasks, as far as they could be read, and a line for each thing that is wrong.
    """
    weights, problems = _weights(task)
    names = list(weights)
    if len(names) > 1 and (odd := [key for key in config if key not in weights]):
        fix = f"with several tasks a dict for each, as {{'{names[0]}': {{...}}}}"
        problems.append(f"data.config={shown(config)}: {shown(odd[0])} is none of the tasks; expected {fix}")
    if problems:
        return Tasks({}, {}), problems
    configs = {}
    for name in names:
        given = config if len(names) == 1 else config.get(name, {})
        configs[name], wrong = _config(name, given, level)
        problems += wrong
    return Tasks(weights, configs), problems


def _weights(task: str) -> tuple[dict[str, float], list[str]]:
    known, weights, problems = task_names(), dict[str, float](), list[str]()
    for part in task.split(","):
        name, colon, text = (piece.strip() for piece in part.partition(":"))
        if name not in known:
            close = difflib.get_close_matches(name, known, 3, 0.5) or difflib.get_close_matches(name, known, 3, 0.0)
            problems.append(f"data.task={shown(name)}: reasoning-gym has no such task; the nearest are {', '.join(close)}")
        elif name in weights:
            problems.append(f"data.task={shown(task)}: {name} is there twice; give it one weight")
        else:
            try:
                weights[name] = float(text) if colon else 1.0
            except ValueError:
                weights[name] = 0.0
            if not 0 < weights[name] < math.inf:
                problems.append(f"data.task={shown(part)}: expected a weight above 0, as in {name}:2")
    return weights, problems


def _config(name: str, given: Any, level: int | None) -> tuple[dict[str, Any], list[str]]:
    """Return the fields of a task's config that differ from its own defaults, and what is wrong with them."""
    from reasoning_gym.factory import CURRICULA, DATASETS

    where, known = f"data.config={shown(given)}", [field.name for field in fields(DATASETS[name][1])]
    if not isinstance(given, Mapping):
        return {}, [f"{where}: expected a dict of the fields of {name}, such as {known[0]}"]
    problems, config = [], dict[str, Any]()
    for key in given:
        if key in OWN_FIELDS:
            problems.append(f"{where}: `{key}` is set by data.seed, data.train_size and data.eval_size; remove it")
        elif key not in known:
            problems.append(f"{where}: {name} has no field {shown(key)}{suggestion(str(key), known)}; its: {', '.join(known)}")
    if name not in CURRICULA and level:
        return {}, [*problems, f"data.level={level}: expected 0 for {name}, which has no curriculum; use data.config"]
    if name in CURRICULA and level is not None:
        curriculum: Any = CURRICULA[name]
        curriculum = curriculum()
        most = max(len(attribute.levels) for attribute in curriculum.attributes.values()) - 1
        if not 0 <= level <= most:
            return {}, [*problems, f"data.level={level}: expected 0 to {most} for {name}"]
        curriculum.set_global_level(level)
        made = curriculum.generate_configuration()
        config = {field: getattr(made, field) for field in known if field not in OWN_FIELDS}
    config |= given
    if not problems:
        try:
            Tasks({name: 1.0}, {name: config}).dataset(1, 0)
        except Exception as error:  # each task has checks of its own
            at, fix = ("", "it") if level is None else (f" at data.level={level}", "one of them")
            problems.append(f"{where}{at}: {name} refuses it: {one_line(error)}; change {fix}")
    return config, problems


@dataclass(frozen=True)
class Problem:
    """Holds one problem: its question, the answer if reasoning-gym gives one, and the entry that a score needs, pickled."""

    task: str
    question: str
    answer: str | None
    entry: bytes


class Drawer:
    """Draws problems, while its `with` lasts, in a process of its own, whose hashes have a fixed seed.

    Some tasks go through sets of words, whose order is another in every process, and every process of a run, and one that
    resumes it, must have the same rows. That process imports reasoning-gym and then does nothing but fork: each drawing
    is a fork's, so that none has a trace of those before it.
    """

    def __enter__(self) -> "Drawer":
        paths = os.pathsep.join(path for path in sys.path if path)
        environment = os.environ | {"PYTHONPATH": paths, "PYTHONHASHSEED": "0"}
        self._errors = tempfile.TemporaryFile()
        self._asks, answers = socket.socketpair()
        with answers:
            self._process = subprocess.Popen(
                [sys.executable, "-c", CODE, str(answers.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # what tasks print
                stderr=self._errors,
                env=environment,
                pass_fds=[answers.fileno()],
                start_new_session=True,  # ended with its forks
            )
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._asks.close()
        self._errors.close()

    def draw(self, tasks: Tasks, size: int, seed: int) -> Generator[Problem]:
        """Yield the problems of a data set, in order.

        Raises:
            UserError: the task fails on a problem.
        """
        before = os.fstat(self._errors.fileno()).st_size
        ours, theirs = socket.socketpair()
        with ours, ours.makefile("rwb") as pipe:
            try:
                with theirs:
                    socket.send_fds(self._asks, [b"draw"], [theirs.fileno()])
                pickle.dump((tasks, size, seed), pipe)
                pipe.flush()
                for _ in range(size):
                    yield pickle.load(pipe)
                return
            except (EOFError, OSError, pickle.UnpicklingError):  # the last: it ended within a problem
                pass
        said = os.pread(self._errors.fileno(), 1 << 20, before).decode(errors="replace").strip()
        last, names = (said.splitlines() or ["it ended without a word"])[-1], ",".join(tasks.weights)
        raise UserError(f"data.task={names}: reasoning-gym fails: {printable(last)[:300]}; change data.config or data.task")


def fork_for_each(descriptor: int) -> None:
    """Run the process of a Drawer: fork for each socket that comes over the one at `descriptor`, until that is closed."""
    import reasoning_gym  # noqa: F401  # before the forks, which have it then

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # whoever has ended is gone
    with socket.socket(fileno=descriptor) as asked:
        while (received := socket.recv_fds(asked, 16, 1))[0]:
            if os.fork() == 0:
                return _draw_all(received[1][0])
            os.close(received[1][0])


def _draw_all(descriptor: int) -> None:
    """Write the problems that are asked for at a socket to it, until there are enough or nobody reads them."""
    import numpy as np

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # a task may start processes
    with socket.socket(fileno=descriptor) as client, contextlib.suppress(BrokenPipeError, ConnectionResetError):
        pipe = client.makefile("rwb")
        tasks, size, seed = pickle.load(pipe)
        random.seed(seed)
        np.random.seed(seed % 2**32)  # the programs of codeio draw from it
        dataset = tasks.dataset(size, seed)
        for index in range(size):
            entry = dataset[index]
            answer = None if entry["answer"] is None else str(entry["answer"])
            task, kept = entry["metadata"]["source_dataset"], pickle.dumps(entry, PROTOCOL)
            pickle.dump(Problem(task, entry["question"], answer, kept), pipe, PROTOCOL)
            pipe.flush()
