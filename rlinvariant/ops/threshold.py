"""Truncated sampling: the smallest logit of a row that top-k, top-p and min-p keep.

All three keep the likeliest tokens, so a row's kept set is `logit >= theta`, and sampler and trainer agree on it if they agree
on one number. Probabilities are integers here, since integer sums have no order that could differ.

R: rows, V: vocabulary.
"""

import torch
from torch import Tensor

from rlinvariant.kernels import cpu
from rlinvariant.ops.register import define, require_dtype

UNIT = 40  # the likeliest token's mass is 2**40
LONGEST = 2**22 - 1  # tokens of a row: their masses fit 62 bits, and a bound above them (kernels/threshold.py) 63
_LOG2E = 1.44269504
_COEFFICIENTS = (1.5353362e-4, 1.3398875e-3, 9.618437e-3, 5.5503324e-2, 2.4022648e-1, 6.931472e-1, 1.0)


def keeps_all(top_k: int, top_p: float, min_p: float) -> bool:
    """Say whether the settings leave a distribution as it is."""
    return top_k <= 0 and top_p == 1.0 and min_p == 0.0


def threshold(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Find theta: the tokens that a request may draw are those with `logit >= theta`.

        mass = floor(2^40 exp((logit - max logit) / temperature))
        min-p keeps what is at least as large as the smallest logit with mass >= min_p 2^40;
        top-k keeps the k largest, and what equals the last of them;
        top-p keeps the largest that have, together, at least ceil(top_p * mass of what min-p and top-k keep), and all that
        equal the last of them

    Args:
        logits: [R, V], bf16 or fp32, V at most LONGEST; of any value: a row with NaN or +inf keeps all its tokens.
        temperature: [R] fp32, >= 0; at 0, the greedy row, all tokens are kept, and below 4.3e-39, whose reciprocal overflows.
        top_k: [R] int64; 0 or less, or V or more: no limit.
        top_p: [R] fp32, in (0, 1]; 1: no limit, also for tokens without mass.
        min_p: [R] fp32, in [0, 1]; 0: no limit.

    Returns:
        theta, [R] fp32: one of the row's logits, or -inf where all are kept. It has no gradient: the kept set is a constant.

    Raises:
        ValueError: shapes, dtypes or (on a CPU) values are not as above.

    Order: none. Masses are integers and counts are, and a sum of integers is the same in any order and any tiling.
    Bits: theta[r] depends on row r of each input alone, and is the same on CPU and GPU: masses are made by multiplications and
        additions in fp32, each rounded. They are within 1 and 2^-19 of themselves of the true ones, so shares within V 2^-40 +
        2^-18: the kept set is that of exact sums unless top_p lies so near to the share at which a group begins.
    Ref: Holtzman et al. 2020, arXiv:1904.09751 (top-p); Fan et al. 2018, arXiv:1805.04833 (top-k); Nguyen et al. 2024,
        arXiv:2407.01082 (min-p). The order of the three is vLLM's (v1/sample/sampler.py), which drops some tokens of a group of
        equals at the edge of top-p, by their place in a sort.
    """
    return _threshold(logits, temperature, top_k, top_p, min_p)


def rows_threshold(logits: Tensor, temperature: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor | None:
    """Compute `threshold` with the same settings for every row; None where they keep all."""
    if keeps_all(top_k, top_p, min_p):
        return None
    k_R = torch.full(temperature.shape, top_k, dtype=torch.int64, device=temperature.device)
    return threshold(logits, temperature, k_R, torch.full_like(temperature, top_p), torch.full_like(temperature, min_p))


def threshold_ref(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Compute `threshold` in plain PyTorch, by sorting, for finite rows: the same bits."""
    rows, vocab = logits.shape
    x_RV, order_RV = (logits.float() + 0.0).sort(-1, descending=True)
    mass_RV = masses_ref(logits.float() + 0.0, temperature).gather(1, order_RV)
    least_R = (min_p.double() * 2.0**UNIT).ceil().long()
    theta_R = torch.where(mass_RV >= least_R[:, None], x_RV, torch.inf).amin(-1)
    theta_R = torch.where(min_p > 0, theta_R, -torch.inf)
    limited = (top_k > 0) & (top_k < vocab)
    kth_R = x_RV.gather(1, (top_k.clamp(1, vocab) - 1)[:, None])[:, 0]
    theta_R = torch.maximum(theta_R, torch.where(limited, kth_R, -torch.inf))
    left_RV = torch.where(x_RV >= theta_R[:, None], mass_RV, 0)
    need_R = (top_p.double() * left_RV.sum(-1).double()).ceil().long().clamp(min=1)
    first_R = (left_RV.cumsum(-1) >= need_R[:, None]).int().argmax(-1)
    last_R = x_RV.gather(1, first_R[:, None])[:, 0]
    theta_R = torch.maximum(theta_R, torch.where(top_p < 1, last_R, -torch.inf))
    return torch.where((_LOG2E / temperature).isfinite(), theta_R, -torch.inf)


def masses_ref(logits: Tensor, temperature: Tensor) -> Tensor:
    """Compute the integer masses of `threshold`, [R, V] int64, in plain PyTorch; a temperature of 0 counts as 1."""
    t_R1 = torch.where(temperature == 0, 1.0, temperature).float()[:, None]
    gap_RV = (logits.float() - logits.float().amax(-1, keepdim=True)) * (torch.full_like(t_R1, _LOG2E) / t_R1)
    gap_RV = torch.where(gap_RV > -44, gap_RV, -44.0)
    whole_RV = (gap_RV + 12582912.0) - 12582912.0
    rest_RV = gap_RV - whole_RV
    p_RV = torch.full_like(rest_RV, _COEFFICIENTS[0])
    for c in _COEFFICIENTS[1:]:
        p_RV = p_RV * rest_RV
        p_RV = p_RV + torch.tensor(c, dtype=torch.float32, device=p_RV.device)
    return torch.ldexp(p_RV, whole_RV.int() + UNIT).long()


def _check(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> None:
    require_dtype("threshold", logits)
    rows = logits.shape[0]
    per_row = temperature.shape == top_k.shape == top_p.shape == min_p.shape == (rows,)
    floats = temperature.dtype == top_p.dtype == min_p.dtype == torch.float32
    if logits.dim() != 2 or logits.shape[1] > LONGEST or not per_row or not floats or top_k.dtype is not torch.int64:
        raise ValueError(
            f"threshold: expected temperature, top_p, min_p fp32 and top_k int64, each of [{rows}], and V at most {LONGEST}"
        )
    if logits.is_cuda:  # looking would wait for it at every step
        return
    if not bool((top_p > 0).all() & (top_p <= 1).all() & (min_p >= 0).all() & (min_p <= 1).all()):
        raise ValueError("threshold: expected top_p in (0, 1] and min_p in [0, 1]")


def _threshold_cpu(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    theta = torch.empty(len(logits), dtype=torch.float32)
    inputs = [x.contiguous() for x in (logits, temperature, top_k, top_p, min_p)]
    cpu.call("threshold", *inputs, theta, *logits.shape, cpu.is_bf16(logits))
    return theta


_threshold = define(
    "threshold(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p) -> Tensor",
    cpu=_threshold_cpu,
    cuda="threshold.threshold",
    fake=lambda x, t, k, p, m: t.new_empty(t.shape),
    check=_check,
)
