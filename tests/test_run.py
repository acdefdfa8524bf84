"""Runs from the outside: launched, two processes, without W&B; each mode, resumed, and each mistake in one line."""

import html
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rlinvariant.bits import compare
from rlinvariant.keys import KEYS
from rlinvariant.report import completions, rollouts
from rlinvariant.report.rundir import read_metrics
from tests import forks
from tests.parity.device import CUDA, cpu_only
from tests.trainer.many_runs import CANARY

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "tests/trainer/tiny_recipe.py"
ONE = "1gpu.yaml" if CUDA else "cpu.yaml"
TOKENS = 2 * 16 * 8  # two steps of 16 completions of up to 12 tokens, of which a few end early
SMALL = (  # the arithmetic recipe, its sizes cut
    "recipe=arithmetic",
    "steps=2",
    "data.digits=2",
    "data.train_size=32",
    "data.eval_size=8",
    "sampler.max_model_len=64",
    "sampler.kv_cache_gib=0.05",
    "sampler.enforce_eager=true",
    "trainer.per_device_train_batch_size=16",
    "trainer.num_generations=4",
    "trainer.max_completion_length=12",
    "trainer.warmup_steps=0",
    "trainer.learning_rate=1e-3",
)


two_processes = cpu_only("two processes of one run take a GPU each; here they are joined by gloo (configs/cpu2.yaml)")


class Finished:
    """The processes of a command that ran in a directory of its own, and the runs that they left there."""

    def __init__(self, directory: Path, *done: subprocess.CompletedProcess[str]) -> None:
        self.directory, self.code = directory, next((each.returncode for each in done if each.returncode), 0)
        self.output, self.error = done[0].stdout, "\n".join(each.stderr for each in done)

    def run(self, name: str) -> Path:
        assert self.code == 0, f"exit {self.code}\n{self.output[-2000:]}\n{self.error[-4000:]}"
        return self.directory / "runs" / name


