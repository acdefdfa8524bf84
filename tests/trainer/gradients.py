"""The gradients of a run."""

import torch
from torch import Tensor
from transformers import TrainerCallback


class Gradients(TrainerCallback):
    """Keeps each step's gradients of the policy, float64, as the optimizer gets them."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append(torch.cat([p.grad.flatten().double() for p in model.parameters()]))


def distance(found: Tensor, expected: Tensor) -> float:
    """Return how far apart two gradients are, as a share of the second one's norm."""
    return ((found - expected).norm() / expected.norm()).item()


def halves(x: list[Tensor]) -> Tensor:
    """The sum of a step's leaves as it is defined, by recursion."""
    if len(x) == 1:
        return x[0]
    return halves(x[: len(x) // 2]) + halves(x[len(x) // 2 :])
