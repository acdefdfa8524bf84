"""Whole runs that draw from servers on loopback are those that draw from an engine of their own, byte for byte."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from rlinvariant.demo.model import build_small
from rlinvariant.report.rundir import read_metrics
from tests import forks
from tests.parity.device import cpu_only
from tests.parity.harness import assert_same_weights
from tests.sampler.servers import Server
from tests.trainer.test_pairs import WINDOW, small
from tests.trainer.tool_model import tool_run

pytestmark = [pytest.mark.slow, cpu_only("a server and a trainer would share a GPU")]
ROOT = Path(__file__).parents[2]
TINY = (f"recipe={ROOT / 'tests/trainer/tiny_recipe.py'}", "wandb.mode=disabled", "data.eval_size=2")
STEPS = 5
CLOCKS = ("time/", "perf/", "step_time", "profiling/", "throughput/")


@pytest.fixture(scope="module")
def token_file(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("token") / "trainer.token"
    path.touch(0o600)
    path.write_text("0123456789abcdef" * 4)
    return str(path)


class Lab:
    """A directory of runs, with settings of their own or those of the tiny recipe, and servers that are stopped at its end."""

    def __init__(
        self,
        path: Path,
        model: str,
        token_file: str,
        settings: Sequence[str] = (),
        longest: int = 64,
        save_steps: int = 100,
    ) -> None:
        self.path, self.model, self.token_file, self.servers = path, model, token_file, list[Server]()
        self.settings, self.longest, self.save_steps = settings or (*TINY, f"model={model}"), longest, save_steps

    def serve(self, count: int, model: str | None = None) -> list[Server]:
        length = ["--max-model-len", str(self.longest), "--kv-cache-memory-bytes", "67108864"]
        options = ["--trainer-token-file", self.token_file, *length]
        command = ["-m", "rlinvariant", "serve", model or self.model, *options]
        started = [Server(command, self.path / f"server-{len(self.servers) + i}") for i in range(count)]
        self.servers += started
        for one in started:
            one.wait()
        return started

    def train(self, run: str, *more: str, servers: Any = (), ranks: int = 1, kills: str = "") -> Any:
        """Run to the end, and return what the processes said."""
        at = [f"sampler.servers={','.join(one.url for one in servers)}", f"sampler.trainer_token_file={self.token_file}"]
        size = f"trainer.per_device_train_batch_size={16 // ranks}"
        command = [*self.settings, f"run={run}", size, f"trainer.save_steps={self.save_steps}", *(at if servers else ()), *more]
        env = os.environ | {"PYTHONPATH": str(ROOT), "KILLS": kills}
        return forks.run_ranks(ranks, [str(ROOT / "train.py"), *command], cwd=self.path, env=env)

    def rollout(self, run: str, step: int = 1) -> dict[str, bytes]:
        """Return the bytes of all that a step has drawn, but for what names the run."""
        with np.load(self.path / f"runs/{run}/rollouts/step-{step}.npz") as arrays:
            found = {name: arrays[name].tobytes() for name in arrays.files if name not in ("about", "batches")}
            return found | {"sampling": json.dumps(json.loads(str(arrays["about"]))["sampling"]).encode()}

    def weights(self, run: str) -> dict[str, Any]:
        return load_file(self.path / f"runs/{run}/model/model.safetensors")

    def rows(self, run: str) -> list[dict[str, str]]:
        rows = read_metrics(self.path / f"runs/{run}")
        return [{k: repr(v) for k, v in row.items() if not k.startswith(CLOCKS) and "cached" not in k} for row in rows]


@pytest.fixture(scope="module")
def lab(arithmetic_dir, token_file, tmp_path_factory):
    made = Lab(tmp_path_factory.mktemp("lab"), arithmetic_dir, token_file)
    (done,) = made.train("own", f"steps={STEPS}")
    assert done.returncode == 0, done.stderr[-3000:]
    yield made
    for one in made.servers:
        one.stop()


def test_a_run_by_servers_is_the_run_of_an_engine(lab):
    (done,) = lab.train("served", f"steps={STEPS}", servers=lab.serve(2))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "each server, at each start; compared now: 0 / " in done.stdout
    rows = read_metrics(lab.path / "runs/served")
    assert [row["onpolicy/mismatched_tokens"] for row in rows] == [0] * STEPS
    assert [row["onpolicy/coverage"] for row in rows] == [1] * STEPS
    assert lab.rows("served") == lab.rows("own")
    assert lab.rollout("served") == lab.rollout("own")
    assert_same_weights(lab.weights("served"), lab.weights("own"), "trained by servers")
    (other,) = lab.train("seed", f"steps={STEPS}", "seed=1", servers=lab.servers[:2])
    assert other.returncode == 0 and lab.rollout("seed") != lab.rollout("own"), "control: another seed draws otherwise"


@pytest.mark.parametrize("shards", [False, True])
def test_two_processes_draw_from_servers_what_one_draws_itself(shards, lab):
    """The second process brings nothing of its own to the servers, and all of its requests."""
    sharded = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "NO_WRAP"}
    sharded |= {"FSDP_CPU_RAM_EFFICIENT_LOADING": "false", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}
    name, servers = f"ranks-{shards}", (lab.servers or lab.serve(2))[:2]
    with pytest.MonkeyPatch.context() as patched:
        for key, value in sharded.items() if shards else ():
            patched.setenv(key, value)
        done = lab.train(name, "steps=3", servers=servers, ranks=2)
    assert [one.returncode for one in done] == [0, 0], done[0].stderr[-3000:] + done[1].stderr[-3000:]
    found, expected = lab.rollout(name), lab.rollout("own")
    assert {k: x for k, x in found.items() if k != "sampling"} == {k: x for k, x in expected.items() if k != "sampling"}
    rows = read_metrics(lab.path / f"runs/{name}")
    assert [(row["onpolicy/mismatched_tokens"], row["onpolicy/coverage"]) for row in rows] == [(0, 1)] * 3


def test_servers_draw_turns_of_a_mixture_with_a_window_for_ppo(token_file, tmp_path):
    """A run of all four at once is the run of an engine, byte for byte; that another seed's is not, the first test shows."""
    settings = [
        *tool_run(tmp_path, small("mixtral", sliding_window=WINDOW)),
        "algorithm=ppo",
        "steps=2",
        "sampler.max_model_len=128",
    ]
    lab = Lab(tmp_path, str(tmp_path / "model"), token_file, settings, longest=128)
    try:
        for name, servers, more in (("own", (), ["sampler.kv_cache_gib=0.05"]), ("served", lab.serve(1), [])):
            (done,) = lab.train(name, *more, servers=servers)
            assert done.returncode == 0, done.stderr[-3000:]
            assert ("note: onpolicy/router_flips is not counted: the sampler does not say" in done.stdout) == (name == "served")
    finally:
        for one in lab.servers:
            one.stop()
    rows = read_metrics(tmp_path / "runs/served")
    assert all(row["onpolicy/router_flips"] == 0 for row in read_metrics(tmp_path / "runs/own"))
    assert all("onpolicy/router_flips" not in row for row in rows)
    assert [(row["onpolicy/mismatched_tokens"], row["onpolicy/coverage"]) for row in rows] == [(0, 1)] * 2
    assert all(row["rollout/turns"] > 1 and row["onpolicy/compared_tokens"] > 100 for row in rows)
    assert lab.rollout("served") == lab.rollout("own")
    assert_same_weights(lab.weights("served"), lab.weights("own"), "trained by servers")


