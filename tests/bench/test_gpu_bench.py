"""The GPU benchmarks' own code, on a CPU that stands in for the GPU: they run, and their rows have what is promised."""

import contextlib
import importlib
import json
from concurrent.futures import ThreadPoolExecutor
from xml.etree import ElementTree

import pytest
import torch

from rlinvariant import ops
from rlinvariant.bench import (
    __main__,
    attention,
    gpu,
    gpu_parity,
    gpu_step,
    gpu_trainer,
    linear,
    logprob,
    measure,
    models,
    norms,
    report,
    sampler,
    tune,
)
from rlinvariant.bench.compare import Parity, against_trainer, differing
from rlinvariant.bench.measure import Row
from rlinvariant.rollout import Completion
from tests.bench import fake_gpu


@pytest.fixture
def on_cpu(monkeypatch):
    fake_gpu.install(monkeypatch)
    with fake_gpu.OnCpu():
        yield


def test_tune_writes_a_tile_for_every_row_count(on_cpu, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(tune, "shapes", lambda tiny: [(64, 128), (32, 96)])
    monkeypatch.setattr(tune, "_compile", lambda some: [""] * len(some))
    tune.run(tmp_path / "tiles.json", tiny=False)
    content = json.loads((tmp_path / "tiles.json").read_text())
    assert set(content["tiles"]) == {"64x128", "32x96"}
    assert all(set(by_rows) == set(map(str, tune.ROWS)) for by_rows in content["tiles"].values())
    assert "packages" in content["environment"]
    assert "BITS DIFFER" not in capsys.readouterr().out


def test_tune_leaves_out_a_tile_whose_bits_differ_and_fails(on_cpu, monkeypatch, tmp_path):
    def product(tile, x, w):
        return ops.linear(x, w) if tile is None else ops.linear(x, w) + 1

    monkeypatch.setattr(tune, "shapes", lambda tiny: [(64, 128)])
    monkeypatch.setattr(tune, "_compile", lambda some: [""] * len(some))
    monkeypatch.setattr(tune, "_product", product)
    with pytest.raises(SystemExit, match="BITS DIFFER"):
        tune.run(tmp_path / "tiles.json", tiny=False)
    found = json.loads((tmp_path / "tiles.json").read_text())["tiles"]["64x128"]
    assert found == {"16": [128, 128, 64, 8, 3], "32": None, "64": None, "128": None, "256": None}


def test_candidates_fit_into_a_multiprocessor():
    for rows in tune.ROWS:
        some = tune.candidates(rows)
        assert 20 <= len(some) <= 80 and len(set(some)) == len(some)
        for bn, bm, bk, warps, stages in some:
            assert (bn + bm) * bk * 2 * stages <= tune.SHARED and warps in (1, 2, 4, 8) and 3 <= stages <= 6
            assert bn * bm / (32 * warps) <= 256, "more accumulators than a thread has registers"


def test_linear_has_a_row_for_each_shape_and_a_mean(on_cpu):
    rows = list(linear.rows(tiny=True))
    assert len(rows) == 6 and all(r.bench == "linear" and r.ours > 0 and r.stock > 0 for r in rows)
    assert {r.target for r in rows} == {linear.FEW, linear.MANY, linear.MEAN}
    assert all(r.bits_equal["ours"] for r in rows)


def _names(rows):
    return {row.case.split(",")[0].split(" ")[0] for row in rows}


def _invariant(rows):
    return all(row.bits_equal["ours"] for row in rows)


def test_norms_are_compared_with_kernels_that_write_in_place(on_cpu, monkeypatch):
    monkeypatch.setattr(norms, "_theirs", lambda: fake_gpu.Vllm)
    rows = list(norms.rows(tiny=True))
    assert (
        _names(rows) == {"rms_norm", "add_rms_norm", "rope", "qk_norm_rope", "swiglu"} and len(rows) == 12 and _invariant(rows)
    )


def test_a_stock_kernel_that_looks_at_the_batch_is_found_out(on_cpu, monkeypatch):
    class Batchy(fake_gpu.Vllm):
        @staticmethod
        def rms_norm(out, x, w, eps):
            fake_gpu.Vllm.rms_norm(out, x, w, eps if len(x) < 40 else 1e-3)

    monkeypatch.setattr(norms, "_theirs", lambda: Batchy)
    found = {row.case: row.bits_equal["stock"] for row in norms.rows(tiny=True)}
    assert not found["rms_norm, tiny, 40 x 256"] and found["add_rms_norm, tiny, 40 x 256"]


def test_attention_compares_paged_steps_and_packed_rows(on_cpu, monkeypatch):
    fake_gpu.install_attention(monkeypatch, attention)
    rows = list(attention.rows(tiny=True))
    assert _names(rows) == {"prefill", "decode", "packed"} and _invariant(rows)
    assert {row.target for row in rows if row.case.startswith("decode") and "up to" not in row.case} == {1.02}


def test_logprob_compares_the_head_with_two_others_and_sample(on_cpu, monkeypatch):
    monkeypatch.setattr(logprob, "_vllm", lambda: fake_gpu.Vllm)
    rows = list(logprob.rows(tiny=True))
    assert _names(rows) == {"token_logprobs", "sample"} and len(rows) == 6 and _invariant(rows)


@pytest.mark.parametrize("name", [n for n in models.SHAPES if n != "tiny"])
def test_configurations_have_the_shapes_that_are_tuned_for(name):
    from transformers import AutoModelForCausalLM

    shape, found = models.SHAPES[name], set()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(models.config(name), dtype=torch.bfloat16)
    layer = model.model.layers[0]
    weights = {n.rpartition(".")[0].rpartition(".")[2]: tuple(p.shape) for n, p in layer.named_parameters() if p.dim() == 2}
    qkv = sum(weights[f"{x}_proj"][0] for x in "qkv")
    assert (qkv, shape.hidden) == shape.linears["qkv"] and weights["o_proj"] == shape.linears["o"]
    assert (2 * weights["gate_proj"][0], shape.hidden) == shape.linears["gate_up"]
    assert weights["down_proj"] == shape.linears["down"] and tuple(model.lm_head.weight.shape) == shape.linears["lm_head"]
    assert len(model.model.layers) == shape.layers and model.config.tie_word_embeddings == shape.tied
    found.add(model.config.rope_parameters["rope_theta"])
    assert found == {models.ROPE[shape.kind]["rope_theta"]}


def test_a_model_is_built_once_and_its_biases_are_not_zero(tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    monkeypatch.setitem(models.SHAPES, "small", models.Shape(64, 96, 1, 2, 1, 32, 128, True, "qwen2"))
    path = models.build("small", tmp_path / "m")
    before = (tmp_path / "m" / "model.safetensors").stat().st_mtime_ns
    assert models.build("small", tmp_path / "m") == path
    assert (tmp_path / "m" / "model.safetensors").stat().st_mtime_ns == before
    model = AutoModelForCausalLM.from_pretrained(path)
    assert model.dtype == torch.bfloat16 and model.model.layers[0].self_attn.q_proj.bias.abs().min() > 0
    assert model.model.norm.weight.std() > 0


def test_rotation_gives_every_input_its_turn():
    assert gpu.copies(gpu.COLD) == 1 and gpu.copies(gpu.COLD - 1) == 2 and gpu.copies(8 << 20) == 25
    calls = [lambda i=i: i for i in range(7)]
    turned = [call() for call in gpu.rotate(calls)]
    assert len(turned) == gpu.LAUNCHES and {turned.count(i) for i in range(7)} == {2, 3}


class Fakes:
    """In place of processes: what each would answer; `dead` ones end when they are first asked."""

    def __init__(self, monkeypatch, module, answer, dead=()):
        self.asked, self.closed = [], []
        fakes = self

        class Worker:
            def __init__(self, name, side, *arguments):
                assert name == module.__name__
                self.side = side

            def ask(self, **request):
                self.send(**request)
                return self.answer()

            def send(self, **request):
                fakes.asked.append((self.side, request))
                self.request = request

            def answer(self):
                if self.side in dead:
                    raise measure.WorkerEnded(f"{self.side} ended with exit code 9\nValueError: no memory")
                return answer(self.side, **self.request)

            def ready(self, seconds):
                return True

            def no_more(self):
                pass

            def close(self):
                fakes.closed.append(self.side)

        monkeypatch.setattr(module, "Worker", Worker)
        monkeypatch.setattr(models, "build", lambda *_, **__: "path")


def _engine(side, what, batch=None, more=None):
    if what == "start":
        return {"seconds": 50.0 if side == "exact" else 100.0}
    if what == "alone":
        return {"differing": 0 if side == "exact" else 5, "tokens": 16, "requests": 2, "batch": 4}
    return {"tokens": 8 * batch, "seconds": {"exact": 2.5 if more else 2.0, "stock": 1.0, "peer": 4.0}[side]}


def test_sampler_rows_are_rates_with_a_target_and_a_peer(monkeypatch):
    fakes = Fakes(monkeypatch, sampler, _engine)
    rows = list(sampler.rows(tiny=False))
    rates = {row.case: row for row in rows if row.unit == "tok/s"}
    ours, peer = rates["ours: qwen3-1.7b, batch 16"], rates["VLLM_BATCH_INVARIANT=1: qwen3-1.7b, batch 16"]
    assert (ours.bench, ours.ratio, ours.target, ours.bits_equal) == ("sampler", 0.5, 0.95, {"ours": True, "stock": False})
    assert (peer.bench, peer.ratio, peer.target, peer.bits_equal["ours"]) == ("peer", 0.25, None, False)
    assert (ours.samples, peer.samples) == (sampler.ROUNDS, sampler.PEER_ROUNDS)
    reported = [row for row in rates.values() if "vLLM's own report" in row.case]
    assert {(row.ratio, row.target) for row in reported} == {(0.4, None)} and len(reported) == 4
    assert [(row.ours, row.unit) for row in rows[:4]] == [(50, "s"), (100, "s"), (0, "of 16"), (5, "of 16")]
    assert len(rates) == 12 and sorted(fakes.closed) == sorted(sampler.ENGINES)
    order = [side[0] + "r" * bool(request["more"]) for side, request in fakes.asked if request.get("batch") == 1]
    assert order == ["p", "s", "er", "e", "e", "er", "s", "s", "er", "e"], "the engines do not take turns"


@pytest.mark.parametrize("dead", ["peer", "stock", "exact"])
def test_an_engine_that_ends_costs_its_own_rows_alone(monkeypatch, tmp_path, dead):
    Fakes(monkeypatch, sampler, _engine, dead=[dead])
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
    sampler.serve(link, Engine(), "tiny", 7.0)
    assert link.sent[0] == {"seconds": 7.0}
    assert link.sent[1] == {"differing": 16 if batchy else 0, "tokens": 16, "requests": 2, "batch": 4}
    assert link.sent[2]["tokens"] == link.sent[3]["tokens"] == 24 and reported == [False] * 4 + [True]


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
        return {"seconds": 8.0 if side == "exact" else 10.0, "tokens": 1e5 if side == "exact" else 2e5, "exact": mine,
                "peak": 1.0, "rollout": 2.0, "train": None, "sync": None}  # fmt: skip

    fakes = Fakes(monkeypatch, gpu_step, answer)
    monkeypatch.setattr(gpu, "large", lambda: True)
    rows = list(gpu_step.rows(tiny=False))
    last = {row.case.split(":")[0]: row for row in rows}
    step = last["step"]
    assert (step.ratio, step.target, step.samples) == (0.8, 0.85, 3) and step.bits_equal == {"ours": False, "stock": False}
    assert last["step, for each million sampled tokens"].ratio == 1.6 and last["sampled tokens of a step"].ours == 1e5
    assert last["all but the rollout"].ratio == 0.75 and len(rows) == 3 * len(last)
    assert [(side, request["length"]) for side, request in fakes.asked[:3]] == [("exact", 64), ("stock", 64), ("stock", 512)]


def test_steps_of_sides_that_do_not_fit_together_follow_each_other(monkeypatch):
    """And are compared round by round all the same."""
    seconds = {"exact": iter([9.0, 1.0, 2.0, 3.0]), "stock": iter([9.0, 10.0, 20.0, 30.0])}

    def answer(side, length):
        return {"seconds": next(seconds[side]), "tokens": 1.0, "exact": side == "exact", "peak": 1.0, "rollout": 0.0,
                "train": None, "sync": None}  # fmt: skip

    fakes = Fakes(monkeypatch, gpu_step, answer)
    monkeypatch.setattr(gpu, "large", lambda: False)
    rows = list(gpu_step.rows(tiny=False))
    assert [side for side, _ in fakes.asked] == ["exact"] * 4 + ["stock"] * 4
    step = {row.case.split(":")[0]: row for row in rows}["step"]
    assert (step.ours, step.stock, step.samples) == (2.0, 20.0, 3) and step.bits_equal == {"ours": True, "stock": False}


def test_steps_end_when_another_would_not_be_in_time(monkeypatch):
    monkeypatch.setattr(gpu_step, "SECONDS", 0)
    answer = {"seconds": 1.0, "tokens": 1.0, "exact": True, "peak": 1.0, "rollout": 0.0, "train": None, "sync": None}
    Fakes(monkeypatch, gpu_step, lambda side, length: answer)
    assert {row.samples for row in gpu_step.rows(tiny=True)} == {1}


def test_stock_trl_steps_with_a_colocated_engine(monkeypatch, tmp_path):
    """TRL's own trainer, from its construction to two steps, with an engine that draws at random in place of vLLM's."""
    generation = importlib.import_module("trl.generation.vllm_generation")
    made = fake_gpu.engine()
    monkeypatch.setattr(generation, "LLM", made)
    monkeypatch.setattr(generation, "is_vllm_available", lambda *_: True)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "VLLM_ENABLE_V1_MULTIPROCESSING",
                 "VLLM_USE_FLASHINFER_SAMPLER", "VLLM_NO_USAGE_STATS"):  # fmt: skip
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)  # now, and what it was afterwards

    class Link:
        sent = []

        def requests(self):
            return iter([{"length": 3}, {"length": 8}])

        def send(self, **answer):
            self.sent.append(answer)

    path, link = models.build("tiny", tmp_path / "model", stops=5), Link()
    settings = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "max_completion_length": 8, "max_steps": 9}
    trainer = gpu_step._stock(path, str(tmp_path / "out"), settings, kv_gib=0.5)
    trainer.add_callback(gpu_step._turns(link, trainer))
    with pytest.raises(SystemExit):
        trainer.train()
    assert made.arguments["kv_cache_memory_bytes"] == 2**29 and made.arguments["gpu_memory_utilization"] == 0.01
    assert made.arguments["max_num_seqs"] == 16 and made.arguments["distributed_executor_backend"] == "external_launcher"
    assert made.limits == [3, 8] and made.loaded == 2 * len(list(trainer.model.named_parameters()))
    assert [answer["exact"] for answer in link.sent] == [False, False] and all(answer["rollout"] > 0 for answer in link.sent)


