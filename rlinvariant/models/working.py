"""A trainer's model, and on a GPU its working copies: weights cast once per forward, not at every use, and side by side where
projections read the same input.

A column of a product does not depend on the columns beside it (`ops.linear` on CUDA), so q, k and v as one product, or gate
and up, have the bits that they have alone, and that vLLM's merged layers have. What is saved is launches, which a short
micro-batch spends most of its time on: three of seven products a layer, and all casts but a few. It costs two bytes a
parameter. The masters stay parameters of their own modules: state_dict, optimizer and weight sync see no difference.

Gradients do depend on who shares a product: dx is one sum over all of its columns, or a sum for each projection, rounded, and
then added. Weights in shards, which are whole only while their layer computes, are therefore joined in the same way, at each
use, and train what whole ones do. So are frozen ones with LoRA adapters, of which no copy is kept.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rlinvariant import ops
from rlinvariant.models import lora
from rlinvariant.models.lora import is_lora
from rlinvariant.models.modules import MLP, Attention, Linear, MergedAttention, MergedMLP, become
from rlinvariant.models.patch import make_invariant
from rlinvariant.ops.linear import gradients
from rlinvariant.ops.lora import is_joinable

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def make_trainable(
    model: "PreTrainedModel", dtype: torch.dtype = torch.bfloat16, shards_on: torch.device | None = None
) -> "PreTrainedModel":
    """Do what `make_invariant` does, and what a trainer adds on a GPU. A proof must run what `InvariantGRPOTrainer` trains.

    `shards_on` is the device of the shards that a model, still on the host, will be cut into; None: it stays whole.
    """
    make_invariant(model, dtype)
    device = shards_on or next(model.parameters()).device
    if any(map(is_lora, model.modules())):
        return join_adapted(model) if device.type == "cuda" else model
    return use_working_copies(model, dtype, kept=shards_on is None) if device.type == "cuda" else model


def use_working_copies(model: "PreTrainedModel", dtype: torch.dtype, kept: bool = True) -> "PreTrainedModel":
    """Make the linear layers of a patched model's decoder compute, in place, with copies that every forward of it refreshes.

    Args:
        model: a causal LM after `make_invariant`, fp32 parameters, on its device. The lm_head is left alone.
        dtype: of activations.
        kept: or copies are made at each use, forward and backward, of those projections that share a product: for shards.

    A layer called by itself, outside the decoder's forward, uses the weights that the last forward saw.
    """
    decoder = model.base_model
    if any(isinstance(hook, _Refresh) for hook in decoder._forward_pre_hooks.values()):
        return model
    refresh = _Refresh(kept)
    for module in list(decoder.modules()):
        form = getattr(type(module), "form", None)
        if form is Attention and _alike(module.q_proj, module.k_proj, module.v_proj):
            become(module, _WorkingAttention, product=refresh.add(dtype, module.q_proj, module.k_proj, module.v_proj))
        elif form is MLP and _alike(module.gate_proj, module.up_proj):
            become(module, _WorkingMLP, product=refresh.add(dtype, module.gate_proj, module.up_proj))
    if not kept:
        return model
    merged = {linear for linears, _ in refresh.groups for linear in linears}
    for module in decoder.modules():
        if getattr(type(module), "form", None) is Linear and module not in merged:
            become(module, _WorkingLinear, product=refresh.add(dtype, module))
    decoder.register_forward_pre_hook(refresh)
    refresh()
    return model


def join_adapted(model: "PreTrainedModel") -> "PreTrainedModel":
    """Make q, k and v of a patched model one product, in place, and gate and up, where one of them has a LoRA adapter.

    The base has the dtype of activations and is copied for a product, not kept: so for whole models and for shards.
    """
    for module in list(model.modules()):
        form = getattr(type(module), "form", None)
        if form is Attention and _adapted(module.q_proj, module.k_proj, module.v_proj):
            become(module, _AdaptedAttention)
        elif form is MLP and _adapted(module.gate_proj, module.up_proj):
            become(module, _AdaptedMLP)
    return model


def _adapted(*linears: Any) -> bool:
    own = [getattr(linear, "base_layer", linear) for linear in linears]
    return any(map(is_lora, linears)) and _alike(*own) and is_joinable(own[0].in_features)


def _alike(*linears: Any) -> bool:
    """Return whether all of the layers have a bias, or none."""
    return len({linear.bias is None for linear in linears}) == 1


class _AdaptedAttention(MergedAttention):
    """Computes attention with the base and the adapters of its projections in one product."""

    def qkv_proj(self, x: Tensor) -> Tensor:
        return lora.joined(x, self.q_proj, self.k_proj, self.v_proj)

    def parts(self, qkv: Tensor) -> tuple[Tensor, ...]:
        layers: Any = self.q_proj, self.k_proj, self.v_proj
        return qkv.split([layer.out_features for layer in layers], -1)


class _AdaptedMLP(MergedMLP):
    """Computes an MLP with gate and up, base and adapters, in one product."""

    gate_proj: nn.Module
    up_proj: nn.Module

    def gate_up_proj(self, x: Tensor) -> Tensor:
        return lora.joined(x, self.gate_proj, self.up_proj)


class _WorkingLinear(nn.Module):
    product: "_Product"

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self)


class _WorkingAttention(MergedAttention):
    """Computes attention with one projection, made of three: their names stay for whoever saves or syncs the weights."""

    product: "_Product"

    def qkv_proj(self, x: Tensor) -> Tensor:
        return self.product(x, self.q_proj, self.k_proj, self.v_proj)

    def parts(self, qkv: Tensor) -> tuple[Tensor, ...]:
        return qkv.split(self.product.sizes, -1)


class _WorkingMLP(MergedMLP):
    """Computes an MLP with gate and up in one projection, made of two."""

    product: "_Product"
    gate_proj: nn.Module
    up_proj: nn.Module

    def gate_up_proj(self, x: Tensor) -> Tensor:
        return self.product(x, self.gate_proj, self.up_proj)


class _Refresh:
    """Runs before the decoder. As an object, it lets a deep copy of the model refresh its own copies from its own masters."""

    def __init__(self, kept: bool) -> None:
        self.groups: list[tuple[tuple[Any, ...], _Product]] = []
        self._kept = kept

    def add(self, dtype: torch.dtype, *linears: Any) -> "_Product":
        product = _Product([linear.weight for linear in linears], dtype, self._kept)
        self.groups.append((linears, product))
        return product

    def __call__(self, *_: Any) -> None:
        masters = [linear.weight for linears, _ in self.groups for linear in linears]  # as they are now: they may be replaced
        with torch.no_grad():
            every: Any = torch._foreach_copy_  # pyright: ignore[reportPrivateImportUsage]
            every([part for _, product in self.groups for part in product.parts], masters)


class _Product:
    """Computes the product with one copy [sum of N, K] of the weights of linear layers that read the same input."""

    def __init__(self, weights: list[Tensor], dtype: torch.dtype, kept: bool) -> None:
        self.sizes = [len(weight) for weight in weights]
        self.copy = _empty(weights, dtype) if kept else None
        # An alias, whose writes autograd does not count: a second forward before a backward writes the same values again,
        # and if an optimizer has moved the weights in between, the masters that `_Linear` saves say so.
        self.parts = () if self.copy is None else self.copy.data.split(self.sizes)

    def __call__(self, x: Tensor, *linears: Any) -> Tensor:
        """Multiply x [*, K] by the copy; the result is [*, sum of N]."""
        bias = None if linears[0].bias is None else torch.cat([linear.bias for linear in linears])
        return _Linear.apply(x, self.copy, bias, *(linear.weight for linear in linears))


class _Linear(torch.autograd.Function):
    """Runs `ops.linear` by a copy, or None: one that is made anew, forward and backward.

    Gradients are for the copy's masters: fp32, as the matrix unit adds them up.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, copy: Tensor | None, bias: Tensor | None, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(x, copy, *weights)
        ctx.bias = None if bias is None else bias.dtype
        return ops.linear(x, _joined(weights, x.dtype) if copy is None else copy, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, copy, *weights = ctx.saved_tensors
        copy = _joined(weights, x.dtype) if copy is None else copy
        in_x, _, in_bias, *in_weights = ctx.needs_input_grad
        dx, dw, db = gradients(dy, x, copy, (in_x, any(in_weights), in_bias), weights[0].dtype, ctx.bias)
        parts = [None] * len(weights) if dw is None else dw.split([len(w) for w in weights])
        return dx, None, db, *(part if need else None for part, need in zip(parts, in_weights, strict=True))


def _empty(weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.empty(sum(map(len, weights)), weights[0].shape[1], dtype=dtype, device=weights[0].device)


def _joined(weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    copy = _empty(weights, dtype)
    torch._foreach_copy_(list(copy.split([len(w) for w in weights])), list(weights))  # pyright: ignore
    return copy
