"""The weights that a stock engine has in a layout of its own: packed anew after a sync, and what they should be.

A stock CPU engine multiplies by packed copies. Of two kinds its own reload leaves something else in their place: of an lm_head
that is the embedding it keeps the old copy, and of experts it puts the plain weights where the kernel expects packed ones.
"""

import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlinvariant.types import Untyped

OF_MIXTURES = (".mlp.gate.weight", ".experts.gate_up_proj", ".experts.down_proj")  # what a trainer has of a mixture
OF_EXPERTS = re.compile(r"(.*)\.experts\.(gate_up_proj|down_proj)")


def pack_anew(model: nn.Module) -> None:
    """Pack what a stock engine's reload has left unpacked."""
    head: Any = getattr(model, "lm_head", None)
    if hasattr(head, "cpu_linear"):
        head.quant_method.process_weights_after_loading(head)
    layer: Any
    for layer in model.modules():
        if (kernel := _cpu_kernel(layer)) is not None:
            kernel.process_weights_after_loading(layer)


def _cpu_kernel(layer: Untyped) -> Untyped:
    """Return the kernel of a stock CPU engine's experts, which has packed weights; None for any other layer."""
    kernel = getattr(getattr(getattr(layer, "quant_method", None), "moe_kernel", None), "fused_experts", None)
    return kernel if hasattr(kernel, "isa") else None


def place(model: nn.Module, name: str) -> str:
    """Return the name that vLLM's own model has for a parameter of transformers' mixture; any other name as it is."""
    if not name.endswith(OF_MIXTURES):
        return name
    try:
        model.get_parameter(name)
        return name
    except AttributeError:
        own = {own_name for own_name, _ in model.named_parameters()}
    renamed = name.replace(".mlp.", ".block_sparse_moe.")  # Mixtral's
    if (found := OF_EXPERTS.fullmatch(name)) is None:
        return renamed if renamed in own else name
    weight = "w13_weight" if found[2] == "gate_up_proj" else "w2_weight"
    paths = (f"{path.rpartition('.')[0]}.{inside}{weight}" for path in (name, renamed) for inside in ("", "routed_experts."))
    return next((path for path in paths if path in own), name)


def as_packed(layer: Untyped, have: Tensor, expected: Tensor) -> Tensor:
    """Return what a stock engine's experts should have in place of `expected`, [E, 2 I, D] or [E, D, I], in have's dtype."""
    expected, kernel = expected.to(have.dtype), _cpu_kernel(layer)
    if kernel is None:
        return expected
    from vllm._custom_ops import cpu_prepack_moe_weight

    missing = kernel._padded_intermediate_size(kernel.moe_config) - kernel.moe_config.intermediate_size_per_partition
    if missing and expected.shape[1] == kernel.moe_config.hidden_dim:
        expected = F.pad(expected, (0, missing))
    elif missing:
        expected = torch.cat([F.pad(half, (0, 0, 0, missing)) for half in expected.chunk(2, 1)], 1)
    return cpu_prepack_moe_weight(expected.contiguous(), kernel.isa)
