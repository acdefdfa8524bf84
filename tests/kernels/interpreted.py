"""Run the GPU kernels on CPU tensors in Triton's interpreter and compare them with the CPU ops. See test_interpreted.py."""

import importlib
import itertools
import sys

import numpy
import torch
import triton
import triton.language as tl

from rlinvariant import checksums, ops
from rlinvariant.kernels import (
    checksum,
    linear,
    moe_experts,
    moe_route,
    qk_norm_rope,
    rms_norm,
    rope,
    scale_logits,
    swiglu,
    threshold,
    token_logprobs,
)
from rlinvariant.ops.threshold import LONGEST, masses_ref
from rlinvariant.verification.mixtures import logits_with_ties
from tests.kernels.layouts import ALIGNED

names = ("moe_experts", "rms_norm", "rope", "scale_logits", "swiglu", "token_logprobs")
cpu = {name: importlib.import_module(f"rlinvariant.ops.{name}") for name in names}
torch.manual_seed(0)
compared = []


@triton.jit
def _count_steps(out, n, STEP: tl.constexpr):
    steps = 0.0
    for _ in range(0, n, STEP):
        steps += 1.0
    tl.store(out, steps)


try:
    _count_steps[(1,)](torch.empty(1), 5, STEP=2)
except Exception as error:  # Triton 3.6 with numpy 2.4
    print(f"skip: the interpreter of Triton {triton.__version__} cannot run a loop with numpy {numpy.__version__}: {error!r}")
    sys.exit()


def same(what, ours, expected, tolerance=2e-5):
    ours, expected = ((x,) if isinstance(x, torch.Tensor) else x for x in (ours, expected))
    for i, (a, b) in enumerate(zip(ours, expected, strict=True)):
        limits = {"rtol": tolerance, "atol": tolerance, "equal_nan": True}
        torch.testing.assert_close(a, b, **limits, msg=lambda m, i=i: f"{what}, output {i}: {m}")
    compared.append(what)


for m, n, k, tile in ((5, 70, 96, (16, 16, 32, 4, 3)), (17, 33, 100, (16, 16, 64, 4, 3)), (1, 16, 64, (32, 16, 64, 4, 3))):
    x, w, b = torch.randn(m, k), torch.randn(n, k), torch.randn(n)
    same(f"linear {m} {n} {k}", linear.tiled(x, w, b, tile), x @ w.t() + b, 1e-4)
    same(f"linear {m} {n} {k}, no bias", linear.tiled(x, w, None, tile), x @ w.t(), 1e-4)
made: list[int] = []


def vendor(x, w, b, out=None):
    """cuBLASLt's place: records how many rows it is called with."""
    made.append(len(x))
    y = x @ w.t() + (0.0 if b is None else b)
    return y if out is None else out.copy_(y)


linear.check, linear.cublaslt = lambda *_: True, vendor
for m, expected_calls in ((0, []), (5, []), (300, [300]), (513, [512]), (3000, [2944]), (3008, [3008]), (9000, [8192, 768])):
    x, w, b = torch.randn(m, 40), torch.randn(24, 40), torch.randn(24)
    made.clear()
    same(f"linear in calls, {m}", linear.linear(x, w, b), x @ w.t() + b, 1e-4)
    assert made == expected_calls, (m, made)
    assert linear.ROUTES.pop("24x40 bfloat16").startswith("Triton, and cuBLASLt")  # also after the record was forgotten
for shape in ((7, 96), (2, 3, 4, 128), (3, 2048)):
    x, r, dy, ds = torch.randn(4, *shape)
    w = torch.randn(shape[-1])
    for form in ((1e-6, None), (1e-6, 1.0)):
        same(f"rms_norm {shape}", rms_norm.rms_norm(x, w, *form), ops.rms_norm(x, w, *form))
        same(f"add_rms_norm {shape}", rms_norm.add_rms_norm(x, r, w, *form), ops.add_rms_norm(x, r, w, *form))
        for total in (None, ds):
            expected = cpu["rms_norm"].rms_norm_backward(dy, x, w, total, *form)
            same(f"rms_norm_backward {shape}", rms_norm.rms_norm_backward(dy, x, w, total, *form), expected)
