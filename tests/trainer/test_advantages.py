"""PPO's arithmetic against numbers worked by hand, the papers' other formulas in float64, and an MDP with known values."""

import math

import numpy as np
import pytest
import torch

from rlinvariant.bits import assert_bits_equal
from rlinvariant.trainer.advantages import (
    explained_variance,
    gae,
    mean_and_variance,
    over_sampled,
    token_rewards,
    value_loss,
    whiten,
)

F64 = torch.float64


def ragged(
    seed: int, rows: int = 7, longest: int = 11, dtype: torch.dtype = F64
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """rewards, values, mask; garbage where there is no token."""
    rng = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (rows, 1), generator=rng)
    mask = (torch.arange(longest) < lengths).long()
    rewards, values = torch.randn(2, rows, longest, generator=rng, dtype=F64).to(dtype)
    return rewards, values, mask


def by_the_paper(rewards: np.ndarray, values: np.ndarray, gamma: float, lam: float) -> list[float]:
    """Schulman et al. 2016, equations 11 to 16 as they are defined: the lambda-weighted mean of all k-step advantages.

    One episode of n steps. From the step n - t on, k-step advantages are all the same, and share the weights that are left.
    """
    n, found = len(rewards), []
    for t in range(n):
        k_step = []
        for k in range(1, n - t + 1):
            following = values[t + k] if t + k < n else 0.0
            earned = sum(gamma**i * rewards[t + i] for i in range(k))
            k_step.append(earned + gamma**k * following - values[t])
        weights = [(1 - lam) * lam ** (k - 1) for k in range(1, n - t)] + [lam ** (n - t - 1)]
        found.append(sum(w * a for w, a in zip(weights, k_step, strict=True)))
    return found


def test_gae_of_three_tokens_by_hand():
    """Both 0.5. deltas: 1 + .5*4 - 2 = 1; 0 + .5*8 - 4 = 0; 10 - 8 = 2. A: 2; 0 + .25*2 = .5; 1 + .25*.5 = 1.125."""
    rewards, values = torch.tensor([[1.0, 0.0, 10.0, 99.0]]), torch.tensor([[2.0, 4.0, 8.0, 99.0]])
    advantages, returns = gae(rewards, values, torch.tensor([[1, 1, 1, 0]]), 0.5, 0.5)
    assert advantages.tolist() == [[1.125, 0.5, 2.0, 0.0]] and returns.tolist() == [[3.125, 4.5, 10.0, 0.0]]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.97, 0.0), (0.0, 0.3), (0.99, 1.0)])
def test_gae_is_the_papers_mean_of_k_step_advantages(gamma, lam):
    for seed in range(5):
        rewards, values, mask = ragged(seed)
        advantages, returns = gae(rewards, values, mask, gamma, lam)
        for row, n in enumerate(mask.sum(1).tolist()):
            expected = by_the_paper(rewards[row, :n].numpy(), values[row, :n].numpy(), gamma, lam)
            assert advantages[row, :n].tolist() == pytest.approx(expected, rel=1e-11, abs=1e-12)
            assert returns[row, :n].tolist() == pytest.approx(
                (np.array(expected) + values[row, :n].numpy()).tolist(), rel=1e-11
            )
            assert not advantages[row, n:].any() and not returns[row, n:].any()


def test_gae_of_a_row_depends_on_that_row_alone():
    rewards, values, mask = ragged(3, dtype=torch.float32)
    together, _ = gae(rewards, values, mask, 0.99, 0.95)
    for row, n in enumerate(mask.sum(1).tolist()):
        alone, _ = gae(rewards[row : row + 1, :n], values[row : row + 1, :n], mask[row : row + 1, :n], 0.99, 0.95)
        assert_bits_equal(alone[0], together[row, :n], f"row {row}")