def environment(before: str = "", **more: str) -> dict[str, str]:
    """Return the environment of a run; `before` is where Python looks for modules first."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "ACCELERATE_", "VLLM_"))}
    path = os.pathsep.join(p for p in (before, str(ROOT), os.environ.get("PYTHONPATH")) if p)
    return inherited | {"PYTHONPATH": path, "WANDB_MODE": "offline"} | more


def launched(directory: Path, config: str, script: str, *arguments: str, flags: Sequence[str] = (), **more: str) -> Finished:
    """Run a command line as a user has it."""
    directory.mkdir()
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "-q"]
    command += ["--config_file", str(ROOT / "configs" / config), "--num_cpu_threads_per_process", "1", *flags]
    command += [str(ROOT / script), *arguments]
    env = environment(**more)
    return Finished(directory, subprocess.run(command, cwd=directory, env=env, capture_output=True, text=True, timeout=550))


def forked(directory: Path, script: str, *arguments: str) -> Finished:
    """Run it as the process that it becomes, without a launcher and without importing."""
    directory.mkdir()
    command = [str(ROOT / script), *arguments]
    return Finished(directory, forks.run(command, cwd=directory, env=environment() | forks.LAUNCHED))


def of_two_ranks(model: str) -> list[str]:
    """Return the arguments of a run whose three groups of 4 lie on two processes of six samples: one is shared.

    Each process trains on its samples in parts, of which both have as many.
    """
    parts = "trainer.tokens_per_microbatch=50"
    return [f"recipe={RECIPE}", f"model={model}", "run=two", "trainer.per_device_train_batch_size=6", parts]


def forked_ranks(directory: Path, model: str) -> Finished:
    """Run the two processes that the launcher would start."""
    directory.mkdir()
    env = environment(RECORD=str(directory))
    return Finished(directory, *forks.run_ranks(2, [str(ROOT / "train.py"), *of_two_ranks(model)], cwd=directory, env=env))


@pytest.fixture(scope="module")
def jobs(arithmetic_dir, tmp_path_factory) -> Mapping[str, Future[Finished]]:
    """All processes, two at a time with one thread each."""
    top = tmp_path_factory.mktemp("runs")
    small = [*SMALL, f"model={arithmetic_dir}"]
    many = ["tests/trainer/many_runs.py", arithmetic_dir, *small]
    started: dict[str, Callable[[], Finished]] = {
        "many": lambda: launched(top / "many", ONE, *many) if CUDA else forked(top / "many", *many),
        "exact": lambda: launched(top / "exact", ONE, "train.py", *small, "run=exact"),
        "two": lambda: forked_ranks(top / "two", arithmetic_dir),
        "autocast": lambda: launched(top / "autocast", ONE, "train.py", *small, flags=["--mixed_precision", "bf16"]),
    }
    if CUDA:
        del started["two"]
    pool = ThreadPoolExecutor(max_workers=2)
    return {name: pool.submit(job) for name, job in started.items()}


@pytest.fixture(scope="module", params=["forked", pytest.param("launched", marks=pytest.mark.slow)])
def two(request, arithmetic_dir, tmp_path_factory) -> Finished:
    """A run of two processes; those that are launched are so as if wandb were not installed."""
    if request.param == "forked":
        return request.getfixturevalue("jobs")["two"].result()
    top = tmp_path_factory.mktemp("launched")
    (top / "shim").mkdir()
    # find_spec gives None and import raises ModuleNotFoundError
    (top / "shim/sitecustomize.py").write_text("import sys\n\nsys.modules['wandb'] = None\n")
    more = {"before": str(top / "shim"), "RECORD": str(top / "two")}
    return launched(top / "two", "cpu2.yaml", "train.py", *of_two_ranks(arithmetic_dir), **more)


@pytest.fixture(scope="module")
def many(jobs) -> dict[str, Any]:
    """Return what each run of many_runs.py gave, by name."""
    done = jobs["many"].result()
    lines = [line for line in done.output.splitlines() if line.startswith("RESULTS ")]
    assert lines, done.output[-2000:] + done.error[-4000:]
    return json.loads(lines[0].removeprefix("RESULTS "))


@pytest.fixture
def metrics_of(jobs):
    """The rows of a run by its name."""

    def rows(name: str) -> list[dict[str, Any]]:
        return read_metrics(jobs[name if name in jobs else "many"].result().run(name))

    return rows


def total(rows: list[dict[str, Any]], key: str) -> int:
    return sum(int(row[f"onpolicy/{key}"]) for row in rows)


@pytest.mark.parametrize("invariance", ["exact", "off", "sampler", "trainer"])
def test_every_mode_writes_every_metric(invariance, metrics_of):
    rows = metrics_of(invariance)
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert set(KEYS) <= row.keys()
        assert row["onpolicy/coverage"] == 1 and row["onpolicy/weights_equal"] == 1
        assert row["onpolicy/group_unique_frac"] == 1


def test_exact_mode_is_exact(jobs, metrics_of):
    rows = metrics_of("exact")
    assert total(rows, "mismatched_tokens") == 0 == total(rows, "unscored_tokens")
    assert rows[-1]["onpolicy/exact_streak_tokens"] == total(rows, "compared_tokens") >= TOKENS
    assert f"mismatched 0 / {total(rows, 'compared_tokens'):,} tokens, coverage 1" in jobs["exact"].result().output


@pytest.mark.parametrize("invariance", ["off", "sampler", "trainer"])
def test_a_stock_side_is_seen_at_every_step(invariance, metrics_of, many):
    """Control."""
    assert many[invariance]["code"] == 0
    for row in metrics_of(invariance):
        assert row["onpolicy/mismatched_tokens"] > 0 and 0 < row["onpolicy/logprob_absdiff/max"] < 1
    assert many[invariance]["output"].count("first mismatch: sequence") == 2


def test_a_run_leaves_its_files(jobs):
    run = jobs["exact"].result().run("exact")
    config = json.loads((run / "config.json").read_text())
    assert config["steps"] == {"value": 2, "source": "command line"}
    environment = json.loads((run / "environment.json").read_text())
    if importlib.util.find_spec("wandb") is not None:
        assert environment["wandb"] == "offline" and list((run / "wandb").glob("offline-run-*"))
    else:
        assert environment["wandb"] == "disabled"
    assert [len(rows) for _, rows in completions.Completions(run)] == [16, 16] and not list(run.glob("samples*"))
    assert (run / "checkpoints/checkpoint-2/model.safetensors").exists()
    result = json.loads((run / "result.json").read_text())
    assert result["finished"] is True and result["seconds"] > 0
    assert all(0 <= result[f"heldout_reward_{when}"] <= 1 for when in ("before", "after"))


def test_a_run_leaves_a_model_that_says_what_it_is(jobs, arithmetic_dir):
    run = jobs["exact"].result().run("exact")
    model = AutoModelForCausalLM.from_pretrained(run / "model", dtype="auto")
    trained, state = load_file(run / "checkpoints/checkpoint-2/model.safetensors"), model.state_dict()
    assert all(compare(state[name], weight) is None for name, weight in trained.items())
    name, weight = next(iter(trained.items()))
    weight.view(-1).view(torch.int32)[-1] ^= 1
    assert compare(state[name], weight) is not None, "the control: one bit"
    card, result = (run / "model/README.md").read_text(), json.loads((run / "result.json").read_text())
    assert "rlinvariant train recipe=arithmetic" in card and "model=arithmetic" in card
    assert str(Path(arithmetic_dir).parent) not in card, "no path of this machine"
    before, after = (result[f"heldout_reward_{when}"] for when in ("before", "after"))
    assert f"{before:.3f} before, {after:.3f} after; 8 prompts" in card
    assert "mismatched 0 of" in card and "recipe arithmetic, 32 prompts" in card


def test_no_file_of_a_run_has_a_secret(jobs, many):
    """Control: what is no secret is found in W&B's own file, so that a secret there would be too."""
    assert many["secrets"]["code"] == 0, many["secrets"]["error"]
    run = jobs["many"].result().run("secrets")
    found = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    for file in run.glob("rollouts/*.npz"):  # packed
        with np.load(file, allow_pickle=False) as arrays:
            found[file] += str(arrays["about"]).encode()
    said = many["secrets"]["output"] + many["secrets"]["error"]
    assert CANARY not in said and not [file for file, content in found.items() if CANARY.encode() in content]
    config = json.loads((run / "config.json").read_text())
    assert config["data.api_key"]["value"] == "***" and config["data.source"]["value"] == "https://***@example.org/rows"
    if importlib.util.find_spec("wandb") is not None:
        assert any(b"seen-by-wandb" in content for file, content in found.items() if file.suffix == ".wandb")


