"""A recipe is found, checked, and derived from another."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlinvariant.config import load_recipe, parse, recipe_names
from rlinvariant.errors import ConfigErrors
from tests.config.common import RECIPE, REPO


def test_unknown_recipes_are_suggested_and_listed() -> None:
    with pytest.raises(ConfigErrors) as raised:
        parse(["recipe=arithmetik", "data.size=3"], {})
    (line,) = raised.value.errors
    assert line.startswith("recipe=arithmetik: unknown recipe; did you mean arithmetic?; there are: ")
    with pytest.raises(ConfigErrors, match=r"^recipe: missing; write recipe=NAME with one of .*arithmetic"):
        parse([], {})
    with pytest.raises(ConfigErrors, match=r"^recipe=no/file\.py: no such file; give the path of a recipe \.py, or one of"):
        parse(["recipe=no/file.py"], {})


def test_incomplete_recipe_is_refused() -> None:
    Path("half.py").write_text("def datasets(config, tokenizer): ...\n")
    with pytest.raises(ConfigErrors) as raised:
        parse(["recipe=half.py"], {})
    assert raised.value.errors == ["recipe=half.py: does not define reward_funcs; see recipes/arithmetic.py"]


def test_mistakes_in_a_recipe_name_it() -> None:
    Path("bad.py").write_text(RECIPE.replace('"steps": 7', '"steps": "x", "trainer.bta": 1'))
    with pytest.raises(ConfigErrors) as raised:
        parse(["recipe=bad.py"], {})
    assert raised.value.errors == [
        "recipe bad: steps=x: expected int; default 100",
        "recipe bad: trainer.bta=1: unknown key; did you mean trainer.beta?",
    ]


def test_recipe_without_a_model_needs_one() -> None:
    Path("plain.py").write_text(RECIPE.replace("def prepare_model", "def unused"))
    with pytest.raises(ConfigErrors) as raised:
        parse(["recipe=plain.py"], {})
    assert raised.value.errors == ["model: missing, recipe plain has none of its own; write model=DIRECTORY or model=ORG/NAME"]
    assert parse(["recipe=plain.py", "model=Qwen/Qwen3-0.6B"], {}).model == "Qwen/Qwen3-0.6B"


def test_recipe_checks_are_in_the_same_list() -> None:
    Path("checking.py").write_text(RECIPE + '\ndef check(config): return [f"data.size={config.data.size}: too small"]\n')
    with pytest.raises(ConfigErrors) as raised:
        parse(["recipe=checking.py", "steps=0"], {})
    assert raised.value.errors == ["steps=0: expected at least 1", "data.size=5: too small"]


def test_a_recipe_may_derive_from_another(in_tmp: Path) -> None:
    Path("child.py").write_text(
        "from rlinvariant.recipes.arithmetic import DEFAULTS as PARENT, Data, datasets, prepare_model, reward_funcs\n"
        'DEFAULTS = {**PARENT, "invariance": "off", "data.digits": 2}\n'
    )
    config = parse([f"recipe={in_tmp}/child.py"], {})
    assert (config.invariance, config.data.digits, config.sources["data.digits"]) == ("off", 2, "recipe child")
    assert config.load_recipe() is load_recipe(config.recipe)


def test_a_base_and_other_defaults_are_a_recipe(in_tmp: Path) -> None:
    (in_tmp / "deep").mkdir()
    Path("deep/parent.py").write_text('BASE = "../mine.py"\nDEFAULTS = {"trainer.max_steps": 5, "data.size": 6}\n')
    Path("child.py").write_text('BASE = "deep/parent.py"\nDEFAULTS = {"steps": 9}\n')
    Path("packaged.py").write_text('BASE = "countdown_ppo"\ndef reward_funcs(config): return ["mine"]\n')
    config, mine = parse(["recipe=child.py"], {}), load_recipe("mine.py")
    assert (config.steps, config.data.size, config.trainer.learning_rate) == (9, 6, 1e-3)
    assert config.sources["data.size"] == config.sources["steps"] == "recipe child"
    child, packaged, countdown = config.load_recipe(), load_recipe("packaged.py"), load_recipe("countdown")
    assert (child.datasets, child.data, child.prepare_model) == (mine.datasets, mine.data, mine.prepare_model)
    assert packaged.datasets is countdown.datasets and packaged.reward_funcs is not countdown.reward_funcs
    assert packaged.defaults == load_recipe("countdown_ppo").defaults


def test_a_base_that_leads_back_or_nowhere_is_one_line(in_tmp: Path) -> None:
    for name, base in (("a", "./b.py"), ("b", "./a.py"), ("self", "./self.py"), ("typo", "arithmetik"), ("gone", "./no.py")):
        Path(f"{name}.py").write_text(f'BASE = "{base}"\n')

    def refused(recipe: str) -> str:
        with pytest.raises(ConfigErrors) as raised:
            parse([f"recipe={recipe}"], {})
        (line,) = raised.value.errors
        return line

    assert refused("a.py").endswith(": its BASE leads back to it: a -> b -> a; let one of them have no BASE")
    assert "self -> self" in refused("self.py")
    assert refused("typo.py").startswith(
        "recipe=typo.py: BASE=arithmetik: unknown recipe; did you mean arithmetic?; there are: "
    )
    assert refused("gone.py").startswith(
        "recipe=gone.py: BASE=./no.py: no such file; give the path of a recipe .py, or one of "
    )


@pytest.mark.parametrize("recipe", recipe_names())
def test_a_recipe_is_imported_without_a_framework(recipe: str) -> None:
    code = (
        f"import sys, rlinvariant.recipes.{recipe}\n"
        "print(sorted({'datasets', 'tokenizers', 'torch', 'transformers', 'trl'} & set(sys.modules)))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout == "[]\n"