def test_rewards_by_hand():
    logprobs, reference = (
        torch.tensor([[-1.0, -2.0, 7.0], [-0.5, 7.0, 7.0]]),
        torch.tensor([[-1.5, -1.0, 5.0], [-0.5, 5.0, 5.0]]),
    )
    mask, scores = torch.tensor([[1, 1, 0], [1, 0, 0]]), torch.tensor([3.0, 4.0])
    assert token_rewards(scores, logprobs, None, mask, 0.0).tolist() == [[0, 3, 0], [4, 0, 0]]
    # -0.5 * (-1 + 1.5) = -0.25;  3 - 0.5 * (-2 + 1) = 3.5;  4 - 0
    assert token_rewards(scores, logprobs, reference, mask, 0.5).tolist() == [[-0.25, 3.5, 0], [4, 0, 0]]


def test_a_row_without_a_token_and_a_hole_are_refused():
    x, empty = torch.zeros(2, 2), torch.tensor([[1, 1], [0, 0]])
    for call in (lambda: token_rewards(x[:, 0], x, None, empty, 0.0), lambda: gae(x, x, empty, 1.0, 1.0)):
        with pytest.raises(ValueError, match="row 1: every token is masked"):
            call()
    with pytest.raises(ValueError, match="a hole"):
        gae(x, x, torch.tensor([[1, 1], [0, 1]]), 1.0, 1.0)


def test_over_turns_the_next_token_is_the_next_turns():
    """Holes change nothing: the estimates are those of the sampled tokens alone, and the reward is on the last of them."""
    rewards, values, mask = ragged(2, dtype=torch.float32)
    columns = torch.tensor([0, 1, 3, 4, 7, 8, 9, 12, 13, 15, 16, 17])[: mask.shape[1]]
    wide = [torch.zeros(len(mask), 20, dtype=x.dtype).index_copy(1, columns, x) for x in (rewards, values, mask)]
    wide[1][wide[2] == 0] = 99.0  # a tool's token has a value, which nobody reads
    found = over_sampled(wide[0], wide[1], wide[2].bool(), 0.97, 0.9)
    for estimate, alone in zip(found, gae(rewards, values, mask, 0.97, 0.9), strict=True):
        assert_bits_equal(estimate[:, columns], alone, "sampled tokens")
        assert not estimate[wide[2] == 0].any()
    scores = torch.arange(len(mask), dtype=torch.float32) + 1
    carried = token_rewards(scores, wide[0], None, wide[2], 0.0)
    last = columns[mask.sum(1) - 1]
    assert carried.sum(1).tolist() == scores.tolist() == carried.gather(1, last[:, None])[:, 0].tolist()


def clipped_error(v: float, old: float, target: float, clip: float) -> float:
    """Compute the clipped error by cases, without min, max or clamp."""
    if v > old + clip:
        held = old + clip
    elif v < old - clip:
        held = old - clip
    else:
        held = v
    free, kept = (v - target) ** 2, (held - target) ** 2
    return 0.5 * (kept if kept > free else free)


def test_value_loss_by_cases_and_its_gradient():
    rng = torch.Generator().manual_seed(0)
    values, old, returns = torch.randn(3, 500, generator=rng, dtype=F64)
    values.requires_grad_()
    loss, clipped = value_loss(values, old, returns, 0.2)
    expected = [clipped_error(*x, 0.2) for x in zip(values.tolist(), old.tolist(), returns.tolist(), strict=True)]
    assert loss.tolist() == pytest.approx(expected, rel=1e-13)
    assert 50 < clipped.sum() < 450
    (gradient,) = torch.autograd.grad(loss.sum(), values)
    assert not gradient[clipped].any()
    assert gradient[~clipped].tolist() == pytest.approx((values - returns)[~clipped].tolist(), rel=1e-13)
    assert torch.autograd.gradcheck(lambda v: value_loss(v, old, returns, 0.2)[0], values)
    plain, none = value_loss(values, old, returns, None)
    assert plain.tolist() == pytest.approx((0.5 * (values - returns) ** 2).tolist()) and not none.any()