@pytest.mark.slow
@two_processes
@pytest.mark.parametrize("two", ["launched"], indirect=True)
def test_wandb_may_be_absent(two):
    assert json.loads((two.run("two") / "environment.json").read_text())["wandb"] == "disabled"


@pytest.fixture
def asked(two) -> list[list[dict[str, Any]]]:
    """Return what each of two processes asked of its sampler, rollout by rollout."""
    assert two.run("two").is_dir()
    files = [(two.directory / f"{rank}.jsonl").read_text().splitlines() for rank in (0, 1)]
    return [[json.loads(line) for line in lines] for lines in files]


@two_processes
def test_two_processes_are_exact_and_their_metrics_are_summed(two, asked):
    for row, *of_ranks in zip(read_metrics(two.run("two")), *asked, strict=True):
        completions = [c for rollout in of_ranks for c in rollout["completions"]]
        assert len(completions) == 12
        assert row["onpolicy/compared_tokens"] == sum(map(len, completions)) >= 12 * 8
        assert row["onpolicy/mismatched_tokens"] == 0 == row["onpolicy/unscored_tokens"]
        assert row["completions/max_length"] == max(map(len, completions))
        assert row["completions/mean_length"] == sum(map(len, completions)) / 12
        assert row["onpolicy/group_unique_frac"] == 1 == row["onpolicy/weights_equal"]


