"""The weights that a sampler has are known by their bits: whoever changes the trainer's, the next draw is from the new ones."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import TrainerCallback

from rlinvariant.config import PPOConfig
from rlinvariant.trainer import InvariantGRPOTrainer
from rlinvariant.trainer.evaluate import greedy_reward
from tests.parity.device import cpu_only
from tests.parity.harness import Run, assert_exact, new_trainer, questions, variety

NAME = "model.layers.0.mlp.up_proj.weight"


def by_step_number(self: Any, stale: bool = False) -> None:
    """Sync by the number of the step, as was done before: the control, which has to miss each change."""
    version, older = self._versions.to_sample_with(self.state.global_step, stale)
    if self._versions.sampler != version:
        self.sampler.sync(self._weights(older))
        self._versions.sampler = version


@pytest.fixture(params=["by bits", "by step number"])
def rule(request, monkeypatch) -> str:
    """Let `sync` know the weights by their bits or by the step's number; the control's runs are exact in nothing."""
    if request.param == "by step number":
        monkeypatch.setattr(InvariantGRPOTrainer, "sync", by_step_number)
    return request.param


@pytest.fixture
def watched(exact_engine, monkeypatch) -> Callable[[Run], list[bool]]:
    """Write down at each draw, from now on, whether the engine's weights are others than the run's."""

    def watch(run: Run) -> list[bool]:
        found: list[bool] = []
        generate = exact_engine.generate

        def looking(*args: Any, **kwargs: Any) -> Any:
            found.append(bool(exact_engine.differing_weights(run.trainer._weights())))
            return generate(*args, **kwargs)

        monkeypatch.setattr(exact_engine, "generate", looking)
        return found

    return watch


def doubled(p: torch.Tensor) -> torch.Tensor:
    return p.detach().clone() * 2


def in_place(model: Any) -> None:
    with torch.no_grad():
        model.get_parameter(NAME).mul_(2)


def other_storage(model: Any) -> None:
    p = model.get_parameter(NAME)
    p.data = doubled(p)


def one_ulp(model: Any) -> None:
    """The least change that a bf16 sampler can see."""
    p = model.get_parameter(NAME)
    word = p.data.view(-1)[:1].bfloat16()
    word.view(torch.int16).add_(1)
    p.data.view(-1)[:1] = word.float()


def fused_step(model: Any) -> None:
    """A fused optimizer writes without a count in `Tensor._version`."""
    p = model.get_parameter(NAME)
    p.grad = torch.ones_like(p)
    torch.optim.AdamW([p], lr=0.1, fused=True).step()
    p.grad = None


EDITS: dict[str, Callable[[Any], Any]] = {
    "in place": in_place,
    "by .data": lambda model: model.get_parameter(NAME).data.mul_(2),
    "another storage": other_storage,
    "load_state_dict": lambda model: model.load_state_dict({NAME: doubled(model.get_parameter(NAME))}, strict=False),
    "a fused optimizer": fused_step,
    "one ulp": one_ulp,
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_is_seen_by_the_next_evaluation(edit, rule, arithmetic_dir, exact_engine, watched, tmp_path):
    run = new_trainer(arithmetic_dir, exact_engine, tmp_path)
    stale, trainer = watched(run), run.trainer
    greedy_reward(trainer, questions(4))
    EDITS[edit](trainer.model)
    greedy_reward(trainer, questions(4))
    assert stale == [False, rule == "by step number"]


def test_an_edit_is_seen_by_trls_evaluation(rule, arithmetic_dir, exact_engine, watched, tmp_path):
    evaluated = {"eval_dataset": questions(4), "per_device_eval_batch_size": 16}
    run = new_trainer(arithmetic_dir, exact_engine, tmp_path, **evaluated)
    stale = watched(run)
    run.trainer.train()
    run.trainer.evaluate()
    in_place(run.trainer.model)
    run.trainer.evaluate()
    assert stale[-1] == (rule == "by step number") and not any(stale[:-1])


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_an_edit_between_two_draws_of_a_step_is_seen(algorithm, rule, arithmetic_dir, exact_engine, watched, tmp_path):
    class Edits(TrainerCallback):
        def on_substep_end(self, args, state, control, model: Any = None, **kwargs):
            in_place(model)

    ppo = {"ppo": PPOConfig()} if algorithm == "ppo" else {}
    twice = {"gradient_accumulation_steps": 2, "steps_per_generation": 1, "per_device_train_batch_size": 8}
    run = new_trainer(arithmetic_dir, exact_engine, tmp_path, callbacks=[Edits()], max_steps=1, **twice, **ppo)
    stale = watched(run)
    if rule == "by bits":
        run.trainer.train()
        assert_exact(run, 64)
        assert stale == [False, False]
    else:
        with pytest.raises(Exception, match="mismatched"):
            run.trainer.train()
        assert stale == [False, True]


def test_the_best_model_is_what_is_evaluated(rule, arithmetic_dir, exact_engine, watched, tmp_path):
    """`load_best_model_at_end`, with rewards that fall: the first step's weights are loaded after the last step."""

    def falling(completions: list[str], trainer_state: Any, **_: Any) -> list[float]:
        return [value - 10 * trainer_state.global_step for value in variety(completions)]

    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_reward", "greater_is_better": True}
    each = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    evaluated = {"eval_dataset": questions(4), "per_device_eval_batch_size": 16, "reward_funcs": falling}
    run = new_trainer(arithmetic_dir, exact_engine, tmp_path, **best, **each, **evaluated)
    stale = watched(run)
    run.trainer.train()
    assert run.trainer.state.best_global_step == 1
    greedy_reward(run.trainer, questions(4))
    assert stale[-1] == (rule == "by step number") and not any(stale[:-1])


@cpu_only("a GPU's engine keeps its weights as they are")
def test_a_stock_engine_is_given_the_weights_at_each_draw(arithmetic_dir, stock_engine, tmp_path):
    """It has packed its matrices: an element in a column that is not read would go unseen."""
    trainer = new_trainer(arithmetic_dir, stock_engine, tmp_path, invariance="off").trainer
    trainer.sync()
    one_ulp(trainer.model)
    weight = trainer.model.get_parameter(NAME)
    weight.data[0, 1] += 1
    with mock.patch.object(stock_engine, "sync", wraps=stock_engine.sync) as given:
        greedy_reward(trainer, questions(4))
    assert given.call_count == 1


def test_weights_that_have_not_changed_are_not_given_again(arithmetic_dir, exact_engine, tmp_path):
    """A sync forgets the prefix cache."""
    trainer = new_trainer(arithmetic_dir, exact_engine, tmp_path).trainer
    trainer.sync()
    with mock.patch.object(exact_engine, "sync", wraps=exact_engine.sync) as given:
        greedy_reward(trainer, questions(4))
        trainer.model.get_parameter(NAME).data.copy_(trainer.model.get_parameter(NAME).data.bfloat16().float())
        trainer.sync()  # less than a rounding to bf16
    assert given.call_count == 0