merged = torch.randn(6, 5 * 128)
q, k = merged[:, : 3 * 128].view(6, 3, 128), merged[:, 3 * 128 : 4 * 128].view(6, 1, 128)
for half in (64, 20):
    cos, sin = torch.randn(2, 6, half)
    for sign in (1.0, -1.0):
        same(f"rope {half}", rope.rope(q, cos, sin, sign), cpu["rope"]._rope(q.contiguous(), cos, sin, sign))
    weights = torch.randn(128), torch.randn(128)
    for form in ((None, None, cos, sin, 1e-6, None), (*weights, cos, sin, 1e-6, None), (*weights, cos, sin, 1e-6, 1.0)):
        expected = ops.qk_norm_rope(q.contiguous(), k.contiguous(), *form)
        same(f"qk_norm_rope {half}", qk_norm_rope.qk_norm_rope(q, k, *form), expected)
gate, up = torch.randn(5, 2 * 1100).chunk(2, -1)
dy = torch.randn(5, 1100)
gate[0, :8] = torch.tensor([-3e38, -40.0, -16.0, -0.0, 16.0, 40.0, 3e38, torch.nan])
for activation in ("silu", "gelu_tanh"):
    same(activation, swiglu.swiglu(gate, up, activation), ops.swiglu(gate, up, activation))
    expected = cpu["swiglu"]._swiglu_backward(dy, gate, up, activation)
    same(f"{activation} backward", swiglu.swiglu_backward(dy, gate, up, activation), expected)
x, dy = torch.randn(3, 1100) * torch.logspace(-6, 3, 1100), torch.randn(3, 1100)
x[0, :4] = torch.tensor([torch.inf, -torch.inf, torch.nan, -0.0])
for form in ((0.3, None), (None, 30.0), (0.3, 5.0)):
    same(f"scale_logits {form}", scale_logits.scale_logits(x, *form), ops.scale_logits(x, *form))
    expected = cpu["scale_logits"].scale_logits_backward(dy, x, *form)
    same(f"scale_logits_backward {form}", scale_logits.scale_logits_backward(dy, x, *form), expected)
