"""Operands of a mixture's ops in which another order of anything shows: ordinary ones hide it behind a rounding to bf16.

R: rows (tokens), S: slots of a row, E: experts, D: width of a row, I: width inside an expert.
"""

import torch
from torch import Tensor


def logits_with_ties(rows: int, experts: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Return router logits [R, E] of which many are equal: each twice, all, zeros of both signs, and ordinary rows, in turn."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, experts, generator=rng)
    half = x[:, : (experts + 1) // 2]
    x[0::4] = torch.cat([half, half], 1)[0::4, :experts]
    x[1::4] = x[1::4, :1]
    x[2::4] = torch.where(x[2::4] > 0, 0.0, -0.0)
    return x.to(dtype)


def cancelling_experts(
    rows: int, slots: int, experts: int, width: int, inside: int, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return operands of `ops.moe_experts` of which sums are zero in real arithmetic, so that a result is rounding error.

    * The first product cancels in half of the columns inside, since columns of x come in pairs, with opposite signs. Every
      third column of the result reads these alone.
    * The second product cancels in another third of the columns of the result: there the other columns inside come in pairs,
      alike but for the sign of what multiplies them.
    * Every other row's slots cancel, if it has three or more: its experts are one function, the last of them times minus a
      power of two, and the weights make the products sum to zero. Each product by a weight is rounded, so that another order of
      slots shows. Two would cancel whatever they are.

    Half of the rows go to the first group of experts, the others anywhere but to the last, and one row to that: of many rows
    some expert has one, and of few rows most have none.

    Args:
        rows, slots, experts, width, inside: R, S, E, D, I; slots are at most experts.
        dtype: of x and both weights.
        seed: another one gives other operands.

    Returns:
        x [R, D], ids [R, S] int64, weights [R, S] fp32, gate_up [E, 2 I, D], down [E, D, I].
    """
    rng = torch.Generator().manual_seed(seed)
    groups = max(1, experts // slots)
    group_E = torch.arange(experts).div(slots, rounding_mode="floor").clamp(max=groups - 1)

    def spread(*shape: int) -> Tensor:
        x = torch.randn(shape, generator=rng)
        return (x * torch.exp2(torch.randint(-6, 6, shape, generator=rng))).to(dtype)

    one, other, _ = _pairs(width, rng)
    x_RD = spread(rows, width)
    x_RD[:, other] = -x_RD[:, one]
    gate_up = (torch.randn(groups, 2, inside, width, generator=rng) * width**-0.5 / 8).to(dtype)
    small = torch.randperm(inside, generator=rng)[: inside // 2]  # columns inside that are rounding error
    gate_up[:, :, small] = spread(groups, 2, len(small), width)
    alike = gate_up[:, :, small]
    alike[..., other] = alike[..., one]
    gate_up[:, :, small] = alike
    plain = torch.ones(inside, dtype=torch.bool).index_fill(0, small, False).nonzero()[:, 0]
    one, other, _ = (plain[at] for at in _pairs(len(plain), rng))
    gate_up[:, :, other] = gate_up[:, :, one]
    down = spread(groups, width, inside)
    paired = down[:, 1::3]
    paired[..., other] = -paired[..., one]
    paired[..., small] = 0.0
    down[:, 1::3] = paired
    down[:, 2::3] = down[:, 2::3].index_fill(-1, plain, 0.0)

    largest = 2 ** max(1, (slots - 1).bit_length())  # a power of two, so that a group's last expert has exactly its share
    last_E = torch.cat([group_E[1:] != group_E[:-1], torch.tensor([True])])
    sign_E = torch.where(last_E, -float(largest), 1.0).to(dtype)
    ids, weights = _slots(rows, slots, group_E, last_E, largest, rng)
    return x_RD, ids, weights, gate_up.flatten(1, 2)[group_E], down[group_E] * sign_E[:, None, None]


def _pairs(count: int, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Cut 0, ..., count - 1 at random into pairs, as two lists, and what is left."""
    order = torch.randperm(count, generator=rng)
    return order[: count // 2], order[count // 2 : count // 2 * 2], order[count // 2 * 2 :]


def _slots(rows: int, slots: int, group_E: Tensor, last_E: Tensor, largest: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return ids and weights [R, S]: of one group each row, its last expert among them, in any order."""
    groups = int(group_E[-1]) + 1
    group_R = torch.randint(max(1, groups - 1), (rows,), generator=rng)
    group_R[torch.rand(rows, generator=rng) < 0.5] = 0
    group_R[rows // 2] = groups - 1
    ids, weights = torch.empty(rows, slots, dtype=torch.int64), torch.empty(rows, slots)
    for row, group in enumerate(group_R.tolist()):
        members = ((group_E == group) & ~last_E).nonzero()[:, 0]
        chosen = members[torch.randperm(len(members), generator=rng)[: slots - 1]]
        # on a grid on which their sum is exact, of 24 bits
        shares = torch.randint(2**19, 2**20, (slots - 1,), generator=rng).float() / 2**20
        cancels = slots > 2 and row % 2 == 0
        last = ((group_E == group) & last_E).nonzero()[0]
        at = torch.randperm(slots, generator=rng)
        ids[row, at] = torch.cat([chosen, last])
        weights[row, at] = torch.cat([shares, shares.sum()[None] / largest if cancels else torch.rand(1, generator=rng)])
    return ids, weights
