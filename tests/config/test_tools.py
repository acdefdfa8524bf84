"""The settings of tools and environments: what they name is imported, kept with the run, and a line if it is wrong."""

from pathlib import Path

import pytest

from rlinvariant.errors import UserError
from rlinvariant.resumption import settings
from tests.config.common import RECIPE, errors, good

TOOLS = """
def search(word: str) -> str:
    return word

class World:
    def reset(self, **_): ...

PI = 3
"""


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(RECIPE)
    Path("theirs.py").write_text(RECIPE + "def tools(config): return [print]\ndef environment(config): return dict\n")
    Path("my_tools.py").write_text(TOOLS)
    return tmp_path


def test_what_is_named_is_imported() -> None:
    config = good("tools=my_tools.py:search", "environment=my_tools.py:World", "run=one")
    (search,) = config.tool_funcs()
    made = config.environment_factory()
    assert made is not None and search("a") == "a" and type(made()).__name__ == "World"
    assert good("run=two").tool_funcs() == [] and good("run=two").environment_factory() is None


def test_a_recipe_has_its_own_and_the_users_come_first() -> None:
    theirs = ["recipe=theirs.py", "run=one"]
    from rlinvariant.config import parse

    config = parse(theirs, {})
    assert config.tool_funcs() == [print] and config.environment_factory() is dict
    mine = parse([*theirs, "tools=my_tools.py:search", "environment=my_tools.py:World"], {})
    assert [tool.__name__ for tool in mine.tool_funcs()] == ["search"]
    assert mine.environment_factory() is not dict


def test_an_edited_file_is_another_run() -> None:
    said = ("tools=my_tools.py:search", "environment=my_tools.py:World", "run=one")
    before = settings(good(*said))
    names = ("file of tool my_tools.py:search, sha256", "file of environment my_tools.py:World, sha256")
    assert all(len(before[name]) == 16 for name in names)
    Path("other_tools.py").write_text(TOOLS + "\n# edited\n")
    after = settings(good("tools=other_tools.py:search", "run=two"))
    assert after["file of tool other_tools.py:search, sha256"] != before[names[0]]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("tools=my_tools.py", "tools=my_tools.py: expected FILE.py:FUNCTION or MODULE:FUNCTION, such as my_tools.py:search"),
        ("tools=my_tools.py:serch", "tools=my_tools.py:serch: my_tools.py has no `serch`; did you mean search?"),
        ("tools=my_tools.py:World", "tools=my_tools.py:World: expected a function, found type"),
        (
            "tools=my_tools.py:search,my_tools.py:search",
            "tools=my_tools.py:search,my_tools.py:search: my_tools.py:search is there",
        ),
        ("tools=none.py:search", "tools=none.py:search: no such file"),
        ("environment=my_tools.py:PI", "environment=my_tools.py:PI: expected a class, or a function that makes an environment"),
        ("environment=World", "environment=World: expected FILE.py:NAME or MODULE:NAME, such as my_game.py:Game"),
        ("tool_errors=ignore", "tool_errors=ignore: expected one of tell, end, stop"),
        ("tool_timeout=2", "tool_timeout: expected tools= or environment= beside it"),
        ("tool_format=plain", "tool_format: expected tools= or environment= beside it"),
    ],
)
def test_a_mistake_is_one_line(given: str, said: str) -> None:
    (line,) = errors(given, "run=one")
    assert line.startswith(said)


def test_an_environment_is_in_no_cage() -> None:
    (line,) = errors("environment=my_tools.py:World", "reward_cage=1", "run=one")
    assert line.startswith("reward_cage=1: expected 0 with an environment")


def test_a_limit_without_sense_is_a_line() -> None:
    (line,) = errors("tools=my_tools.py:search", "tool_timeout=-1", "run=one")
    assert line == "tool_timeout=-1.0: expected seconds, more than 0; 0: no limit"


def test_a_name_that_fails_says_what_it_raises() -> None:
    from rlinvariant.config.named import named

    Path("broken.py").write_text("1 / 0\n")
    with pytest.raises(UserError, match=r"environment=broken\.py:World: cannot be imported: ZeroDivisionError"):
        named("environment", "broken.py:World")