for vocab in (99, 4096, 9000):
    logits = torch.randn(6, vocab) * 4
    logits[1, 5], logits[2, : vocab // 2], logits[3, 7] = 50.0, -torch.inf, torch.nan
    ids, t = torch.tensor([5, 5, vocab - 1, 0, 1, 2]), torch.tensor([1.0, 0.7, 1.0, 1.0, 2.0, 0.5])
    expected = cpu["token_logprobs"]._row_logprobs(logits, ids, t, None)
    ours = token_logprobs.row_logprobs(logits, ids, t, None)
    same(f"row_logprobs {vocab}", ours[:2], expected[:2])
    known = torch.tensor([0, 1, 2, 4, 5])  # of the row with a NaN, one of the two statistics must be NaN, no matter which
    same(f"row_logprobs {vocab}, statistics", ours[2][known], expected[2][known])
    assert ours[2][3].isnan().any()
    dlogprobs, dentropy = torch.randn(2, 6)
    theta = logits.nan_to_num(0.0)[torch.arange(6), ids].clamp(max=2.0)  # the scored tokens are kept
    expected = cpu["token_logprobs"]._row_logprobs(logits, ids, t, theta)
    same(f"row_logprobs {vocab}, truncated", token_logprobs.row_logprobs(logits, ids, t, theta)[:2], expected[:2])
    for grads in itertools.product((dlogprobs,), (None, dentropy), (None, theta)):
        gradients = []
        for module, forward, backward in (
            (token_logprobs, "row_logprobs", "row_logprobs_backward"),
            (cpu["token_logprobs"], "_row_logprobs", "_row_logprobs_backward"),
        ):
            gradients.append(logits.clone())
            found = getattr(module, forward)(logits, ids, t, grads[2])
            getattr(module, backward)(gradients[-1], ids, t, *grads, *found)
        same(f"row_logprobs_backward {vocab}", *gradients)
    rows = torch.tensor([0, 1, 2, 4, 5])
    t = torch.tensor([1.0, 0.7, 1.0, 0.0, 0.5])
    for below in (None, theta[rows]):
        drawn = logits[rows], t, rows * 987_654_321_987, rows, below
        ours, expected = token_logprobs.sample(*drawn), ops.sample(*drawn)
        assert torch.equal(ours[0], expected[0]) and torch.equal(ours[2], expected[2]), (vocab, ours, expected)
        same(f"sample {vocab}", ours[1], expected[1])
for experts, slots in ((8, 3), (5, 1), (7, 7)):
    x = logits_with_ties(12, experts, torch.bfloat16)
    x[5, 2], x[6, :2] = torch.nan, -torch.inf
    for renormalise in (True, False):
        ours, expected = moe_route.moe_route(x, slots, renormalise), ops.moe_route(x, slots, renormalise)
        assert torch.equal(ours[1], expected[1]), (ours, expected)
        same(f"moe_route {experts}", ours[0], expected[0])
for rows, slots, experts, few in ((5, 3, 7, 16), (40, 2, 4, 0), (1, 2, 4, 16), (90, 1, 3, 0)):
    moe_experts.FEW = few  # 0: tiles of 64 rows
    shares, chosen = ops.moe_route(torch.randn(rows, experts), slots, True)
    chosen = torch.ones_like(chosen) if rows == 90 else chosen  # all rows on one expert
    operands = (
        torch.randn(rows, 96),
        chosen,
        shares,
        torch.randn(experts, 160, 96) / 8,
        torch.randn(experts, 96, 80) / 8,
        "silu",
    )
    same(f"moe_experts {rows}", moe_experts.moe_experts(*operands), ops.moe_experts(*operands), 1e-4)
    needed = (True, True, True, rows < 40, rows > 1, True)
    how = torch.randn(rows, 96), *operands, torch.float32, needed
    found, expected = (module.gradients(*how) for module in (moe_experts, cpu["moe_experts"]))
    assert [g is None for g in found] == [g is None for g in expected] == [False, False, not needed[3], not needed[4]]
    present = [[g for g in side if g is not None] for side in (found, expected)]
    same(f"moe_experts, gradients, {rows}", *present, 1e-4)
    plan = moe_experts._Plan(chosen, experts, moe_experts.tile_for(chosen.numel(), experts))
    of_rows, of_slots = (how[0], operands[4].mT, True), (torch.randn(chosen.numel(), 160), operands[3].mT, False)
    for x, weight, from_rows in (of_rows, of_slots):  # a transposed weight is read where it lies
        read, copied = (plan.product(x, y, from_rows).view(torch.int32) for y in (weight, weight.contiguous()))
        same(f"moe_experts, transposed, {rows}", read, copied, 0)
settings = torch.tensor(
    (
        (1.0, 0, 0.95, 0.0),
        (0.7, 20, 1.0, 0.0),
        (1.0, 0, 1.0, 0.02),
        (0.6, 20, 0.9, 0.2),
        (1.0, 2500, 0.95, 0.0),
        (1.0, 0, 0.5, 0.1),
        (1e-40, 5, 0.5, 0.1),
        (3.0, 20, 0.9, 0.0),  # of the mass of the tokens that tie with the 20th
    )
)
threshold.BLOCK, threshold.LANES, threshold.FEW = (tl.constexpr(n) for n in (1024, 512, 8))  # so that few rows have several
threshold.ROWS = 20
for dtype, vocab, every in ((torch.bfloat16, 17, 1), (torch.bfloat16, 3000, 1), (torch.float32, 3000, 5)):
    x = (torch.randn(12, vocab) * 3).to(dtype)  # kinds of rows; a search of 32 bits takes the interpreter long
    x[1], x[2, 1 + vocab // 2 :], x[3], x[4, ::2], x[5] = 0.0, -torch.inf, -x[3].abs(), -0.0, x[5].round()
    x[6], x[7, -1], x[8, 3], x[9], x[10, -1], x[11] = x[6] * 1e-3, torch.nan, torch.inf, -torch.inf, 90.0, x[11] * 1e30
    rows = torch.arange(0, 48, every)  # each kind with four settings
    logits, (t, k, p, m) = x[rows % 12], settings[(rows // 12 * 5 + rows) % 8].T.contiguous()
    expected = ops.threshold(logits, t, k.long(), p, m)
    ours = threshold.threshold(logits, t, k.long(), p, m)
    same(f"threshold {vocab}", ours.view(torch.int32), expected.view(torch.int32), 0)  # the same bits
    assert expected.isfinite().any() and expected.isneginf().any()
for dtype in (torch.bfloat16, torch.float32):  # top-p alone, at the share of a key and next to it on both sides, and elsewhere
    x = (torch.randn(1, 3000) * 3).to(dtype)
    t = torch.tensor([0.7])
    order = x.float().sort(-1, descending=True)
    share = masses_ref(x, t).gather(1, order[1])[0].cumsum(0).double()
    edge = (share / share[-1]).float()[:60:6]
    edge = edge[(edge > 0.5) & (edge < 0.99)]
    p = torch.cat([edge, edge.nextafter(torch.tensor(0.0)), edge.nextafter(torch.tensor(1.0)), torch.linspace(0.31, 0.97, 20)])
    like = x.expand(len(p), -1).contiguous(), t.expand(len(p)), torch.zeros(len(p)).long(), p, torch.zeros(len(p))
    ours, summed = threshold.threshold_and_summed(*like)
    same(f"threshold at edges {dtype}", ours.view(torch.int32), ops.threshold(*like).view(torch.int32), 0)
    assert summed[:-20].any() and summed[-20:].sum() <= 1, summed
threshold.BLOCK, threshold.LANES, threshold.FEW = (tl.constexpr(n) for n in (2**15, 2**16, 2**10))
x = torch.zeros(1, LONGEST, dtype=torch.bfloat16)  # all tokens are about as likely, and top-p keeps three: few groups are read
x[0, :96:32] = torch.tensor([1.0, 1.015625, 1.03125])
one = x, torch.tensor([1e6]), torch.zeros(1).long(), torch.tensor([2.85 / LONGEST]), torch.zeros(1)
same("threshold of the longest row", threshold.threshold(*one), ops.threshold(*one), 0)
assert threshold.threshold(*one) == 1.0
parts, checksum.MOST = [], 50_000  # so that long ones are cut, as those of 2**30 words are
for columns in (8, 4, 2, 1):  # bytes of a word, whose sign counts
    x = torch.randint(0, 256, (20_001, columns), dtype=torch.uint8)
    wide = torch.randint(0, 256, (3001, 40 * columns + 64), dtype=torch.uint8)
    parts += [(x, 7), (x[:0], 3), (wide[:, : 40 * columns], 11), (wide[:, 1 : 8 * columns + 1], 2**40), (x.repeat(4, 1), 0)]
    parts += [(x[1:, :1], 5), (x.view(-1, 1)[1 : 8 * columns + 1].view(-1, columns), 1)]
for (x, first), sums in zip(parts, checksums._on_gpu(parts), strict=True):
    assert torch.equal(sums, checksums.partial_ref(x, first)), (x.shape, x.stride(), first)
compared.append(f"checksums of {len(parts)} tensors at once")


class Watched:
    """A kernel that is started as before; what it sums has to begin at a multiple of 16 bytes."""

    def __init__(self, kernel, operand):
        self.kernel, self.at = kernel, kernel.arg_names.index(operand)

    def __getitem__(self, grid):
        def launch(*args, **how):
            watched.append(args[self.at].data_ptr() % 16)
            return self.kernel[grid](*args, **how)

        return launch


watched: list[int] = []
for name, operand in ALIGNED:
    module, kernel = name.split(".")
    setattr(globals()[module], kernel, Watched(vars(globals()[module])[kernel], operand))
x = torch.randn(3 * 100 + 1)[1:].view(3, 100)
ids, t = torch.arange(3), torch.ones(3)
token_logprobs.row_logprobs(x, ids, t, None)
token_logprobs.sample(x, t, ids, ids, None)
moe_route.moe_route(x, 4, True)
assert x.data_ptr() % 16 and watched == [0] * 4, watched
compared.append("sums of what was not aligned")
try:  # control
    same("control", rms_norm.rms_norm(r, w, 1e-6, None), ops.rms_norm(r, w, 1e-1))
except AssertionError:
    print("compared", len(compared))