@two_processes
def test_a_group_may_span_two_processes(asked):
    """4 + 2 on the first, 2 + 4 on the second."""
    for first, second in zip(*asked, strict=True):
        prompts = [tuple(p) for p in first["prompts"] + second["prompts"]]
        assert [len(set(prompts[i : i + 4])) for i in (0, 4, 8)] == [1, 1, 1] and len(set(prompts)) == 3


@two_processes
def test_two_processes_draw_distinct_seeds(asked):
    seeds = [seed for rollouts in asked for rollout in rollouts for seed in rollout["seeds"]]
    assert len(set(seeds)) == len(seeds) == 2 * 2 * 6


@two_processes
def test_two_processes_record_one_rollout(two, asked):
    rollout, _ = rollouts.read(two.run("two"), 1)
    assert [(b.prompts, b.seeds, [c.token_ids for c in b.completions]) for b in rollout.batches] == [
        (rank[0]["prompts"], rank[0]["seeds"], rank[0]["completions"]) for rank in asked
    ]


def test_a_run_may_be_resumed(metrics_of, many):
    """Two steps, then two more of the same run: by `resume=true`, and exact."""
    assert many["interrupted"]["code"] == 0 == many["resumed"]["code"], many["resumed"]["error"]
    rows = metrics_of("resumed")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert total(rows, "mismatched_tokens") == 0 == total(rows, "unscored_tokens")
    assert total(rows, "compared_tokens") >= 2 * TOKENS


def test_a_step_after_a_resume_may_be_replayed(jobs, many):
    assert rollouts.steps(jobs["many"].result().run("resumed")) == [1, 3]
    assert many["replayed"]["code"] == 0, many["replayed"]["error"]
    assert "exact: step 3 was replayed bit for bit" in many["replayed"]["output"]
    assert "resumed/checkpoints/checkpoint-2, sha256" in many["replayed"]["output"]


def test_a_start_reads_each_configuration_and_makes_each_check_once(many):
    """vLLM reads the model's configuration for itself, too."""
    calls = many["calls"]
    ours = {name: [caller for caller in callers if not caller.startswith("vllm.")] for name, callers in calls.items()}
    assert {name: len(callers) for name, callers in ours.items()} == dict.fromkeys(ours, 1), calls


OUTCOMES = {
    "not exact": (1, "not exact", ["step 2: mismatched 1 / ", ", position 1: sampler ", "Stopped before the optimizer step"]),
    "ctrl-C": (130, "interrupted", []),
    "reward raises": (2, "refused", ["reward function raises, step 1, sample 5"]),
    "bug": ("traceback", "failed", ["a bug"]),
}


@pytest.mark.parametrize("name", OUTCOMES)
def test_a_run_that_stops_in_the_middle_says_how(name, many, jobs):
    """Exit code, result.json and the report, and the line that names it."""
    code, outcome, words = OUTCOMES[name]
    assert many[name]["code"] == code, many[name]["error"][-3000:]
    run = jobs["many"].result().directory / "runs" / name.replace(" ", "_")
    result = json.loads((run / "result.json").read_text())
    page = html.unescape((run / "report.html").read_text())
    assert result["finished"] is False and result["outcome"] == outcome
    assert result["seconds"] > 0 and result["heldout_reward_after"] is None
    assert (result["heldout_reward_before"] is None) == (name in ("reward raises", "bug")), (
        "the evaluation before has those, too"
    )
    for word in words:
        assert word in result["error"] and word in page
    assert f"({outcome}: " in page
    assert f"report      runs/{run.name}/report.html" in many[name]["output"]
    last = read_metrics(run)[-1:] if name in ("not exact", "ctrl-C") else []
    assert [row["step"] for row in last] == ([2] if name == "not exact" else [1] if last else [])
    assert not last or last[0]["onpolicy/mismatched_tokens"] == (name == "not exact")


