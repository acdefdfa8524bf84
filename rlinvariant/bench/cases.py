"""One op on one set of inputs, ours against another's: numbers and bits first, then time."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from rlinvariant import bits, ops
from rlinvariant.bench import gpu
from rlinvariant.bench.measure import Row

REFERENCE_ROWS = 9  # how many first rows are compared with the reference, which is slow
FIRST_ROWS = (1, 2, 3, 9, 17, 257)  # how many first rows are computed apart from the others; also half of all and one
TEMPERATURE, TRUNCATION = 0.7, (50, 0.95, 0.01)  # top_k, top_p, min_p

Op = Callable[..., Tensor | tuple[Tensor, ...]]


@dataclass(frozen=True)
class Case:
    """Holds an op of ours, its reference `X_ref`, and another's op, with the inputs that all three get."""

    name: str
    ours: Op
    reference: Op
    stock: Op
    inputs: tuple[Tensor, ...]
    sliced: int  # how many of the inputs have a row per token or sequence: the first ones
    unit: int = 1  # consecutive rows that belong together
    gradients: tuple[int, ...] = ()  # inputs to differentiate by; none: forward alone
    same: bool = True  # both compute the same numbers, up to rounding
    target: float | None = None


def check(case: Case) -> dict[str, bool | None]:
    """Return {"ours": ..., "stock": ...}: whether each side's rows come out the same alone and in the whole batch.

    Raises:
        AssertionError: ours does not compute what its reference and the stock op do.
    """
    with torch.no_grad():
        some = _first(case, min(REFERENCE_ROWS, len(case.inputs[0]) // case.unit))
        _assert_close(_fresh(case.ours, some), _fresh(case.reference, some), f"{case.name}: ours, reference")
        full = [_fresh(f, case.inputs) for f in (case.ours, case.stock)]
        if case.same:
            _assert_close(full[0], full[1], f"{case.name}: ours, stock")
        ours, stock = (_invariant(f, case, out) for f, out in zip((case.ours, case.stock), full, strict=True))
    return {"ours": ours, "stock": stock}


def call(function: Op, inputs: tuple[Tensor, ...], gradients: tuple[int, ...]) -> Callable[[], object]:
    """Return what is timed: the function, or the function and its gradients."""
    if not gradients:
        return lambda: _no_grad(function, inputs)
    leaves = [x.detach().requires_grad_(i in gradients) for i, x in enumerate(inputs)]
    wanted = [leaves[i] for i in gradients]
    upstream = [torch.randn_like(x) for x in as_tuple(function(*leaves))]
    return lambda: torch.autograd.grad(as_tuple(function(*leaves)), wanted, upstream)


def gpu_row(bench: str, case: Case, seconds: float, graphs: bool = True) -> Row:
    """Check the bits, then time with as many copies of the inputs as keep each out of the cache, up to a graph's launches."""
    equal = check(case)
    count = min(gpu.GRAPH_LAUNCHES, gpu.copies(sum(x.numel() * x.element_size() for x in case.inputs))) if graphs else 1
    sides = [
        [call(f, tuple(x.clone() for x in case.inputs), case.gradients) for _ in range(count)] for f in (case.ours, case.stock)
    ]
    return Row(
        bench=bench, case=case.name, target=case.target, bits_equal=equal, **gpu.pair(sides[0], sides[1], seconds, graphs)
    )


def drawn_reference(logits: Tensor, temperature: Tensor, seeds: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the tokens that `ops.sample` draws, and their log-probs and ranks by `ops.log_softmax_ref`, each [R].

    `ops.sample_ref` would now and then draw another token, where the random number lies on the edge between two.
    """
    tokens = ops.sample(logits, temperature, seeds, positions)[0]
    picked = tokens[:, None]
    logprobs = ops.log_softmax_ref(logits, temperature).gather(1, picked)[:, 0]
    return tokens, logprobs, (logits > logits.gather(1, picked)).sum(1)


def truncated_cases(
    hidden: Tensor, weight: Tensor, name: Callable[[str, str], str], truncation: tuple[int, float, float] = TRUNCATION
) -> Iterator[Case]:
    """Make a case of `ops.threshold` against vLLM's own function, and one of the head with it against the head without it.

    The second says what truncated sampling costs in the trainer; the sampler's head costs the same, and draws besides.

    Args:
        hidden: [R, D], bf16.
        weight: [V, D] of the lm_head.
        name: makes a case's name of the op's and of the shape's.
        truncation: top_k, top_p and min_p of every row.
    """
    rows, vocab, device = len(hidden), len(weight), hidden.device
    settings = [torch.full((rows,), x, device=device) for x in (TEMPERATURE, *truncation)]
    logits, ids = ops.linear(hidden, weight.to(hidden.dtype)), torch.randint(vocab, (rows,), device=device)

    def stock(logits: Tensor, t: Tensor, k: Tensor, p: Tensor, m: Tensor) -> Tensor:
        from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p_pytorch

        x = logits.float() / t[:, None]
        probabilities = x.softmax(-1)
        x = x.masked_fill(probabilities < probabilities.amax(-1, keepdim=True) * m[:, None], -torch.inf)
        kept = apply_top_k_top_p_pytorch(x, torch.where(k > 0, k, vocab), p) > -torch.inf
        return torch.where(kept, logits.float(), torch.inf).amin(-1)

    def scored(op: Op, hidden: Tensor, ids: Tensor, weight: Tensor) -> Tensor | tuple[Tensor, ...]:
        return op(hidden, weight, ids, TEMPERATURE, None, None, *truncation)

    def whole(hidden: Tensor, ids: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return ops.token_logprobs(hidden, weight, ids, TEMPERATURE)

    inputs = (logits, *settings)
    yield Case(name("threshold (stock: vLLM's)", f"{rows} x {vocab}"), ops.threshold, ops.threshold_ref, stock, inputs, 5)
    ours, ref = (partial(scored, op) for op in (ops.token_logprobs, ops.token_logprobs_ref))
    shape = f"{rows} x {hidden.shape[1]} -> {vocab}"
    both = name("token_logprobs with top-p (stock: ours without)", shape)
    yield Case(both, ours, ref, whole, (hidden, ids, weight), 2, same=False)


def as_tuple(x: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return x if isinstance(x, tuple) else (x,)


def _invariant(function: Op, case: Case, full: tuple[Tensor, ...]) -> bool:
    """Return whether the first rows come out the same alone and in the whole batch."""
    count = len(case.inputs[0]) // case.unit
    for k in sorted({*FIRST_ROWS, count // 2 + 1} & set(range(1, count))):
        part = _fresh(function, _first(case, k))
        if not all(bits.same(some, whole[: k * case.unit]) for some, whole in zip(part, full, strict=True)):
            return False
    return True


def _first(case: Case, count: int) -> tuple[Tensor, ...]:
    """Return the inputs of the first rows alone, `count` times `case.unit`."""
    return *(x[: count * case.unit] for x in case.inputs[: case.sliced]), *case.inputs[case.sliced :]


def _assert_close(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...], what: str) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=0.05, atol=0.05, msg=lambda m: f"{what}: {m}")


def _fresh(function: Op, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Call a function on copies of the inputs: some of the others' kernels write where they read."""
    return as_tuple(function(*(x.clone() for x in inputs)))


def _no_grad(function: Op, inputs: tuple[Tensor, ...]) -> object:
    with torch.no_grad():
        return function(*inputs)
