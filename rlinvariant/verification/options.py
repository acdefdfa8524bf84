"""The options of `verify`, and a check of them before anything is loaded."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from rlinvariant.config import LoraConfig, check_lora, draft
from rlinvariant.errors import ConfigErrors
from rlinvariant.model_source import adapter_base, source_problems


@dataclass(frozen=True)
class Options:
    """Holds the arguments of `verify.verify`, which describes them."""

    model: str
    tokens: int | None = None
    short: bool = False
    random: bool = False
    seed: int = 0
    dtype: str = "bfloat16"
    eager: bool = False
    lora: LoraConfig | None = None
    tensor_parallel_size: int = 1

    def arguments(self) -> list[str]:
        """Return the command line of `verify` that asks for this."""
        said = [self.model, "--seed", str(self.seed), "--dtype", self.dtype]
        said += ["--tokens", str(self.tokens)] if self.tokens else []
        said += [f"--{name}" for name in ("short", "random", "eager") if getattr(self, name)]
        said += ["--lora", *self.lora.settings().split()] if self.lora else []
        return [*said, "--tensor-parallel-size", str(self.tensor_parallel_size)]

    def require_sense(self) -> None:
        """Raise ConfigErrors for a model that cannot be there, and for options that contradict each other."""
        errors = source_problems("model", self.model, adapters=True) or clash(self.model, self.lora)
        if self.short and self.tokens:
            errors.append(f"verify: --tokens {self.tokens} with --short: expected one of them; remove one")
        if self.dtype not in ("bfloat16", "float32"):
            errors.append(f"dtype={self.dtype}: expected bfloat16 or float32")
        if errors:
            raise ConfigErrors(errors)


def add_lora(parser: argparse.ArgumentParser) -> None:
    """Add the option that puts random adapters around a model."""
    says = "put LoRA adapters with random values around MODEL: r=16, and other settings of lora.* without that prefix"
    parser.add_argument("--lora", nargs="+", metavar="KEY=VALUE", help=says)


def lora_config(settings: Sequence[str] | None) -> LoraConfig | None:
    """Return what `--lora` asks for, None if nothing. Raises ConfigErrors for what is wrong with it."""
    if settings is None:
        return None
    read = draft([f"lora.{setting}" for setting in settings])
    errors = read.errors or check_lora(read.config)
    if not errors and not read.config.lora.r:
        errors = ["lora.r=0: expected a rank, at least 1; write --lora r=16"]
    if errors:
        raise ConfigErrors([f"--lora {line.removeprefix('lora.')}" for line in errors])
    return read.config.lora


def clash(model: str, asked: LoraConfig | None) -> list[str]:
    """Refuse random adapters beside a directory's own."""
    if asked is None or adapter_base(model) is None:
        return []
    return [f"--lora r={asked.r}: expected none with {model}, which has adapters of its own; remove it"]
