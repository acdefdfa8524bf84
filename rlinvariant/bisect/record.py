"""Record what one side computes, value by value, for the rows of one sequence.

A value's place is (layer, role): it is the output of the module of that name, or the input of the next module where no module
gives it. Both sides run the same modules, so places align; vLLM's merged projections are split. Calls of `rlinvariant.ops`
inside a module are kept with the module's value: their rows of input, the weights that they were given, and their settings.
Rows are kept by absolute position.
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
from rlinvariant.models.lora import is_lora
from rlinvariant.ops.lora import side_by_side
from rlinvariant.types import Untyped

Place = tuple[int | None, str]
"""A layer, None outside any, and a role."""

LOGPROB_PLACE: Place = (None, "log-prob")
THRESHOLD_PLACE: Place = (None, "threshold")
QKV_ROLES = ("q projection", "k projection", "v projection")
GATE_UP_ROLES = ("gate projection", "up projection")
ROTATED_ROLES = ("q norm and rotation", "k norm and rotation")
OUTPUT_ROLES = {  # last part of a module's name -> roles of its output's parts
    "embed_tokens": ("embedding",),
    "rotary_emb": ("rope table",),
    "input_layernorm": ("input norm",),
    "q_proj": QKV_ROLES[:1],
    "k_proj": QKV_ROLES[1:2],
    "v_proj": QKV_ROLES[2:],
    "qkv_proj": QKV_ROLES,
    "o_proj": ("o projection",),
    "gate_proj": GATE_UP_ROLES[:1],
    "up_proj": GATE_UP_ROLES[1:],
    "gate_up_proj": GATE_UP_ROLES,
    "down_proj": ("down projection",),
    "norm": ("final norm",),
    "lm_head": ("lm_head",),
    "logits_processor": ("lm_head",),
}
MERGED_ROLES = {"self_attn": QKV_ROLES, "mlp": GATE_UP_ROLES}  # modules that call a trainer's merged product -> its parts
INPUT_ROLES = {  # last part of a module's name -> role of its input, and the op that gives the input
    "o_proj": ("attention", "attention"),
    "mlp": ("residual and norm", "add_rms_norm"),
    "down_proj": ("swiglu", "swiglu"),
}
HEAD_OPS = ("qk_norm_rope", "rope", "attention", "paged_attention")  # they take [T, H, D], the others [*rows, D]
WITH_ADAPTER = ("lora_linear", "joined_lora_linear", "wide_linear")
PRODUCTS = ("linear", *WITH_ADAPTER)
ROW_OPS = (*PRODUCTS, "rms_norm", "add_rms_norm", "swiglu", "swiglu_merged", "scale_logits", "sample")
OP_SIGNATURES = {op: inspect.signature(getattr(ops, op)) for op in (*ROW_OPS, *HEAD_OPS)}
WEIGHT_ARGUMENTS = ("weight", "weights", "bias", "q_weight", "k_weight", "a", "b")
SETTING_ARGUMENTS = ("eps", "offset", "scale", "window", "softcap", "activation")


Which = tuple[list[int], list[int], int]
"""Rows of a forward that belong to the sequence, their positions, and how many rows the forward has."""


@dataclass(frozen=True)
class Call:
    """Holds one call of an op: by argument name, the sequence's rows of the inputs, the weights as given, and the settings."""

    op: str
    inputs: dict[str, Tensor]
    weights: dict[str, Tensor | None]
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Block:
    """Holds the rows of one place that were computed at once.

    Args:
        positions: of the rows, in their sequence.
        value: [rows, D], on the CPU.
        inputs: [rows, K] that the module took; None if no module stands here.
        call: the op that gave the value; None if none did, or several.
        module: the module whose output the value is; None if there is none.
        together: rows computed in that step, other sequences' included.
        calls: names of all ops that were called on the way.
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
    kind: str = ""  # type of layer that the module was called with; each type has a rope table of its own
    calls: list[Call] = field(default_factory=list)


class Recorder:
    """Records one side. `trace` has the blocks of each place; the places are in the order of their first execution."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.trace: dict[Place, list[Block]] = {}
        self._stack: list[_Frame] = []
        self._last: dict[str, Call] = {}
        self._heads: Which = ([], [], 0)
        self._rows: Which = ([], [], 0)

    def expect(self, rows: Sequence[int], positions: Sequence[int], together: int) -> None:
        """Announce which rows of the coming forward, of how many, belong to the sequence, and at which positions."""
        self._rows = list(rows), list(positions), together

    def expect_logits(self, rows: Sequence[int], positions: Sequence[int], together: int) -> None:
        """Announce the same of the lm_head's rows; in a trainer, counted over all calls of the lm_head in one forward."""
        self._heads = list(rows), list(positions), together
        self._scored = 0

    @contextmanager
    def recording(self, attentions: Sequence[Untyped] = ()) -> Iterator["Recorder"]:
        """Hook every module of the model, the ops, and vLLM's attention layers, which nothing calls as modules."""
        with ExitStack() as stack:
            for name, module in self.model.named_modules():
                if name:
                    before, after = partial(self._before, name), partial(self._after, name)
                    stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
                    stack.callback(module.register_forward_hook(after, always_call=True).remove)
            for op in OP_SIGNATURES:
                _replace(stack, ops, op, partial(self._op, op))
            head = sys.modules["rlinvariant.ops.token_logprobs"]  # the package's attribute of that name is the function
            _replace(stack, head, "linear", self._head)
            _replace(stack, head, "scale_logits", self._scaled)
            _replace(stack, head, "rows_threshold", self._rows_threshold)
            _replace(stack, ops, "threshold", self._threshold)
            for layer, attention in enumerate(attentions):
                _replace(stack, attention, "forward", partial(self._attention, layer))
            yield self

    def _before(self, name: str, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        frame = _Frame(name, module, kind=next((f" of {x}" for x in (*args, *kwargs.values()) if isinstance(x, str)), ""))
        self._stack.append(frame)
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.is_floating_point()]
        which = self._heads if _last(name) in ("logits_processor", "lm_head") else self._rows
        if len(tensors) == 1:  # vLLM's fused norm takes the residual too
            frame.inputs = _pick(tensors[0].reshape(-1, tensors[0].shape[-1]), which)
        if _is_layer(name):
            self._last = {}
        if frame.inputs is not None and _layer(name) is not None and _last(name) in INPUT_ROLES:
            role, op = INPUT_ROLES[_last(name)]
            self._keep((_layer(name), role), frame.inputs, None, self._last.get(op), None, self._rows)

    def _after(self, name: str, module: Any, args: Any, output: Any) -> None:
        frame = self._stack.pop()
        while frame.module is not module:  # a module that raised left its frame
            frame = self._stack.pop()
        leaf = next(module.children(), None) is None or is_lora(module)
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
        roles = ("layer output",) if _is_layer(name) else OUTPUT_ROLES.get(_last(name), (_last(name),))
        roles, sizes = tuple(role + frame.kind for role in roles), self.sizes(roles, value.shape[-1])
        calls = frame.calls if leaf else []
        self._split(_layer(name), roles, sizes, value, frame.inputs, calls, module, which)

    def sizes(self, roles: Sequence[str], width: int) -> list[int]:
        """Return how many columns each part of an output has: q, k and v, or gate and up."""
        if len(roles) != len(QKV_ROLES):
            return [width // len(roles)] * len(roles)
        config: Any = self.model.config
        config = config.get_text_config()
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        head = width // (heads + 2 * kv_heads)
        return [heads * head, kv_heads * head, kv_heads * head]

    def _split(
        self,
        layer: int | None,
        roles: Sequence[str],
        sizes: Sequence[int],
        value: Tensor,
        inputs: Tensor | None,
        calls: Sequence[Call],
        module: nn.Module | None,
        which: Which,
    ) -> None:
        """Keep each part of an output at its place; a merged product is one call, or one for each part."""
        at = 0
        for i, (role, size) in enumerate(zip(roles, sizes, strict=True)):
            call = calls[i] if len(calls) == len(roles) else calls[0] if len(calls) == 1 else None
            if call is not None and call.op in ("linear", "lora_linear") and len(roles) > 1 and len(calls) == 1:
                part = {n: w if w is None or n == "a" else w[at : at + size] for n, w in call.weights.items()}
                call = Call(call.op, call.inputs, part)
            names = tuple(c.op for c in calls) if call is None else (call.op,)
            self._keep((layer, role), value[:, at : at + size], inputs, call, module, which, names)
            at += size

    def _keep(
        self,
        place: Place,
        value: Tensor,
        inputs: Tensor | None,
        call: Call | None,
        module: nn.Module | None,
        which: Which,
        names: tuple[str, ...] = (),
    ) -> None:
        calls = names or (() if call is None else (call.op,))
        self.trace.setdefault(place, []).append(Block(which[1], value, inputs, call, module, which[2], calls))

    def _op(self, op: str, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        frame = self._stack[-1] if self._stack else None
        of_heads = op in ("sample", "scale_logits") or (frame and _last(frame.name) == "logits_processor")
        which = self._heads if of_heads else self._rows
        if not which[0]:
            return output
        bound = OP_SIGNATURES[op].bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        rows = {
            name: _pick(x.flatten(1) if op in HEAD_OPS else x.reshape(-1, x.shape[-1]), which)
            for name, x in given.items()
            if name not in (*WEIGHT_ARGUMENTS, "packed") and isinstance(x, Tensor) and x.is_floating_point() and x.dim() > 1
        }
        call = Call(
            "lora_linear" if op in WITH_ADAPTER else op.removesuffix("_merged").removeprefix("paged_"),
            {name: x for name, x in rows.items() if x is not None},
            _with_adapter(op, given) or {name: given[name] for name in WEIGHT_ARGUMENTS if name in given},
            {name: given[name] for name in SETTING_ARGUMENTS if name in given},
        )
        self._last[call.op] = call
        if op == "scale_logits" and any(call.settings.values()) and (value := _pick(output, which)) is not None:
            self._keep((None, "scaled logits"), value, call.inputs.get("logits"), call, None, which)
        if frame is None:
            return output
        frame.calls.append(call)
        layer, sizes = _layer(frame.name), getattr(getattr(frame.module, "product", None), "sizes", [])
        if op == "joined_lora_linear":
            sizes = [len(weight) for weight in given["weights"]]
        if op in ("linear", "joined_lora_linear") and len(sizes) > 1:
            value = _pick(output.reshape(-1, output.shape[-1]), which)
            if value is not None:
                self._split(layer, MERGED_ROLES[_last(frame.name)], sizes, value, call.inputs.get("x"), [call], None, which)
        if op == "attention":
            self._rotated(layer, *args[:2])
        return output

    def _attention(self, layer: int, original: Callable[..., Any], query: Tensor, key: Tensor, *args: Any, **kwargs: Any):
        self._rotated(layer, query.view(query.shape[0], -1), key.view(key.shape[0], -1))
        return original(query, key, *args, **kwargs)

    def _rotated(self, layer: int | None, q: Tensor, k: Tensor) -> None:
        """Keep what attention takes, before vLLM's cache or a kernel has it."""
        for role, x in zip(ROTATED_ROLES, (q, k), strict=True):
            if (value := _pick(x.flatten(1), self._rows)) is not None:
                self._keep((layer, role), value, None, self._last.get("qk_norm_rope"), None, self._rows)

    def _head(self, original: Callable[..., Any], x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Run the product inside `ops.token_logprobs`, a chunk of all scored tokens, and keep its rows."""
        output = original(x, weight, bias)
        self._chunk = self._scored
        self._scored += len(x)
        self._logits("lm_head", "linear", x, output, {"weight": weight, "bias": bias}, {})
        return output

    def _scaled(self, original: Callable[..., Any], logits: Tensor, scale: float | None, softcap: float | None) -> Tensor:
        """Run the scaling that follows that product, and keep its rows."""
        output = original(logits, scale, softcap)
        if scale is not None or softcap is not None:
            self._logits("scaled logits", "scale_logits", logits, output, {}, {"scale": scale, "softcap": softcap})
        return output

    def _threshold(self, original: Callable[..., Any], logits: Tensor, *settings: Tensor) -> Tensor:
        """Run the op in the sampler, whose rows are of requests, and keep the sequence's row."""
        theta = original(logits, *settings)
        value = _pick(theta[:, None], self._heads)
        if value is not None:
            row = self._heads[0][0]
            self._keep_threshold(value, self._heads, [x[row].item() for x in settings])
        return theta

    def _rows_threshold(self, original: Callable[..., Any], logits: Tensor, t: Tensor, *settings: float) -> Tensor | None:
        """Run the op in the trainer, for a chunk of all scored tokens, and keep the sequence's rows."""
        theta = original(logits, t, *settings)
        which = self._in_chunk(len(logits))
        if theta is not None and (value := _pick(theta[:, None], which)) is not None:
            self._keep_threshold(value, which, [t[0].item(), *settings])
        return theta

    def _keep_threshold(self, value: Tensor, which: Which, settings: Sequence[float]) -> None:
        single = [x if isinstance(x, int) else fp32(x).item() for x in settings]  # as the op has them
        named: dict[str, Any] = dict(zip(("temperature", "top_k", "top_p", "min_p"), single, strict=True))
        self._keep(THRESHOLD_PLACE, value, None, Call("threshold", {}, {}, named), None, which)

    def _in_chunk(self, rows: int) -> Which:
        """Return which rows of a chunk of scored tokens belong to the sequence."""
        at = [(r - self._chunk, p) for r, p in zip(*self._heads[:2], strict=True) if 0 <= r - self._chunk < rows]
        return [r for r, _ in at], [p for _, p in at], rows

    def _logits(self, role: str, op: str, x: Tensor, output: Tensor, weights: dict[str, Any], settings: dict[str, Any]) -> None:
        which = self._in_chunk(len(x))
        taken, value = _pick(x, which), _pick(output, which)
        if taken is not None and value is not None:
            call = Call(op, {"logits" if op == "scale_logits" else "x": taken}, weights, settings)
            self._keep((None, role), value, taken, call, None, which)


def _with_adapter(op: str, given: dict[str, Any]) -> dict[str, Tensor | None]:
    """Return the weights of a product with an adapter inside it, alike for all ways to call one; of another op none."""
    if op not in WITH_ADAPTER:
        return {}
    x, a = given["x"], given["a"]
    if op == "wide_linear":
        weight, b = given["weight"].split([x.shape[-1], len(a)], -1)
    else:
        one = op == "lora_linear"
        weights, a, b = ([given["weight"]], [a], [given["b"]]) if one else (given["weights"], a, given["b"])
        with torch.no_grad():  # of the weights, which are large, a single one is not copied
            b, a = side_by_side([w[:, :0] for w in weights], a, b, x)
            weight = weights[0] if one else torch.cat(weights)
    return {"weight": weight, "bias": given["bias"], "a": a, "b": b}


def _replace(stack: ExitStack, owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """Put a wrapper, which gets the original first, in the place of an attribute until the stack is closed."""
    original, own = getattr(owner, name), name in vars(owner)
    setattr(owner, name, partial(wrapper, original))
    stack.callback(lambda: setattr(owner, name, original) if own else delattr(owner, name))


def _pick(x: Tensor, which: Which) -> Tensor | None:
    """Return a copy of the sequence's rows on the CPU; None where x does not have the expected number of rows."""
    rows, _, together = which
    if not rows or len(x) != together:
        return None
    return x.detach()[torch.tensor(rows, device=x.device)].cpu()


def fp32(values: float | Sequence[float]) -> Tensor:
    """Return numbers as a fp32 tensor."""
    return torch.tensor(values, dtype=torch.float32)


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _layer(name: str) -> int | None:
    found = re.search(r"(?:^|\.)(?:layers|h)\.(\d+)(?:\.|$)", name)
    return None if found is None else int(found[1])


def _is_layer(name: str) -> bool:
    return re.search(r"(?:^|\.)(?:layers|h)\.\d+$", name) is not None
