"""`rlinvariant eval`: what is wrong is said before the engine starts; numbers are those of the completions in the file."""

import json
from pathlib import Path

import pytest
import torch

import rlinvariant.evaluation.evaluate as evaluation
from rlinvariant.config import parse
from rlinvariant.errors import ConfigErrors, UserError
from rlinvariant.evaluation.command import table
from rlinvariant.evaluation.evaluate import MIXED, estimates
from rlinvariant.evaluation.subject import find
from tests.commands import run

RECIPE = str(Path(__file__).parents[1] / "trainer/tiny_recipe.py")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["{model}"], "recipe: missing; write recipe=NAME"),
        (["{model}", "recipe=arithmetc"], "did you mean arithmetic?"),
        (["{model}", "recipe=arithmetic", "steps=3"], "steps: eval does not take it"),
        (["{model}", "recipe=arithmetic", "trainer.temperature=2"], "trainer.temperature: eval does not take it"),
        (["{model}", "recipe=arithmetic", "trainer.reward_weights=1,0.5"], "expected 1, one for each reward function"),
        (["{model}", "recipe=arithmetic", "reward=nowhere.py:f"], "reward=nowhere.py:f"),
        (["{model}", "recipe=calculator"], "tool_format=plain needs one chat template"),
        (["{model}", "recipe=arithmetic", "tool_timeout=1"], "tool_timeout: expected tools= or environment= beside it"),
        (["{model}", "recipe=guess", "reward_cage=1"], "reward_cage=1: expected 0 with an environment"),
        (["{model}", "recipe=arithmetic", "trainer.top_p=0"], "trainer.top_p=0.0: expected more than 0 and at most 1"),
        (["{model}", "recipe=arithmetic", "invariance=trainer"], "expected exact or off"),
        (["{model}", "recipe=arithmetic", "seed=1", "seed=2"], "seed=1 and seed=2"),
        (["{model}", "recipe=arithmetic", "data.digits=x"], "data.digits=x: expected int"),
        (["nowhere", "recipe=arithmetic"], "model=nowhere: no such directory"),
        (["runs/a/checkpoints/checkpoint-2"], "runs/a/checkpoints/checkpoint-2: no such run (rlinvariant ls names those here)"),
        (["{model}", "recipe=arithmetic", "--k", "4"], "--k 4: expected at most --samples"),
        (["{model}", "recipe=arithmetic", "--samples", "2", "--k", "1,4"], "expected at most --samples, which is 2"),
        (["{model}", "recipe=arithmetic", "--k", "0"], "expected whole numbers of at least 1"),
        (["{model}", "recipe=arithmetic", "--temperature", "0"], "expected a number from 0.01 to 2"),
        (["{model}", "recipe=arithmetic", "--temperature", "0.8"], "--temperature 0.8: expected --samples beside it"),
        (["{model}", "recipe=arithmetic", "--pass", "nan"], "--pass: nan: expected a number"),
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


REWARDS = """
def dots(completions, **kwargs):
    return [0.5 for _ in completions]

def of_short_prompts(completions, prompts, **kwargs):
    return [1.0 if len(prompt) < 6 else None for prompt in prompts]

def needs(completions, nothing_has_it):
    return [0.0 for _ in completions]
"""


def own_run(arithmetic_dir: str, *settings: str) -> None:
    """Leave runs/yam, as a run of config=run.yaml without a recipe does, and go on with its model."""
    Path("rewards.py").write_text(REWARDS)
    Path("rows.jsonl").write_text("\n".join(json.dumps({"prompt": f"{10**i}+{i}="}) for i in range(6)))
    Path("run.yaml").write_text("data: {path: rows.jsonl, eval_size: 4}\nreward: [rewards.py:of_short_prompts]\n")
    length = "trainer.max_completion_length=12"
    config = parse(["config=run.yaml", f"model={arithmetic_dir}", "run=yam", "sampler.max_model_len=64", length, *settings])
    Path("runs/yam").mkdir(parents=True)
    Path("runs/yam/config.json").write_text(json.dumps(config.resolved()))
    Path("runs/yam/metrics.jsonl").touch()
    Path("runs/yam/model").symlink_to(arithmetic_dir)