def test_servers_that_die_cost_no_step(lab):
    """One dies in step 2 and the run goes on; the last dies in step 4, which is saved; a third serves the resumed run."""
    one, two = lab.serve(2)
    kills = f"2:{one.process.pid},4:{two.process.pid}"
    (done,) = lab.train("killed", f"steps={STEPS}", servers=(one, two), kills=kills)
    assert done.returncode == 2, done.stderr[-3000:]
    assert done.stderr.count("error: ") == 1 and "error: sampler.servers: none is left" in done.stderr
    assert "Traceback" not in done.stderr and f"note: sampler.servers={one.url}: not reached" in done.stderr
    assert [path.name for path in (lab.path / "runs/killed/checkpoints").glob("checkpoint-*")] == ["checkpoint-4"]
    (done,) = lab.train("killed", f"steps={STEPS}", "resume=true", servers=lab.serve(1))
    assert done.returncode == 0, done.stderr[-3000:]
    assert lab.rows("killed") == lab.rows("own")
    assert_same_weights(lab.weights("killed"), lab.weights("own"), "through two deaths and a resume")


def test_what_is_no_server_for_this_run_is_refused_in_one_line_by_one_process(lab, tmp_path):
    other = tmp_path / "other"
    build_small(other)
    wrong = lab.serve(1, str(other))
    cases = {
        f"{wrong[0].url}: it serves another model, {other}; start it with": {"servers": wrong},
        "127.0.0.1:9: not reached": {"more": "sampler.servers=http://127.0.0.1:9"},
    }
    for at, (said, how) in enumerate(cases.items()):
        more = ["steps=2"] if "servers" in how else ["steps=2", how["more"], f"sampler.trainer_token_file={lab.token_file}"]
        done = lab.train(f"refused-{at}", *more, servers=how.get("servers", ()), ranks=2)
        both = done[0].stderr + done[1].stderr
        assert [one.returncode for one in done] == [2, 2] and both.count("error: ") == 1 and said in both, both[-3000:]
        assert "starting the vLLM engine" not in done[0].stdout and not (lab.path / f"runs/refused-{at}").exists()
