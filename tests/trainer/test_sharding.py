"""Runs with weights in shards: they train the weights that DDP trains, bit for bit, and what would change bits is refused."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers.training_args import OptimizerNames

from rlinvariant import bits
from rlinvariant.conflicts import SHARDS, launcher_problems, sharding_problems
from rlinvariant.report import rollouts
from rlinvariant.report.rundir import read_metrics
from rlinvariant.trainer import state_file
from tests import forks
from tests.parity.device import cpu_only

ROOT = Path(__file__).parents[2]
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
ENV = {k: v for k, v in os.environ.items() if not k.startswith(("FSDP_", "ACCELERATE_"))} | {"PYTHONPATH": str(ROOT)}
SETTINGS = (
    f"recipe={ROOT / 'tests/trainer/tiny_recipe.py'}",
    "wandb.mode=disabled",
    "data.eval_size=2",
    "trainer.per_device_train_batch_size=8",
    "trainer.learning_rate=1e-3",
    "trainer.lr_scheduler_type=constant",
    "trainer.save_steps=2",
    "trainer.max_grad_norm=0.05",  # so that every step is clipped
    "trainer.tokens_per_microbatch=120",  # so that a step has several parts
)
EVALUATED = ("trainer.eval_strategy=steps", "trainer.eval_steps=1", "trainer.per_device_eval_batch_size=4")
BEST = ("trainer.load_best_model_at_end=true", "trainer.metric_for_best_model=eval_reward")
KINDS = {
    "grpo": (),
    "beta": ("trainer.beta=0.05", "trainer.optim=adamw_torch", "trainer.gradient_checkpointing=true"),
    "stale": ("staleness=1", *EVALUATED, *BEST),
    "ppo": ("algorithm=ppo", "ppo.kl_coef=0.05"),
}
runs = cpu_only("two processes of one run take a GPU each; here they are joined by gloo")


def test_what_accelerate_would_do_otherwise_is_refused_by_name():
    assert launcher_problems({}) == [] == launcher_problems(FSDP) == launcher_problems({"FSDP_VERSION": "1"})
    assert launcher_problems(FSDP | {name: right for name, (right, _) in SHARDS.items()}) == []
    wrong = {
        "FSDP_VERSION": "1",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "True",
        "FSDP_ACTIVATION_CHECKPOINTING": "true",
        "FSDP_OFFLOAD_PARAMS": "true",
        "FSDP_RESHARD_AFTER_FORWARD": "false",
        "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
        "FSDP_IGNORED_MODULES": "lm_head",
    }
    assert wrong.keys() == SHARDS.keys()
    for name, value in wrong.items():
        (line,) = launcher_problems(FSDP | {name: value})
        assert line.startswith(f"{name}={value}: expected ") and "configs/8gpu_fsdp2.yaml" in line
    (line,) = launcher_problems(FSDP | {"ACCELERATE_USE_CPU": "true", "WORLD_SIZE": "1"})
    assert line.startswith("num_processes=1: expected 2 or more")
    (line,) = launcher_problems({"ACCELERATE_USE_FSDP": "true"})  # accelerate's own default is 1
    assert line.startswith("FSDP_VERSION=1: expected fsdp_version: 2")
    for name in ("DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"):
        (line,) = launcher_problems({f"ACCELERATE_USE_{name}": "true"})
        assert line.startswith("distributed_type=")
    assert launcher_problems({"ACCELERATE_DYNAMO_BACKEND": "NO"}) == []  # accelerate says so where nothing is asked for
    (line,) = launcher_problems({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"})
    assert line.startswith("ACCELERATE_DYNAMO_BACKEND=INDUCTOR: expected no dynamo_config")


def test_settings_that_cannot_stand_beside_shards_are_refused_by_name():
    good = SimpleNamespace(mask_truncated_completions=False, sync_ref_model=False, optim=OptimizerNames.ADAMW_TORCH)
    bad = SimpleNamespace(mask_truncated_completions=True, sync_ref_model=True, optim="adafactor")
    assert sharding_problems(good, "exact") == []
    found = [line.split(":")[0] for line in sharding_problems(bad, "off", "trainer.")]
    masked, synced = "trainer.mask_truncated_completions=True", "trainer.sync_ref_model=True"
    assert found == ["invariance=off", masked, synced, "trainer.optim=adafactor"]


def two(directory: Path, model: str, *settings: str, sharded: bool, ranks: int = 2, **env: str):
    command = [str(ROOT / "train.py"), *SETTINGS, f"model={model}", *settings]
    return forks.run_ranks(ranks, command, cwd=directory, env=ENV | (FSDP if sharded else {}) | env)


def finished(done) -> None:
    assert {rank.returncode for rank in done} == {0}, done[0].stderr[-3000:] + done[1].stderr[-3000:]


@runs
def test_accelerate_s_own_wrapping_is_one_line_before_weights_are_loaded(arithmetic_dir, tmp_path):
    done = two(tmp_path, arithmetic_dir, "run=a", sharded=True, FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP")
    assert [rank.returncode for rank in done] == [2, 2] and done[1].stderr == "" and not (tmp_path / "runs").exists()
    (line,) = done[0].stderr.splitlines()
    assert line.startswith("error: FSDP_AUTO_WRAP_POLICY=TRANSFORMER_BASED_WRAP: expected fsdp_auto_wrap_policy: NO_WRAP")


@pytest.fixture(scope="module", params=KINDS)
def both(request, arithmetic_dir, tmp_path_factory) -> tuple[Path, Path]:
    """Two processes with whole models, and two with shards: the directories of their runs."""
    top = tmp_path_factory.mktemp(request.param)
    for name, sharded in (("whole", False), ("shards", True)):
        done = two(top, arithmetic_dir, f"run={name}", "steps=4", *KINDS[request.param], sharded=sharded)
        finished(done)
        assert ("weights in shards over 2 processes: 3 units, each of the 2 decoder" in done[0].stdout) == sharded
    return top / "runs/whole", top / "runs/shards"


def assert_same(a: Path, b: Path) -> dict[str, torch.Tensor]:
    one, other = load_file(a), load_file(b)
    assert one.keys() == other.keys()
    assert [name for name, x in one.items() if bits.compare(x, other[name]) is not None] == []
    return one


def moments(run: Path, step: int) -> list[torch.Tensor]:
    """Return the first moments of the optimizer of a run, in its order, whole."""
    at = run / f"checkpoints/checkpoint-{step}/training"
    whole = state_file.read(at / "state.safetensors")["optimizer"]
    if whole is not None:
        return [x["exp_avg"] for x in whole["state"].values()]
    ranks = [state_file.read(at / f"rank-{rank}.safetensors")["optimizer"]["state"] for rank in (0, 1)]
    return [torch.cat([a["exp_avg"], b["exp_avg"]]) for a, b in zip(*(x.values() for x in ranks), strict=True)]


@runs
@pytest.mark.slow
def test_shards_train_the_weights_of_whole_models_bit_for_bit(both):
    whole, cut = both
    for run in both:
        rows = read_metrics(run)
        exact = [row for row in rows if not row["onpolicy/weight_version_lag"]]
        assert len(exact) == (1 if "stale" in str(run) else 4)
        assert sum(row["onpolicy/mismatched_tokens"] + row["onpolicy/unscored_tokens"] for row in exact) == 0
        assert all(row["onpolicy/coverage"] == 1 and row["onpolicy/weights_equal"] == 1 for row in rows)
        assert all(row["grad_norm"] > 0.05 for row in rows), "clipped"
    assert [row["grad_norm"] for row in read_metrics(whole)] == [row["grad_norm"] for row in read_metrics(cut)]
    files = [f"{at}/model.safetensors" for at in ("checkpoints/checkpoint-2", "checkpoints/checkpoint-4", "model")]
    critic = "checkpoints/checkpoint-4/critic"
    if (whole / critic).exists():
        files += [f"{critic}/model.safetensors", f"{critic}/value_head.safetensors"]
    two, four, *_ = [assert_same(whole / file, cut / file) for file in files]
    assert all(bits.compare(x, four[name]) is not None for name, x in two.items()), "control: each moves in two steps"
    assert "lm_head.weight" not in four, "a tied head is its embedding, which is there once"
    if not (whole / critic).exists():  # PPO's critic has its parameters in another order
        for a, b in zip(moments(whole, 4), moments(cut, 4), strict=True):
            assert bits.compare(a, b) is None and a.any()
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (whole / "model" / name).read_bytes() == (cut / "model" / name).read_bytes()
    assert not [path for path in cut.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl")], "no pickle"


@runs
@pytest.mark.slow
def test_a_resumed_run_in_shards_is_the_run_and_no_other_layout_goes_on_with_it(both, arithmetic_dir, tmp_path, request):
    whole, cut = both
    settings = KINDS[request.node.callspec.params["both"]]
    for name, run in (("whole", whole), ("shards", cut)):
        shutil.copytree(run, tmp_path / "runs" / name)
        shutil.rmtree(tmp_path / "runs" / name / "checkpoints/checkpoint-4")
    finished(two(tmp_path, arithmetic_dir, "run=shards", "steps=4", "resume=true", *settings, sharded=True))
    again = tmp_path / "runs/shards"
    for file in ("model/model.safetensors", "checkpoints/checkpoint-4/model.safetensors"):
        assert_same(cut / file, again / file)
    assert all(bits.compare(a, b) is None for a, b in zip(moments(cut, 4), moments(again, 4), strict=True))
    shutil.rmtree(again / "checkpoints/checkpoint-4")
    for name, sharded, why in (
        ("shards", False, "each had a shard of every weight; resume with a machine file in shards, as 2gpu_fsdp2"),
        ("whole", True, "each had every weight whole; resume with a machine file without shards, as 2gpu"),
    ):
        done = two(tmp_path, arithmetic_dir, f"run={name}", "steps=4", "resume=true", *settings, sharded=sharded)
        assert [rank.returncode for rank in done] == [2, 2] and why in done[0].stderr, done[0].stderr[-2000:]
        assert done[0].stderr.count("\n") == 1 and done[1].stderr == "", "said once"
        assert "loading transformers" not in done[0].stdout, "before weights are loaded"
    if not settings:
        done = two(tmp_path, arithmetic_dir, "run=shards", "steps=4", "resume=true", sharded=True, ranks=3)
        assert done[0].returncode == 2 and "written by 2 processes, this run has 3" in done[0].stderr, done[0].stderr[-2000:]


@runs
@pytest.mark.slow
def test_ordered_gradients_train_one_model_on_three_processes(arithmetic_dir, tmp_path):
    """PPO, so that a critic is there, too. Two numbers have one sum; of three, the library's is another one.

    torch's fused Adam on a CPU, which is not used here, rounds the last numbers of a norm's third otherwise.
    """
    kinds = {"whole": ("ordered", False), "shards": ("ordered", True), "stock": ("stock", False)}
    for name, (order, sharded) in kinds.items():
        settings = (f"run={name}", f"gradients={order}", "steps=2", "algorithm=ppo", "trainer.optim=adamw_torch")
        finished(two(tmp_path, arithmetic_dir, *settings, sharded=sharded, ranks=3))
    end = "checkpoints/checkpoint-2"
    for file in ("model.safetensors", "critic/model.safetensors", "critic/value_head.safetensors"):
        assert_same(tmp_path / "runs/whole" / end / file, tmp_path / "runs/shards" / end / file)
    one, stock = (load_file(tmp_path / "runs" / name / end / "model.safetensors") for name in ("whole", "stock"))
    assert any(bits.compare(x, stock[name]) is not None for name, x in one.items()), "control: as the library adds them"


def first_rollout(run: Path) -> list[tuple[list[int], int, list[int], list[int]]]:
    """Return prompt, seed, tokens and the words of the log-probs of each completion of step 1."""
    rollout, _ = rollouts.read(run, 1)
    words = [torch.tensor(c.sampler_logprobs, dtype=torch.float32).view(torch.int32).tolist() for c in rollout.completions]
    asked = [(list(prompt), seed) for prompt, seed, _ in rollout.requests]
    rows = zip(asked, rollout.completions, words, strict=True)
    return [(prompt, seed, list(c.token_ids), own) for (prompt, seed), c, own in rows]


@runs
@pytest.mark.slow
def test_a_step_s_rollout_is_the_same_bytes_on_any_number_of_processes(arithmetic_dir, tmp_path):
    """Prompts, seeds, tokens and log-probs of the first step: one process, two, and two with weights in shards."""
    settings = [x.replace("batch_size=8", "batch_size=16") for x in SETTINGS]
    one = [str(ROOT / "train.py"), *settings, f"model={arithmetic_dir}", "run=one", "steps=1"]
    finished([forks.run(one, cwd=tmp_path, env=ENV | forks.LAUNCHED)] * 2)
    finished(two(tmp_path, arithmetic_dir, "run=two", "steps=1", sharded=False))
    finished(two(tmp_path, arithmetic_dir, "run=shards", "steps=1", sharded=True))
    finished(two(tmp_path, arithmetic_dir, "run=other", "steps=1", "seed=1", sharded=True))
    drawn = {name: first_rollout(tmp_path / "runs" / name) for name in ("one", "two", "shards", "other")}
    assert len(drawn["one"]) == 16 and drawn["one"] == drawn["two"] == drawn["shards"]
    assert drawn["other"] != drawn["one"], "control: another seed"


@runs
@pytest.mark.slow
def test_a_run_in_shards_is_started_and_replayed_as_a_user_does(arithmetic_dir, tmp_path):
    environment = {k: v for k, v in ENV.items() if k not in ("LOCAL_RANK", "RANK", "WORLD_SIZE")}

    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "rlinvariant", *arguments]
        return subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400)

    done = command("train", *SETTINGS, f"model={arithmetic_dir}", "machine=cpu2_fsdp2", "run=a", "steps=2")
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"mismatched 0 / [\d,]+ tokens, coverage 1", done.stdout)
    assert json.loads((tmp_path / "runs/a/environment.json").read_text())["machine_file"] == "cpu2_fsdp2"
    replayed = command("replay", "runs/a", "--step", "1")
    assert replayed.returncode == 0 and "exact: step 1 was replayed bit for bit" in replayed.stdout, replayed.stdout[-2000:]
