"""The parity benchmark of a GPU and its soak, with workers that answer at once in place of processes."""

import contextlib
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from rlinvariant.bench import gpu, gpu_parity, measure, report
from rlinvariant.bench.compare import against_trainer, differing
from rlinvariant.rollout import Completion
from tests.bench.fake_workers import Fakes


def test_parity_puts_both_processes_of_a_model_together(monkeypatch):
    def answer(side, what):
        return {"sampler against trainer, micro-batch 1, T = 1.0": (0 if side == "exact" else 7, 8)}

    Fakes(monkeypatch, gpu_parity, answer)
    rows = list(gpu_parity.rows(tiny=False))
    assert [row.model for row in rows] == [*gpu_parity.SMALL_MODELS, *gpu_parity.LARGE_MODELS]
    assert {(row.mismatched, row.tokens, row.control_mismatched) for row in rows} == {(0, 8, 7)}


def test_a_model_whose_process_ends_costs_its_own_rows_alone(monkeypatch, tmp_path):
    ended = iter(gpu_parity.SMALL_MODELS[:1] * 2)

    def answer(side, what):
        if next(ended, None):
            raise measure.WorkerEnded("gpu_parity ended with exit code 1\nKeyError: 'x'")
        return {"sampler against trainer, micro-batch 1, T = 1.0": (0, 8)}

    Fakes(monkeypatch, gpu_parity, answer)
    monkeypatch.setattr(gpu_parity, "ThreadPoolExecutor", lambda _: ThreadPoolExecutor(1))  # the first model's come first
    with pytest.raises(SystemExit, match="not measured: .*KeyError"):
        measure.write(tmp_path / "parity.json", gpu_parity.rows(tiny=False), tiny=False)
    rows = json.loads((tmp_path / "parity.json").read_text())["rows"]
    assert [row.get("case", row.get("model")) for row in rows] == [*gpu_parity.SMALL_MODELS, *gpu_parity.LARGE_MODELS]
    assert [("missing" in row) for row in rows] == [True, False, False, False, False]
    assert f"| {gpu_parity.SMALL_MODELS[0]} | not measured: " in report.markdown(tmp_path)


def test_a_trainer_that_scores_other_tokens_than_were_sampled_is_refused():
    class Model(torch.nn.Linear):
        def forward(self, *args, token_ids, **kwargs):
            return torch.zeros(len(token_ids) - 1), None

    completion = Completion([1, 2], [-1.0, -1.0])
    with pytest.raises(ValueError, match="1 log-probs were computed for 2 sampled tokens"):
        against_trainer(Model(1, 1), [[3, 4]], [completion], 1.0, 1)


def test_completions_differ_from_where_they_part():
    a = Completion([1, 2, 3, 4], [-1.0, -1.0, -1.0, -1.0])
    assert differing(a, a) == 0
    assert differing(a, Completion([1, 2, 3, 4], [-1.0, -2.0, -1.0, -1.0])) == 1
    assert differing(a, Completion([1, 9, 3, 4], [-1.0, -1.0, -1.0, -1.0])) == 3


def _rollouts(mismatched=0, control=9):
    def answer(side, seed, temperature):
        return {"tokens": 100, "sampled": 100, "mismatched": control if side == "control" else mismatched}

    return answer


def test_a_soak_adds_up_over_runs_and_has_one_control(monkeypatch, tmp_path):
    file = tmp_path / "parity_soak.json"
    fakes = Fakes(monkeypatch, gpu_parity, _rollouts())
    gpu_parity.soak(file, 700, tiny=True)
    content = json.loads(file.read_text())
    assert content["tokens"] >= 700 and content["mismatched"] == 0 and content["coverage"] == 1 and len(content["runs"]) == 1
    assert content["control"]["mismatched"] == 9 and [side for side, _ in fakes.asked].count("control") == 1
    gpu_parity.soak(file, 300, tiny=True)
    again = json.loads(file.read_text())
    assert again["tokens"] >= content["tokens"] + 300 and again["runs"][0] == content["runs"][0] and len(again["runs"]) == 2
    assert [side for side, _ in fakes.asked].count("control") == 1
    assert len({request["seed"] for _, request in fakes.asked}) == len(fakes.asked)
    assert {request["temperature"] for _, request in fakes.asked} == {1.0, 0.7}
    assert f"{again['tokens']:,} | 1 | 9 / 100 |" in report.markdown(tmp_path)


@pytest.mark.parametrize(
    ("answer", "dead", "says"),
    [
        (_rollouts(mismatched=1), [], "mismatched of"),
        (_rollouts(control=0), [], "0 mismatched of"),
        (_rollouts(), ["exact-1", "exact-2"], "0 mismatched of 0 "),
        (_rollouts(), ["control"], "control: None"),
    ],
)
def test_a_soak_that_proves_nothing_fails(monkeypatch, tmp_path, answer, dead, says):
    Fakes(monkeypatch, gpu_parity, answer, dead)
    with pytest.raises(SystemExit, match=says):
        gpu_parity.soak(tmp_path / "parity_soak.json", 300, tiny=True)
    assert set(json.loads((tmp_path / "parity_soak.json").read_text())["runs"][0]["missing"]) == set(dead)


@pytest.mark.parametrize("dead", [[], ["control"]])
def test_a_soak_has_its_control_first(monkeypatch, tmp_path, dead):
    """The control runs first, and alone: on a small GPU two engines fit, a third does not."""
    fakes = Fakes(monkeypatch, gpu_parity, _rollouts(), dead)
    monkeypatch.setattr(gpu, "large", lambda: False)
    with pytest.raises(SystemExit, match="control: None") if dead else contextlib.nullcontext():
        gpu_parity.soak(tmp_path / "parity_soak.json", 300, tiny=False)
    run = json.loads((tmp_path / "parity_soak.json").read_text())["runs"][0]
    assert [side for side, _ in fakes.asked].index("control") == 0
    assert [side for side, _ in fakes.asked].count("control") == 1 and list(run["missing"]) == dead
    assert run["rollouts"] == len(fakes.asked) - 1 and run["tokens"] >= 300


def test_one_half_of_a_soak_goes_on_without_the_other(monkeypatch, tmp_path):
    Fakes(monkeypatch, gpu_parity, _rollouts(), ["exact-1"])
    gpu_parity.soak(tmp_path / "parity_soak.json", 300, tiny=True)
    assert json.loads((tmp_path / "parity_soak.json").read_text())["tokens"] == 300
