"""Numbers that are not finite, planted into a trainer's second step: where, by what means, and what the error must say."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import TrainerCallback
from trl import GRPOTrainer

from rlinvariant.config import PPOConfig
from rlinvariant.trainer.finite import FiniteTrainer, not_finite
from tests.parity.harness import Run, new_trainer

NAN, INF = float("nan"), float("inf")
SMALL = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "max_completion_length": 4}
LAYER = "model.layers.1.mlp.up_proj.weight"


@dataclass(frozen=True)
class Plant:
    """A place, and what is planted there.

    Args:
        place: a key of `PLACES`.
        value: what is planted.
        algorithm: "grpo" or "ppo".
        says: a pattern of the error's text between the step and the end.
        then: how it ends.
        spreads: whether, without the check, a weight or a state becomes not finite; else the harm is another.
    """

    place: str
    value: float
    algorithm: str
    says: str
    then: str = "stopped before the optimizer step"
    spreads: bool = True

    def __str__(self) -> str:
        return f"{self.algorithm}: {self.value} in {self.place}"


class At(TrainerCallback):
    """Calls a function before the second step."""

    def __init__(self, function: Callable[[], None]) -> None:
        self.function = function

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.function()


def after(trainer: Any, method: str, change: Callable[[Any], Any]) -> None:
    """Let `change` have what a method of one trainer returns in the second step."""
    real = getattr(trainer, method)

    def changed(*args: Any, **kwargs: Any) -> Any:
        found = real(*args, **kwargs)
        return change(found) if trainer.state.global_step == 1 else found

    setattr(trainer, method, changed)


def first(x: Tensor, value: float) -> Tensor:
    """Put a value in the place of a tensor's first number, in a way that no version counter sees; return the tensor."""
    x.data.view(-1)[0] = value
    return x


