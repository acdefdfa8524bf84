"""Runs that train LoRA adapters and draw from servers are those of an engine of their own, byte for byte."""

from typing import Any

import pytest
from peft import LoraConfig
from safetensors.torch import load, load_file
from transformers import AutoTokenizer

import rlinvariant
from rlinvariant.models import lora
from rlinvariant.report.rundir import read_metrics
from rlinvariant.sampler import served
from tests.parity.device import cpu_only
from tests.parity.harness import assert_same_weights, questions, small_config, variety
from tests.sampler import test_served as plain
from tests.trainer.test_served_runs import TINY, Lab
from tests.trainer.test_sharding import FSDP

pytestmark = [pytest.mark.slow, cpu_only("a server and a trainer would share a GPU")]
token_file = plain.token_file
STEPS = 4
ADAPTED = ("lora.r=4", "trainer.learning_rate=1e-2")


def adapters(lab: Lab, run: str) -> dict[str, Any]:
    return load_file(lab.path / f"runs/{run}/model/adapter_model.safetensors")


@pytest.fixture(scope="module")
def lab(arithmetic_dir, token_file, tmp_path_factory):
    settings = (*TINY, f"model={arithmetic_dir}", *ADAPTED, f"steps={STEPS}")
    made = Lab(
        tmp_path_factory.mktemp("lab"), arithmetic_dir, token_file, settings, save_steps=2
    )  # the next rollout is recorded
    (done,) = made.train("own")
    assert done.returncode == 0, done.stderr[-3000:]
    yield made
    for one in made.servers:
        one.stop()


@pytest.mark.parametrize("count", [1, 2])
def test_a_run_of_adapters_by_servers_is_the_run_of_an_engine(count, lab):
    """The control is another seed, by which each of the compared parts is another."""
    servers = (lab.servers or lab.serve(2))[:count]
    (done,) = lab.train(f"served-{count}", servers=servers)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "without the trainer's adapters" in done.stdout and "compared now: 0 / " in done.stdout
    assert "; room for LoRA adapters, r 4, on 14 projections: q_proj, " in servers[-1].log.read_text()
    rows = read_metrics(lab.path / f"runs/served-{count}")
    assert [(row["onpolicy/mismatched_tokens"], row["onpolicy/coverage"]) for row in rows] == [(0, 1)] * STEPS
    assert all(row["onpolicy/compared_tokens"] > 60 for row in rows)
    assert lab.rows(f"served-{count}") == lab.rows("own")
    for step in (1, 3):  # what began with B = 0, and what two steps have moved
        assert lab.rollout(f"served-{count}", step) == lab.rollout("own", step)
    assert_same_weights(adapters(lab, f"served-{count}"), adapters(lab, "own"), "trained by servers")
    (other,) = lab.train(f"seed-{count}", "seed=1", servers=servers)
    assert other.returncode == 0 and lab.rollout(f"seed-{count}", 3) != lab.rollout("own", 3)
    with pytest.raises(AssertionError):
        assert_same_weights(adapters(lab, f"seed-{count}"), adapters(lab, "own"), "control")


@pytest.mark.parametrize("shards", [False, True])
def test_two_processes_train_adapters_by_servers(shards, lab, monkeypatch):
    servers, name = (lab.servers or lab.serve(2))[:2], f"ranks-{shards}"
    for key, value in FSDP.items() if shards else ():
        monkeypatch.setenv(key, value)
    done = lab.train(name, servers=servers, ranks=2)
    assert [one.returncode for one in done] == [0, 0], done[0].stderr[-3000:] + done[1].stderr[-3000:]
    assert ("weights in shards over 2 processes" in done[0].stdout) is shards
    found, expected = lab.rollout(name), lab.rollout("own")
    assert {k: x for k, x in found.items() if k != "sampling"} == {k: x for k, x in expected.items() if k != "sampling"}
    rows = read_metrics(lab.path / f"runs/{name}")
    assert [(row["onpolicy/mismatched_tokens"], row["onpolicy/coverage"]) for row in rows] == [(0, 1)] * STEPS


def test_servers_that_die_cost_no_step_of_adapters(lab):
    """One dies in step 2 and the run goes on; the last dies in step 3, which is saved; a third serves the resumed run."""
    one, two = lab.serve(2)
    (done,) = lab.train("killed", servers=(one, two), kills=f"2:{one.process.pid},3:{two.process.pid}")
    assert done.returncode == 2 and "error: sampler.servers: none is left" in done.stderr, done.stderr[-3000:]
    assert f"note: sampler.servers={one.url}: not reached" in done.stderr
    (done,) = lab.train("killed", "resume=true", servers=lab.serve(1))
    assert done.returncode == 0, done.stderr[-3000:]
    assert lab.rows("killed") == lab.rows("own")
    assert_same_weights(adapters(lab, "killed"), adapters(lab, "own"), "through two deaths and a resume")


@pytest.mark.parametrize("other_base", [False, True])
def test_the_base_is_sent_once_or_not_at_all(other_base, lab, arithmetic_weights, tmp_path, monkeypatch):
    """A server that was started with the model has its base; after a trainer of another one it is sent, at the first sync."""
    (one,) = (lab.servers or lab.serve(2))[:1]
    if other_base:
        before = served_by(one)
        before.sync(plain.scaled(arithmetic_weights, 1.01))
    sent: list[set[str]] = []
    save = served.save
    monkeypatch.setattr(served, "save", lambda part: (sent.append({*load(b"".join(whole := save(part)))}), whole)[1])
    rows: list[dict[str, Any]] = []
    trainer = rlinvariant.grpo_trainer(
        lab.model,
        variety,
        small_config(tmp_path, learning_rate=1e-2),
        questions(),
        processing_class=AutoTokenizer.from_pretrained(lab.model),
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "down_proj"]),
        sampler_options={"servers": [one.url], "trainer_token_file": lab.token_file, "max_model_len": 64},
        on_row=lambda row, mismatch: rows.append(row),
    )
    trainer.train()
    assert [row["onpolicy/mismatched_tokens"] for row in rows] == [0, 0]
    model = trainer.accelerator.unwrap_model(trainer.model)
    moving, every = ({name for name, _ in of(model)} for of in (lora.adapters, lora.pairs))
    assert sent[0] == (every if other_base else moving)
    assert len(sent) > 4 and all(names == moving for names in sent[1:]), "the comparison's two, and each step's"


def served_by(one: Any) -> served.ServedSampler:
    them = [plain.server.Server(one.url, plain.Token("0123456789abcdef" * 4))]
    return served.ServedSampler(them, dtype="bfloat16", max_model_len=64, eager=True)
