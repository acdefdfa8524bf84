"""The typed configuration tree of a run: its defaults, then the recipe's values, then `key=value` from the command line.

`parse` turns arguments into a `Config`, or into one list of everything that is wrong with them. It reads files and the
environment, but imports no framework, loads no model, opens no device, and writes nothing but a cache of TRL's fields.
"""

from rlinvariant.config.check import check, check_lora, unreachable
from rlinvariant.config.fields import ALIASES, OWNED, TRAINER_CHOICES, TRAINER_DEFAULTS, TRAINER_OWN
from rlinvariant.config.parse import Draft, draft, parse
from rlinvariant.config.recipe import Data, Recipe, load_recipe, recipe_names
from rlinvariant.config.tree import RUNS, Config, LoraConfig, PPOConfig, SamplerConfig, WandbConfig

__all__ = [
    "ALIASES",
    "OWNED",
    "RUNS",
    "TRAINER_CHOICES",
    "TRAINER_DEFAULTS",
    "TRAINER_OWN",
    "Config",
    "Data",
    "Draft",
    "LoraConfig",
    "PPOConfig",
    "Recipe",
    "SamplerConfig",
    "WandbConfig",
    "check",
    "check_lora",
    "draft",
    "load_recipe",
    "parse",
    "recipe_names",
    "unreachable",
]
