"""`rlinvariant eval`: what is wrong is said before the engine starts; numbers are those of the completions in the file."""

import json
from pathlib import Path

import pytest

from rlinvariant.errors import ConfigErrors, UserError
from rlinvariant.evaluation.command import table
from rlinvariant.evaluation.evaluate import MIXED, estimates
from tests.commands import run

RECIPE = str(Path(__file__).parents[1] / "trainer/tiny_recipe.py")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["{model}"], "recipe: missing; write recipe=NAME"),
        (["{model}", "recipe=arithmetc"], "did you mean arithmetic?"),
        (["{model}", "recipe=arithmetic", "steps=3"], "steps: eval does not take it"),
        (["{model}", "recipe=arithmetic", "invariance=trainer"], "expected exact or off"),
        (["{model}", "recipe=arithmetic", "seed=1", "seed=2"], "seed=1 and seed=2"),
        (["{model}", "recipe=arithmetic", "data.digits=x"], "data.digits=x: expected int"),
        (["nowhere", "recipe=arithmetic"], "model=nowhere: no such directory"),
        (["{model}", "recipe=arithmetic", "--k", "4"], "--k 4: expected at most --samples"),
        (["{model}", "recipe=arithmetic", "--samples", "2", "--k", "1,4"], "expected at most --samples, which is 2"),
        (["{model}", "recipe=arithmetic", "--k", "0"], "expected whole numbers of at least 1"),
        (["{model}", "recipe=arithmetic", "--temperature", "0"], "expected a number of at least 0.01"),
        (["{model}", "recipe=arithmetic", "--out", "/proc/x/y.json"], "cannot be written"),
    ],
)
def test_a_mistake_is_one_line_before_the_engine(arguments, line, arithmetic_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as raised:
        run("eval", *(argument.format(model=arithmetic_dir) for argument in arguments))
    errors = raised.value.errors if isinstance(raised.value, ConfigErrors) else [str(raised.value)]
    assert len(errors) == 1 and line in errors[0] and "\n" not in errors[0]
    assert list(tmp_path.iterdir()) == [], "nothing is left"


def test_a_run_without_weights_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/empty").mkdir(parents=True)
    (tmp_path / "runs/empty/metrics.jsonl").touch()
    with pytest.raises(UserError, match="neither model nor a whole checkpoint"):
        run("eval", "empty")


def problem(*rewards: float) -> list[dict]:
    return [{"reward": reward} for reward in rewards]


def test_pass_at_k_needs_rewards_of_0_or_1_or_a_bound():
    mixed = [problem(0.0, 0.5), problem(1.0, 0.2)]
    found, notes = estimates(mixed, None, None, sampled=True)
    assert list(found) == ["reward"] and notes == [MIXED]
    found, notes = estimates(mixed, None, 0.5, sampled=True)
    assert [found[f"pass@{k}"]["mean"] for k in (1, 2)] == [0.5, 1.0] and not notes
    found, _ = estimates([problem(0.0, 1.0), problem(0.0, 0.0)], [2], None, sampled=True)
    assert found["reward"]["mean"] == 0.25 and found["pass@2"] == {"mean": 0.5, "error": 0.5}


@pytest.mark.slow
def test_an_evaluation_is_what_its_completions_say(arithmetic_dir, tmp_path, monkeypatch, capsys):
    """Of one model: greedy and sampled, again with another batch: the same; with another seed or stock vLLM: not."""
    monkeypatch.chdir(tmp_path)

    def evaluated(name: str, *more: str) -> dict:
        assert run("eval", arithmetic_dir, f"recipe={RECIPE}", "--samples", "4", "--out", f"{name}.json", *more) == 0
        return json.loads((tmp_path / f"{name}.json").read_text())

    first = evaluated("first", "--pass", "0.9")
    said = capsys.readouterr().out
    greedy, sampled = first["draws"]
    assert greedy["completions"] == 8 and sampled["completions"] == 32 and len(first["results"]) == 8
    for draw in first["draws"]:
        means = [sum(one["reward"] for one in p[draw["name"]]) / draw["samples"] for p in first["results"]]
        assert draw["estimates"]["reward"]["mean"] == pytest.approx(sum(means) / 8)
        assert f"{draw['estimates']['reward']['mean']:8.3f}" in said
    for one in first["results"][0]["T=1"]:
        assert one["reward"] == pytest.approx(len(set(one["completion"])) / 10) and one["rewards"][0]["name"] == "variety"
    assert set(sampled["estimates"]) == {"reward", "pass@1", "pass@2", "pass@4"}
    assert all(line in said for line in table(first))
    again = evaluated("again", "--pass", "0.9", "sampler.max_num_seqs=3")
    assert again["results"] == first["results"], "no number depends on the batch"
    other = evaluated("other", "--pass", "0.9", "seed=1")
    assert [p["greedy"] for p in other["results"]] == [p["greedy"] for p in first["results"]]
    assert [p["T=1"] for p in other["results"]] != [p["T=1"] for p in first["results"]], "the control"