def test_the_rewards_temperature_and_rows_are_those_of_the_run(arithmetic_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own_run(arithmetic_dir, "trainer.temperature=0.5")
    config = find("yam", []).config
    assert [reward.__name__ for reward in config.reward_funcs()] == ["of_short_prompts"] and config.data.eval_size == 4
    assert config.trainer.temperature == 0.5 and find(arithmetic_dir, ["recipe=arithmetic"]).config.trainer.temperature == 1.0
    with pytest.raises(ConfigErrors, match="nothing_has_it"):
        run("eval", "yam", "reward=rewards.py:needs")
    with pytest.raises(ConfigErrors, match="nothing_has_it"):  # also in place of a recipe's, and not beside them
        run("eval", arithmetic_dir, "recipe=arithmetic", "reward=rewards.py:needs")
    with pytest.raises(UserError, match=r"data\.path=rows\.jsonl: no held-out rows"):
        run("eval", "yam", "data.eval_size=0")


def test_a_scripts_run_is_evaluated_with_settings_that_are_given(arithmetic_dir, tmp_path, monkeypatch):
    """Its config.json names the script where a run of the command line has its recipe."""
    monkeypatch.chdir(tmp_path)
    own_run(arithmetic_dir)
    config = json.loads(Path("runs/yam/config.json").read_text())
    config = {key: entry | {"source": "script" if entry["source"] != "default" else "default"} for key, entry in config.items()}
    config["recipe"] = {"value": "my.py", "source": "script"}
    Path("runs/yam/config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigErrors, match="recipe: missing"):
        find("yam", [])
    assert find("yam", ["recipe=arithmetic"]).config.recipe == "arithmetic"
    with pytest.raises(UserError, match=r"a run of my\.py; start that again"):
        run("resume", "yam")


def test_a_name_of_a_wheel_is_made_a_directory_first(arithmetic_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluation, "base_and_adapter", lambda name: (arithmetic_dir, None))
    rewards = ["reward=rewards.py:needs"]
    Path("rewards.py").write_text(REWARDS)
    with pytest.raises(ConfigErrors, match="nothing_has_it"):  # beyond the model's loading
        run("eval", "smollm2-135m-instruct", "recipe=arithmetic", *rewards)


@pytest.mark.slow
def test_a_run_without_a_recipe_is_evaluated(arithmetic_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    own_run(arithmetic_dir, "trainer.temperature=0.5")
    assert run("eval", "yam", "--samples", "2", "--out", "eval.json", "data.eval_size=5") == 0
    found, said = json.loads(Path("eval.json").read_text()), capsys.readouterr().out
    assert [draw["name"] for draw in found["draws"]] == ["greedy", "T=0.5"]
    assert "samples are drawn at temperature 0.5 (trainer.temperature)" in said
    graded = [problem for problem in found["results"] if len(problem["prompt"]) < 6]
    assert 0 < len(graded) < 5
    for draw in found["draws"]:
        assert draw["estimates"]["reward"] == {"mean": 1.0, "error": 0.0, "problems": len(graded)}
        left = (5 - len(graded)) * draw["samples"]
        assert draw["left_out"] == left and f"{draw['name']}: {left} of {5 * draw['samples']} completions left out" in said


def problem(*rewards: float | None) -> list[dict]:
    return [{"reward": reward} for reward in rewards]


def test_pass_at_k_needs_rewards_of_0_or_1_or_a_bound():
    mixed = [problem(0.0, 0.5), problem(1.0, 0.2)]
    found, notes = estimates(mixed, None, None, sampled=True)
    assert list(found) == ["reward"] and notes == [MIXED]
    found, notes = estimates(mixed, None, 0.5, sampled=True)
    assert [found[f"pass@{k}"]["mean"] for k in (1, 2)] == [0.5, 1.0] and not notes
    assert estimates([problem(0.5), problem(0.2)], [1], 0.5, sampled=False)[0]["pass@1"]["mean"] == 0.5, "greedy, too"
    assert list(estimates([problem(1.0)], [1], None, sampled=False)[0]) == ["reward"]
    found, _ = estimates([problem(0.0, 1.0), problem(0.0, 0.0)], [2], None, sampled=True)
    assert found["reward"]["mean"] == 0.25 and found["pass@2"] == {"mean": 0.5, "error": 0.5, "problems": 2}


@pytest.mark.parametrize("given", [0.1, 0.3, 0.7, 0.9])
def test_a_reward_passes_at_the_number_that_the_function_gave(given):
    """Rewards are fp32, and some of these are less than the number in float64."""
    reward = torch.tensor([given], dtype=torch.float32).tolist()[0]
    assert estimates([problem(reward)], [1], given, sampled=True)[0]["pass@1"]["mean"] == 1
    assert estimates([problem(reward)], [1], given + 1e-6, sampled=True)[0]["pass@1"]["mean"] == 0, "the control"


def test_a_completion_without_a_reward_is_left_out_and_does_not_count_as_0():
    problems = [problem(1.0, None), problem(None, None), problem(1.0, 0.0)]
    found, _ = estimates(problems, [1, 2], None, sampled=True)
    assert found["reward"] == {"mean": 0.75, "error": 0.25, "problems": 2} == found["pass@1"]
    assert found["pass@2"] == {"mean": 1.0, "error": None, "problems": 1}
    assert estimates([problem(None)], None, None, sampled=False)[0]["reward"] == {"mean": None, "error": None, "problems": 0}


@pytest.mark.slow
def test_an_evaluation_is_what_its_completions_say(arithmetic_dir, tmp_path, monkeypatch, capsys):
    """A model's greedy and sampled completions are the same in another batch, and others with another seed."""
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
