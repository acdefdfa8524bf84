"""The help shows the fields, and a wrong command line is answered at once."""

import os
import re
import subprocess
import sys

import pytest

from rlinvariant.config.help import FIRST_FIELDS
from tests.config.common import REPO, good


def shown_help(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    from rlinvariant.cli import main

    assert main(["train", *argv]) == 0
    return capsys.readouterr().out


def test_help_says_where_values_come_from(capsys: pytest.CaptureFixture[str]) -> None:
    shown = shown_help(capsys, "--help", "recipe=mine.py", "trainer.epsilon=0.5").splitlines()
    lines = {line.partition("=")[0].strip(): (line.strip(), shown[i + 1]) for i, line in enumerate(shown) if "=" in line}
    assert lines["steps"] == ("steps=7  [recipe mine]", "      int. Optimizer steps.")
    assert lines["data.size"][0] == "data.size=5  [recipe mine]"
    assert lines["trainer.epsilon"][0] == "trainer.epsilon=0.5  [command line]", "what the user has set is shown"
    assert lines["model"][0] == "model=None  [default]"
    assert lines["invariance"][1].startswith("      one of exact, off, sampler, trainer. ")


@pytest.mark.parametrize("width", [80, 200])
def test_help_shows_fifteen_fields_and_all_when_asked(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    first, everything = shown_help(capsys, "--help"), shown_help(capsys, "--help=all")
    keys = [
        [line.split("=")[0].strip() for line in text.splitlines() if re.match(r"  [\w.]+=.*]$", line)]
        for text in (first, everything)
    ]
    assert sorted(keys[0]) == sorted(FIRST_FIELDS) and len(keys[0]) == 15
    assert sorted(keys[1]) == sorted(good().resolved().keys() - {"data.size", "data.path"})
    assert f"{len(keys[1]) - 15} more fields: --help=all" in first and "more fields" not in everything
    examples = [line for line in everything.splitlines() if "rlinvariant train recipe" in line]
    assert all(len(line) <= min(width, 120) or line in examples for line in everything.splitlines())


def test_help_with_a_mistake_is_that_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    from rlinvariant.cli import main

    assert main(["train", "--help", "stps=3"]) == 2
    assert capsys.readouterr() == ("", "error: stps=3: unknown key; did you mean steps?\n")
    assert main(["train", "--help", "recipe=gsm8k"]) == 0, "that it needs a model is no mistake yet"


def test_train_prints_errors_without_a_traceback(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from rlinvariant.cli import main

    error = "error: stps=3: unknown key; did you mean steps?\n"
    for rank, local, shown in (("0", "0", error), ("1", "1", ""), ("1", None, error)):  # the last: a shell's, of no launch
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", local) if local else monkeypatch.delenv("LOCAL_RANK", raising=False)
        assert main(["train", "recipe=arithmetic", "stps=3"], script="train.py") == 2
        assert capsys.readouterr() == ("", shown)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["train"], "recipe: missing"),
        (["train", "recipe=nope"], "recipe=nope: unknown recipe"),
        (["train", "recipe=arithmetic", "stps=3"], "stps=3: unknown key; did you mean steps?"),
        (["train", "recipe=arithmetic", "trainer.optim=adma"], "trainer.optim=adma: expected one of adamw_torch"),
        (["train", "recipe=countdown_ppo", "steps=0"], "steps=0: expected at least 1"),
        (["train", "recipe=gsm8k"], "model: missing"),
        (["train", "--help=all", "recipe=arithmetic"], ""),
    ],
)
def test_a_wrong_command_line_is_answered_without_a_framework(arguments: list[str], error: str) -> None:
    """Each takes seconds to import. Nothing is measured in time: that depends on the machine."""
    code = (
        "import sys; from rlinvariant.cli import main\n"
        f"code = main({arguments!r})\n"
        "print(sorted({'accelerate', 'datasets', 'numpy', 'torch', 'transformers', 'trl', 'vllm'} & set(sys.modules)), code)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.splitlines()[-1] == f"[] {2 if error else 0}"
    assert done.stderr.startswith(f"error: {error}" if error else "")
