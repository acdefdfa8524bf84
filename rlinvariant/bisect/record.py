"""Record what one side computes, value by value, for the rows of one sequence.

A place is (layer, role): what the module of that name gave, or what the next module took where no module stands between. Both
sides run the same modules, so places align; vLLM's merged projections are split. Calls of `rlinvariant.ops` inside a module are
kept with its value: their rows of input, the very weights they were given, their settings. Rows are kept by absolute position.
"""

import inspect
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rlinvariant import ops

Place = tuple[int | None, str]
"""Layer, None outside any; role."""

QKV, GATE_UP = ("q projection", "k projection", "v projection"), ("gate projection", "up projection")
OUT = {  # last part of a module's name -> the role of what it gives
    "embed_tokens": ("embedding",), "rotary_emb": ("rope table",), "input_layernorm": ("input norm",),
    "q_proj": QKV[:1], "k_proj": QKV[1:2], "v_proj": QKV[2:], "qkv_proj": QKV, "o_proj": ("o projection",),
    "gate_proj": GATE_UP[:1], "up_proj": GATE_UP[1:], "gate_up_proj": GATE_UP, "down_proj": ("down projection",),
    "norm": ("final norm",), "lm_head": ("lm_head",), "logits_processor": ("lm_head",),
}  # fmt: skip
MERGED = {"self_attn": QKV, "mlp": GATE_UP}  # of a trainer's working copies, called by these modules
TAKEN = {  # -> the role of what it takes, and the op that gives that
    "o_proj": ("attention", "attention"), "mlp": ("residual and norm", "add_rms_norm"), "down_proj": ("swiglu", "swiglu"),
}  # fmt: skip
ROTATED = ("q norm and rotation", "k norm and rotation")
RECORDED = (
    "linear", "rms_norm", "add_rms_norm", "qk_norm_rope", "rope", "attention", "paged_attention", "swiglu", "swiglu_merged",
    "scale_logits", "sample",
)  # fmt: skip
SIGNATURES = {op: inspect.signature(getattr(ops, op)) for op in RECORDED}
WEIGHTS = ("weight", "bias", "q_weight", "k_weight")
SETTINGS = ("eps", "offset", "scale", "window", "softcap", "activation")  # what must be equal too
_HEADS = ("qk_norm_rope", "rope", "attention", "paged_attention")  # take [T, H, D], the others [*rows, D]


@dataclass(frozen=True)
class Call:
    """One call of an op, by the names of its arguments: the sequence's rows of inputs, weights as given, settings."""

    op: str
    inputs: dict[str, Tensor]
    weights: dict[str, Tensor | None]
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Block:
    """Rows of one place that were computed at once.

    Args:
        positions: of the rows in their sequence.
        value: [rows, D], on the CPU.
        inputs: [rows, K] that the module took, None if no module stands here.
        call: the op that gave the value, None if none did, or several.
        calls: names of all ops that were called on the way.
        module: whose output it is, None if no module's.
        together: how many rows were computed in that step, other sequences' included.
    """

    positions: list[int]
    value: Tensor
    inputs: Tensor | None
    call: Call | None
    module: Any
    together: int
    calls: tuple[str, ...] = ()


@dataclass
class _Frame:
    name: str
    module: Any
    inputs: Tensor | None = None
    kind: str = ""  # that the module was called with: a type of layer, each with a rope table of its own
    calls: list[Call] = field(default_factory=list)