def test_parity_puts_both_processes_of_a_model_together(monkeypatch):
    def answer(side, what):
        return {"sampler against trainer, micro-batch 1, T = 1.0": (0 if side == "exact" else 7, 8)}

    Fakes(monkeypatch, gpu_parity, answer)
    rows = list(gpu_parity.rows(tiny=False))
    assert [row.model for row in rows] == [*gpu_parity.SMALL, *gpu_parity.LARGE]
    assert {(row.mismatched, row.tokens, row.control_mismatched) for row in rows} == {(0, 8, 7)}


def test_a_model_whose_process_ends_costs_its_own_rows_alone(monkeypatch, tmp_path):
    ended = iter(gpu_parity.SMALL[:1] * 2)

    def answer(side, what):
        if next(ended, None):
            raise measure.WorkerEnded("gpu_parity ended with exit code 1\nKeyError: 'x'")
        return {"sampler against trainer, micro-batch 1, T = 1.0": (0, 8)}

    Fakes(monkeypatch, gpu_parity, answer)
    monkeypatch.setattr(gpu_parity, "ThreadPoolExecutor", lambda _: ThreadPoolExecutor(1))  # the first model's come first
    with pytest.raises(SystemExit, match="not measured: .*KeyError"):
        measure.write(tmp_path / "parity.json", gpu_parity.rows(tiny=False), tiny=False)
    rows = json.loads((tmp_path / "parity.json").read_text())["rows"]
    assert [row.get("case", row.get("model")) for row in rows] == [*gpu_parity.SMALL, *gpu_parity.LARGE]
    assert [("missing" in row) for row in rows] == [True, False, False, False, False]
    assert f"| {gpu_parity.SMALL[0]} | not measured: " in report.markdown(tmp_path)


