"""Working copies of a trainer's weights on a GPU: cast once per forward, not at every use, and side by side where projections
read the same input.

A column of a product does not depend on the columns beside it (`ops.linear` on CUDA), so q, k and v as one product, or gate
and up, have the bits that they have alone, and that vLLM's merged layers have. What is saved is launches, which a short
micro-batch spends most of its time on: two thirds of the products and all but a few of the casts. It costs two bytes a
parameter. The masters stay parameters of their own modules: state_dict, optimizer and weight sync see no difference.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rlinvariant import ops
from rlinvariant.ops.linear import gradients


def use_working_copies(model: Any, dtype: torch.dtype) -> Any:
    """Make the linear layers of a patched model's decoder compute, in place, with copies that every forward of it refreshes.

    Args:
        model: a causal LM after `make_invariant`, fp32 parameters, on a CUDA device. The lm_head is left alone.
        dtype: of activations.
    """
    decoder, merged = model.base_model, set()
    groups: list[_Group] = []

    def group(*linears: Any) -> "_Group":
        groups.append(_Group(linears, dtype))
        merged.update(linears)
        return groups[-1]

    for module in list(decoder.modules()):
        if hasattr(module, "attend"):
            _swap(module, group(module.q_proj, module.k_proj, module.v_proj), forward=_attention)
        elif hasattr(module, "gate_and_up"):
            _swap(module, group(module.gate_proj, module.up_proj), forward=_mlp)
    for module in decoder.modules():
        if getattr(type(module), "stock", None) is nn.Linear and module not in merged:
            _swap(module, group(module), forward=lambda self, x: self.projections(x))
    copies = [copy for g in groups for copy in g.parts]
    masters = [linear.weight for g in groups for linear in g.linears]

    def refresh(*_: Any) -> None:
        with torch.no_grad():
            every: Any = torch._foreach_copy_  # pyright: ignore[reportPrivateImportUsage]
            every(copies, masters)

    decoder.register_forward_pre_hook(refresh)
    return model


def _swap(module: Any, projections: "_Group", **methods: Any) -> None:
    cls = type(module)
    module.__class__ = type(cls.__name__, (cls,), {"__module__": cls.__module__, "__qualname__": cls.__qualname__, **methods})
    module.projections = projections


def _attention(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    projections = self.projections
    return self.attend(*projections(hidden_states).split(projections.sizes, -1), *args, **kwargs)


def _mlp(self: Any, x: Tensor) -> Tensor:
    return self.down_proj(ops.swiglu_merged(self.projections(x)))


class _Group:
    """Linear layers that read the same input, and one copy of their weights, [sum of N, K]."""

    def __init__(self, linears: tuple[Any, ...], dtype: torch.dtype) -> None:
        self.linears, self.sizes = linears, [linear.weight.shape[0] for linear in linears]
        first = linears[0].weight
        self.copy = torch.empty(sum(self.sizes), first.shape[1], dtype=dtype, device=first.device)
        # An alias, whose writes autograd does not count: a second forward before a backward writes the same values again,
        # and if the weights have moved in between, the masters that the product saves say so.
        self.parts = self.copy.data.split(self.sizes)

    def __call__(self, x: Tensor) -> Tensor:
        """x [*, K] -> [*, sum of N]."""
        biases = [linear.bias for linear in self.linears if linear.bias is not None]
        bias = torch.cat([b.to(x.dtype) for b in biases]) if biases else None
        return _Product.apply(x, self.copy, bias, *(linear.weight for linear in self.linears))


class _Product(torch.autograd.Function):
    """`ops.linear` by a copy, with gradients for the masters that it was made from: fp32, as the matrix unit adds them up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, copy: Tensor, bias: Tensor | None, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(x, copy, *weights)
        ctx.bias = None if bias is None else bias.dtype
        return ops.linear(x, copy, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, copy, *weights = ctx.saved_tensors
        in_x, _, in_bias, *in_weights = ctx.needs_input_grad
        dx, dw, db = gradients(dy, x, copy, (in_x, any(in_weights), in_bias), weights[0].dtype, ctx.bias)
        parts = [None] * len(weights) if dw is None else dw.split([len(w) for w in weights])
        return dx, None, db, *(part if need else None for part, need in zip(parts, in_weights, strict=True))
