"""Make a function an opaque operator: one name, one implementation per device, one derivative.

Opaque means that torch.compile, CUDA graphs and vLLM's graph passes see a single node and cannot fuse, split or reorder
what is inside, so a compiled forward gives the bits of the eager one. (Backwards are Python and run eagerly.)

`torch.library.custom_op` does the same at 10 us a call (19 us with gradients); this costs 2 and 9, which matters for small
models on CPU. The derivative is an ordinary `torch.autograd.Function`, installed at the operator's autograd key.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

_LIBRARY = torch.library.Library("rlinvariant", "DEF")
_below_autograd = torch._C._AutoDispatchBelowAutograd


def require_dtype(op: str, x: torch.Tensor, dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32)) -> None:
    """Raise TypeError unless x, of any shape, has one of the dtypes."""
    if x.dtype not in dtypes:
        raise TypeError(f"{op}: expected {' or '.join(str(d)[6:] for d in dtypes)}, got {str(x.dtype)[6:]}")


def widened(x: torch.Tensor) -> torch.Tensor:
    """Return x, of any shape, in the precision that the references compute in: fp64 stays, anything narrower becomes fp32."""
    return x if x.dtype is torch.float64 else x.float()


def define(
    schema: str,
    *,
    cpu: Callable[..., object],
    cuda: str | Callable[..., object],
    fake: Callable[..., object],
    check: Callable[..., None] | None = None,
    save: Callable[..., None] | None = None,
    backward: Callable[..., object] | None = None,
) -> Callable[..., Any]:
    """Register `schema` ("name(Tensor x, ...) -> Tensor") and return the operator.

    Args:
        schema: PyTorch operator schema, without the namespace.
        cpu: the implementation for CPU tensors.
        cuda: the one for CUDA tensors, or "module.function" of rlinvariant.kernels, imported at the first call: not every
            machine has Triton.
        fake: output shapes and dtypes, for tracing.
        check: raises on inputs that do not fit together, on either device.
        save: `save(ctx, inputs, output)`, stores what the derivative needs; None for an operator without derivative.
        backward: `backward(ctx, *grads)`, one gradient or None per input.
    """
    name = schema.split("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, _checked(check, cpu), "CPU")
    _LIBRARY.impl(name, _checked(check, _at_first_call(cuda) if isinstance(cuda, str) else cuda), "CUDA")
    torch.library.register_fake(f"rlinvariant::{name}", fake, lib=_LIBRARY)
    operator = getattr(torch.ops.rlinvariant, name).default
    if save is None or backward is None:
        return operator

    def forward(ctx: Any, *inputs: Any) -> Any:
        with _below_autograd():
            output = operator(*inputs)
        save(ctx, inputs, output)
        return output

    @once_differentiable
    def differentiate(ctx: Any, *grads: Any) -> Any:
        return backward(ctx, *grads)

    function = type(
        name, (torch.autograd.Function,), {"forward": staticmethod(forward), "backward": staticmethod(differentiate)}
    )

    def autograd(*inputs: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs):
            return function.apply(*inputs)
        with _below_autograd():
            return operator(*inputs)

    _LIBRARY.impl(name, autograd, "Autograd")
    return operator


def _checked(check: Callable[..., None] | None, implementation: Callable[..., Any]) -> Callable[..., Any]:
    if check is None:
        return implementation

    def call(*inputs: Any) -> Any:
        check(*inputs)
        return implementation(*inputs)

    return call


def _at_first_call(path: str) -> Callable[..., Any]:
    found: list[Callable[..., Any]] = []

    def call(*inputs: Any) -> Any:
        if not found:
            module, name = path.split(".")
            found.append(getattr(importlib.import_module(f"rlinvariant.kernels.{module}"), name))
        return found[0](*inputs)

    return call