def test_a_trainer_that_scores_other_tokens_than_were_sampled_is_refused():
    class Model(torch.nn.Linear):
        def forward(self, *args, token_ids, **kwargs):
            return torch.zeros(len(token_ids) - 1), None

    completion = Completion([1, 2], [-1.0, -1.0])
    with pytest.raises(ValueError, match="1 log-probs were computed for 2 sampled tokens"):
        against_trainer(Model(1, 1), [[3, 4]], [completion], 1.0, 1)


def test_completions_differ_from_where_they_part():
    a = Completion([1, 2, 3, 4], [-1.0, -1.0, -1.0, -1.0])
    assert differing(a, a) == 0
    assert differing(a, Completion([1, 2, 3, 4], [-1.0, -2.0, -1.0, -1.0])) == 1
    assert differing(a, Completion([1, 9, 3, 4], [-1.0, -1.0, -1.0, -1.0])) == 3


@pytest.mark.parametrize(
    ("row", "fails"),
    [
        (Row("linear", "x", 1, 1, "us", 1, None, {"ours": True, "stock": False}, 1, 0), False),
        (Row("linear", "x", 1, 1, "us", 1, None, {"ours": False, "stock": True}, 1, 0), True),
        (Row("peer", "x", 1, 1, "us", 1, None, {"ours": False, "stock": True}, 1, 0), False),
        (Parity("parity", "m", "bfloat16", "x", 8, 0, "c", 8), False),
        (Parity("parity", "m", "bfloat16", "x", 8, 1, "c", 8), True),
    ],
)
def test_a_difference_is_written_down_and_fails(tmp_path, row, fails):
    if fails:
        with pytest.raises(SystemExit, match="BITS DIFFER in 1 rows: "):
            measure.write(tmp_path / "x.json", [row], tiny=True)
    else:
        measure.write(tmp_path / "x.json", [row], tiny=True)
    assert len(json.loads((tmp_path / "x.json").read_text())["rows"]) == 1


