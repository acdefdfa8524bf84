"""The GPU benchmarks' own code, on a CPU that stands in for the GPU: they run, and their rows have what is promised."""

import importlib
import json
import sys

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


class Workers:
    """In place of processes: what each would answer."""

    def __init__(self, monkeypatch, module, answer):
        self.asked, self.closed = [], []
        workers = self

        class Worker:
            def __init__(self, name, side, *arguments):
                assert name == module.__name__
                self.side = side

            def ask(self, **request):
                workers.asked.append((self.side, request))
                return answer(self.side, **request)

            def close(self):
                workers.closed.append(self.side)

        monkeypatch.setattr(module, "Worker", Worker)
        monkeypatch.setattr(models, "build", lambda *_, **__: "path")


def test_sampler_rows_are_rates_with_a_target_and_a_peer(monkeypatch):
    def answer(side, what, batch=None):
        if what == "alone":
            return {"differing": 0 if side == "exact" else 5, "tokens": 16, "requests": 2, "batch": 4}
        return {"tokens": 8 * batch, "seconds": {"exact": 2.0, "stock": 1.0, "peer": 4.0}[side]}

    workers = Workers(monkeypatch, sampler, answer)
    rows = list(sampler.rows(tiny=False))
    rates = {row.case: row for row in rows if row.unit == "tok/s"}
    ours, peer = rates["ours: qwen3-1.7b, batch 16"], rates["VLLM_BATCH_INVARIANT=1: qwen3-1.7b, batch 16"]
    assert (ours.bench, ours.ratio, ours.target, ours.bits_equal) == ("sampler", 0.5, 0.95, {"ours": True, "stock": False})
    assert (peer.bench, peer.ratio, peer.target, peer.bits_equal["ours"]) == ("peer", 0.25, None, False)
    assert len(rates) == 8 and [row.ours for row in rows[:2]] == [0, 5] and sorted(workers.closed) == sorted(sampler.NAMES)
    orders = ["".join(side[0] for side, request in workers.asked if request.get("batch") == 1)]
    assert orders[0].startswith("pseespp") or "esppse" in orders[0], "the engines do not take turns"


@pytest.mark.parametrize("batchy", [False, True])
def test_a_sampler_that_depends_on_its_batch_is_counted(batchy):
    class Engine:
        vocabulary = 50

        def generate(self, prompts, length, seeds):
            shift = len(prompts) if batchy else 0
            return [Completion([1] * length, [-1.0 - shift] * length) for _ in prompts]

        def forget(self):
            pass

    class Link:
        sent = []

        def requests(self):
            return iter([{"what": "alone"}, {"what": "generate", "batch": 3}])

        def send(self, **answer):
            self.sent.append(answer)

    link = Link()
    link.sent = []
    sampler.serve(link, Engine(), "tiny")
    assert link.sent[0] == {"differing": 16 if batchy else 0, "tokens": 16, "requests": 2, "batch": 4}
    assert link.sent[1]["tokens"] == 24


def test_trainer_rows_count_real_tokens_and_memory(monkeypatch):
    def answer(side, what, case=None):
        if what == "memory":
            return {"peak": 900.0 if side == "exact" else 1000.0}
        if what == "bits":
            return {"same": side == "exact"}
        return {"seconds": 1.0 if side == "exact" else 2.0, "tokens": 100}

    Workers(monkeypatch, gpu_trainer, answer)
    rows = list(gpu_trainer.rows(tiny=False))
    assert [row.target for row in rows] == [1.0, None, 1.25, None, 1.0] * 2
    assert {row.ratio for row in rows if row.unit == "tok/s"} == {2.0} and rows[4].ratio == 0.9
    assert rows[0].bits_equal == {"ours": True, "stock": False}


def test_step_rows_are_seconds_and_exact_only_if_every_step_was(monkeypatch):
    exact = iter([True, True, True, False])  # the warm-up and three steps

    def answer(side):
        mine = next(exact) if side == "exact" else False
        return {"seconds": 8.0 if side == "exact" else 10.0, "tokens": 1e5 if side == "exact" else 2e5, "exact": mine,
                "peak": 1.0, "rollout": 1.0, "train": 1.0, "sync": 0.0}  # fmt: skip

    workers = Workers(monkeypatch, gpu_step, answer)
    step, each, _ = gpu_step.rows(tiny=False)
    assert (step.ratio, step.target, step.bits_equal) == (0.8, 0.85, {"ours": False, "stock": False})
    assert each.ratio == 1.6 and "100,000 and 200,000 tokens" in step.case
    assert [side for side, _ in workers.asked[:2]] == ["stock", "exact"]


def test_parity_puts_both_processes_of_a_model_together(monkeypatch):
    def answer(side, what):
        return {"sampler against trainer, micro-batch 1, T = 1.0": (0 if side == "exact" else 7, 8)}

    Workers(monkeypatch, gpu_parity, answer)
    rows = list(gpu_parity.rows(tiny=False))
    assert [row.model for row in rows] == [*gpu_parity.SMALL, *gpu_parity.LARGE]
    assert {(row.mismatched, row.tokens, row.control_mismatched) for row in rows} == {(0, 8, 7)}


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
        raise RuntimeError("out of memory")

    (tmp_path / "x.json").write_text("an earlier result")
    with pytest.raises(RuntimeError, match="out of memory"):
        measure.write(tmp_path / "x.json", rows(), tiny=True)
    assert len(json.loads((tmp_path / "x.json.partial").read_text())["rows"]) == 1
    assert (tmp_path / "x.json").read_text() == "an earlier result"


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
    assert "--tokens: only with parity, on a GPU" in refused("step", "--tokens", "9", machine="cpu")
    assert "invalid choice: 'gemm'" in refused("gemm", machine="cpu")


def test_parity_gets_the_number_of_tokens(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "name", lambda: "h200")
    asked = []
    monkeypatch.setattr(gpu_parity, "rows", lambda tiny, tokens=None: asked.append((tiny, tokens)) or [])
    __main__.main(["parity", "--tiny", "--tokens", "99", "--out", str(tmp_path)])
    __main__.main(["parity", "--out", str(tmp_path)])
    assert asked == [(True, 99), (False, None)]


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


def test_the_readme_gets_a_matrix_and_whether_targets_are_met(results, tmp_path):
    readme = tmp_path / "README.md"
    names = ("linear", "norms", "sampler")
    readme.write_text("a\n" + "".join(f"<!-- h200/{name} -->\nstale\n<!-- end -->\n" for name in names) + "z\n")
    report.update(readme, results)
    text = readme.read_text()
    assert "| m qkv | **1.20** | 1.00 |" in text and "| geometric mean of 1 shapes | 1.00 |  |" in text
    assert "| rms_norm, m | 0.50 |" in text and "2 of 3 meet their target" in text and "stale" not in text
    assert "| ours: m, batch 1 | 90 | 100 | tok/s | **0.90** | ≥ 0.92 | no | yes | no |" in text
    assert text.startswith("a\n") and text.endswith("z\n")
    report.update(readme, results)
    assert readme.read_text() == text


def test_the_figure_is_drawn_or_said_not_to_be(results, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    report.figure(results)
    assert "not drawn, matplotlib is not installed" in capsys.readouterr().out
    assert report._bar(vars(Row("sampler", "ours: m; x", 90, 100, "tok/s", 0.8, 0.92, {}, 3, 0))) == ("m", 1.25, True)
