"""PPO's arithmetic on a padded batch of completions, as pure functions: rewards per token, GAE, whitening, value loss.

B: completions, T: tokens of the longest one. Everywhere, `mask` is 1 on real tokens, which stand at the left of each row, and
`values[b, t]` is the critic's estimate before token t is chosen.
"""

import numpy as np
import torch
from torch import Tensor

from rlinvariant import metrics


def token_rewards(scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor | None, mask: Tensor, kl_coef: float) -> Tensor:
    """Give each token its reward: a penalty for leaving the reference on every one, the completion's score on the last.

        r_t = [t is last] score - kl_coef (logprob_t - ref_logprob_t)

    The penalty's sum over a completion estimates, without bias, kl_coef KL(policy || reference) of whole completions (k1).

    Args:
        scores: [B] fp32, the reward of each completion.
        logprobs, ref_logprobs: [B, T] fp32, of the sampled tokens; ref_logprobs None: no penalty.
        mask: [B, T].
        kl_coef: in units of reward per nat.

    Returns:
        [B, T] fp32, 0 where there is no token.

    Raises:
        ValueError: a row has no token: nothing to carry its score.

    Ref: Ouyang et al. 2022, arXiv:2203.02155, equation 2; Schulman 2020, "Approximating KL Divergence" (k1).
    """
    last_B = _last(mask)
    rewards_BT = torch.zeros_like(logprobs)
    if ref_logprobs is not None:
        rewards_BT = torch.where(mask.bool(), -kl_coef * (logprobs - ref_logprobs), rewards_BT)
    return rewards_BT.scatter_add(1, last_B[:, None], scores[:, None].to(rewards_BT.dtype))


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Estimate advantages, and the returns that the critic is to learn. After the last token nothing more is earned.

        delta_t = r_t + gamma V_{t+1} - V_t,   A_t = delta_t + gamma lam A_{t+1},   R_t = A_t + V_t

    Args:
        rewards, values: [B, T] fp32.
        mask: [B, T].
        gamma: discount per token, 0 to 1.
        lam: 0 trusts the critic's next value, 1 the rewards alone.

    Returns:
        advantages, returns: each [B, T] in rewards.dtype, 0 where there is no token.

    Raises:
        ValueError: a row has no token, or a hole.

    Order: one recursion from the last token to the first, in float64; rounded once, at the end.
    Bits: a row depends on that row alone, and not on its padding.
    Ref: Schulman et al. 2016, arXiv:1506.02438, equation 16.
    """
    _lengths(mask)
    real_BT = mask.bool()
    rewards_BT, values_BT = (torch.where(real_BT, x.double(), 0.0) for x in (rewards, values))
    delta_BT = rewards_BT + gamma * torch.nn.functional.pad(values_BT[:, 1:], (0, 1)) - values_BT
    advantages_BT, following_B = torch.zeros_like(delta_BT), torch.zeros_like(delta_BT[:, 0])
    for t in reversed(range(delta_BT.shape[1])):
        following_B = torch.where(real_BT[:, t], delta_BT[:, t] + gamma * lam * following_B, 0.0)
        advantages_BT[:, t] = following_B
    return advantages_BT.to(rewards.dtype), (advantages_BT + values_BT).to(rewards.dtype)


def over_sampled(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Estimate as `gae` where rows have holes: what follows a turn's last token is the next turn's first.

    A tool's tokens are no actions: they take no time, are not discounted over, and have neither advantage nor return.

    Args:
        rewards, values: [B, T] fp32.
        mask: [B, T] bool, true on sampled tokens.

    Returns:
        advantages, returns: each [B, T], 0 where no token was sampled.
    """
    order_BT = (~mask).long().argsort(dim=1, stable=True)  # sampled tokens first, in order
    packed = gae(rewards.gather(1, order_BT), values.gather(1, order_BT), mask.gather(1, order_BT), gamma, lam)
    advantages, returns = (torch.zeros_like(x).scatter(1, order_BT, x) for x in packed)
    return advantages, returns


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None) -> tuple[Tensor, Tensor]:
    """Return half the squared error of each value; a value may not gain by moving further than `clip` from what it was.

        L = 1/2 max((V - R)^2, (V_old + clamp(V - V_old, -clip, clip) - R)^2)

    Args:
        values: [*] with gradient.
        old_values, returns: [*], constants.
        clip: in units of reward; None: plain squared error.

    Returns:
        loss [*], and whether the clipped error was the larger, [*] bool: there the gradient is 0.

    Ref: PPO's own code, baselines/ppo2; Huang et al. 2022, "The 37 Implementation Details of PPO", detail 9.
    """
    error = (values - returns).square()
    if clip is None:
        return error / 2, torch.zeros_like(error, dtype=torch.bool)
    clipped = (old_values + (values - old_values).clamp(-clip, clip) - returns).square()
    return torch.maximum(error, clipped) / 2, clipped > error


def mean_and_variance(numbers: np.ndarray) -> tuple[float, float]:
    """Compute both of [n] float64, float32 numbers of all ranks; the variance has n in its denominator. NaN of none.

    Order: none; sums are exact (squares of float32 numbers are), and rounded once.
    """
    mean = metrics.mean(numbers)
    return mean, max(metrics.mean(numbers * numbers) - mean * mean, 0.0)


def whiten(advantages: Tensor, mask: Tensor, mean: float, variance: float) -> Tensor:
    """Shift and scale to mean 0 and variance 1 over the tokens of all ranks; 0 where there is no token, or no spread.

        white = (A - mean) / (sqrt(variance) + 1e-8)

    Args:
        advantages, mask: [B, T].
        mean, variance: of the tokens of all ranks, by `mean_and_variance`.
    """
    white_BT = (advantages.double() - mean) / (variance**0.5 + 1e-8)
    return torch.where(mask.bool(), white_BT, 0.0).to(advantages.dtype)


def explained_variance(returns: np.ndarray, values: np.ndarray) -> float:
    """Return how much of the returns' variance the critic explains: 1 all, 0 none, below 0 worse than a constant.

        explained = 1 - Var(R - V) / Var(R)

    Args:
        returns, values: [n] float64, R and V of all ranks' tokens. NaN where R does not vary.
    """
    whole = metrics.std(returns)
    return 1.0 - (metrics.std(returns - values) / whole) ** 2 if whole > 0 else float("nan")


def _last(mask: Tensor) -> Tensor:
    """Return the column of each row's last token, [B].

    Raises:
        ValueError: a row has no token.
    """
    real_BT = mask.bool()
    if bool((~real_BT.any(1)).any()):
        row = int((~real_BT.any(1)).nonzero()[0])
        raise ValueError(f"row {row}: every token is masked, or the completion is empty: no token can carry its reward")
    return real_BT.shape[1] - 1 - real_BT.flip(1).long().argmax(1)


def _lengths(mask: Tensor) -> Tensor:
    """Return how many tokens each row has, [B]."""
    real_BT = mask.bool()
    lengths_B = real_BT.sum(1)
    _last(mask)
    if bool((real_BT[:, 1:] & ~real_BT[:, :-1]).any()):
        raise ValueError("mask: expected real tokens at the left of each row, found a hole")
    return lengths_B
