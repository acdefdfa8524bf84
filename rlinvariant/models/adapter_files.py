"""A directory of PEFT's with a LoRA adapter: written, read as the sampler takes it, or put around a trainer's model.

A: [R, K] of an adapter, B: [N, R], for a weight [N, K]; R is the adapter's rank.
"""

import copy
import importlib.util
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rlinvariant.errors import ConfigErrors, UserError, one_line
from rlinvariant.install import install_hint
from rlinvariant.models.lora import A, B, adapters, plain, problems
from rlinvariant.types import Untyped

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WEIGHTS = "adapter_model.safetensors"
MERGE = "merge it: rlinvariant merge"


@dataclass(frozen=True)
class Adapter:
    """Holds what a directory has: PEFT's configuration, and `weights` as `lora.adapters` gives them, float32 on the CPU."""

    directory: str
    config: Untyped
    weights: list[tuple[str, Tensor]]

    @property
    def ranks(self) -> dict[str, int]:
        """Return the rank of each adapter by the name of its projection, as `Sampler` takes them."""
        return {name.removesuffix(f".{A}"): len(a) for name, a in self.weights if name.endswith(A)}

    def require_fit(self, model: nn.Module) -> None:
        """Compare shapes with those of a Hugging Face model's projections. Raises UserError for the first that does not fit."""
        shapes = {name: m.weight.shape for name, m in model.named_modules() if isinstance(m, nn.Linear)}
        for name, weight in self.weights:
            projection, r = name.removesuffix(f".{A}").removesuffix(f".{B}"), self.config.r
            n, k = shapes.get(projection, (0, 0))
            if (expected := [r, k] if name.endswith(A) else [n, r]) != [*weight.shape]:
                why = f"expected {expected}" if n else f"{type(model).__name__} has no such projection"
                fix = "name their own in adapter_config.json, base_model_name_or_path"
                raise UserError(f"{self.directory}: {name} is {[*weight.shape]}: {why}: are they another model's? {fix}")

    def require_fit_to(self, base: str) -> None:
        """Do what `require_fit` does for the model of a directory or hub id, which is made here without memory."""
        from transformers import AutoConfig, AutoModelForCausalLM

        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            self.require_fit(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base, trust_remote_code=False)))


def write(directory: str | Path, config: Untyped, weights: Mapping[str, Tensor]) -> None:
    """Write an adapter as PEFT does, where no model of PEFT's has it.

    Args:
        config: its `peft.LoraConfig`.
        weights: by PEFT's names, which have the adapter's own name, `default`, in them.
    """
    kept = copy.copy(config)
    kept.inference_mode = True  # as PEFT says of whatever it saves
    kept.save_pretrained(str(directory))
    own = {name.replace(".default.", "."): weight.detach().cpu().contiguous() for name, weight in weights.items()}
    save_file(own, Path(directory) / WEIGHTS, {"format": "pt"})


def read(directory: str | Path) -> Adapter:
    """Read an adapter.

    Raises:
        ConfigErrors: what of its configuration is not supported, a line each.
        UserError: a file is missing or damaged, or holds something else than pairs of A and B.
    """
    config, path = configuration(directory), Path(directory) / WEIGHTS
    if not path.is_file():
        raise UserError(f"{path}: missing; expected the weights that PEFT saves beside adapter_config.json")
    try:
        saved = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({one_line(error, 120)}); take another copy of it") from error
    scaling = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
    weights = []
    for name, weight in sorted(saved.items()):
        other = f"{name.removesuffix(B)}{A}" if name.endswith(B) else f"{name.removesuffix(A)}{B}"
        if not name.endswith((A, B)) or other not in saved:
            raise UserError(f"{path}: has {name}: expected pairs ending in {A} and {B}, and nothing else")
        rank = weight.shape[0] if name.endswith(A) else weight.shape[-1]
        if weight.dim() != 2 or rank != config.r:
            raise UserError(f"{path}: {name} is {[*weight.shape]}: expected r={config.r}, as adapter_config.json says")
        weights.append((plain(name), weight.float() * (scaling if name.endswith(B) else 1)))
    return Adapter(str(directory), config, weights)


def configuration(directory: str | Path) -> Untyped:
    """Return the `peft.LoraConfig` of a directory; raises as `read` does."""
    if importlib.util.find_spec("peft") is None:
        raise UserError(f"{directory}: a PEFT adapter needs the package peft; {install_hint('lora')}")
    from peft import PeftConfig

    try:
        config = PeftConfig.from_pretrained(str(directory))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{directory}: adapter_config.json cannot be read: {one_line(error, 160)}") from error
    config.inference_mode = False  # which PEFT writes whenever it saves
    if found := [f"{directory}: {line.removeprefix('peft_config.')}" for line in problems(config)]:
        raise ConfigErrors(found)
    return config


def loaded(model: "PreTrainedModel", directory: str | Path) -> Untyped:
    """Return PEFT's model around `model`, with a directory's adapters in float32, as they would be trained further.

    Raises:
        UserError: as `read`; and where the adapters are another model's.
    """
    found = read(directory)
    found.require_fit(model)
    from peft import PeftModel

    try:
        adapted = PeftModel.from_pretrained(model, str(directory), is_trainable=True)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{directory}: adapters do not fit the model: {one_line(error, 160)}") from error
    own = {name for name, _ in adapters(adapted)}
    if other := sorted(own ^ {name for name, _ in found.weights}):
        where = "missing from the file" if other[0] in own else "not in the model"
        raise UserError(f"{directory}: {len(other)} adapter weights, {other[0]} first, {where}: are they another model's?")
    return adapted