def test_whitening_and_explained_variance_are_of_all_ranks():
    rewards, values, mask = ragged(1, rows=40)
    x, v = rewards[mask.bool()].numpy(), values[mask.bool()].numpy()
    parts = [slice(0, 13), slice(13, 40)]  # two ranks
    mean, variance = mean_and_variance(x.astype(np.float64))
    assert (mean, variance) == mean_and_variance(x[::-1].astype(np.float64)), "however ranks divide it"
    assert (mean, variance) == pytest.approx((x.mean(), x.var()), rel=1e-12)
    white = torch.cat([whiten(rewards[p], mask[p], mean, variance) for p in parts])
    assert white[mask.bool()].tolist() == pytest.approx(((x - x.mean()) / (x.std() + 1e-8)).tolist(), rel=1e-11)
    assert not white[mask == 0].any()
    assert explained_variance(x, v) == pytest.approx(1 - (x - v).var() / x.var(), rel=1e-11)
    assert explained_variance(x, v) == explained_variance(x[::-1], v[::-1]), "in any order of micro-batches and ranks"
    assert explained_variance(x, x) == 1 and math.isnan(explained_variance(x * 0, v))
    assert not whiten(torch.ones(2, 3), torch.ones(2, 3), 1.0, 0.0).any(), "no spread"


# ---- a problem with known values


def episodes(policy: torch.Tensor, count: int, longest: int, rng: torch.Generator) -> tuple[torch.Tensor, ...]:
    """States, actions, rewards, mask, [count, longest] each: two states; action 1 goes to the other, 0 stays.

    Staying pays 0.3 in state 0 and 1 in state 1, leaving pays nothing. After each action the episode ends with probability 0.2.
    """
    state = torch.randint(0, 2, (count,), generator=rng)
    alive, columns = torch.ones(count, dtype=torch.bool), []
    for _ in range(longest):
        action = torch.multinomial(policy[state], 1, generator=rng)[:, 0]
        reward = torch.where(action == 0, torch.tensor([0.3, 1.0])[state], 0.0)
        columns.append((state, action, reward, alive))
        alive = alive & (torch.rand(count, generator=rng) > 0.2)
        state = torch.where(action == 1, 1 - state, state)
    return tuple(torch.stack(x, 1) for x in zip(*columns, strict=True))


def test_ppo_solves_a_two_state_problem():
    """Optimal: stay in state 1, V*(1) = 1 + 0.8 V*(1) = 5, and go there from state 0, V*(0) = 0.8 * 5 = 4.

    Greed for the next reward stays in state 0, which is worth 0.3 / 0.2 = 1.5.
    """
    rng = torch.Generator().manual_seed(0)
    logits, values = torch.zeros(2, 2, requires_grad=True), torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.Adam([{"params": [logits], "lr": 0.2}, {"params": [values], "lr": 0.2}])
    for step in range(100):
        for group in optimizer.param_groups:
            group["lr"] = 0.2 * (1 - step / 100)
        with torch.no_grad():
            states, actions, rewards, mask = episodes(logits.softmax(-1), 128, 40, rng)
            old, old_values = logits.log_softmax(-1)[states, actions], values[states] + 0.0
            advantages, returns = gae(rewards, old_values, mask, 1.0, 0.95)
            advantages = whiten(advantages, mask, *mean_and_variance(advantages[mask].numpy()))
        for _ in range(2):
            ratio = (logits.log_softmax(-1)[states, actions] - old).exp()
            policy = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
            critic, _ = value_loss(values[states], old_values, returns, 0.5)
            optimizer.zero_grad()
            (((policy + critic) * mask).sum() / mask.sum()).backward()
            optimizer.step()
    policy = logits.softmax(-1)
    assert policy[0, 1] > 0.98 and policy[1, 0] > 0.98
    assert values.tolist() == pytest.approx([4.0, 5.0], abs=0.2)
