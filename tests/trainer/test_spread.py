"""Runs whose processes share a sampler, each with some columns: they draw and train what runs with a sampler each do."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlinvariant.report.rundir import read_metrics
from tests import forks
from tests.trainer.test_sharding import ENV, assert_same, finished, first_rollout, runs, two

HERE = Path(__file__).parent
SPREAD = "sampler.tensor_parallel_size=2"


@runs
@pytest.mark.slow
def test_a_shared_sampler_draws_and_trains_the_same_bytes(arithmetic_dir, tmp_path):
    """A sampler each; one for both, beside whole models and beside shards."""
    for name, sharded, more in (("each", False, ()), ("whole", False, (SPREAD,)), ("shards", True, (SPREAD,))):
        finished(two(tmp_path, arithmetic_dir, f"run={name}", "steps=4", *more, sharded=sharded))
    top = tmp_path / "runs"
    for name in ("whole", "shards"):
        rows = read_metrics(top / name)
        assert sum(row["onpolicy/mismatched_tokens"] + row["onpolicy/unscored_tokens"] for row in rows) == 0
        assert all(row["onpolicy/coverage"] == 1 and row["onpolicy/weights_equal"] == 1 for row in rows) and len(rows) == 4
        assert first_rollout(top / name) == first_rollout(top / "each")
        assert_same(top / "each/model/model.safetensors", top / name / "model/model.safetensors")
    alone = {k: v for k, v in ENV.items() if k not in ("LOCAL_RANK", "RANK", "WORLD_SIZE")}
    for words in (("replay", "runs/shards", "--step", "1"), ("eval", "runs/shards")):  # in one process
        line = [sys.executable, "-m", "rlinvariant", *words]
        done = subprocess.run(line, cwd=tmp_path, env=alone, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@runs
@pytest.mark.slow
def test_ranks_with_a_shared_sampler_take_as_many_turns_as_their_samples(arithmetic_dir, tmp_path):
    """Ranks that draw together take what `test_ranks_take_as_many_turns_as_their_samples` asks, and draw the same as apart."""
    found = []
    for way in ("each", "shared"):
        (tmp_path / way).mkdir()
        command = [str(HERE / "turns_on_ranks.py"), str(tmp_path / way), arithmetic_dir, way]
        env = {**os.environ, "PYTHONPATH": str(HERE.parents[1])}
        for done in forks.run_ranks(2, command, cwd=tmp_path, env=env):
            assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        found.append([json.loads((tmp_path / way / f"{rank}.json").read_text()) for rank in (0, 1)])
    each, shared = found
    assert [rank["turns"] for rank in shared] == [rank["turns"] for rank in each]
    assert all(len(turns[0]) < len(turns[1]) for turns in zip(*(rank["turns"] for rank in shared), strict=True)), "blind"
    for rank in (0, 1):
        for how in ("raises", "hangs"):
            assert shared[rank][f"stop, {how}"] == each[rank][f"stop, {how}"]
        for row, other in zip(shared[rank]["rows"], each[rank]["rows"], strict=True):
            assert row["onpolicy/mismatched_tokens"] == 0 < row["onpolicy/compared_tokens"] == other["onpolicy/compared_tokens"]
            assert row["reward"] == other["reward"]
