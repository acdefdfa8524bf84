"""Micro-batches by tokens: however a step is divided, its log-probs have the same bits and its gradients are the same sums."""

import random

import pytest
import torch
from transformers import TrainerCallback

from rlinvariant.errors import ConfigErrors, UserError
from rlinvariant.trainer import InvariantGRPOTrainer, memory, microbatches
from rlinvariant.trainer.memory import Fit
from rlinvariant.trainer.microbatches import merged, pack_rows
from tests.parity.harness import assert_exact, assert_same_weights, new_trainer, train, weights
from tests.trainer.test_training import LOSSES, STEP, numbers

ONE_ROW = 1  # a part for each row: no row is shorter


def test_parts_hold_every_row_once_and_at_most_so_many_tokens():
    rng = random.Random(0)
    for _ in range(200):
        lengths = [rng.randint(1, 60) for _ in range(rng.randint(1, 40))]
        most, least = rng.randint(1, 300), rng.randint(1, 5)
        parts = pack_rows(lengths, most, least)
        assert sorted(row for part in parts for row in part) == [*range(len(lengths))]
        assert all(sum(lengths[row] for row in part) <= most or len(part) == 1 for part in parts)
        assert len(parts) >= min(least, len(lengths))
        assert parts == pack_rows(lengths, most, least)


def test_no_part_is_needlessly_small():
    assert pack_rows([8] * 16, 64) == [[0, 2, 4, 6, 8, 10, 12, 14], [1, 3, 5, 7, 9, 11, 13, 15]]
    assert len(pack_rows([10] * 100, 1000)) == 1 and len(pack_rows([10] * 100, 999)) == 2


@pytest.mark.parametrize(
    ("given", "expected"),
    [((8, 4, 4), (32, 1, 1)), ((8, 4, 8), (32, 1, 2)), ((8, 3, 2), (8, 3, 2)), ((8, 4, 2), (16, 2, 1)), ((8, 1, 1), (8, 1, 1))],
)
def test_trl_counts_as_few_micro_batches_as_the_rollout_allows(given, expected):
    assert merged(*given) == expected
    (rows, steps, rollout), (new_rows, new_steps, new_rollout) = given, expected
    assert rows * steps == new_rows * new_steps and rows * rollout == new_rows * new_rollout


class Gradients(TrainerCallback):
    """Keeps each step's gradients, as the optimizer gets them."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append(torch.cat([p.grad.flatten().double() for p in model.parameters()]))


@pytest.fixture
def divided(arithmetic_dir, exact_engine, tmp_path):
    """Train one step in fp32, with so many tokens in a part; return the run and its gradients."""

    def start(tokens, **changes):
        kept = Gradients()
        directory = tmp_path / str(len(list(tmp_path.iterdir())))
        settings = {"max_steps": 1, "max_grad_norm": 1e9, "callbacks": [kept]} | changes
        run = train(arithmetic_dir, exact_engine, directory, tokens_per_microbatch=tokens, **settings)
        return run, kept.steps[0]

    return start


def distance(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("loss", LOSSES)
def test_a_step_has_the_same_gradients_and_bits_however_it_is_divided(loss, divided, monkeypatch):
    settings = {"loss_type": loss, "importance_sampling_level": "sequence" if loss == "luspo" else "token"}
    whole, expected = divided(None, **settings)
    assert_exact(whole, STEP)
    but = ("loss", "grad_norm")  # sums of floating-point numbers in another order
    for tokens in (100, 40, ONE_ROW + 13):
        run, found = divided(tokens, **settings)
        assert_exact(run, STEP)
        assert numbers(run, *but) == numbers(whole, *but)
        assert run.rows[0]["loss"] == pytest.approx(whole.rows[0]["loss"], rel=1e-4, abs=1e-6)
        assert distance(found, expected) < 0.02, f"{tokens} tokens"  # of bf16 activations' own gradients
    monkeypatch.setattr(InvariantGRPOTrainer, "_weight", lambda *_: 1.0)
    _, wrong = divided(40, **settings)
    assert distance(wrong, expected) > 0.2, "a part's weight is not seen"
