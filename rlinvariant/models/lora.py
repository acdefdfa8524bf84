"""PEFT's LoRA layers, with the adapter inside the product: their form, and what is refused.

PEFT is applied first, then `make_invariant`: the model stays PEFT's in all that TRL, saving and loading see, and only what a
layer computes is ours.

The names that sampler and trainer share for an adapter of `model.layers.0.mlp.up_proj` end in `.lora_A.weight` and
`.lora_B.weight`; B has PEFT's scaling in it.

A: [R, K] of an adapter, B: [N, R], for a weight [N, K]; R is the adapter's rank.
"""

import copy
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rlinvariant import bits, ops
from rlinvariant.errors import UserError, one_line
from rlinvariant.models import shards
from rlinvariant.runtime import random_state_kept
from rlinvariant.types import Untyped

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

A, B = "lora_A.weight", "lora_B.weight"
TAKEN = (
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "inference_mode"),
    *("r", "lora_alpha", "use_rslora", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    "init_lora_weights",
)
"""Fields of `peft.LoraConfig` that may have any value; of all others, and those of later releases, the default is expected."""


class LoraLinear(nn.Module):
    """Computes PEFT's `lora.Linear` by `ops.lora_linear`; with adapters disabled, the base layer alone."""

    base_layer: nn.Linear
    lora_A: Any
    lora_B: Any
    scaling: Any
    disable_adapters: bool
    active_adapters: list[str]

    def forward(self, x: Tensor, *args: Untyped, **kwargs: Untyped) -> Tensor:
        base, (a, b) = self.base_layer, in_use(self)
        if a is None or b is None:
            return ops.linear(x, base.weight, base.bias)
        return ops.lora_linear(x, base.weight, a, b, base.bias)


def in_use(layer: Untyped) -> tuple[Tensor | None, Tensor | None]:
    """Return A and B, with its scaling, of a layer's active adapter; None and None where it has none, or the base alone counts.

    That is so where adapters are disabled, or where PEFT has merged them into the base, as its own forward has it.
    """
    active = [name for name in layer.active_adapters if name in layer.lora_A] if is_lora(layer) else []
    if not active or layer.disable_adapters or layer.merged:
        return None, None
    (name,) = active
    return layer.lora_A[name].weight, scaled(layer, name)


def joined(x: Tensor, *layers: Untyped) -> Tensor:
    """Return, side by side, the products of linear layers that read the same x, some with adapters, as one product (CUDA)."""
    a, b = zip(*map(in_use, layers), strict=True)
    if not any(rows is not None for rows in a):
        return torch.cat([layer(x) for layer in layers], -1)
    own = [layer.base_layer if is_lora(layer) else layer for layer in layers]
    bias = None if own[0].bias is None else torch.cat([linear.bias for linear in own])
    return ops.joined_lora_linear(x, [linear.weight for linear in own], a, b, bias)


def scaled(layer: Untyped, name: str) -> Tensor:
    """Return B [N, R] of an adapter times its scaling, in B's dtype: what multiplies x A^T."""
    return layer.lora_B[name].weight * layer.scaling[name]


def is_lora(module: nn.Module) -> bool:
    """Return whether a module is a linear layer of PEFT's with an adapter."""
    return hasattr(module, "lora_A") and isinstance(getattr(module, "base_layer", None), nn.Linear)


def problems(config: Untyped) -> Iterator[str]:
    """Yield what of a `peft.LoraConfig` is not supported, each with its fix; names start with `peft_config.`."""
    if getattr(config, "peft_type", None) != "LORA":  # an enum of strings
        yield f"peft_config={type(config).__name__}: expected a peft.LoraConfig"
        return
    found = {field.name: (getattr(config, field.name), field) for field in fields(config) if field.name not in TAKEN}
    for key, (value, field) in found.items():
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if value != default and (value or default):  # None, [] and {} are one
            yield f"peft_config.{key}={value}: expected {default}: exact adapters have no {key.removeprefix('use_')}"
    if config.init_lora_weights not in (True, "gaussian"):
        yield f"peft_config.init_lora_weights={config.init_lora_weights}: expected True or gaussian"
    if config.inference_mode:
        yield "peft_config.inference_mode=True: expected False: nothing would be trained; load it with is_trainable=True"
    targets = {config.target_modules} if isinstance(config.target_modules, str) else set(config.target_modules or ())
    if outside := sorted(targets & {"embed_tokens", "lm_head", "wte", "embeddings"}):
        yield f"peft_config.target_modules has {outside[0]}: expected projections of the decoder alone; leave it out"


def fit_problems(said: str, adapter: Untyped, config: "PreTrainedConfig") -> list[str]:
    """Return what `applied` refuses of a `peft.LoraConfig` for the model of `config`."""
    try:
        ranks_for(said, adapter, config)
    except UserError as error:
        return str(error).splitlines()
    return []


