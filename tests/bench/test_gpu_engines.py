"""The GPU benchmarks of engines, trainers and whole steps, with workers that answer at once in place of processes."""

import importlib
import json

import pytest

from rlinvariant.bench import gpu, gpu_step, gpu_trainer, long_context, measure, report, sampler
from rlinvariant.models import shapes
from rlinvariant.rollout import Completion
from tests.bench import fake_gpu
from tests.bench.fake_workers import Fakes


def _engine(side, what, batch=None, more=None):
    if what == "start":
        return {"seconds": 50.0 if side == "exact" else 100.0}
    if what == "alone":
        return {"differing": 0 if side == "exact" else 5, "tokens": 16, "requests": 2, "batch": 4}
    return {"tokens": 8 * batch, "seconds": {"exact": 2.5 if more else 2.0, "stock": 1.0, "peer": 4.0}[side]}


def test_sampler_rows_are_rates_with_a_target_and_a_peer(monkeypatch):
    fakes = Fakes(monkeypatch, sampler, _engine)
    monkeypatch.setattr(sampler, "machine", lambda: "gpu")
    rows = list(sampler.rows(tiny=False))
    rates = {row.case: row for row in rows if row.unit == "tok/s"}
    ours, peer = rates["ours: qwen3-1.7b, batch 16"], rates["VLLM_BATCH_INVARIANT=1: qwen3-1.7b, batch 16"]
    assert (ours.bench, ours.ratio, ours.target, ours.bits_equal) == ("sampler", 0.5, 1.2, {"ours": True, "stock": False})
    assert (peer.bench, peer.ratio, peer.target, peer.bits_equal["ours"]) == ("peer", 0.25, None, False)
    assert (ours.samples, peer.samples) == (sampler.ROUNDS, sampler.PEER_ROUNDS)
    reported = [row for row in rates.values() if "vLLM's own report" in row.case]
    assert {(row.ratio, row.target) for row in reported} == {(0.4, None)} and len(reported) == 4
    assert [(row.ours, row.unit) for row in rows[:4]] == [(50, "s"), (100, "s"), (0, "of 16"), (5, "of 16")]
    assert len(rates) == 12 and sorted(fakes.closed) == sorted(sampler.SETUPS["gpu"].engines)
    order = [side[0] + "r" * bool(request["more"]) for side, request in fakes.asked if request.get("batch") == 1]
    assert order == ["p", "s", "er", "e", "e", "er", "s", "s", "er", "e"], "the engines do not take turns"


def test_a_cpu_has_a_smaller_model_and_no_peer(monkeypatch):
    fakes = Fakes(monkeypatch, sampler, _engine)
    monkeypatch.setattr(sampler, "machine", lambda: "cpu")
    rows = list(sampler.rows(tiny=False))
    rates = {row.case: row.target for row in rows if row.unit == "tok/s"}
    assert len(rates) == 6 and rates["ours: smollm2-135m, batch 32"] == 1.0
    assert sorted(fakes.closed) == ["exact", "stock"] and not any("VLLM_BATCH_INVARIANT" in row.case for row in rows)


@pytest.mark.parametrize("dead", ["peer", "stock", "exact"])
def test_an_engine_that_ends_costs_its_own_rows_alone(monkeypatch, tmp_path, dead):
    Fakes(monkeypatch, sampler, _engine, dead=[dead])
    monkeypatch.setattr(sampler, "machine", lambda: "gpu")
    with pytest.raises(SystemExit, match="not measured: .*exit code 9: ValueError: no memory"):
        measure.write(tmp_path / "x.json", sampler.rows(tiny=False), tiny=False)
    content = json.loads((tmp_path / "x.json").read_text())
    missing = [row for row in content["rows"] if "missing" in row]
    assert content["complete"] is False and len(content["rows"]) == 16
    assert len(missing) == {"peer": 6, "exact": 10, "stock": 16}[dead]
    alive = [row["found"] for row in missing if row["case"] == "ours: qwen3-1.7b, batch 16"]
    assert alive == {"peer": [], "exact": [{"stock": 128.0}], "stock": [{"exact": 64.0}]}[dead]
    tables = report.markdown(tmp_path)
    assert tables.count("not measured: ") == len(missing) and "Not complete" in tables


