"""The end-to-end tests share some parts: the environment of every process, a tiny checkpoint, and engines, slow to start."""

import gc
import os
from collections.abc import Callable, Generator, Iterator

# Before torch is imported: libgomp reads it once. A spinning OpenMP thread starves its partner on a machine that is shared.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may need the network

import pytest

from tests import collector
from tests.collector import importing
from tests.forks import Server

FORKS = pytest.StashKey[Server]()


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # pytest-xdist's workers share it
        config.stash[FORKS] = Server()


def pytest_unconfigure(config: pytest.Config) -> None:
    if FORKS in config.stash:
        config.stash[FORKS].close()


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    with importing():
        return (yield)


@pytest.fixture
def real_freeze(monkeypatch) -> Iterator[None]:
    """Give a test the `gc.freeze` and `gc.unfreeze` of a process as a user has it."""
    with monkeypatch.context() as real:
        real.setattr(gc, "freeze", collector.FREEZE)
        real.setattr(gc, "unfreeze", collector.UNFREEZE)
        yield
    gc.collect()
    collector.FREEZE()


@pytest.fixture(scope="session")
def arithmetic_dir(tmp_path_factory) -> str:
    """The recipe's model and tokenizer with random weights: two layers, 128 wide, tied head, 99 tokens."""
    import torch

    from rlinvariant.recipes.arithmetic import build_model

    path = tmp_path_factory.mktemp("models") / "arithmetic"
    torch.manual_seed(0)
    model, tokenizer = build_model()
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def exact_engine(arithmetic_dir):
    """One invariant engine for all trainers of this process: each syncs its own weights into it before it samples."""
    from tests.parity.harness import start_engine

    return start_engine(arithmetic_dir)


@pytest.fixture(scope="session")
def arithmetic_weights(arithmetic_dir) -> list:
    from tests.parity.harness import load

    return list(load(arithmetic_dir).named_parameters())


@pytest.fixture(autouse=True)
def weights_of_its_own(request) -> None:
    """Whatever the test before has left in the shared engine, NaN perhaps."""
    if "exact_engine" in request.fixturenames:
        request.getfixturevalue("exact_engine").sync(request.getfixturevalue("arithmetic_weights"))


@pytest.fixture(scope="session")
def stock_engine(arithmetic_dir):
    from tests.parity.harness import start_engine

    return start_engine(arithmetic_dir, invariant=False)


@pytest.fixture
def record_reliability(record_property) -> Callable[[str, int, int, str], None]:
    """Return a function that gives `make reliability` a row: (its name in reliability/table.py, how many good, of, control).

    The control says what was planted, or how it was before, and how many of it were good: "no manifest: 0 / 12". Call it
    before what may fail.
    """

    def record(row: str, good: int, of: int, control: str) -> None:
        record_property("reliability", {"row": row, "good": good, "of": of, "control": control})

    return record