def ranks_for(said: str, adapter: Untyped, config: "PreTrainedConfig") -> dict[str, int]:
    """Return `ranks` of the model of `config`, which is made without memory, with a `peft.LoraConfig`; raises as `applied`."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
        return ranks(applied(model, copy.deepcopy(adapter), 0, said))


def width_problem(said: str, rank: int, config: "PreTrainedConfig") -> str | None:
    """Refuse a rank beyond the width of the model that `config` describes, in a line that starts with `said`; else None."""
    width = config.get_text_config().hidden_size
    why = f"expected at most {width}, the model's width: A would have more numbers than the weight; lower it"
    return f"{said}r={rank}: {why}" if rank > width else None


def outside(model: nn.Module) -> list[str]:
    """Name what has an adapter that is no projection of the decoder: embeddings, the lm_head."""
    adapted = {plain(name): m for name, m in model.named_modules() if hasattr(m, "lora_A")}
    return [name for name, module in adapted.items() if not is_lora(module) or name.rpartition(".")[2] == "lm_head"]


def applied(model: "PreTrainedModel", config: Untyped, seed: int, said: str = "lora.") -> Untyped:
    """Return PEFT's model around a model, with adapters as a `peft.LoraConfig` says; their first values depend on the seed.

    Parameters of the model get no gradients from here on. Adapters are fp32, whatever the model is.

    Raises:
        UserError: the model is too narrow for the rank, or has not the projections; `said` and the setting begin it.
    """
    from peft import get_peft_model

    if wide := width_problem(said, config.r, model.config):
        raise UserError(wide)
    with random_state_kept(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")  # of an lm_head, which is refused below
        torch.manual_seed(seed)
        try:
            adapted = get_peft_model(model, config)
        except ValueError as error:  # of projections that the model has not, say
            raise UserError(f"{said}target_modules: {one_line(error)}") from error
    own = adapted.peft_config["default"]
    if own.base_model_name_or_path and os.path.isdir(own.base_model_name_or_path):  # whoever reads the files is elsewhere
        own.base_model_name_or_path = os.path.abspath(own.base_model_name_or_path)
    if found := outside(adapted):
        fix = f"set {said}target_modules=q_proj,k_proj,v_proj,o_proj" if ".experts" in found[0] else "leave it out"
        raise UserError(f"{said}target_modules takes {found[0]}: expected projections of the decoder alone; {fix}")
    names = set() if isinstance(config.target_modules, str) else set(config.target_modules or ())
    found = [plain(name) for name, module in adapted.named_modules() if is_lora(module)]
    if absent := sorted(x for x in names if not any(name == x or name.endswith(f".{x}") for name in found)):
        raise UserError(f"{said}target_modules has {absent[0]}: expected projections of the model, as {found[0]}")
    return adapted


def is_reference(model: nn.Module) -> bool:
    """Return whether a model computes as TRL's reference now: with its adapters off, or with the copy that TRL named `ref`."""
    layer: Any = next(filter(is_lora, model.modules()), None)
    return layer is not None and (layer.disable_adapters or layer.active_adapters == ["ref"])


@contextmanager
def counting(model: nn.Module, seed: int = 0) -> Iterator[None]:
    """Give every B random values for a while: with zeros, as they begin, who ignores an adapter computes the same."""
    weights = _of_b(model)
    before = [weight.detach().clone() for weight in weights]
    try:
        randomise(model, seed)
        yield
    finally:
        with torch.no_grad():
            for weight, values in zip(weights, before, strict=True):
                weight.copy_(values)


def randomise(model: nn.Module, seed: int) -> None:
    """Give every B values that depend on the seed alone; A's first values are random already."""
    with torch.no_grad(), random_state_kept():
        torch.manual_seed(seed)
        for weight in _of_b(model):
            shards.put(torch.randn(weight.shape) * 0.02, weight)


def _of_b(model: nn.Module) -> list[Tensor]:
    layers: list[Any] = [module for module in model.modules() if is_lora(module)]
    return [layer.lora_B[layer.active_adapters[0]].weight for layer in layers]


def add_reference(model: Untyped) -> None:
    """Keep a frozen copy of the adapter, named `ref`, which is the reference that TRL makes and looks for."""
    model.add_adapter("ref", model.peft_config["default"])
    with torch.no_grad():
        for name, weight in trained(model):
            model.get_parameter(name.replace(".default.", ".ref.")).copy_(weight)


def ranks(model: nn.Module) -> dict[str, int]:
    """Return the rank of each adapter by the name of its projection, as `Sampler` takes them; none: no PEFT."""
    return {name.removesuffix(f".{A}"): len(a) for name, a in adapters(model) if name.endswith(A)}


