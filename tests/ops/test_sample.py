import math

import pytest
import torch
from torch import Tensor

from rlinvariant import ops
from rlinvariant.bits import assert_bits_equal
from tests import ladders
from tests.ladders import DTYPES, cpu_only, dtype_name, gpu_only, randn

MASK = (1 << 64) - 1


def uniform(seed: int, position: int) -> float:
    """u of the contract, a second time and in Python: splitmix64's output function, twice, 53 bits."""
    z = (seed + 0x9E3779B97F4A7C15 * (position + 1)) & MASK
    for _ in range(2):
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        z ^= z >> 31
    return (z >> 11) * 2.0**-53


def uniforms(seeds: Tensor, positions: Tensor) -> Tensor:
    pairs = zip(seeds.tolist(), positions.tolist(), strict=True)
    return torch.tensor([uniform(s, p) for s, p in pairs], dtype=torch.float64)


def draw(logits: Tensor, seeds: Tensor, positions: Tensor | None = None, temperature: float = 1.0) -> tuple[Tensor, ...]:
    if positions is None:
        positions = torch.zeros_like(seeds)
    return ops.sample(logits, torch.full((len(logits),), temperature), seeds, positions)


def chi_square(tokens: Tensor, p: Tensor) -> float:
    """Pearson's statistic in standard deviations from its mean; outcomes that are rarer than 5 draws are put together."""
    expected, seen = p.double() * len(tokens), torch.bincount(tokens, minlength=len(p)).double()
    rare = expected < 5
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    seen = torch.cat([seen[~rare], seen[rare].sum()[None]])
    kept = expected > 0
    assert not seen[~kept].any()
    freedom = int(kept.sum()) - 1
    return float((((seen - expected) ** 2)[kept] / expected[kept]).sum() - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("vocab", [17, 4097])
def test_sample_is_batch_invariant(vocab, dtype):
    rows = 1024 if vocab < 100 else 257
    logits, t = randn(rows, vocab, dtype=dtype), torch.linspace(0, 2, rows)
    seeds, positions = torch.arange(rows) * 7919, torch.arange(rows) % 50
    ladders.assert_batch_invariant(ops.sample, logits, t, seeds, positions)
    for temperature in (0.0, 0.7):
        t = torch.full((33,), temperature)
        ladders.assert_needle(lambda x, s, p, t=t: ops.sample(x, t[: len(x)], s, p), logits[5:6], seeds[5:6], positions[5:6])


def test_batch_control():
    """torch.multinomial draws from one stream: a row's token depends on the rows before it."""

    def stock(logits: Tensor, seeds: Tensor) -> Tensor:
        return torch.multinomial(torch.softmax(logits, -1), 1, generator=torch.Generator(logits.device).manual_seed(0))

    def shared_noise(logits: Tensor, seeds: Tensor) -> tuple[Tensor, ...]:
        return draw(logits, seeds, torch.arange(len(logits)))

    inputs = randn(1024, 17), torch.arange(1024)
    ladders.assert_control(ladders.assert_batch_invariant, shared_noise, [(stock, inputs)])


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("vocab", [1, 2, 15, 16, 17, 4097])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_tokens_follow_the_inverse_cdf(temperature, vocab, dtype):
    """Against float64 and a second implementation of the hash: the token whose interval of the CDF holds u."""
    rows = 400
    logits, seeds, positions = 2 * randn(rows, vocab, dtype=dtype), torch.arange(rows) * 104729 - 5000, torch.arange(rows) % 7
    tokens, _, _ = draw(logits, seeds, positions, temperature)
    cdf = torch.softmax(logits.double() / temperature, -1).cumsum(-1)
    u = uniforms(seeds, positions)
    upper = cdf.gather(1, tokens[:, None])[:, 0]
    lower = torch.where(tokens > 0, cdf.gather(1, (tokens - 1).clamp(min=0)[:, None])[:, 0], 0.0)
    assert ((lower - 1e-6 <= u) & (u <= upper + 1e-6)).all()
    assert (ops.sample_ref(logits, torch.full((rows,), temperature), seeds, positions)[0] != tokens).float().mean() < 0.01
    if vocab > 1:  # control: the hash of another position fails the same check
        other, _, _ = draw(logits, seeds, positions + 1, temperature)
        assert (other != tokens).float().mean() > 0.1


def test_the_noise_is_the_same_53_bits_on_every_device():
    """Equal probabilities, whose sums are exact: the token is the leading 20 bits of u, which Python computes too."""
    seeds = torch.tensor([0, 1, 2, 12345, -1, -(2**63), 2**63 - 1, 7919])
    positions = torch.tensor([0, 1, 5, 100, 0, 3, 2**40, 31])
    tokens, _, _ = draw(torch.zeros(8, 2**20), seeds, positions)
    assert torch.equal(tokens, (uniforms(seeds, positions) * 2**20).long())
    assert torch.equal(ops.sample_ref(torch.zeros(8, 2**20), torch.ones(8), seeds, positions)[0], tokens)
    assert not torch.equal(tokens, draw(torch.zeros(8, 2**20), seeds, positions + 1)[0])  # control


@gpu_only
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("vocab", [17, 4097, 20000])
def test_cpu_and_gpu_draw_the_same_tokens(vocab, temperature):
    """Equal fp32 logits give equal tokens, wherever u is not within rounding of the edge between two tokens."""
    rows = 300
    logits, seeds, positions = 3 * randn(rows, vocab), torch.arange(rows) * 104729, torch.arange(rows) % 7
    tokens, logprobs, ranks = draw(logits, seeds, positions, temperature)
    with torch.device("cpu"):
        expected = draw(logits.cpu(), seeds.cpu(), positions.cpu(), temperature)
    cdf = torch.softmax(logits.double() / (temperature or 1.0), -1).cumsum(-1)
    clear = ((cdf - uniforms(seeds, positions)[:, None]).abs().min(1).values > 1e-6) | (temperature == 0)
    assert clear.sum() > 0.9 * rows
    assert torch.equal(tokens[clear].cpu(), expected[0][clear.cpu()])
    assert torch.equal(ranks[clear].cpu(), expected[2][clear.cpu()])
    torch.testing.assert_close(logprobs[clear].cpu(), expected[1][clear.cpu()], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_frequencies_are_the_probabilities(temperature):
    n, row = 20000, 2 * randn(1, 50)
    p = torch.softmax(row[0].double() / temperature, -1)
    by_seed = draw(row.expand(n, -1), torch.arange(n), None, temperature)[0]
    by_position = draw(row.expand(n, -1), torch.full((n,), 12345), torch.arange(n), temperature)[0]
    assert abs(chi_square(by_seed, p)) < 4 and abs(chi_square(by_position, p)) < 4
    assert chi_square(by_seed, torch.softmax(row[0].double() / temperature * 1.05, -1)) > 4  # control: 5 % off in temperature


def test_seeds_and_positions_are_independent():
    """Equal distribution over a grid of (seed, position) and over pairs of neighbours, each way; no two draws alike."""
    n = 128
    uniform_row = torch.zeros(1, 4096).expand(n * n, -1)
    seeds, positions = torch.arange(n).repeat_interleave(n), torch.arange(n).repeat(n)
    u = draw(uniform_row, seeds, positions)[0].view(n, n) // 256  # sixteen bins
    flat = torch.full((256,), 1 / 256)
    assert abs(chi_square((u[1:] * 16 + u[:-1]).flatten(), flat)) < 4  # consecutive seeds, as of a GRPO group
    assert abs(chi_square((u[:, 1:] * 16 + u[:, :-1]).flatten(), flat)) < 4  # consecutive positions
    diagonal = u[1:, :-1] * 16 + u[:-1, 1:]  # seed + 1 at one position, seed at the next
    assert abs(chi_square(diagonal.flatten(), flat)) < 4
    assert len({uniform(s, p) for s in range(n) for p in range(n)}) == n * n
    assert chi_square((u * 16 + u).flatten(), flat) > 4  # control: the same noise twice


def test_a_request_keeps_its_noise():
    """Same seed and position, same token, in any row; another seed or position, another draw."""
    row = torch.zeros(1, 4096).expand(64, -1)
    same = draw(row, torch.full((64,), 9), torch.full((64,), 3))[0]
    assert same.unique().numel() == 1
    assert draw(row, torch.arange(64))[0].unique().numel() > 60
    assert draw(row, torch.full((64,), 9), torch.arange(64))[0].unique().numel() > 60


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("vocab", [1, 15, 16, 17, 4097])
def test_greedy_takes_the_first_maximum_with_its_logprob_at_temperature_one(vocab, dtype):
    logits = randn(50, vocab, dtype=dtype)
    logits[:, vocab // 2 :: 3] = 9.0  # ties
    tokens, logprobs, ranks = draw(logits, torch.arange(50), None, 0.0)
    assert (tokens == vocab // 2).all() and not ranks.any()
    reference = ops.sample_ref(logits, torch.zeros(50), torch.arange(50), torch.zeros(50, dtype=torch.int64))
    assert torch.equal(reference[0], tokens) and torch.equal(reference[2], ranks)
    at_one = ops.log_softmax(logits, torch.ones(50)).gather(1, tokens[:, None])[:, 0]
    assert_bits_equal(logprobs, at_one, "log-prob at temperature 1")
    assert_bits_equal(ops.log_softmax(logits, torch.zeros(50)), ops.log_softmax(logits, torch.ones(50)), "log_softmax at 0")


def test_ranks_count_likelier_tokens():
    logits = randn(200, 300)
    tokens, _, ranks = draw(logits, torch.arange(200))
    expected = ops.sample_ref(logits, torch.ones(200), torch.arange(200), torch.zeros(200, dtype=torch.int64))[2]
    assert_bits_equal(ranks, expected, "ranks")
    assert ranks.max() > 10


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_masked_tokens_are_never_drawn(dtype):
    logits, allowed = torch.zeros(5000, 40, dtype=dtype), [0, 17, 38]  # the first and the last of the row are masked in turn
    for kept in (allowed, [7], [1, 39]):
        masked = torch.full_like(logits, float("-inf"))
        masked[:, kept] = logits[:, kept]
        for temperature in (0.0, 0.7, 1.0):
            tokens, logprobs, _ = draw(masked, torch.arange(5000), None, temperature)
            assert set(tokens.unique().tolist()) == ({kept[0]} if temperature == 0 else set(kept))
            assert logprobs.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_a_nan_or_infinite_logit_shows_as_a_nan_logprob(dtype):
    """Some token must be returned; the log-prob tells that its row is broken, and the others are not."""
    logits = randn(9, 20, dtype=dtype)
    clean = draw(logits, torch.arange(9))
    for value in (float("nan"), float("inf")):
        for temperature in (0.0, 1.0):
            broken = logits.clone()
            broken[4, 13] = value
            tokens, logprobs, _ = draw(broken, torch.arange(9), None, temperature)
            assert torch.equal(logprobs.isnan(), torch.arange(9) == 4)
            assert ((tokens >= 0) & (tokens < 20)).all()
        assert_bits_equal(draw(broken, torch.arange(9))[1][:4], clean[1][:4], "rows before")
        assert_bits_equal(draw(broken, torch.arange(9))[0][5:], clean[0][5:], "rows after")


def test_each_row_has_its_own_temperature():
    logits = randn(3, 100)
    t = torch.tensor([0.0, 0.7, 1.5])
    mixed = ops.sample(logits, t, torch.arange(3), torch.arange(3))
    for i in range(3):
        alone = ops.sample(logits[i : i + 1], t[i : i + 1], torch.arange(3)[i : i + 1], torch.arange(3)[i : i + 1])
        ladders.assert_same(alone, tuple(x[i : i + 1] for x in mixed), f"temperature {t[i]}")


def test_strides_change_no_bits():
    logits, seeds, positions = randn(24, 100), torch.arange(24) * 17, torch.arange(24)
    t = torch.full((24,), 0.7)
    expected = ops.sample(logits, t, seeds, positions)
    strided = logits.t().contiguous().t(), t[:1].expand(24), seeds.repeat_interleave(2)[::2], positions.flip(0).flip(0)
    ladders.assert_same(ops.sample(*strided), expected, "strided")
    assert_bits_equal(ops.log_softmax(logits.t().contiguous().t(), t[:1].expand(24)), ops.log_softmax(logits, t), "strided")


def test_no_rows_give_no_tokens():
    empty = torch.zeros(0, dtype=torch.int64)
    tokens, logprobs, ranks = draw(randn(0, 50), empty)
    assert (tokens.shape, logprobs.shape, ranks.shape) == ((0,), (0,), (0,))
    assert ops.log_softmax(randn(0, 50), torch.ones(0)).shape == (0, 50)


LONG, INT, FLOAT = torch.int64, torch.int32, torch.float32


@pytest.mark.parametrize(
    ("logits", "temperature", "seeds", "positions"),
    [
        ((4, 9), 3, (4, LONG), (4, LONG)),
        ((4, 9), 4, (3, LONG), (4, LONG)),
        ((4, 9), 4, (4, LONG), (5, LONG)),
        ((4, 9), 4, (4, INT), (4, LONG)),
        ((4, 9), 4, (4, LONG), (4, INT)),
        ((4, 9), 4, (4, FLOAT), (4, LONG)),
        ((9,), 1, (1, LONG), (1, LONG)),
    ],
)
def test_other_shapes_and_dtypes_are_refused(logits, temperature, seeds, positions):
    ids = (torch.arange(n, dtype=dtype) for n, dtype in (seeds, positions))
    with pytest.raises((ValueError, TypeError)):
        ops.sample(randn(*logits), torch.ones(temperature), *ids)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=dtype_name)
def test_logits_of_another_dtype_are_refused_by_name(dtype):
    logits, ones, ids = randn(4, 9, dtype=dtype), torch.ones(4), torch.arange(4)
    with pytest.raises((ValueError, TypeError), match=dtype_name(dtype)):
        ops.sample(logits, ones, ids, ids)
    with pytest.raises((ValueError, TypeError), match=dtype_name(dtype)):
        ops.log_softmax(logits, ones)


@cpu_only  # looking at it would make a GPU wait at every step
@pytest.mark.parametrize("temperature", [-1.0, float("nan")])
def test_a_negative_temperature_is_refused(temperature):
    t = torch.tensor([1.0, temperature, 1.0, 1.0])
    with pytest.raises(ValueError, match="temperature >= 0"):
        ops.sample(randn(4, 9), t, torch.arange(4), torch.arange(4))


def test_sample_is_opaque():
    inputs = randn(4, 50), torch.ones(4), torch.arange(4), torch.arange(4)
    ladders.assert_registered(torch.ops.rlinvariant.sample.default, *inputs, torch.zeros(4))
    ladders.assert_opaque(ops.sample, *inputs)