@pytest.mark.parametrize("batchy", [False, True])
def test_a_sampler_that_depends_on_its_batch_is_counted(batchy):
    reported = []

    class Engine:
        vocabulary = 50

        def generate(self, prompts, length, seeds, logprobs=False):
            reported.append(logprobs)
            shift = len(prompts) if batchy else 0
            return [Completion([1] * length, [-1.0 - shift] * length) for _ in prompts]

        def forget(self):
            pass

    class Link:
        sent = []

        def requests(self):
            timed = {"what": "generate", "batch": 3}
            return iter([{"what": "start"}, {"what": "alone"}, timed | {"more": {}}, timed | {"more": {"logprobs": True}}])

        def send(self, **answer):
            self.sent.append(answer)

    link = Link()
    link.sent = []
    sampler.serve(link, Engine(), sampler.SETUPS["tiny"], 7.0)
    assert link.sent[0] == {"seconds": 7.0}
    assert link.sent[1] == {"differing": 16 if batchy else 0, "tokens": 16, "requests": 2, "batch": 4}
    assert link.sent[2]["tokens"] == link.sent[3]["tokens"] == 24 and reported == [False] * 4 + [True]


def _long(side, what, context=None, batch=None, seed=None):
    if what != "time":
        return {"differing": 3 if side == "stock" else 0}
    by_round = {0: 100.0, 1: 1.0, 2: 3.0, 3: 2.0}[seed]  # the first, which warms up, does not count
    return {"prefill": {"flash": 10, "chunked": 5, "stock": 20}[side], "decode": by_round * {"flash": 1}.get(side, 8)}


def test_long_requests_have_a_rate_of_each_attention(monkeypatch):
    fakes = Fakes(monkeypatch, long_context, _long)
    monkeypatch.setattr(long_context, "machine", lambda: "gpu")
    rows = {row.case: row for row in long_context.rows(tiny=False)}
    assert len(rows) == 4 * 3 * 2 and sorted(fakes.closed) == ["chunked", "flash", "stock"]
    at = "qwen3-1.7b, decode, batch 8, 32768 of context"
    flash, chunked = (rows[f"attention={name}: {at}"] for name in ("flash", "chunked"))
    assert (flash.ours, flash.stock, flash.ratio, flash.samples) == (2.0, 16.0, 0.125, 3) and chunked.ratio == 1.0
    assert rows[f"attention=chunked: {at}; stock: attention=flash"].ratio == 8.0
    assert rows["attention=chunked: qwen3-1.7b, prefill, batch 1, 16384 of context"].ratio == 0.25
    assert flash.bits_equal == {"ours": True, "stock": False}
    assert {case for case, row in rows.items() if row.target == 0.95} == {
        f"attention=chunked: qwen3-1.7b, decode, batch {batch}, {context} of context"
        for batch in (1, 8)
        for context in (16384, 32768)
    }
    order = [side[0] for side, request in fakes.asked if (request.get("context"), request.get("batch")) == (16384, 8)]
    assert order == ["f", "c", "s", "s", "c", "f", "f", "c", "s", "s", "c", "f"], "the engines do not take turns"


def test_an_attention_that_ends_costs_its_own_rows(monkeypatch):
    Fakes(monkeypatch, long_context, _long, dead=["flash"])
    monkeypatch.setattr(long_context, "machine", lambda: "gpu")
    rows = list(long_context.rows(tiny=False))
    missing = [row for row in rows if hasattr(row, "missing")]
    assert len(rows) == 24 and len(missing) == 16 and all("flash" in row.case for row in missing)


@pytest.mark.parametrize("cached", [0, 512])
def test_a_decode_whose_prompts_are_computed_again_is_no_decode(cached):
    class Engine:
        vocabulary = 9

        def generate(self, prompts, length, seeds, logprobs=False):
            return [Completion([1] * length, [-1.0] * length, cached) for _ in prompts]

        def forget(self):
            pass

    prompts = [[1] * 600] * 2
    if cached:
        assert set(long_context.timed(Engine(), prompts, 4)) == {"prefill", "decode"}
        return
    with pytest.raises(RuntimeError, match="0 of 1,200 tokens of prompts came from the prefix cache"):
        long_context.timed(Engine(), prompts, 4)


def test_trainer_rows_count_real_tokens_and_memory(monkeypatch):
    def answer(side, what, size=None, case=None):
        if what == "memory":
            return {"peak": 900.0 if side == "exact" else 1000.0}
        if what == "bits":
            return {"same": side == "exact"}
        return {"train": 1.0 if side == "exact" else 2.0, "step": 1.0 if side == "exact" else 4.0, "tokens": 100}

    fakes = Fakes(monkeypatch, gpu_trainer, answer)
    rows = list(gpu_trainer.rows(tiny=False))
    assert [row.target for row in rows] == [1.0, None, 1.25, None, 1.0] * 2
    assert [row.ratio for row in rows] == [2.0, 4.0, 2.0, 4.0, 0.9] * 2
    assert rows[0].bits_equal == {"ours": True, "stock": False} and sorted(fakes.closed) == ["exact", "stock"]