def test_what_was_measured_before_a_failure_is_kept(tmp_path):
    def rows():
        yield Row("linear", "x", 1, 1, "us", 1, None, {"ours": True, "stock": True}, 1, 0)
        yield Row("linear", "y", 1, 1, "us", 1, None, {"ours": True, "stock": True}, 1, 0)
        yield Row("linear", "x", 2, 1, "us", 2, None, {"ours": True, "stock": True}, 2, 0)
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        measure.write(tmp_path / "x.json", rows(), tiny=True)
    content = json.loads((tmp_path / "x.json").read_text())
    assert [(row["case"], row["samples"]) for row in content["rows"]] == [("x", 2), ("y", 1)] and content["complete"] is False
    assert list(tmp_path.iterdir()) == [tmp_path / "x.json"]


@pytest.mark.parametrize("code", ["raise ValueError('no memory')", "import os; os._exit(7)"])
def test_a_worker_that_ends_is_named_with_its_exit_code_and_log(tmp_path, monkeypatch, code, capsys):
    early = "import sys; print('OSError: from a child', file=sys.stderr); [print(i, file=sys.stderr) for i in range(99)]"
    (tmp_path / "ends.py").write_text(f"{early}\n{code}\n")
    (tmp_path / "echoes.py").write_text("import sys\nfor line in sys.stdin:\n    print(line, end='', flush=True)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with measure.Workers({"a": measure.Worker("ends", "a", "/a/path"), "b": measure.Worker("echoes")}) as workers:
        assert workers.ask(["a", "b"], x=1) == {"b": {"x": 1}} == workers.ask(["a", "b"], together=True, x=1)
        alive = workers.alive["b"]
    printed = capsys.readouterr().out
    assert ("ends a ended with exit code 7" if "exit" in code else "ends a ended with exit code 1") in printed
    assert "OSError: from a child" in printed and "98" in printed and "\n50\n" not in printed
    assert ("OSError: from a child" if "exit" in code else "ValueError: no memory") in workers.missing["a"]
    assert alive.process.poll() == 0


def test_a_worker_that_does_not_end_is_ended(tmp_path, monkeypatch):
    (tmp_path / "stays.py").write_text("import time\ntime.sleep(600)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    worker = measure.Worker("stays")
    worker.close(seconds=0.2)
    assert worker.process.returncode == -9


@pytest.mark.parametrize("name", list(__main__.NAMES))
def test_every_benchmark_can_be_imported(name):
    for module in filter(None, __main__.NAMES[name][:2]):
        bench = importlib.import_module(f"rlinvariant.bench.{module}")
        assert any(callable(getattr(bench, entry, None)) for entry in ("rows", "run", "main"))


def test_each_machine_has_its_benchmarks(monkeypatch, capsys, tmp_path):
    def refused(*argv, machine):
        monkeypatch.setattr(gpu, "name", lambda: machine)
        with pytest.raises(SystemExit, match="2"):
            __main__.main([*argv, "--out", str(tmp_path)])
        return capsys.readouterr().err

    assert "linear: not for this machine (cpu); here: ops, trainer" in refused("linear", machine="cpu")
    assert "ops: not for this machine (h200); here: linear, norms" in refused("ops", machine="h200")
    assert "--tokens: only with families, and with parity on a GPU" in refused("step", "--tokens", "9", machine="cpu")
    assert "invalid choice: 'gemm'" in refused("gemm", machine="cpu")


def test_parity_gets_the_number_of_tokens(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "name", lambda: "h200")
    asked = []
    monkeypatch.setattr(gpu_parity, "soak", lambda file, tokens, tiny: asked.append((file.name, tokens, tiny)))
    monkeypatch.setattr(gpu_parity, "rows", lambda tiny: asked.append(tiny) or [])
    __main__.main(["parity", "--tiny", "--tokens", "99", "--out", str(tmp_path)])
    __main__.main(["parity", "--out", str(tmp_path)])
    assert asked == [("parity_soak.json", 99, True), False]


def _rollouts(mismatched=0, control=9):
    def answer(side, seed, temperature):
        return {"tokens": 100, "sampled": 100, "mismatched": control if side == "control" else mismatched}

    return answer


def test_a_soak_adds_up_over_runs_and_has_one_control(monkeypatch, tmp_path):
    file = tmp_path / "parity_soak.json"
    fakes = Fakes(monkeypatch, gpu_parity, _rollouts())
    gpu_parity.soak(file, 700, tiny=True)
    content = json.loads(file.read_text())
    assert content["tokens"] >= 700 and content["mismatched"] == 0 and content["coverage"] == 1 and len(content["runs"]) == 1
    assert content["control"]["mismatched"] == 9 and [side for side, _ in fakes.asked].count("control") == 1
    gpu_parity.soak(file, 300, tiny=True)
    again = json.loads(file.read_text())
    assert again["tokens"] >= content["tokens"] + 300 and again["runs"][0] == content["runs"][0] and len(again["runs"]) == 2
    assert [side for side, _ in fakes.asked].count("control") == 1
    assert len({request["seed"] for _, request in fakes.asked}) == len(fakes.asked)
    assert {request["temperature"] for _, request in fakes.asked} == {1.0, 0.7}
    assert f"{again['tokens']:,} | 1 | 9 / 100 |" in report.markdown(tmp_path)


@pytest.mark.parametrize(
    ("answer", "dead", "says"),
    [
        (_rollouts(mismatched=1), [], "mismatched of"),
        (_rollouts(control=0), [], "0 mismatched of"),
        (_rollouts(), ["exact-1", "exact-2"], "0 mismatched of 0 "),
        (_rollouts(), ["control"], "control: None"),
    ],
)
def test_a_soak_that_proves_nothing_fails(monkeypatch, tmp_path, answer, dead, says):
    Fakes(monkeypatch, gpu_parity, answer, dead)
    with pytest.raises(SystemExit, match=says):
        gpu_parity.soak(tmp_path / "parity_soak.json", 300, tiny=True)
    assert set(json.loads((tmp_path / "parity_soak.json").read_text())["runs"][0]["missing"]) == set(dead)


@pytest.mark.parametrize("dead", [[], ["control"]])
def test_a_soak_has_its_control_first(monkeypatch, tmp_path, dead):
    """And alone: on a small GPU two engines fit, a third does not."""
    fakes = Fakes(monkeypatch, gpu_parity, _rollouts(), dead)
    monkeypatch.setattr(gpu, "large", lambda: False)
    with pytest.raises(SystemExit, match="control: None") if dead else contextlib.nullcontext():
        gpu_parity.soak(tmp_path / "parity_soak.json", 300, tiny=False)
    run = json.loads((tmp_path / "parity_soak.json").read_text())["runs"][0]
    assert [side for side, _ in fakes.asked].index("control") == 0
    assert [side for side, _ in fakes.asked].count("control") == 1 and list(run["missing"]) == dead
    assert run["rollouts"] == len(fakes.asked) - 1 and run["tokens"] >= 300


def test_one_half_of_a_soak_goes_on_without_the_other(monkeypatch, tmp_path):
    Fakes(monkeypatch, gpu_parity, _rollouts(), ["exact-1"])
    gpu_parity.soak(tmp_path / "parity_soak.json", 300, tiny=True)
    assert json.loads((tmp_path / "parity_soak.json").read_text())["tokens"] == 300


@pytest.fixture
def results(tmp_path):
    directory = tmp_path / "h200"
    directory.mkdir()
    environment = {"cpu": {"model": "M", "cores": 2}, "packages": {"torch": "2.11"}, "gpu": {"name": "NVIDIA H200"}}
    bits = {"ours": True, "stock": False}

    def write(name, *rows):
        (directory / f"{name}.json").write_text(json.dumps({"environment": environment, "rows": [vars(r) for r in rows]}))

    write(
        "linear",
        Row("linear", "m qkv, 8 x 64 -> 32", 2, 1, "us", 1.2, 1.15, bits, 3, 0),
        Row("linear", "m qkv, 64 x 64 -> 32", 1, 1, "us", 1.004, 1.0, bits, 3, 0),
        Row("linear", "m o, 64 x 64 -> 16", 1, 1, "us", 1.1, 1.0, bits, 3, 0),
        Row("linear", "geometric mean of 1 shapes, 8 rows", 2, 1, "us", 1.0, 1.05, bits, 3, 0),
    )
    write("norms", Row("norms", "rms_norm, m, 16 x 64", 1, 2, "us", 0.5, 1.0, bits, 3, 0))
    write(
        "sampler",
        Row("sampler", "ours: m, batch 1", 90, 100, "tok/s", 0.9, 0.92, bits, 3, 0),
        Row("peer", "VLLM_BATCH_INVARIANT=1: m, batch 1", 30, 100, "tok/s", 0.3, None, bits, 3, 0),
    )
    (directory / "linear_tiles.json").write_text('{"tiles": {}}')
    return directory


def test_the_readme_gets_a_line_for_each_comparison_and_whether_its_target_is_met(results, tmp_path):
    readme = tmp_path / "README.md"
    names = ("linear", "norms", "sampler", "trainer")
    readme.write_text(
        "a\n" + "".join(f"<!-- h200/{name} -->\nstale\n<!-- end -->\n" for name in names) + "<!-- x/y -->\nz\n<!-- end -->"
    )
    report.update(readme, [results])
    text = readme.read_text()
    assert "| 8 rows, each shape | 2 / 1 us | **1.20** | ≤ 1.15 | no | yes | no |" in text
    assert "| 64 rows, each shape | 2 sizes | **1.05** (1.00 to 1.10) | ≤ 1.0 | 1 of 2 | yes | no |" in text
    assert "| rms_norm | 1 / 2 us | **0.50** |" in text and text.count("stale") == 0
    assert "| ours: m, batch 1 | 90 / 100 tok/s | **0.90** | ≥ 0.92 | no | yes | no |" in text
    assert "<!-- h200/trainer -->\nnot measured yet\n<!-- end -->" in text
    assert text.startswith("a\n") and text.endswith("<!-- x/y -->\nz\n<!-- end -->")
    report.update(readme, [results])
    assert readme.read_text() == text


def test_the_figure_has_a_bar_for_each_row_with_a_target_and_each_peer(results):
    report.figure(results)
    drawn = ElementTree.parse(results / "cost.svg").getroot()
    space = "{http://www.w3.org/2000/svg}"
    bars = [rect for rect in drawn.iter(f"{space}rect") if rect.get("x")]
    assert [bar.get("fill") for bar in bars] == [report.OURS, report.THEIRS]
    widths = [float(bar.get("width", 0)) for bar in bars]
    assert widths[1] / widths[0] == pytest.approx(0.9 / 0.3, rel=0.01)
    assert [text.text for text in drawn.iter(f"{space}text")][:2] == ["m, batch 1", "1.11"]
    assert report._bar(vars(Row("sampler", "ours: m; x", 90, 100, "tok/s", 0.8, 0.92, {}, 3, 0))) == ("m", 1.25, True)


def test_nothing_is_drawn_of_what_was_not_measured(results):
    (results / "sampler.json").unlink()
    report.figure(results)
    assert not (results / "cost.svg").exists()
