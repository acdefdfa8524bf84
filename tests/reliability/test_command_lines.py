"""Command lines made of real keys and hostile values: each is taken whole, or refused by lines that name what is wrong."""

import math
import os
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from rlinvariant.config import ALIASES, OWNED, parse, tree
from rlinvariant.errors import ConfigErrors, UserError
from rlinvariant.text import shown
from tests.config.common import RECIPE

VALUES = """
|nan|inf|-inf|NaN|1e400|-1e400|-1|0|1|2|-0.0|1e-400|1e308|10**9|None|true|yes|False|True|null|[]|{}|()|{'a': nan}|{"a": 1e999}
{"a": [NaN]}|{'a': {'b': inf}}|'|"|../..|..|.|/|/etc/passwd|/etc/shadow|/proc/self/mem|/proc/self/fd|/dev/zero|/dev/null|~/x
~nosuchuser/x.py|~|a/b|a/b/c|-|--|=|==|x=y|,|,,|1,2,nan|0.5,inf|lambda: 0|__import__('os').getcwd()|%s|{}{}|C:\\x|1_000|１２
0x10|1e5|Infinity|auto|steps|all|no|epoch|cosine|sgd|adamw_torch|arithmetic|gsm8k|mine.py|./broken.py|./binary.py|./exits.py
./list.py|./keys.py|./noclass.py|./plainclass.py|./required.py|./base.py|./badcheck.py|./odd.py|./folder.py|.../x|a.b|0.0|1.5
-5|99999999999999999999999|日本|🙈|x y|\\|*|?|[|{|wandb|ORG/NAME|org/name"""
ODD_VALUES = ["a" * 300, "/" * 5000, "a/" * 2500, "9" * 5000, "[" * 2000, "b" * 300 + ".py"]
ODD_VALUES += ["\0", "a\0b.py", "a\nb", "\r", "\t", "\x1b[31m", "\udcff", "x.py\n"]
ODD_KEYS = ["", " ", "steps ", "trainer", "trainer.", ".", "..", "...seed", "data", "data.", "sources", "sources.x", "*"]
ODD_KEYS += ["__class__", "trainer.__init__", "steps\n", "a" * 3000, "--steps", "-", "\0", "日本", "recipe.name", "trainer.*"]
NUMBERS = ["nan", "inf", "-inf", "1e999", "-1", "0", "1", "0.5", "1,2,nan", "{'a': 1e999}"]
BROKEN = [f"./{name}" for name in ("list.py", "keys.py", "noclass.py", "exits.py", "broken.py", "base.py", "required.py")]
WHOLE = ["mine.py", "arithmetic", "arithmetic_ppo", "reverse"]
FILES = {
    "mine.py": RECIPE,
    "broken.py": "def (:\n",
    "exits.py": "import sys\nsys.exit(3)\n",
    "list.py": "DEFAULTS = ['steps']\n" + RECIPE.replace("DEFAULTS", "OTHER"),
    "keys.py": "DEFAULTS = {3: 4}\n" + RECIPE.replace("DEFAULTS", "OTHER"),
    "noclass.py": RECIPE + "\nData = 5\n",
    "plainclass.py": RECIPE + "\nclass Data: pass\n",
    "required.py": RECIPE.replace("size: int = 1", "size: int").replace('"data.size": 5', '"steps": 7'),
    "base.py": "BASE = 5\n" + RECIPE,
    "badcheck.py": RECIPE + "\ncheck = 5\n",
    "odd.py": RECIPE.replace('"steps": 7', '"steps": float("nan"), "trainer.beta": float("inf"), "seed": object()'),
}
ENVIRONMENTS: list[dict[str, str]] = [
    {},
    {"WORLD_SIZE": "abc"},
    {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": "1"},
    {"WORLD_SIZE": "-1", "RANK": "x"},
    {"WORLD_SIZE": "", "LOCAL_WORLD_SIZE": "1e3"},
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, text in FILES.items():
        Path(name).write_text(text)
    Path("binary.py").write_bytes(os.urandom(64) + b"\0\xff")
    Path("folder.py").mkdir()
    return tmp_path


def values() -> list[str]:
    return [*VALUES.strip("\n").replace("\n", "|").split("|"), *ODD_VALUES]


def lines(count: int, seed: int) -> Iterator[tuple[list[str], dict[str, str]]]:
    """Draw command lines: a recipe that is whole, and one to three settings; or a recipe that is not."""
    draw = random.Random(seed)
    whole = parse(["recipe=mine.py"], {})
    keys = [*tree.leaves(whole), *ALIASES, *(f"trainer.{name}" for name in OWNED)]
    often = [key for key in keys if not key.startswith("trainer.")]
    pool = values()
    for number in range(count):
        recipe = draw.choice(BROKEN if draw.random() < 0.5 else pool) if number % 8 == 0 else draw.choice(WHOLE)
        settings = []
        for _ in range(draw.choice((1, 1, 2, 3))):
            key = draw.choice(draw.choice((keys, keys, keys, often, ODD_KEYS)))
            value = draw.choice(NUMBERS if draw.random() < 0.3 else pool)
            settings.append(value if draw.random() < 0.02 else f"{key}={value}")
        yield [f"recipe={recipe}", *settings], draw.choice(ENVIRONMENTS) if number % 5 == 0 else {}


def fault(argv: Sequence[str], env: dict[str, str], build: bool) -> str | None:
    """Say what is wrong with the answer to a command line; None: it is taken, or refused as it should be."""
    try:
        config = parse(argv, env)
    except ConfigErrors as error:
        named = [
            "recipe",
            "model",
            "run",
            *ALIASES.values(),
            *env,
            *(shown(argument.partition("=")[0], 100)[:100] for argument in argv),
        ]
        for line in error.errors:
            if "\n" in line or "\r" in line or not line.strip():
                return f"not one line: {line!r}"
            if not any(key.strip() in line for key in named):
                return f"names no key: {line!r}"
            if len(line) > 2000:
                return f"{len(line)} characters"
        return None
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    if wrong := [key for key, leaf in tree.leaves(config).items() if not finite(leaf.value)]:
        return f"taken, and not finite: {wrong}"
    if build:
        try:
            config.grpo_config()
        except UserError as error:
            return None if "\n" not in str(error) else f"not one line: {error}"
        except BaseException as error:
            return f"grpo_config: {type(error).__name__}: {error}"
    return None


def finite(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(finite, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def faults(count: int, seed: int = 0, build: bool = False) -> Iterator[str]:
    """Yield each answer that is not as it should be, with its command line."""
    for argv, env in lines(count, seed):
        if said := fault(argv, env, build):
            yield f"{argv!r:.300} {env}: {said:.300}"


def test_hostile_command_lines_are_taken_or_refused(folder: Path) -> None:
    assert not (found := list(faults(200))), "\n".join(found)


PLANTS: dict[str, tuple[str, str, Any, str]] = {
    "a number that is none is taken": ("parse", "_is_finite", lambda value: True, "not finite"),
    "a launcher's variable is a word": (
        "check",
        "_processes",
        lambda env: (int(env.get("WORLD_SIZE", 1)), []),
        "ValueError",
    ),
    "control characters are shown": ("parse", "shown", str, "not one line"),
    "a recipe's settings are not looked at": ("recipe", "_require_settings", lambda *_: None, "Error: "),
}


@pytest.mark.parametrize("name", PLANTS)
def test_a_check_that_is_missing_is_found(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: with one check taken out, the same command lines are not all answered as they should be."""
    module, function, without, words = PLANTS[name]
    monkeypatch.setattr(sys.modules[f"rlinvariant.config.{module}"], function, without)
    assert any(words in line for line in faults(300))


@pytest.mark.reliability
@pytest.mark.timeout(3600)
def test_two_thousand_hostile_command_lines_and_the_settings_that_trl_gets(
    folder: Path, record_reliability: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = list(faults(2000, seed=1, build=True))
    module, function, without, _ = PLANTS["control characters are shown"]
    monkeypatch.setattr(sys.modules[f"rlinvariant.config.{module}"], function, without)
    spoilt = 300 - len(list(faults(300)))
    record_reliability("command lines", 2000 - len(found), 2000, f"control characters shown: {spoilt} / 300")
    assert not found, "\n".join(found)
    assert spoilt < 300, "the control is blind"
