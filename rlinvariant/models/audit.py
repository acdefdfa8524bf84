"""Find what a model computes outside `rlinvariant.ops` and could therefore differ between sampler and trainer.

An operation may stay outside when IEEE 754 fixes its bits, whatever kernel runs it: moving data, casting, and the correctly
rounded + - * / sqrt on one element. Sums, products of matrices and transcendental functions are not among them: their bits
depend on shape, vector width and threads. Whatever is not known to be safe is reported.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from rlinvariant.models.modules import UnsupportedModel
from rlinvariant.models.patch import make_invariant
from rlinvariant.models.working import make_trainable
from rlinvariant.runtime import random_state_kept
from rlinvariant.types import Untyped

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

VIEWS = (
    *(
        "view",
        "unsafe_view",
        "reshape",
        "reshape_alias",
        "transpose",
        "t",
        "permute",
        "expand",
        "as_strided",
        "detach",
        "alias",
    ),
    *("slice", "select", "unsqueeze", "squeeze", "split", "split_with_sizes", "unbind", "narrow", "diagonal", "chunk"),
)
COPIES = (
    *("cat", "stack", "clone", "copy", "to_copy", "foreach_copy", "lift_fresh", "contiguous", "flip", "roll", "repeat"),
    "constant_pad_nd",
    *("index", "index_select", "index_put", "gather", "embedding", "where", "masked_fill", "masked_select"),
)
CONSTANTS = (
    *("empty", "empty_like", "empty_strided", "new_empty", "new_zeros", "new_ones", "new_full", "zeros", "zeros_like"),
    *("ones", "ones_like", "full", "full_like", "fill", "zero", "resize", "set"),
)
MOVES = frozenset((*VIEWS, *COPIES, *CONSTANTS))
ROUNDED = frozenset(
    ("add", "sub", "rsub", "mul", "div", "neg", "abs", "sqrt", "maximum", "minimum", "clamp", "clamp_min", "clamp_max", "relu")
)
COMPARES = frozenset(("eq", "ne", "lt", "le", "gt", "ge", "isnan", "isinf"))
OURS = ("rlinvariant",)


@dataclass(frozen=True)
class Finding:
    """Describes an operation outside ops: `op` as ATen names it, inside a module of class `module`."""

    op: str
    module: str


class _Watch(TorchDispatchMode):
    def __init__(self, allowed: tuple[str, ...]) -> None:
        super().__init__()
        self.allowed, self.findings, self.modules = allowed, {}, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not self._safe(func, out, args, kwargs or {}):
            where = self.modules[-1] if self.modules else "outside any module"
            self.findings[Finding(str(func), where)] = None
        return out

    def _safe(self, func, out, args, kwargs) -> bool:
        if func.namespace in self.allowed:
            return True
        if kwargs.get("alpha", 1) != 1 or kwargs.get("accumulate") or (len(args) > 3 and "index_put" in str(func) and args[3]):
            return False  # a product before the sum may or may not be fused; accumulating index_put is a sum
        name = func.__name__.split(".")[0].strip("_") if func.namespace == "aten" else ""
        if name in MOVES or name in ROUNDED or name in COMPARES:
            return True
        outs = [x for x in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(x, torch.Tensor)]
        return func.namespace in ("aten", "prim") and all(not (x.is_floating_point() or x.is_complex()) for x in outs)


@contextmanager
def watch(*also_allowed: str) -> Iterator[dict[Finding, None]]:
    """Collect findings of everything that runs inside. `also_allowed` names further operator namespaces."""
    mode = _Watch(OURS + also_allowed)

    def leave(*_) -> None:  # a hook that returned something would replace the module's output
        mode.modules.pop()

    push = nn.modules.module.register_module_forward_pre_hook(lambda m, _: mode.modules.append(type(m).__name__))
    pop = nn.modules.module.register_module_forward_hook(leave, always_call=True)
    try:
        with mode:
            yield mode.findings
    finally:
        push.remove()
        pop.remove()


def _probe(model: Any) -> dict[str, Any]:
    """Return a packed row of two sequences, of 4 and 5 tokens."""
    device = next(model.parameters()).device
    cu = torch.tensor([0, 4, 9], dtype=torch.int32, device=device)
    ids = torch.arange(9, device=device)[None] % model.config.vocab_size
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]], device=device)
    return {
        "input_ids": ids,
        "position_ids": positions,
        "cu_seq_lens_q": cu,
        "cu_seq_lens_k": cu,
        "max_length_q": 5,
        "max_length_k": 5,
    }


def two_layers(config: "PreTrainedConfig") -> "PreTrainedConfig":
    """Return a copy of a configuration with two layers, or with one of each kind (sliding or not, rotated or not)."""
    small, count = copy.deepcopy(config), config.num_hidden_layers
    per_layer = {k: v for k, v in vars(small).items() if isinstance(v, list) and len(v) == count}  # layer_types, say
    kinds = list(zip(*per_layer.values(), strict=True)) or [()] * count
    first = {kind: i for i, kind in reversed(list(enumerate(kinds)))}.values()
    keep = sorted({*first, 0, min(1, count - 1)} if len(first) < 2 else first)
    small.num_hidden_layers = len(keep)
    for name, values in per_layer.items():
        setattr(small, name, [values[i] for i in keep])
    return small


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def audit(model: "PreTrainedModel", run: Callable[[], object] | None = None) -> list[Finding]:
    """Run a model once, without gradients, and list every operation that no op owns. Empty means exact by structure.

    Args:
        model: what is run, and set to evaluate meanwhile.
        run: calls it; one packed forward of a causal LM to log-probs if not given.
    """
    inputs = _probe(model)

    def to_logprobs() -> None:
        model(**inputs, token_ids=inputs["input_ids"][0, 1:4], predicted_from=torch.arange(3), temperature=0.7)

    with _evaluating(model), watch() as findings:
        (run or to_logprobs)()
    return list(findings)


def require_exact(model: "PreTrainedModel", run: Callable[[], object] | None = None, what: str = "") -> None:
    """Raise UnsupportedModel unless `audit` finds nothing: every operation on the way to the result is owned.

    Args:
        model, run: as for `audit`.
        what: names the model in the message, before its class.
    """
    name = f"{what} {type(model).__name__}".strip()
    try:
        found = audit(model, run)
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        kinds = ", ".join(sorted({type(m).__name__ for m in model.modules()}))
        raise UnsupportedModel(f"{name} cannot run packed through ops ({error}); its modules: {kinds}") from error
    if found:
        listed = ", ".join(sorted(f"{f.op} in {f.module}" for f in found))
        raise UnsupportedModel(
            f"{name} computes outside rlinvariant.ops: {listed}; its bits would depend on the batch, "
            "and no rule in models/patch.py has it"
        )


def audit_config(config: Untyped, dtype: torch.dtype, device: torch.device, sharded: bool = False) -> str:
    """Run the trainer's checks on the first two layers of a model of this configuration, with random weights.

    Args:
        config: transformers' configuration of the model.
        dtype: of activations and weights.
        device: where the layers run.
        sharded: whether a trainer will cut the model over processes, and run it in the form that it has then.

    Returns:
        The name of the model's class.

    Raises:
        UnsupportedModel, UserError: what is not exact in it.
    """
    from transformers import AutoModelForCausalLM

    with random_state_kept(), torch.device(device):
        model = AutoModelForCausalLM.from_config(two_layers(config.get_text_config()), dtype=dtype)
    name = type(model).__name__
    require_exact(make_invariant(model, dtype))
    if sharded:
        require_exact(make_trainable(model, dtype, shards_on=device))
    del model
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return name