class Recorder:
    """Of one side. `trace` has a place's blocks, places in the order of their first execution."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.trace: dict[Place, list[Block]] = {}
        self._stack: list[_Frame] = []
        self._last: dict[str, Call] = {}
        self._heads: tuple[list[int], list[int], int] = ([], [], 0)
        self._rows: tuple[list[int], list[int], int] = ([], [], 0)

    def expect(self, rows: Sequence[int], positions: Sequence[int], together: int) -> None:
        """Which rows of the coming forward belong to the sequence, of how many; where they stand in it."""
        self._rows = list(rows), list(positions), together

    def expect_logits(self, rows: Sequence[int], positions: Sequence[int], together: int) -> None:
        """The same of the lm_head's rows; in a trainer, counted over all its calls of one forward."""
        self._heads = list(rows), list(positions), together
        self._scored = 0

    @contextmanager
    def recording(self, attentions: Sequence[Any] = ()) -> Iterator["Recorder"]:
        """Hook every module of the model, the ops, and vLLM's attention layers, which nothing calls as modules."""
        with ExitStack() as stack:
            for name, module in self.model.named_modules():
                if name:
                    before, after = partial(self._before, name), partial(self._after, name)
                    stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
                    stack.callback(module.register_forward_hook(after, always_call=True).remove)
            for op in RECORDED:
                _replace(stack, ops, op, partial(self._op, op))
            head = sys.modules["rlinvariant.ops.token_logprobs"]  # the package's attribute of that name is the function
            _replace(stack, head, "linear", self._head)
            _replace(stack, head, "scale_logits", self._scaled)
            for layer, attention in enumerate(attentions):
                _replace(stack, attention, "forward", partial(self._attention, layer))
            yield self

    def _before(self, name: str, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        frame = _Frame(name, module, kind=next((f" of {x}" for x in (*args, *kwargs.values()) if isinstance(x, str)), ""))
        self._stack.append(frame)
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.is_floating_point()]
        which = self._heads if _last(name) in ("logits_processor", "lm_head") else self._rows
        if len(tensors) == 1:  # a fused norm of vLLM's takes the residual too
            frame.inputs = _pick(tensors[0].reshape(-1, tensors[0].shape[-1]), which)
        if _is_layer(name):
            self._last = {}
        if frame.inputs is not None and _layer(name) is not None and _last(name) in TAKEN:
            role, op = TAKEN[_last(name)]
            self._keep((_layer(name), role), frame.inputs, None, self._last.get(op), None, self._rows)

    def _after(self, name: str, module: Any, args: Any, output: Any) -> None:
        frame = self._stack.pop()
        while frame.module is not module:  # of a module that raised
            frame = self._stack.pop()
        leaf = next(module.children(), None) is None
        if output is None or not (leaf or _is_layer(name)) or _last(name) == "attn":
            return
        which = self._heads if _last(name) in ("logits_processor", "lm_head") else self._rows
        if isinstance(output, tuple):
            tensors = [x for x in output if isinstance(x, Tensor)]
            output = torch.cat(tensors, -1) if _last(name) == "rotary_emb" else tensors[0] if tensors else None
        if not isinstance(output, Tensor) or output.dim() < 2:
            return
        value = _pick(output.reshape(-1, output.shape[-1]), which)
        if value is None:
            return
        roles = ("layer output",) if _is_layer(name) else OUT.get(_last(name), (_last(name),))
        roles, sizes = tuple(role + frame.kind for role in roles), self.sizes(roles, value.shape[-1])
        calls = frame.calls if leaf else []
        self._split(_layer(name), roles, sizes, value, frame.inputs, calls, module, which)

    def sizes(self, roles: Sequence[str], width: int) -> list[int]:
        """Columns of each part of an output: of q, k, v, or of gate and up."""
        if len(roles) != len(QKV):
            return [width // len(roles)] * len(roles)
        config: Any = self.model.config
        config = config.get_text_config()
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        head = width // (heads + 2 * kv_heads)
        return [heads * head, kv_heads * head, kv_heads * head]

    def _split(self, layer, roles, sizes, value, inputs, calls, module, which) -> None:
        """One place for each part of a merged product, which is one call, or one for each part."""
        at = 0
        for i, (role, size) in enumerate(zip(roles, sizes, strict=True)):
            call = calls[i] if len(calls) == len(roles) else calls[0] if len(calls) == 1 else None
            if call is not None and call.op == "linear" and len(roles) > 1 and len(calls) == 1:
                part = {name: None if w is None else w[at : at + size] for name, w in call.weights.items()}
                call = Call(call.op, call.inputs, part)
            names = tuple(c.op for c in calls) if call is None else (call.op,)
            self._keep((layer, role), value[:, at : at + size], inputs, call, module, which, names)
            at += size

    def _keep(self, place, value, inputs, call, module, which, names: tuple[str, ...] = ()) -> None:
        calls = names or (() if call is None else (call.op,))
        self.trace.setdefault(place, []).append(Block(which[1], value, inputs, call, module, which[2], calls))

    def _op(self, op: str, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        frame = self._stack[-1] if self._stack else None
        of_heads = op in ("sample", "scale_logits") or (frame and _last(frame.name) == "logits_processor")
        which = self._heads if of_heads else self._rows
        if not which[0]:
            return output
        bound = SIGNATURES[op].bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        rows = {
            name: _pick(x.flatten(1) if op in _HEADS else x.reshape(-1, x.shape[-1]), which)
            for name, x in given.items()
            if name not in WEIGHTS and isinstance(x, Tensor) and x.is_floating_point() and x.dim() > 1
        }
        call = Call(
            op.removesuffix("_merged").removeprefix("paged_"),
            {name: x for name, x in rows.items() if x is not None},
            {name: given[name] for name in WEIGHTS if name in given},
            {name: given[name] for name in SETTINGS if name in given},
        )
        self._last[call.op] = call
        if op == "scale_logits" and any(call.settings.values()) and (value := _pick(output, which)) is not None:
            self._keep((None, "scaled logits"), value, call.inputs.get("logits"), call, None, which)
        if frame is None:
            return output
        frame.calls.append(call)
        layer, sizes = _layer(frame.name), getattr(getattr(frame.module, "product", None), "sizes", [])
        if op == "linear" and len(sizes) > 1:
            value = _pick(output.reshape(-1, output.shape[-1]), which)
            if value is not None:
                self._split(layer, MERGED[_last(frame.name)], sizes, value, call.inputs.get("x"), [call], None, which)
        if op == "attention":
            self._rotated(layer, *args[:2])
        return output

    def _attention(self, layer: int, original: Callable[..., Any], query: Tensor, key: Tensor, *args: Any, **kwargs: Any):
        self._rotated(layer, query.view(query.shape[0], -1), key.view(key.shape[0], -1))
        return original(query, key, *args, **kwargs)

    def _rotated(self, layer: int | None, q: Tensor, k: Tensor) -> None:
        """What attention takes, before vLLM's cache or a kernel has it."""
        for role, x in zip(ROTATED, (q, k), strict=True):
            if (value := _pick(x.flatten(1), self._rows)) is not None:
                self._keep((layer, role), value, None, self._last.get("qk_norm_rope"), None, self._rows)

    def _head(self, original: Callable[..., Any], x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The product inside `ops.token_logprobs`, a chunk of all scored tokens."""
        output = original(x, weight, bias)
        self._chunk = self._scored
        self._scored += len(x)
        self._logits("lm_head", "linear", x, output, {"weight": weight, "bias": bias}, {})
        return output

    def _scaled(self, original: Callable[..., Any], logits: Tensor, scale: float | None, softcap: float | None) -> Tensor:
        """What follows it there."""
        output = original(logits, scale, softcap)
        if scale is not None or softcap is not None:
            self._logits("scaled logits", "scale_logits", logits, output, {}, {"scale": scale, "softcap": softcap})
        return output

    def _logits(self, role: str, op: str, x: Tensor, output: Tensor, weights: dict[str, Any], settings: dict[str, Any]) -> None:
        at = [(r - self._chunk, p) for r, p in zip(*self._heads[:2], strict=True) if 0 <= r - self._chunk < len(x)]
        which = [r for r, _ in at], [p for _, p in at], len(x)
        taken, value = _pick(x, which), _pick(output, which)
        if taken is not None and value is not None:
            call = Call(op, {"logits" if op == "scale_logits" else "x": taken}, weights, settings)
            self._keep((None, role), value, taken, call, None, which)


def _replace(stack: ExitStack, owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    original, own = getattr(owner, name), name in vars(owner)
    setattr(owner, name, partial(wrapper, original))
    stack.callback(lambda: setattr(owner, name, original) if own else delattr(owner, name))


def _pick(x: Tensor, which: tuple[list[int], list[int], int]) -> Tensor | None:
    """A copy of the sequence's rows; None where x does not have that many rows."""
    rows, _, together = which
    if not rows or len(x) != together:
        return None
    return x.detach()[torch.tensor(rows, device=x.device)].cpu()


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _layer(name: str) -> int | None:
    found = re.search(r"(?:^|\.)(?:layers|h)\.(\d+)(?:\.|$)", name)
    return None if found is None else int(found[1])


def _is_layer(name: str) -> bool:
    return re.search(r"(?:^|\.)(?:layers|h)\.\d+$", name) is not None