def test_rows_of_a_trainer_that_ends_are_missing(monkeypatch):
    Fakes(
        monkeypatch,
        gpu_trainer,
        lambda side, **_: {"same": True, "train": 1.0, "step": 1.0, "tokens": 100, "peak": 5.0},
        ["stock"],
    )
    rows = list(gpu_trainer.rows(tiny=True))
    assert [row.found for row in rows] == [{"exact": 100.0}] * 4 + [{"exact": 5.0}]
    assert {row.missing for row in rows} == {"stock ended with exit code 9: ValueError: no memory"}


def test_step_rows_are_seconds_and_exact_only_if_every_step_was(monkeypatch):
    exact = iter([True, True, True, False])  # the first, short step and three others

    def answer(side, length):
        mine = next(exact) if side == "exact" else False
        return {
            "seconds": 8.0 if side == "exact" else 10.0,
            "tokens": 1e5 if side == "exact" else 2e5,
            "exact": mine,
            "peak": 1.0,
            "rollout": 2.0,
            "train": None,
            "sync": None,
        }

    fakes = Fakes(monkeypatch, gpu_step, answer)
    monkeypatch.setattr(gpu, "large", lambda: True)
    rows = list(gpu_step.rows(tiny=False))
    last = {row.case.split(":")[0]: row for row in rows}
    step = last["step"]
    assert (step.ratio, step.target, step.samples) == (0.8, 0.37, 3) and step.bits_equal == {"ours": False, "stock": False}
    assert last["step, for each million sampled tokens"].ratio == 1.6 and last["sampled tokens of a step"].ours == 1e5
    assert last["all but the rollout"].ratio == 0.75 and len(rows) == 3 * len(last)
    assert [(side, request["length"]) for side, request in fakes.asked[:3]] == [("exact", 64), ("stock", 64), ("stock", 512)]


def test_steps_of_sides_that_do_not_fit_together_follow_each_other(monkeypatch):
    """Sides that do not fit on a GPU together run one after the other, and are compared round by round all the same."""
    seconds = {"exact": iter([9.0, 1.0, 2.0, 3.0]), "stock": iter([9.0, 10.0, 20.0, 30.0])}

    def answer(side, length):
        return {
            "seconds": next(seconds[side]),
            "tokens": 1.0,
            "exact": side == "exact",
            "peak": 1.0,
            "rollout": 0.0,
            "train": None,
            "sync": None,
        }

    fakes = Fakes(monkeypatch, gpu_step, answer)
    monkeypatch.setattr(gpu, "large", lambda: False)
    rows = list(gpu_step.rows(tiny=False))
    assert [side for side, _ in fakes.asked] == ["exact"] * 4 + ["stock"] * 4
    step = {row.case.split(":")[0]: row for row in rows}["step"]
    assert (step.ours, step.stock, step.samples) == (2.0, 20.0, 3) and step.bits_equal == {"ours": True, "stock": False}


def test_steps_end_when_another_would_not_be_in_time(monkeypatch):
    monkeypatch.setattr(gpu_step, "MOST_SECONDS", 0)
    answer = {"seconds": 1.0, "tokens": 1.0, "exact": True, "peak": 1.0, "rollout": 0.0, "train": None, "sync": None}
    Fakes(monkeypatch, gpu_step, lambda side, length: answer)
    assert {row.samples for row in gpu_step.rows(tiny=True)} == {1}


def test_stock_trl_steps_with_a_colocated_engine(monkeypatch, tmp_path):
    """TRL's own trainer, from its construction to two steps, with an engine that draws at random in place of vLLM's."""
    generation = importlib.import_module("trl.generation.vllm_generation")
    made = fake_gpu.engine()
    monkeypatch.setattr(generation, "LLM", made)
    monkeypatch.setattr(generation, "is_vllm_available", lambda *_: True)
    for name in (
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "VLLM_ENABLE_V1_MULTIPROCESSING",
        "VLLM_USE_FLASHINFER_SAMPLER",
        "VLLM_NO_USAGE_STATS",
    ):
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)  # now, and what it was afterwards

    class Link:
        sent = []

        def requests(self):
            return iter([{"length": 3}, {"length": 8}])

        def send(self, **answer):
            self.sent.append(answer)

    path, link = shapes.build("tiny", tmp_path / "model", stops=5), Link()
    trainer = gpu_step._stock(path, str(tmp_path / "out"), gpu_step.SIZES["tiny"])
    trainer.add_callback(gpu_step._turns(link, trainer))
    with pytest.raises(SystemExit):
        trainer.train()
    assert made.arguments["kv_cache_memory_bytes"] == int(0.3 * 2**30) and made.arguments["gpu_memory_utilization"] == 0.01
    assert made.arguments["max_num_seqs"] == 16 and made.arguments["distributed_executor_backend"] == "external_launcher"
    assert made.limits == [3, 8] and made.loaded == 2 * len(list(trainer.model.named_parameters()))
    assert [answer["exact"] for answer in link.sent] == [False, False] and all(answer["rollout"] > 0 for answer in link.sent)