def below(trainer: Any, method: str, change: Callable[[Any], Any]) -> None:
    """The same below our trainers, where TRL's own method returns."""
    real = getattr(GRPOTrainer, method)

    def changed(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = real(self, *args, **kwargs)
        return change(found) if self is trainer and trainer.state.global_step == 1 else found

    patch = mock.patch.object(GRPOTrainer, method, changed)
    patch.start()
    trainer.planted.append(patch)


def weight(trainer: Any) -> Tensor:
    return trainer.model.get_parameter(LAYER)


def state(trainer: Any, parameter: Tensor, key: str) -> Tensor:
    return trainer.optimizer.state[parameter][key]


def one_key(key: str, value: float) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Replace a tensor of a rollout by a copy with the value planted."""
    return lambda output: output | {key: first(output[key].clone(), value)}


def set_rate(trainer: Any, value: float) -> None:
    for group in trainer.optimizer.param_groups:
        group["lr"] = value


def backward(trainer: Any, plant: Callable[[], Any]) -> None:
    """Plant after the second step's backward, right before the optimizer's turn."""
    after(trainer, "training_step", lambda loss: (plant(), loss)[1])


def in_values(trainer: Any, value: float) -> None:
    trainer.critic.register_forward_hook(lambda m, i, values: values * (value if trainer.state.global_step == 1 else 1))


PLACES: dict[str, Callable[[Any, float], None]] = {
    "a weight, before the draw": lambda t, v: t.add_callback(At(lambda: first(weight(t), v))),
    "a weight, after the backward": lambda t, v: backward(t, lambda: first(weight(t), v)),
    "a gradient": lambda t, v: backward(t, lambda: first(weight(t).grad, v)),
    "every gradient number of a layer": lambda t, v: backward(t, lambda: weight(t).grad.fill_(v)),
    "exp_avg": lambda t, v: backward(t, lambda: first(state(t, weight(t), "exp_avg"), v)),
    "exp_avg_sq": lambda t, v: backward(t, lambda: first(state(t, weight(t), "exp_avg_sq"), v)),
    "the learning rate": lambda t, v: backward(t, lambda: set_rate(t, v)),
    "the sampler's log-probs": lambda t, v: after(t, "_generate_single_turn", lambda r: (r[0], [[v, *r[1][0][1:]], *r[1][1:]])),
    "advantages": lambda t, v: below(t, "_generate_and_score_completions", one_key("advantages", v)),
    "rewards": lambda t, v: below(t, "_calculate_rewards", lambda r: first(r.clone(), v)),
    "every reward": lambda t, v: below(t, "_calculate_rewards", lambda r: torch.full_like(r, v)),
    "the loss": lambda t, v: below(t, "_compute_loss", lambda loss: loss * v),
    "the critic's weight": lambda t, v: backward(t, lambda: first(t.critic.head.weight, v)),
    "the critic's gradient": lambda t, v: backward(t, lambda: first(t.critic.head.weight.grad, v)),
    "the critic's values": in_values,
}


def plants() -> Iterator[Plant]:
    layer, numbers = LAYER.replace(".", r"\."), r"1 of [\d,]+ numbers are not finite"
    for algorithm in ("grpo", "ppo"):
        for value in (NAN, INF, -INF):
            yield Plant("a weight, before the draw", value, algorithm, f"weight {layer}: {numbers}")
            yield Plant("a weight, after the backward", value, algorithm, f"weight {layer}: {numbers}")
            yield Plant("a gradient", value, algorithm, f"gradient of {layer}: {numbers}")
            yield Plant("exp_avg", value, algorithm, f"optimizer state exp_avg of {layer}: {numbers}")
            yield Plant("the learning rate", value, algorithm, "lr of parameter group 0 is")
            yield Plant("the loss", value, algorithm, f"loss: {numbers}")
            yield Plant("the sampler's log-probs", value, algorithm, f"sampler_logprobs: {numbers}", spreads=False)
            if algorithm == "grpo":
                yield Plant("advantages", value, algorithm, f"advantages: {numbers}")
            else:
                yield Plant("the critic's weight", value, algorithm, rf"weight the critic's head\.weight: {numbers}")
                yield Plant("the critic's gradient", value, algorithm, rf"gradient of the critic's head\.weight: {numbers}")
                yield Plant("the critic's values", value, algorithm, r"values: [\d,]+ of [\d,]+ numbers are not finite")
        yield Plant("exp_avg_sq", NAN, algorithm, f"optimizer state exp_avg_sq of {layer}: {numbers}")
        yield Plant("exp_avg_sq", INF, algorithm, f"optimizer state exp_avg_sq of {layer}: {numbers}")
        for value in (INF, -INF, 1e30):
            yield Plant("rewards", value, algorithm, "variety: 1 of 16 rewards are not finite, or too large", spreads=False)
        yield Plant("every reward", NAN, algorithm, "every reward is None", spreads=False)
        yield Plant("every gradient number of a layer", 3e38, algorithm, "the gradient's norm is not finite", spreads=False)
        overflow, then = r"weight [\w.]+: [\d,]+ of [\d,]+ numbers are not finite", "checkpoint-2 was not written"
        yield Plant("the learning rate", 3e38, algorithm, overflow, then)


@contextmanager
def planted(trainer: Any, plant: Plant) -> Iterator[None]:
    """Plant for the length of a block."""
    trainer.planted = []
    PLACES[plant.place](trainer, plant.value)
    try:
        yield
    finally:
        for patch in trainer.planted:
            patch.stop()


@contextmanager
def unchecked() -> Iterator[None]:
    """The trainers as they were: nothing looks at a number."""
    names = ("_require_finite", "_raise_agreed")
    with (
        mock.patch.object(FiniteTrainer, names[0], lambda *a, **k: True),
        mock.patch.object(FiniteTrainer, names[1], lambda *a, **k: None),
    ):
        yield


def poisoned(trainer: Any, directory: Path) -> str | None:
    """Name a number that is not finite in a trainer's weights and states, if one is given, or a checkpoint; None if all are."""
    found = trainer and not_finite(trainer._weights_and_states())
    for file in sorted(directory.rglob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            named = ((f"{file.name}: {name}", tensors.get_tensor(name)) for name in tensors.keys())  # noqa: SIM118
            found = found or not_finite((name, x) for name, x in named if x.is_floating_point())
    return found


def tried(plant: Plant, path: str, engine: Any, directory: Path, **changes: Any) -> tuple[Run, str]:
    """Train two steps with a plant in the second; return the run and the error that it ended with, "" if with none."""
    ppo = {"ppo": PPOConfig()} if plant.algorithm == "ppo" else {}
    run, said = new_trainer(path, engine, directory, **SMALL, **ppo, **changes), ""
    with planted(run.trainer, plant):
        try:
            run.trainer.train()
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
    return run, said


def stopped(plant: Plant, run: Run, said: str, directory: Path) -> str | None:
    """Say what is wrong with the end of a run with a plant; None if nothing is."""
    when = "after step 2" if "checkpoint" in plant.then else "step 2"
    expected = rf"UserError: {when}: {plant.says}.*; {plant.then}; checkpoint-1 is the last$"
    saved = sorted(path.name for path in directory.glob("checkpoint-*"))
    stays = plant.place.startswith(("a weight", "the critic's weight", "exp_avg")) or "checkpoint" in plant.then
    found = poisoned(None if stays else run.trainer, directory)  # what was planted in memory is there still
    well = re.match(expected, said) and saved == ["checkpoint-1"] and found is None
    return None if well else f"{plant}: {said or 'no error'}; {saved}; {found}"
