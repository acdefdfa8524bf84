"""Runs of two processes, joined by gloo: they stop together, and draw what one process draws."""

import contextlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rlinvariant.bench.served import kept_port
from rlinvariant.report.rundir import read_metrics
from tests import forks
from tests.parity.device import cpu_only

ROOT = Path(__file__).parents[2]
pytestmark = cpu_only("two processes of one run take a GPU each; here they are joined by gloo")
TINY = (str(ROOT / "train.py"), f"recipe={ROOT / 'tests/trainer/tiny_recipe.py'}", "wandb.mode=disabled", "data.eval_size=2")


def test_a_mismatch_on_one_process_stops_both_with_one_line_and_one_count(arithmetic_dir, tmp_path):
    """Rank 1 alone has other log-probs, in the second step. The first step is the control: there both go on."""
    command = [*TINY, f"model={arithmetic_dir}", "run=a", "data.fault=rank 1 differs", "trainer.per_device_train_batch_size=8"]
    first, second = forks.run_ranks(2, command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert (first.returncode, second.returncode) == (1, 1), first.stderr[-2000:] + second.stderr[-2000:]
    run = tmp_path / "runs/a"
    result = json.loads((run / "result.json").read_text())
    assert result["outcome"] == "not exact" and f"error: {result['error']}" in first.stderr
    assert (first.stderr + second.stderr).count("mismatched") == 1 and "Traceback" not in first.stderr + second.stderr
    wrong, of = (int(x.replace(",", "")) for x in re.findall(r"mismatched ([\d,]+) / ([\d,]+) tokens", result["error"])[0])
    one, two = read_metrics(run)
    assert one["onpolicy/mismatched_tokens"] == 0 and two["onpolicy/mismatched_tokens"] == wrong
    assert of == two["onpolicy/compared_tokens"] and 0 < wrong < of, "rank 1's tokens, out of those of both"
    assert two["onpolicy/coverage"] == 1 and "Stopped before the optimizer step" in result["error"]


def test_a_bit_of_one_process_s_own_weights_stops_both(arithmetic_dir, tmp_path):
    """Its sampler gets the same bit, so that none of its log-probs differ: ranks are compared with each other for this."""
    command = [*TINY, f"model={arithmetic_dir}", "run=a", "data.fault=rank 1 has a flipped bit"]
    command.append("trainer.per_device_train_batch_size=8")
    both = forks.run_ranks(2, command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert [one.returncode for one in both] == [1, 1], both[0].stderr[-2000:] + both[1].stderr[-2000:]
    result, (row,) = json.loads((tmp_path / "runs/a/result.json").read_text()), read_metrics(tmp_path / "runs/a")
    name = "model.norm.weight (rank 1, whose own is not rank 0's)"
    assert f"after the weight sync, 1 of the sampler's parameters differ from the trainer's, first {name}" in result["error"]
    assert row["onpolicy/mismatched_tokens"] == 0 < row["onpolicy/compared_tokens"], "the step before, as a control"


@pytest.mark.slow
def test_two_nodes_of_torchrun_are_one_run(arithmetic_dir, tmp_path):
    """Two launchers with a process each, as on two hosts, which meet at an address of loopback."""
    with contextlib.closing(kept_port()) as kept:
        port = str(kept.getsockname()[1])
        nodes = []
        for node in ("0", "1"):
            where = [
                "--nnodes",
                "2",
                "--nproc-per-node",
                "1",
                "--node-rank",
                node,
                "--master-addr",
                "127.0.0.1",
                "--master-port",
                port,
            ]
            command = [
                sys.executable,
                "-m",
                "torch.distributed.run",
                *where,
                *TINY,
                f"model={arithmetic_dir}",
                "run=a",
                "steps=2",
            ]
            env = os.environ | {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
            command.append("trainer.per_device_train_batch_size=8")
            nodes.append(
                subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            )
        said = [node.communicate(timeout=forks.TIMEOUT_S) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    rows = read_metrics(tmp_path / "runs/a")
    assert [row["onpolicy/mismatched_tokens"] for row in rows] == [0, 0]
    assert all(row["onpolicy/coverage"] == 1 and row["onpolicy/compared_tokens"] for row in rows)


GATHERS = """
import torch
from accelerate import Accelerator
from types import SimpleNamespace
from rlinvariant.trainer.microbatches import MicroBatchedTrainer

accelerator = Accelerator(cpu=True)
rows = 3 - accelerator.process_index
own = torch.arange(float(rows)) + 10 * rows
with MicroBatchedTrainer._gathers_any_rows(SimpleNamespace(accelerator=accelerator), 3):
    found, one = accelerator.gather(own), accelerator.gather(torch.tensor(float(rows)))
alike = accelerator.gather(own[:2])
print("found", found.nan_to_num(-1).tolist(), one.tolist(), alike.tolist())
torch.distributed.destroy_process_group()
"""


def test_parts_of_two_processes_have_other_numbers_of_rows(tmp_path):
    """TRL gathers a number of each row: gloo ends both processes where one sends more than the other expects."""
    (tmp_path / "gathers.py").write_text(GATHERS)
    for done in forks.run_ranks(2, ["gathers.py"], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}):
        assert done.returncode == 0, done.stderr[-2000:]
        assert "found [30.0, 31.0, 32.0, 20.0, 21.0, -1.0] [3.0, 2.0] [30.0, 31.0, 20.0, 21.0]" in done.stdout


SAVES = """
import os
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from rlinvariant.warmstart import save_here

torch.distributed.init_process_group("gloo")
model, rank = LlamaForCausalLM(LlamaConfig(hidden_size=64, num_hidden_layers=1, vocab_size=8)), os.environ["RANK"]
model.save_pretrained(f"theirs-{rank}")
save_here(model, f"own-{rank}")
torch.distributed.destroy_process_group()
"""


def test_a_recipe_s_own_model_is_saved_by_any_of_two_processes(tmp_path):
    """The control: transformers saves on the first one alone."""
    (tmp_path / "saves.py").write_text(SAVES)
    for done in forks.run_ranks(2, ["saves.py"], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}):
        assert done.returncode == 0, done.stderr[-2000:]
    saved = {path.parent.name for path in tmp_path.glob("*/model.safetensors")}
    assert saved == {"own-0", "own-1", "theirs-0"}


UNITS = """
import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import fully_shard
from rlinvariant.models.leaves import Leaves

class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 3) for _ in range(2))
        self.last = nn.Linear(3, 3)

    def forward(self, x, chosen):
        return self.last(sum(self.experts[i](x) for i in chosen)).sum()

accelerator = Accelerator(cpu=True)
model = Experts()
fully_shard(model.last)
fully_shard(model)
leaves = Leaves(model.named_parameters(), [model])

def step(*chosen):
    leaves.begin(len(chosen))
    for experts in chosen:
        model(torch.ones(2, 4), experts).backward()
    leaves.finish()

step([0, 1], [0, 1])
print("found", [p.grad.to_local().numel() for p in model.parameters()])
try:
    step([0], [1])
except RuntimeError as error:
    print(error)
torch.distributed.destroy_process_group()
"""


def test_a_weight_without_a_gradient_of_some_sample_ends_the_step_in_shards(tmp_path):
    """FSDP leaves it out of what it reduces: without a look at its size, the other expert's would be added in its place."""
    (tmp_path / "units.py").write_text(UNITS)
    for done in forks.run_ranks(2, ["units.py"], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}):
        assert done.returncode == 0, done.stderr[-2000:]
        assert "found [" in done.stdout and "root has gradients of 20 of 40 numbers in sample 0" in done.stdout
