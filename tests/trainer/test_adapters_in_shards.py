"""LoRA with weights in shards: the adapters that whole models train, bit for bit, PEFT's files, and faults that are named."""

import json
import re
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from rlinvariant import bits
from rlinvariant.report.rundir import read_metrics
from tests import forks
from tests.trainer.test_sharding import ENV, FSDP, assert_same, finished, first_rollout, moments, runs, two

HERE = Path(__file__).parent
LORA = ("lora.r=3", "trainer.beta=0.05")  # 3 rows of A: one process has two of them
SPREAD = "sampler.tensor_parallel_size=2"
FILE = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def both(arithmetic_dir, tmp_path_factory) -> tuple[Path, Path]:
    """Two processes with whole models, and two with shards: the directories of their runs."""
    top = tmp_path_factory.mktemp("lora")
    for name, sharded in (("whole", False), ("shards", True)):
        done = two(top, arithmetic_dir, f"run={name}", "steps=4", *LORA, sharded=sharded)
        finished(done)
        assert ("weights in shards over 2 processes: 3 units" in done[0].stdout) == sharded
    return top / "runs/whole", top / "runs/shards"


@runs
@pytest.mark.slow
def test_shards_train_the_adapters_of_whole_models_bit_for_bit(both, arithmetic_dir):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    whole, cut = both
    for run in both:
        rows = read_metrics(run)
        assert [row["onpolicy/mismatched_tokens"] + row["onpolicy/unscored_tokens"] for row in rows] == [0] * 4
        assert all(row["onpolicy/coverage"] == 1 == row["onpolicy/weights_equal"] for row in rows)
        assert all(row["grad_norm"] > 0.05 for row in rows), "clipped"
    for name in ("grad_norm", "kl", "loss"):
        assert [row[name] for row in read_metrics(whole)] == [row[name] for row in read_metrics(cut)]
    assert first_rollout(whole) == first_rollout(cut)
    files = [f"{at}/{FILE}" for at in ("rollouts/adapter", "checkpoints/checkpoint-2", "checkpoints/checkpoint-4", "model")]
    first, two_steps, four_steps, _ = [assert_same(whole / file, cut / file) for file in files]
    for before, after in ((first, two_steps), (two_steps, four_steps)):
        assert all(bits.compare(x, after[name]) is not None for name, x in before.items()), "control: each moves"
    for a, b in zip(moments(whole, 4), moments(cut, 4), strict=True):
        assert bits.compare(a, b) is None and a.any()
    assert sorted(path.name for path in (cut / "model").iterdir()) == sorted(path.name for path in (whole / "model").iterdir())
    assert not [*cut.rglob("model.safetensors")], "the base is not saved"
    base = AutoModelForCausalLM.from_pretrained(arithmetic_dir)
    theirs = PeftModel.from_pretrained(base, str(cut / "model")).state_dict()
    assert all(bits.same(theirs[name.replace(".weight", ".default.weight")], x) for name, x in four_steps.items()), "by peft"


@runs
@pytest.mark.slow
def test_a_resumed_run_in_shards_is_the_run_and_is_replayed(both, arithmetic_dir, tmp_path):
    _, cut = both
    shutil.copytree(cut, tmp_path / "runs/shards")
    shutil.rmtree(tmp_path / "runs/shards/checkpoints/checkpoint-4")
    finished(two(tmp_path, arithmetic_dir, "run=shards", "steps=4", "resume=true", *LORA, sharded=True))
    again = tmp_path / "runs/shards"
    for file in (f"model/{FILE}", f"checkpoints/checkpoint-4/{FILE}"):
        assert_same(cut / file, again / file)
    assert all(bits.compare(a, b) is None for a, b in zip(moments(cut, 4), moments(again, 4), strict=True))
    for step in ("1", "3"):  # from the adapter that the run began with, and from a checkpoint
        command = ["-m", "rlinvariant.cli", "replay", "runs/shards", "--step", step]
        replayed = forks.run(command, cwd=tmp_path, env=ENV)
        assert f"exact: step {step} was replayed bit for bit" in replayed.stdout, replayed.stdout[-2000:] + replayed.stderr


@runs
@pytest.mark.slow
def test_ordered_gradients_train_one_adapter_on_three_processes(arithmetic_dir, tmp_path):
    """torch's fused Adam rounds the last numbers of a shard otherwise on a CPU, where they do not fill a vector."""
    kinds = {"whole": ("ordered", False), "shards": ("ordered", True), "stock": ("stock", False)}
    for name, (order, sharded) in kinds.items():
        settings = (f"run={name}", f"gradients={order}", "steps=2", "lora.r=4", "trainer.optim=adamw_torch")
        finished(two(tmp_path, arithmetic_dir, *settings, sharded=sharded, ranks=3))
    end = f"checkpoints/checkpoint-2/{FILE}"
    whole = assert_same(tmp_path / "runs/whole" / end, tmp_path / "runs/shards" / end)
    stock = load_file(tmp_path / "runs/stock" / end)
    assert any(bits.compare(x, stock[name]) is not None for name, x in whole.items()), "control: as the library adds them"


@runs
@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["each", "shared"])
def test_faults_of_adapters_in_shards_are_named(sampler, arithmetic_dir, tmp_path):
    """Adapters one sync old; a bit of an adapter in the engine of rank 1; a bit of rank 1's rows of the frozen base."""
    command = [str(HERE / "adapters_on_ranks.py"), str(tmp_path), arithmetic_dir, sampler]
    for done in forks.run_ranks(2, command, cwd=tmp_path, env=ENV | FSDP):
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    for said in [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]:
        assert said["in sync"] == {"mismatched": 0, "differing": []}
        assert said["one sync old"]["mismatched"] > 0
        assert said["one sync old"]["differing"] == [f"{name} (rank 0)" for name in said["adapters"]]
        rank = 1 if sampler == "each" else 0  # all processes of a shared sampler see what one has
        of_rank_1 = f"1 of the sampler's parameters differ from the trainer's, first {said['adapters'][0]} (rank {rank})"
        assert said["a bit of rank 1's engine"] == f"step 3: after the weight sync, {of_rank_1}"
        assert said["a bit of the base"] == ["model.layers.1.mlp.down_proj.weight (rank 0)"]


@runs
@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "shards"])
def test_a_shared_sampler_draws_and_trains_the_same_adapters(both, sharded, arithmetic_dir, tmp_path):
    """Each process has all of A, and those rows of B that it has of the weight."""
    done = two(tmp_path, arithmetic_dir, "run=shared", "steps=4", SPREAD, *LORA, sharded=sharded)
    finished(done)
    (without,) = re.findall(r"(\d+) / \d+ without the trainer's adapters", done[0].stdout)
    assert int(without) > 0, "control"
    each, shared = both[0], tmp_path / "runs/shared"
    rows = read_metrics(shared)
    assert [row["onpolicy/mismatched_tokens"] + row["onpolicy/unscored_tokens"] for row in rows] == [0] * 4
    assert all(row["onpolicy/coverage"] == 1 == row["onpolicy/weights_equal"] for row in rows)
    assert first_rollout(shared) == first_rollout(each)
    assert_same(each / "model" / FILE, shared / "model" / FILE)
