"""Truncated sampling: which tokens are kept, by every setting, beside vLLM's own function and sums in float64."""

import math

import pytest
import torch
from torch import Tensor

from rlinvariant import ops
from rlinvariant.bits import assert_bits_equal
from rlinvariant.ops.threshold import LONGEST, UNIT, masses_ref
from tests import ladders
from tests.ladders import DTYPES, cpu_only, dtype_name, randint, randn, randperm

SETTINGS = [  # temperature, top_k, top_p, min_p
    (1.0, 0, 0.95, 0.0),
    (0.7, 20, 1.0, 0.0),
    (1.0, 0, 1.0, 0.02),
    (0.6, 20, 0.95, 0.02),
    (1.3, 50, 0.9, 0.0),
    (1.0, 0, 0.5, 0.1),
    (1.0, 1, 1.0, 0.0),
    (1.0, 0, 1e-30, 0.0),
    (1.0, 0, 1 - 2**-20, 0.0),
    (1.0, 0, 1.0, 0.0),
]


def rows(count: int, temperature: float, top_k: int, top_p: float, min_p: float) -> tuple[Tensor, ...]:
    """The arguments of `threshold` beside the logits, the same for each row."""
    t, p, m = (torch.full((count,), x, dtype=torch.float32) for x in (temperature, top_p, min_p))
    return t, torch.full((count,), top_k), p, m


def threshold(logits: Tensor, *setting: float) -> Tensor:
    return ops.threshold(logits, *rows(len(logits), *setting))


