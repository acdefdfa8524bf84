"""Every file of recipes/: loads, is a valid configuration, is told of in the README; ablations differ by their defaults alone."""

from pathlib import Path

import pytest

from rlinvariant.config import load_recipe, parse, recipe_names

RECIPES = Path(__file__).parents[2] / "recipes"
PARENTS = {
    "arithmetic_off": ("arithmetic", {"invariance": "off"}),
    "arithmetic_tis": ("arithmetic_off", {"trainer.vllm_importance_sampling_correction": True,
                                          "trainer.vllm_importance_sampling_mode": "token_truncate"}),
    "arithmetic_mis": ("arithmetic_tis", {"trainer.vllm_importance_sampling_mode": "sequence_mask"}),
    "arithmetic_stale": ("arithmetic", {"staleness": 4}),
    "gsm8k_off": ("gsm8k", {"invariance": "off"}),
}  # fmt: skip


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_is_a_valid_configuration(name: str) -> None:
    recipe = load_recipe(name)
    config = parse([f"recipe={name}", *([] if recipe.prepare_model else ["model=org/name"])], {})
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
