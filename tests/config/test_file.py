"""A YAML file, `config=FILE`: the values of the command line, each with where it stands, and its mistakes."""

from pathlib import Path

import pytest

from rlinvariant.config import draft, parse
from rlinvariant.config.help import fields_help
from rlinvariant.errors import ConfigErrors
from tests.config.common import errors, good

RUN = """\
recipe: mine.py
steps: 5            # the recipe says 7
run: "007"
invariance: off
data: {size: 6}
trainer:
  learning_rate: 1e-6
  reward_weights: [1, 0.5]
  epsilon_high: null
  gradient_checkpointing_kwargs: {use_reentrant: false}
trainer.beta: 0.25
wandb: {tags: [a, b], mode: disabled}
sampler: {enforce_eager: true}
"""


def write(text: str, name: str = "run.yaml") -> None:
    Path(name).write_text(text)


def test_a_file_has_the_values_that_the_command_line_would_give() -> None:
    write(RUN)
    config = parse(["config=run.yaml"], {})
    same = parse(
        [
            *("recipe=mine.py", "steps=5", "run=007", "invariance=off", "data.size=6", "trainer.learning_rate=1e-6"),
            *("trainer.reward_weights=1,0.5", "trainer.epsilon_high=None", "trainer.beta=0.25", "wandb.tags=a,b"),
            *("trainer.gradient_checkpointing_kwargs={'use_reentrant': False}", "wandb.mode=disabled"),
            "sampler.enforce_eager=true",
        ],
        {},
    )
    values = [{key: entry["value"] for key, entry in one.resolved().items()} for one in (config, same)]
    assert values[0] == values[1] != {key: entry["value"] for key, entry in good("run=007").resolved().items()}


def test_each_value_says_where_it_came_from() -> None:
    write(RUN)
    resolved = parse(["steps=3", "config=run.yaml"], {}).resolved()
    assert resolved["steps"] == {"value": 3, "source": "command line"}
    assert resolved["data.size"] == {"value": 6, "source": "file run.yaml"}
    assert resolved["trainer.epsilon"]["source"] == "default"
    write("recipe: mine.py\n")
    assert parse(["config=run.yaml"], {}).resolved()["steps"] == {"value": 7, "source": "recipe mine"}
    shown = fields_help(["config=run.yaml", "steps=3"], False)
    assert "recipe=mine.py  [file run.yaml]" in shown and "steps=3  [command line]" in shown


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("recipe: mine.py\ntrainer:\n  bta: 1\n", ["run.yaml:3: trainer.bta=1: unknown key; did you mean trainer.beta?"]),
        ("recipe: mine.py\nsteps: many\n", ["run.yaml:2: steps=many: expected int; default 7"]),
        ("recipe: mine.py\nsteps: true\n", ["run.yaml:2: steps=true: expected int; default 7"]),
        ("recipe: mine.py\nsteps: 1\nsteps: 2\n", ["run.yaml:3: steps: set in line 2 too; keep one"]),
        (
            "recipe: mine.py\ntrainer: {beta: 1}\ntrainer.beta: 2\n",
            ["run.yaml:3: trainer.beta: set in line 2 too; keep one"],
        ),
        (
            "recipe: mine.py\nsteps: 1\ntrainer.max_steps: 2\n",
            ["file run.yaml: steps=1 and trainer.max_steps=2: both set the same value; keep steps"],
        ),
        ("recipe: mine.py\ntrainer: 3\n", ["run.yaml:2: trainer: expected keys with values below it, such as `trainer:` and"]),
        ("recipe: mine.py\nmachine: cpu2\n", ["run.yaml:2: machine: not a setting of the run; write machine= on the command"]),
        ("recipe: mine.py\na: &x 1\nb: *x\n", ["run.yaml:3: not YAML: an alias: write the value out; mend the file"]),
        ("recipe: [\n", ["run.yaml:2: not YAML: "]),
        ("recipe: !!python/object:os.system x\n", ["run.yaml:1: recipe"]),
    ],
)
def test_a_mistake_in_a_file_names_its_line(text: str, lines: list[str]) -> None:
    write(text)
    found = [line for line in draft(["config=run.yaml"]).errors]
    if "python/object" in text:  # a tag that a safe loader does not make: the text is the value, and nothing runs
        assert draft(["config=run.yaml"]).recipe is None
        return
    assert len(found) == len(lines) and all(line.startswith(start) for line, start in zip(found, lines, strict=True)), found


@pytest.mark.parametrize(("text", "found"), [("", "nothing"), ("- a\n- b\n", "a list"), ("steps\n", "one value")])
def test_a_file_that_is_no_mapping_is_one_line(text: str, found: str) -> None:
    write(text)
    expected = "expected keys with values, such as `steps: 100`, found"
    assert draft(["config=run.yaml"]).errors == [f"config=run.yaml: {expected} {found}"]


@pytest.mark.parametrize("text", ["{}", "data: {}\n"])
def test_a_file_without_a_value_names_no_recipe(text: str) -> None:
    write(text)
    with pytest.raises(ConfigErrors) as raised:
        parse(["config=run.yaml"], {})
    assert any(line.startswith("recipe: missing") for line in raised.value.errors)


def test_a_file_that_is_not_there_or_not_text_is_one_line() -> None:
    assert errors("config=no.yaml") == [
        "config=no.yaml: cannot be read (No such file or directory); give the path of a YAML file"
    ]
    Path("run.yaml").write_bytes(b"steps: \xff\n")
    (line,) = errors("config=run.yaml")
    assert line.startswith("config=run.yaml: not YAML: ")
    write("a: " + "[" * 5000)
    (line,) = errors("config=run.yaml")
    assert line.startswith("config=run.yaml: not YAML: ") or line.startswith("run.yaml:")
    assert errors("config=run.yaml", "config=b.yaml")[0].startswith("config=run.yaml and config=b.yaml: both set the same")


def test_all_mistakes_of_file_and_command_line_come_in_one_list() -> None:
    write("stps: 3\ntrainer.top_p: 1.9\n")
    found = errors("config=run.yaml", "seed=-1")
    assert [line.split("=")[0] for line in found] == ["run.yaml:1: stps", "seed", "trainer.top_p"]
    with pytest.raises(ConfigErrors):
        parse(["config=run.yaml"], {})


@pytest.mark.parametrize("text", ["recipe: [\n", "", None])
def test_a_file_that_cannot_be_read_is_not_hidden_behind_what_it_may_have_said(text: str | None) -> None:
    if text is not None:
        write(text)
    with pytest.raises(ConfigErrors) as raised:
        parse(["config=run.yaml"], {})
    (line,) = raised.value.errors
    assert "run.yaml" in line


def test_a_missing_recipe_is_said_behind_the_mistakes_of_the_file() -> None:
    write("recip: mine.py\n")
    with pytest.raises(ConfigErrors) as raised:
        parse(["config=run.yaml"], {})
    assert [line.split(";")[0] for line in raised.value.errors] == ["run.yaml:1: recip=mine.py: unknown key", "recipe: missing"]