def test_kernels_are_named_when_they_are_known(many, jobs):
    """After the first step: before it, a run with a certificate has multiplied nothing."""
    lines = many["interrupted"]["output"].splitlines()
    (at,) = [i for i, line in enumerate(lines) if line.startswith("kernels: ")]
    first = next(i for i, line in enumerate(lines) if line.lstrip().startswith("1/2 "))
    assert at > first and "bfloat16" in lines[at] and "linear: none" not in lines[at]
    environment = json.loads((jobs["exact"].result().run("exact") / "environment.json").read_text())
    assert "bfloat16" in environment["kernels"]["linear"]


def test_autocast_is_refused_in_one_line(jobs):
    run = jobs["autocast"].result()
    errors = [line for line in run.error.splitlines() if line.startswith("error: ")]
    assert run.code != 0 and len(errors) == 1, run.error
    assert "ACCELERATE_MIXED_PRECISION=bf16: expected no" in errors[0] and "--mixed_precision" in errors[0]
    assert not (run.directory / "runs").exists()


# mistake -> what its one line must say
MISTAKES = {
    "no prompt": ["train dataset, row 3: no `prompt`", "columns found: answer, prompt"],
    "reward raises": ["reward function raises, step 1, sample 5", "ValueError: could not convert string to float"],
    "no weights": ["model=no_weights", "no file named model.safetensors"],
    "torn weights": ["model=torn", "cannot be loaded"],
    "unknown architecture": ["model=unknown", "qwen99"],
    "GPT-2": ["model=gpt2: GPT2LMHeadModel", "; use invariance=off"],
    "GPT-2, sampler": ["model=gpt2: GPT2LMHeadModel", "; use invariance=off"],
    "head of 16": ["small_heads", "head_dim=16 is not one of"],
    "experts": ["model=experts", "router_jitter_noise=0.1"],
    "no plugin": ["plugin not active"],
    "no compiler": ["C compiler no-such-compiler not found", "install gcc, or set CC"],
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gives_one_line(mistake, many):
    found = many[mistake]
    lines = found["error"].splitlines()
    assert found["code"] == 2 and len(lines) == 1 and lines[0].startswith("error: "), found["error"][-3000:]
    for words in MISTAKES[mistake]:
        assert words in lines[0]


@pytest.mark.parametrize("mistake", sorted(MISTAKES.keys() - {"reward raises"}))
def test_a_start_that_fails_leaves_nothing(mistake, many, jobs):
    assert many[mistake]["code"] == 2
    assert not (jobs["many"].result().directory / "runs" / mistake.replace(" ", "_").replace(",", "")).exists()


@two_processes
@pytest.mark.slow
def test_two_processes_train_a_recipes_own_model_which_each_has_looked_at(tmp_path):
    """transformers saves a model on the first rank alone: the other one had found no configuration, and no such run began."""
    sizes = ("data.digits=1", "data.eval_size=4", "data.train_size=32", "trainer.per_device_train_batch_size=16", "steps=1")
    command = [str(ROOT / "train.py"), "recipe=arithmetic", "run=own", *sizes]
    env = environment(RLINVARIANT_CACHE=str(tmp_path / "cache"))
    for given, code, said in (
        ("lora.r=129", 2, "error: lora.r=129: expected at most 128"),
        ("trainer.num_generations=4", 0, "on policy   mismatched 0 / "),
    ):
        done = forks.run_ranks(2, [*command, given], cwd=tmp_path, env=env)
        assert [one.returncode for one in done] == [code, code], done[0].stderr[-3000:] + done[1].stderr[-3000:]
        assert (done[0].stdout + done[0].stderr).count(said) == 1 and said not in done[1].stdout + done[1].stderr