def pairs(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield names and tensors as `Sampler.sync` takes them: all parameters, those of adapters with PEFT's scaling in them."""
    yield from base(model)
    yield from adapters(model)


def adapters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield names and tensors of the active adapter of every layer, as the sampler takes them.

    A [R, K] as it is, and B [N, R] with its scaling; names are those of the Hugging Face model without PEFT.
    """
    for name, module in model.named_modules():
        if is_lora(module):
            layer: Any = module
            with torch.no_grad():
                (adapter,) = layer.active_adapters
                yield f"{plain(name)}.{A}", layer.lora_A[adapter].weight
                yield f"{plain(name)}.{B}", scaled(layer, adapter)


def moving(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield those of `pairs` that training moves: of a model in PEFT its adapters alone."""
    yield from adapters(model) if ranks(model) else base(model)


def without_peft(model: Untyped) -> Untyped:
    """Return the Hugging Face model, out of PEFT's if it is in one."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def base(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield names and tensors of all parameters that no adapter owns; names are those of the model without PEFT."""
    for name, weight in model.named_parameters():
        if not _of_adapter(name):
            yield plain(name), weight


def saved(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield names and parameters that are saved: all, a tied lm_head once; of a model in PEFT those of its adapters."""
    adapted = hasattr(model, "peft_config")
    return ((name, weight) for name, weight in model.named_parameters() if not adapted or _of_adapter(name))


def trained(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield PEFT's names and parameters of the adapter that is trained, and not of a reference's."""
    return ((name, weight) for name, weight in model.named_parameters() if _of_adapter(name) and ".default." in name)


def _of_adapter(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name


def share_base(model: nn.Module, memory: Mapping[str, Tensor]) -> set[str]:
    """Let the frozen weights of a model lie where the sampler has them, so that one device holds them once; return their names.

    Args:
        model: with adapters.
        memory: what `Sampler.memory_of` returned for `base(model)`. A weight with other bytes stays where it is.
    """
    shared = set()
    for name, weight in base(model):
        if name in memory and not weight.requires_grad and bits.same(weight, memory[name]):
            weight.data = memory[name]
            shared.add(name)
    return shared


def plain(name: str) -> str:
    """Return a module's or parameter's name without what PEFT puts around it."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def without(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yield pairs of adapters with zeros in every B: of a sampler that has none."""
    for name, weight in weights:
        yield name, torch.zeros_like(weight) if name.endswith(B) else weight


def merged(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield names and tensors of the model's parameters with W + B A in place of W, in W's dtype, rounded once: TRL's way.

    W + B A is summed in float32. These are the weights of `rlinvariant merge`, and another function than the adapters'.
    """
    own = _with_adapters(model)
    for name, weight in base(model):
        if name in own:
            a, b = own[name]
            weight = (weight.detach().float() + b @ a).to(weight.dtype)
        yield name, weight


def share_merged(model: nn.Module) -> float:
    """Return how much of the adapters is left in `merged` weights: 1 if nothing is lost, 0 if all is; 1 without any.

    share = sum (W' - W) B A / sum (B A)^2, over all weights, W' = W + B A as it is rounded to W's dtype
    """
    parameters, kept, whole = dict(base(model)), 0.0, 0.0
    for name, delta in deltas(model):
        before = parameters[name].detach().float()
        added = (before + delta).to(parameters[name].dtype).float() - before
        kept += (added * delta).sum(dtype=torch.float64).item()
        whole += delta.square().sum(dtype=torch.float64).item()
    return kept / whole if whole else 1.0


def deltas(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield B A [N, K], in float32, by the name of the weight that it is added to."""
    for name, (a, b) in _with_adapters(model).items():
        yield name, b @ a


def _with_adapters(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Return A and B, in float32, by the name of the weight that they belong to."""
    found = [(name, weight.detach().float()) for name, weight in adapters(model)]
    return {f"{name.removesuffix(A)}weight": (a, b) for (name, a), (_, b) in zip(found[::2], found[1::2], strict=True)}


def in_words(ranks: Mapping[str, int]) -> str:
    """Say which adapters there are: `LoRA adapters, r 16, on 4 projections: q_proj, v_proj`."""
    kinds = dict.fromkeys(name.rpartition(".")[2] for name in ranks)
    rank = "-".join(map(str, sorted({min(ranks.values()), max(ranks.values())})))
    return f"LoRA adapters, r {rank}, on {len(ranks)} projections: {', '.join(kinds)}"


def split(weights: Iterable[tuple[str, Tensor]]) -> tuple[list[tuple[str, Tensor]], list[tuple[str, Tensor]]]:
    """Return pairs of names and tensors as two lists: those of the model, and those of adapters."""
    of_adapters: list[tuple[str, Tensor]] = []
    return list(without_adapters(weights, of_adapters)), of_adapters


def without_adapters(
    weights: Iterable[tuple[str, Tensor]], of_adapters: list[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the pairs of the model, one at a time, as a file is read, and append those of adapters to `of_adapters`."""
    for pair in weights:
        if pair[0].endswith((A, B)):
            of_adapters.append(pair)
        else:
            yield pair
