"""The options of `verify`, and a check of them before anything is loaded."""

from dataclasses import dataclass

from rlinvariant.errors import ConfigErrors
from rlinvariant.model_source import source_problems


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

    def require_sense(self) -> None:
        """Raise ConfigErrors for a model that cannot be there, and for options that contradict each other."""
        errors = source_problems("model", self.model)
        if self.short and self.tokens:
            errors.append(f"verify: --tokens {self.tokens} with --short: expected one of them; remove one")
        if self.dtype not in ("bfloat16", "float32"):
            errors.append(f"dtype={self.dtype}: expected bfloat16 or float32")
        if errors:
            raise ConfigErrors(errors)
