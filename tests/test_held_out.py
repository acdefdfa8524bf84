"""One word for the held-out reward of a run: what is printed, and what result.json says."""

from types import SimpleNamespace
from typing import Any

from rlinvariant import held_out, run
from rlinvariant.held_out import HeldOut
from rlinvariant.report.console import Console
from rlinvariant.trainer import evaluate
from tests.parity.harness import new_trainer, questions

ZEROS, GRADED, HALF = HeldOut(0.0, True), HeldOut(0.4, False), HeldOut(0.5, True)


def test_an_accuracy_is_one_before_and_after():
    assert held_out.result({"before": ZEROS, "after": HALF})["heldout_is_accuracy"] is True
    for before, after in ((ZEROS, GRADED), (GRADED, HALF)):
        assert held_out.result({"before": before, "after": after})["heldout_is_accuracy"] is False
    for known in ({}, {"before": ZEROS}):
        assert held_out.result(known)["heldout_is_accuracy"] is None, "not known before the run ends"


def test_the_line_of_one_evaluation_does_not_call_zeros_an_accuracy(monkeypatch, capsys):
    class Journal:
        """Keeps what it is given, as the run's does."""

        console, held_out = Console(), {}

        def on_held_out(self, when, value, step):
            self.held_out[when] = value

    values = iter((ZEROS, GRADED))
    monkeypatch.setattr(evaluate, "greedy_reward", lambda *_: next(values))
    trainer, journal = type("Trainer", (), {"state": type("State", (), {"global_step": 0})}), Journal()
    for when in held_out.WHEN:
        run.evaluate(journal, trainer, [0], when)  # pyright: ignore
    journal.console.summary([], journal.held_out, "runs/a")
    said = capsys.readouterr().out
    assert "held-out reward before: 0.000\n" in said and "held-out reward after: 0.400\n" in said
    assert "0.000 before -> 0.400 after, mean reward, greedy" in said and "accuracy" not in said


def test_held_out_rows_to_which_no_reward_applies_are_said(arithmetic_dir, exact_engine, tmp_path, capsys):
    """It is the first that a run knows of its rewards; the control has one."""
    for given, count in ((None, 1), (0.5, 0)):
        rewards = [lambda completions, given=given, **_: [given] * len(completions)]
        made = new_trainer(arithmetic_dir, exact_engine, tmp_path, reward_funcs=rewards)
        journal: Any = SimpleNamespace(held_out={}, console=Console(), on_held_out=lambda *_: None)
        run.evaluate(journal, made.trainer, questions(3), "before")
        said = "note: held-out reward before: every reward is None: no reward function gave any of 3 completions a number"
        assert capsys.readouterr().out.count(said) == count