def awkward(vocab: int, dtype: torch.dtype) -> Tensor:
    """Rows like a model's, of many equals, of one sign, of both zeros, with -inf, and with one token that has it all."""
    x = 3 * randn(64, vocab, dtype=dtype)
    x[1], x[2] = 0.0, x[2].round()
    x[3], x[4] = -x[3].abs(), x[4].abs() * 1e-3
    x[5, ::2], x[5, 1::2] = 0.0, -0.0
    x[6, 1 + vocab // 3 :] = -torch.inf
    x[7, vocab // 2] = 90.0
    x[8] = x[8, :1]
    return x


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("vocab", [1, 2, 17, 4097, 20000])
def test_threshold_equals_the_reference_bit_for_bit(vocab, dtype):
    """One counts eight bits of a key at a time, the other sorts: integers do not know the difference."""
    logits = awkward(vocab, dtype)
    for setting in SETTINGS:
        expected = ops.threshold_ref(logits, *rows(len(logits), *setting))
        assert_bits_equal(threshold(logits, *setting), expected, f"{setting}")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_threshold_is_batch_invariant(dtype):
    """Each row has a setting of its own, as in an engine."""
    count, vocab = 257, 2000
    logits = 3 * randn(count, vocab, dtype=dtype)
    t, k = torch.linspace(0, 2, count), randint(60, count)
    p, m = torch.linspace(0.1, 1, count), torch.linspace(0.05, 0, count)
    ladders.assert_batch_invariant(ops.threshold, logits, t, k, p, m)
    own = t[9:10], k[9:10], p[9:10], m[9:10]
    ladders.assert_needle(lambda x: ops.threshold(x, *(y.expand(len(x)) for y in own)), logits[9:10])


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_the_order_of_the_vocabulary_changes_no_bit(dtype):
    logits = awkward(5000, dtype)
    for setting in SETTINGS:
        assert_bits_equal(threshold(logits[:, randperm(5000)], *setting), threshold(logits, *setting), f"{setting}")


def test_sums_of_floats_know_the_order():
    """Control: the share of the kept tokens, added up in fp32, is another number in another order."""
    x = (3 * randn(64, 5000)).softmax(-1)
    assert ladders.differs(x.sum(-1), torch.stack([y[randperm(5000)].cumsum(0)[-1] for y in x]))


@pytest.mark.parametrize("vocab", [17, 4097, 20000])
def test_masses_are_those_of_float64_within_the_bound(vocab):
    """The bound is that of the docstring; a much smaller one does not hold."""
    logits = awkward(vocab, torch.bfloat16)
    for temperature in (0.3, 0.7, 1.0, 2.0):
        t = torch.full((64,), temperature)
        gap = (logits.double() - logits.double().amax(-1, keepdim=True)) / t[:, None].double()
        true = gap.exp() * 2.0**UNIT
        off = (masses_ref(logits, t).double() - true).abs()
        assert (off <= 1 + 2.0**-19 * true).all()
        assert (off > 1 + 2.0**-26 * true).any()  # control


def kept_exactly(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> tuple[Tensor, Tensor]:
    """The kept sets by sums in float64, and how near each row's top_p is to a share at which its set would be another."""
    x, order = (logits.double() / torch.tensor(temperature).double()).sort(-1, descending=True)
    gone = x - x[:, :1] < (math.log(min_p) if min_p else -torch.inf)
    if 0 < top_k < x.shape[1]:
        gone |= x < x[:, top_k - 1 : top_k]
    share = x.masked_fill(gone, -torch.inf).softmax(-1).cumsum(-1)
    last = x.diff(dim=-1, append=torch.full((len(x), 1), -torch.inf, dtype=x.dtype)) < 0  # of each group of equals
    p = torch.tensor(top_p).double()  # rounded to fp32, as everyone takes it
    edge = torch.where(last & (p < 1), (share - p).abs(), 1.0).amin(-1)
    if top_p < 1:
        first = (torch.where(last, share, 0.0) >= p - 1e-15).int().argmax(-1, keepdim=True)
        gone |= x < x.gather(1, first)
    return torch.zeros_like(gone).scatter(1, order, ~gone), edge


@cpu_only
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_kept_set_is_that_of_exact_sums(setting):
    logits = 3 * randn(512, 5000, dtype=torch.bfloat16)
    expected, edge = kept_exactly(logits, *setting)
    clear = edge > 5000 * 2.0**-40 + 2.0**-18
    assert clear.float().mean() > 0.9 or 0.9999 < setting[2] < 1
    kept = logits >= threshold(logits, *setting)[:, None]
    assert torch.equal(kept[clear], expected[clear])
    if 0.01 < setting[2] < 0.99:  # control: a little more of top_p, or of k, is another set
        more = setting[0], setting[1] + (setting[1] > 0), min(1.0, setting[2] + 0.02), setting[3] / 2
        assert not torch.equal((logits >= threshold(logits, *more)[:, None])[clear], expected[clear])


def vllms(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    """The tokens that vLLM's own functions keep, in its order: temperature, min-p, top-k, top-p."""
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p_pytorch

    t, k, p, m = rows(len(logits), temperature, top_k or logits.shape[1], top_p, min_p)
    x = logits.float() / t[:, None]
    share = x.softmax(-1)
    x = x.masked_fill(share < share.amax(-1, keepdim=True) * m[:, None], -torch.inf)
    return apply_top_k_top_p_pytorch(x, k.int(), p) > -torch.inf


@cpu_only
@pytest.mark.parametrize("setting", SETTINGS[:8])
def test_the_kept_set_is_vllms_but_for_groups_of_equals(setting):
    """A token that we keep and vLLM cuts equals one that it keeps, unless vLLM's fp32 sums may round top_p across an edge."""
    logits = 3 * randn(256, 5000, dtype=torch.bfloat16)
    _, edge = kept_exactly(logits, *setting)
    clear = edge > 1e-5
    assert clear.float().mean() > 0.8
    theirs = vllms(logits, *setting)[clear]
    x, ours = logits[clear].float(), (logits >= threshold(logits, *setting)[:, None])[clear]
    last = torch.where(theirs, x, torch.inf).amin(-1, keepdim=True)
    assert (ours | ~theirs).all() and torch.equal(ours, x >= last)
    if 0.01 < setting[2] < 1:
        assert not torch.equal(ours, theirs)  # control: there are groups that vLLM cuts


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_whole_groups_of_equals_are_kept(dtype):
    logits = torch.tensor([[3.0, 1.0, 2.0, 2.0, 2.0, -1.0, 2.0]], dtype=dtype)
    for k in (2, 3, 4, 5):
        assert threshold(logits, 1.0, k, 1.0, 0.0) == 2.0
    assert threshold(logits, 1.0, 1, 1.0, 0.0) == 3.0 and threshold(logits, 1.0, 6, 1.0, 0.0) == 1.0
    first = 1 / float((logits.double() - 3).exp().sum())
    assert threshold(logits, 1.0, 0, first - 1e-5, 0.0) == 3.0 and threshold(logits, 1.0, 0, first + 1e-5, 0.0) == 2.0
    assert threshold(logits, 1.0, 0, 1.0, math.exp(-1) + 1e-5) == 3.0
    assert threshold(logits, 1.0, 0, 1.0, math.exp(-1) - 1e-5) == 2.0
    equal = torch.full((1, 100), -2.5, dtype=dtype)
    for setting in SETTINGS[:-1]:
        assert threshold(equal, *setting) == -2.5  # all of them


def test_both_zeros_are_one_logit():
    logits = torch.tensor([[0.0, -0.0, -1.0, -0.0]])
    for k in (1, 2, 3):
        assert_bits_equal(threshold(logits, 1.0, k, 1.0, 0.0), torch.zeros(1), "theta")
    assert (logits >= threshold(logits, 1.0, 0, 0.1, 0.0)[:, None]).sum() == 3


def test_filters_are_applied_in_vllms_order():
    """top_p is a share of what min-p and top-k have left: here of 2 of 4 equals, and of 2 of 3 tokens."""
    logits = torch.tensor([[0.0, -0.5, -1.0, -1.5, -2.0]])
    share = torch.tensor([0.0, -0.5]).double().softmax(0)[0].item()
    assert threshold(logits, 1.0, 2, share - 1e-4, 0.0) == 0.0 and threshold(logits, 1.0, 2, share + 1e-4, 0.0) == -0.5
    assert threshold(logits, 1.0, 0, share - 1e-4, math.exp(-0.7)) == 0.0
    assert threshold(logits, 1.0, 0, share - 1e-4, 0.0) == -0.5  # control: of all five


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_rows_that_are_broken_or_greedy_keep_all(dtype):
    logits = randn(8, 100, dtype=dtype)
    logits[0, 3], logits[1, 3], logits[2] = torch.nan, torch.inf, -torch.inf
    temperatures = torch.tensor([1.0, 1.0, 1.0, 0.0, torch.nan, 1e-40, 1e-36, 1.0])
    for setting in ((3, 0.5, 0.1), (0, 0.5, 0.0), (0, 1.0, 0.1)):
        theta = ops.threshold(logits, temperatures, *rows(8, 1.0, *setting)[1:])
        assert torch.equal(theta == -torch.inf, torch.tensor([True] * 6 + [False] * 2))
        assert (logits[6] >= theta[6]).sum() == 1  # the likeliest has it all


def test_masked_tokens_are_dropped_by_any_limit_that_needs_fewer():
    logits = torch.full((1, 50), -torch.inf)
    logits[0, :3] = torch.tensor([1.0, 2.0, 3.0])
    for setting in ((1.0, 0, 0.999999, 0.0), (1.0, 3, 1.0, 0.0), (1.0, 0, 1.0, 1e-6)):
        assert threshold(logits, *setting) == 1.0
    assert threshold(logits, 1.0, 10, 1.0, 0.0) == -torch.inf


def test_no_rows_have_no_threshold():
    assert threshold(randn(0, 50), 1.0, 5, 1.0, 0.0).shape == (0,)


@pytest.mark.parametrize(
    ("at", "value"), [(0, torch.ones(3)), (1, torch.ones(4)), (2, torch.ones(4).double()), (3, torch.ones(5))]
)
def test_other_shapes_and_dtypes_are_refused(at, value):
    arguments = list(rows(4, 1.0, 5, 0.9, 0.1))
    arguments[at] = value
    with pytest.raises(ValueError, match="threshold: expected temperature"):
        ops.threshold(randn(4, 9), *arguments)
    with pytest.raises(TypeError, match="float16"):
        ops.threshold(randn(4, 9, dtype=torch.float16), *rows(4, 1.0, 5, 0.9, 0.1))


def test_a_row_whose_masses_might_not_fit_is_refused():
    for vocab in (LONGEST, LONGEST + 1):
        logits = torch.empty(1, dtype=torch.bfloat16).expand(0, vocab)
        if vocab > LONGEST:
            with pytest.raises(ValueError, match=f"V at most {LONGEST}"):
                threshold(logits, 1.0, 5, 0.9, 0.1)
        else:
            assert threshold(logits, 1.0, 5, 0.9, 0.1).shape == (0,)


@cpu_only  # looking at it would make a GPU wait at every step
@pytest.mark.parametrize("setting", [(1.0, 0, 0.0, 0.0), (1.0, 0, 1.1, 0.0), (1.0, 0, 1.0, -0.1), (1.0, 0, math.nan, 0.0)])
def test_shares_that_are_none_are_refused(setting):
    with pytest.raises(ValueError, match="top_p in"):
        threshold(randn(4, 9), *setting)


def test_threshold_is_opaque():
    inputs = randn(4, 50), *rows(4, 1.0, 5, 0.9, 0.1)
    ladders.assert_registered(torch.ops.rlinvariant.threshold.default, *inputs)
    ladders.assert_opaque(ops.threshold, *inputs)
