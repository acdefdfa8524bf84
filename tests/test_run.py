"""`accelerate launch train.py` from the outside: each mode, two processes, without W&B, resumed, and each mistake in one line."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from rlinvariant.metrics import KEYS
from rlinvariant.report.rundir import read_metrics
from rlinvariant.rollout import request_seed

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "tests/trainer/tiny_recipe.py"
ACCELERATE = Path(sys.executable).with_name("accelerate")
TOKENS = 2 * 16 * 8  # two steps of 16 completions of up to 12 tokens, of which a few end early
SMALL = (  # the arithmetic recipe, its sizes cut
    "recipe=arithmetic", "steps=2", "data.digits=2", "data.train_size=32", "data.eval_size=8", "sampler.max_model_len=64",
    "sampler.kv_cache_gib=0.05", "trainer.per_device_train_batch_size=16", "trainer.num_generations=4",
    "trainer.max_completion_length=12", "trainer.warmup_steps=0", "trainer.learning_rate=1e-3",
)  # fmt: skip


class Finished:
    """A process that ran in a directory of its own, with the run NAME=run that it left there."""

    def __init__(self, directory: Path, command: list[str], **environment: str) -> None:
        directory.mkdir()
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "ACCELERATE_", "VLLM_"))}
        inherited |= {"PYTHONPATH": str(ROOT), "WANDB_MODE": "offline"} | environment
        done = subprocess.run(command, cwd=directory, env=inherited, capture_output=True, text=True, timeout=300)
        self.code, self.output, self.error = done.returncode, done.stdout, done.stderr
        self.directory, self.run = directory, directory / "runs/run"

    def rows(self) -> list[dict[str, Any]]:
        assert self.code == 0, f"exit {self.code}\n{self.output[-2000:]}\n{self.error[-4000:]}"
        return read_metrics(self.run)

    def total(self, key: str) -> int:
        return sum(int(row[f"onpolicy/{key}"]) for row in self.rows())


def launch(config: str, *flags: str) -> list[str]:
    head = [str(ACCELERATE), "launch", "-q", "--config_file", str(ROOT / "configs" / config)]
    return [*head, "--num_cpu_threads_per_process", "1", *flags, str(ROOT / "train.py")]


@pytest.fixture(scope="module")
def jobs(arithmetic_dir, tmp_path_factory) -> Mapping[str, Future[Finished]]:
    """All processes, two at a time with one thread each: most of a start is importing, on one core."""
    top = tmp_path_factory.mktemp("runs")
    no_wandb, record = top / "no_wandb", top / "record"
    no_wandb.mkdir()
    record.mkdir()
    # As if it were not installed: find_spec gives None and import raises ModuleNotFoundError.
    (no_wandb / "sitecustomize.py").write_text("import sys\n\nsys.modules['wandb'] = None\n")
    model = f"model={arithmetic_dir}"
    small = [*SMALL, model, "run=run"]
    one, two = launch("cpu.yaml"), launch("cpu2.yaml")
    tiny = [f"recipe={RECIPE}", model, "run=run", "wandb.mode=disabled"]
    # 6 samples on each of 2 processes are 3 groups of 4: one is shared
    ranks = ["trainer.per_device_train_batch_size=6"]
    commands: dict[str, tuple[list[str], dict[str, str]]] = {
        "mistakes": ([sys.executable, "-m", "tests.trainer.bad_runs", arithmetic_dir], {"OMP_NUM_THREADS": "1"}),
        "two processes": ([*two, *tiny, *ranks], {"RECORD": str(record)}),
        "exact": ([*one, *small], {}),
        "off": ([*one, *small, "invariance=off", "wandb.mode=disabled"], {}),
        "sampler": ([*one, *small, "invariance=sampler"], {"PYTHONPATH": f"{no_wandb}:{ROOT}"}),
        "trainer": ([*one, *small, "invariance=trainer", "wandb.mode=disabled"], {}),
        "autocast": ([*launch("cpu.yaml", "--mixed_precision", "bf16"), *small], {}),
    }
    pool = ThreadPoolExecutor(max_workers=2)
    return {
        name: pool.submit(Finished, top / name.replace(" ", "_"), command, **environment)
        for name, (command, environment) in commands.items()
    }


@pytest.mark.parametrize("invariance", ["exact", "off", "sampler", "trainer"])
def test_every_mode_writes_every_metric(invariance, jobs):
    rows = jobs[invariance].result().rows()
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert set(KEYS) <= row.keys()
        assert row["onpolicy/coverage"] == 1 and row["onpolicy/weights_equal"] == 1
        assert row["onpolicy/group_unique_frac"] == 1


def test_exact_mode_is_exact(jobs):
    run = jobs["exact"].result()
    assert run.total("mismatched_tokens") == 0 == run.total("unscored_tokens")
    assert run.total("compared_tokens") >= TOKENS
    assert run.rows()[-1]["onpolicy/exact_streak_tokens"] == run.total("compared_tokens")
    assert f"mismatched 0 / {run.total('compared_tokens'):,} tokens, coverage 1" in run.output


@pytest.mark.parametrize("invariance", ["off", "sampler", "trainer"])
def test_a_stock_side_is_seen_at_every_step(invariance, jobs):
    """Control."""
    for row in jobs[invariance].result().rows():
        assert row["onpolicy/mismatched_tokens"] > 0 and 0 < row["onpolicy/logprob_absdiff/max"] < 1
    assert "first mismatch: sequence" in jobs[invariance].result().output


def test_a_run_leaves_its_files(jobs):
    run = jobs["exact"].result()
    assert run.code == 0, run.error
    config = json.loads((run.run / "config.json").read_text())
    assert config["steps"] == {"value": 2, "source": "command line"}
    environment = json.loads((run.run / "environment.json").read_text())
    assert environment["wandb"] == "offline" and list((run.run / "wandb").glob("offline-run-*"))
    samples = [json.loads(line) for line in (run.run / "samples.jsonl").read_text().splitlines()]
    assert samples and {"step", "prompt", "completion", "reward"} <= samples[0].keys()
    assert (run.run / "checkpoints/checkpoint-2/model.safetensors").exists()


def test_wandb_may_be_absent(jobs):
    run = jobs["sampler"].result()
    assert len(run.rows()) == 2
    assert json.loads((run.run / "environment.json").read_text())["wandb"] == "disabled"


def test_two_processes_are_exact_and_their_metrics_are_summed(jobs):
    run = jobs["two processes"].result()
    rows = run.rows()
    asked = [
        [json.loads(line) for line in (run.directory.parent / f"record/{rank}.jsonl").read_text().splitlines()]
        for rank in (0, 1)
    ]
    assert len(asked[0]) == len(asked[1]) == len(rows) == 2
    for row, *rollouts in zip(rows, *asked, strict=True):
        completions = [c for rollout in rollouts for c in rollout["completions"]]
        assert len(completions) == 12
        assert row["onpolicy/compared_tokens"] == sum(map(len, completions)) >= 12 * 8
        assert row["onpolicy/mismatched_tokens"] == 0 == row["onpolicy/unscored_tokens"]
        assert row["rollout/len_max"] == max(map(len, completions))
        assert row["onpolicy/group_unique_frac"] == 1 == row["onpolicy/weights_equal"]
        # the third and fourth samples of the second group are the second rank's first two
        first, second = rollouts
        assert first["prompts"][4:] == [first["prompts"][4]] * 2 == second["prompts"][:2] != second["prompts"][2:4]


def test_two_processes_draw_distinct_seeds(jobs):
    run = jobs["two processes"].result()
    run.rows()
    files = (run.directory.parent / f"record/{rank}.jsonl" for rank in (0, 1))
    seeds = [seed for file in files for line in file.read_text().splitlines() for seed in json.loads(line)["seeds"]]
    assert len(set(seeds)) == len(seeds) == 2 * 12
    assert all(0 <= seed < 2**63 for seed in seeds) and request_seed(0, 0, 0, 0) not in seeds[1:]


def test_a_run_may_be_resumed(jobs):
    """Two steps, then two more of the same run: by `resume=true`, and exact."""
    mistakes = jobs["mistakes"].result()
    results = outcomes(mistakes)
    assert results["interrupted"] == results["resumed"] == {"code": 0, "error": ""}, results
    rows = read_metrics(mistakes.directory / "runs/resumed")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(row["onpolicy/mismatched_tokens"] == 0 and row["onpolicy/coverage"] == 1 for row in rows)


def test_autocast_is_refused_in_one_line(jobs):
    run = jobs["autocast"].result()
    errors = [line for line in run.error.splitlines() if line.startswith("error: ")]
    assert run.code != 0 and len(errors) == 1, run.error
    assert "ACCELERATE_MIXED_PRECISION=bf16: expected no" in errors[0] and "--mixed_precision" in errors[0]
    assert not run.run.exists()


def outcomes(mistakes: Finished) -> dict[str, dict[str, Any]]:
    lines = [line for line in mistakes.output.splitlines() if line.startswith("RESULTS ")]
    assert lines, mistakes.error[-4000:]
    return json.loads(lines[0].removeprefix("RESULTS "))


# mistake -> what its one line must say
MISTAKES = {
    "no prompt": ["train dataset, row 3: no `prompt`", "columns found: answer, prompt"],
    "long prompt": ["a prompt of 65 tokens", "sampler.max_model_len=64"],
    "reward raises": ["reward function raises, step 1, sample 5", "ValueError: could not convert string to float"],
    "reward too short": ["reward function too_short, step 1", "returned 7 rewards, expected 8"],
    "no weights": ["model=no_weights", "no file named model.safetensors"],
    "torn weights": ["model=torn", "cannot be loaded"],
    "unknown architecture": ["model=unknown", "qwen99"],
    "no tokenizer": ["model=no_tokenizer", "token"],
    "GPT-2": ["GPT2LMHeadModel"],
    "GPT-2, sampler": ["GPT2LMHeadModel"],
    "head of 16": ["Qwen3ForCausalLM", "head_dim=16", "32, 64"],
    "sliding window": ["sliding"],
    "no plugin": ["plugin not active"],
    "no compiler": ["C compiler no-such-compiler not found", "install gcc, or set CC"],
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gives_one_line(mistake, jobs):
    found = outcomes(jobs["mistakes"].result())[mistake]
    lines = found["error"].splitlines()
    assert found["code"] == 2 and len(lines) == 1 and lines[0].startswith("error: "), found["error"][-3000:]
    for words in MISTAKES[mistake]:
        assert words in lines[0]
