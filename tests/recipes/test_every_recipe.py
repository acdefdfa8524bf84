"""Every file of recipes/: valid, and in the README; a step of each kind; ablations differ by their defaults alone."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from rlinvariant.config import load_recipe, parse, recipe_names
from rlinvariant.recipes import _math, reasoning_gym_gpu, words_gpu
from rlinvariant.report import completions
from tests import forks

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
KINDS = (
    "countdown",
    "countdown_ppo",
    "gsm8k",
    "math",
    "dapo_math",
)  # tests/test_run.py runs arithmetic, of which reverse differs little
PPO = {"algorithm": "ppo", "ppo.lam": 1.0, "ppo.critic_learning_rate": 3e-4}
PARENTS = {
    "arithmetic_off": ("arithmetic", {"invariance": "off"}),
    "arithmetic_tis": (
        "arithmetic_off",
        {"trainer.vllm_importance_sampling_correction": True, "trainer.vllm_importance_sampling_mode": "token_truncate"},
    ),
    "arithmetic_mis": ("arithmetic_tis", {"trainer.vllm_importance_sampling_mode": "sequence_mask"}),
    "arithmetic_stale": ("arithmetic", {"staleness": 4}),
    "words_gpu": ("words", words_gpu.DEFAULTS),
    "reasoning_gym_gpu": ("reasoning_gym", reasoning_gym_gpu.DEFAULTS),
    "gsm8k_off": ("gsm8k", {"invariance": "off"}),
    "arithmetic_ppo": ("arithmetic", PPO),
    "countdown_ppo": ("countdown", PPO),
}


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_is_a_valid_configuration(name: str) -> None:
    recipe = load_recipe(name)
    config = parse([f"recipe={name}", *([] if recipe.prepare_model or "model" in recipe.defaults else ["model=org/name"])], {})
    assert {key for key, source in config.sources.items() if source == f"recipe {name}"} == set(recipe.defaults)
    assert f"| `{name}` |" in (RECIPES / "README.md").read_text()


def test_what_recipes_share_is_no_recipe() -> None:
    assert {path.stem for path in RECIPES.glob("[!_]*.py")} == set(recipe_names())
    assert {path.stem for path in RECIPES.glob("_*.py")} > {"_tiny", "_math"}


@pytest.mark.parametrize("name", PARENTS)
def test_an_ablation_is_its_parent_with_other_defaults(name: str) -> None:
    parent, changes = PARENTS[name]
    ours, theirs = load_recipe(name), load_recipe(parent)
    assert ours.defaults == {**theirs.defaults, **changes} != theirs.defaults
    for part in ("data", "datasets", "reward_funcs", "prepare_model", "check"):
        assert getattr(ours, part) is getattr(theirs, part), part


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The directory in which each kind of recipe has run a step."""
    directory = tmp_path_factory.mktemp("recipes")
    done = forks.run([str(ROOT / "tests/recipes/run_recipes.py"), str(directory)], cwd=directory, env=os.environ)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return directory


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("recipe", KINDS)
def test_a_step_of_each_kind_is_exact(recipe: str, finished: Path) -> None:
    (row,) = [row for row in lines(finished / "runs" / recipe / "metrics.jsonl") if row.get("kind") != "evaluation"]
    assert row["onpolicy/mismatched_tokens"] == 0 == row["onpolicy/unscored_tokens"] and row["onpolicy/compared_tokens"] > 100


@pytest.mark.parametrize("recipe", KINDS[2:])
def test_mathematics_is_asked_in_chat_and_graded(recipe: str, finished: Path) -> None:
    """The model often puts 6 in a box; every answer is 6, written in another way."""
    ((_, samples),) = completions.Completions(finished / "runs" / recipe)
    for sample in samples:
        assert _math.SYSTEM in sample["prompt"]
        assert sample["reward"] == float(sample["completion"].startswith(r"\boxed{6}")), sample
    assert any(sample["reward"] for sample in samples)
