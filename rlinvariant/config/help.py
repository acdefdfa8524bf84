"""The fields of a configuration as a help text: the key, its value, where it comes from, what may stand there."""

import textwrap
from collections.abc import Sequence

from rlinvariant.arguments import given_by_user, help_width, wrapped
from rlinvariant.config.parse import draft, expected
from rlinvariant.config.recipe import listed_recipes
from rlinvariant.config.tree import Leaf, leaves, plain
from rlinvariant.errors import ConfigErrors

FIRST_FIELDS = (
    "recipe",
    "model",
    "run",
    "steps",
    "seed",
    "invariance",
    "algorithm",
    "trainer.learning_rate",
    "trainer.per_device_train_batch_size",
    "trainer.gradient_accumulation_steps",
    "trainer.num_generations",
    "trainer.max_completion_length",
    "trainer.temperature",
    "trainer.beta",
    "sampler.max_model_len",
)
"""The fields that a first run is likely to change."""
SECTIONS = {
    "": "run",
    "data": "data.*, which are the recipe's own",
    "trainer": "trainer.*, which are TRL's: see trl.GRPOConfig",
    "ppo": "ppo.*, with algorithm=ppo",
    "lora": "lora.*, which are PEFT's",
    "sampler": "sampler.*, which are vLLM's",
    "wandb": "wandb.*",
}
"""Prefix of a key -> title of its section."""


WITHOUT_RECIPE = """without a recipe: model=, data.path=FILE (rows with a `prompt`) and reward=FILE.py:FUNCTION. A YAML file,
config=FILE, may hold any fields; what stands on the command line comes before it."""


def fields_help(argv: Sequence[str], everything: bool) -> str:
    """Describe the fields with the values that `argv` gives them, wrapped to the terminal's width.

    Args:
        argv: key=value arguments, or none.
        everything: all fields, in place of `FIRST_FIELDS`, the recipe's own, and those that `argv` sets.

    Raises:
        ConfigErrors: an argument is no key=value, names no field or no recipe, or has a value of another type.
    """
    read = draft(argv)
    if read.errors:
        raise ConfigErrors(read.errors)
    sources = read.config.sources
    sections: dict[str, list[str]] = {section: [] for section in SECTIONS}
    left = 0
    for key, leaf in leaves(read.config).items():
        section = key.partition(".")[0] if "." in key else ""
        if everything or key in FIRST_FIELDS or section == "data" or given_by_user(sources.get(key, "default")):
            sections[section].append(_field(key, leaf, sources.get(key, "default")))
        else:
            left += 1
    text = [f"{SECTIONS[section]}:\n" + "\n".join(fields) for section, fields in sections.items() if fields]
    text.append(wrapped(f"recipes: {listed_recipes()}, or a path to a .py file", hanging="  "))
    text.append(wrapped(WITHOUT_RECIPE, hanging="  "))
    if left:
        text.append(wrapped(f"{left} more fields: --help=all. With a recipe, its values are shown, and its data.* fields."))
    return "\n\n".join(text)


def _field(key: str, leaf: Leaf, source: str) -> str:
    about = f"{expected(leaf.type)}. {leaf.doc.rstrip('.')}."
    lines = textwrap.wrap(about, help_width(), initial_indent="      ", subsequent_indent="      ")
    return "\n".join([f"  {key}={plain(key, leaf.value)}  [{source}]", *lines])
