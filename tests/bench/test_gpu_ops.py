"""The GPU benchmarks of ops, on a CPU that stands in for the GPU: they run, and their rows have what is promised."""

import json

import pytest
import torch

from rlinvariant import ops
from rlinvariant.bench import attention, gpu, linear, logprob, norms, tune
from rlinvariant.models import shapes
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
    assert all(set(by_rows) == set(map(str, tune.ROW_COUNTS)) for by_rows in content["tiles"].values())
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
    for rows in tune.ROW_COUNTS:
        some = tune.candidates(rows)
        assert 20 <= len(some) <= 80 and len(set(some)) == len(some)
        for bn, bm, bk, warps, stages in some:
            assert (bn + bm) * bk * 2 * stages <= tune.SHARED_MEMORY_BYTES and warps in (1, 2, 4, 8) and 3 <= stages <= 6
            assert bn * bm / (32 * warps) <= 256, "more accumulators than a thread has registers"


@pytest.mark.slow
def test_linear_has_a_row_for_each_shape_and_a_mean(on_cpu):
    rows = list(linear.rows(tiny=True))
    assert len(rows) == 6 and all(r.bench == "linear" and r.ours > 0 and r.stock > 0 for r in rows)
    assert {r.target for r in rows} == {linear.FEW_ROWS_TARGET, linear.MANY_ROWS_TARGET, linear.MEAN_TARGET}
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


@pytest.mark.slow
def test_attention_compares_paged_steps_and_packed_rows(on_cpu, monkeypatch):
    fake_gpu.install_attention(monkeypatch, attention)
    rows = list(attention.rows(tiny=True))
    assert _names(rows) == {"prefill", "decode", "our", "packed"} and _invariant(rows)
    assert {row.target for row in rows if row.case.startswith("decode") and "up to" not in row.case} == {1.02}
    own = {row.case.partition(",")[0]: row.target for row in rows if row.case.startswith("our own") and "up to" not in row.case}
    several = {"our own: decode 4 at 96": 1.05, "our own: decode 4 at 96 in a window of 20": 1.1}
    assert own == {**several, "our own: prefill 2 x 40": 1.4}


def test_logprob_compares_the_head_with_two_others_and_sample(on_cpu, monkeypatch):
    monkeypatch.setattr(logprob, "_vllm", lambda: fake_gpu.Vllm)
    rows = list(logprob.rows(tiny=True))
    assert _names(rows) == {"token_logprobs", "sample", "threshold"} and len(rows) == 14 and _invariant(rows)


@pytest.mark.parametrize("name", [n for n in shapes.SHAPES if not n.startswith("tiny")])
def test_configurations_have_the_shapes_that_are_tuned_for(name):
    from transformers import AutoModelForCausalLM

    shape, found = shapes.SHAPES[name], set()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shapes.config(name), dtype=torch.bfloat16)
    layer = model.model.layers[0]
    weights = {n.rpartition(".")[0].rpartition(".")[2]: tuple(p.shape) for n, p in layer.named_parameters() if p.dim() == 2}
    qkv = sum(weights[f"{x}_proj"][0] for x in "qkv")
    assert (qkv, shape.hidden) == shape.linears["qkv"] and weights["o_proj"] == shape.linears["o"]
    if shape.experts:
        experts = layer.mlp.experts
        assert weights["gate"] == shape.linears["router"] == (shape.experts, shape.hidden)
        assert tuple(experts.gate_up_proj.shape) == (shape.experts, 2 * shape.mlp, shape.hidden)
        assert model.config.num_experts_per_tok == shape.experts_per_token
    else:
        assert (2 * weights["gate_proj"][0], shape.hidden) == shape.linears["gate_up"]
        assert weights["down_proj"] == shape.linears["down"]
    assert tuple(model.lm_head.weight.shape) == shape.linears["lm_head"]
    assert len(model.model.layers) == shape.layers and model.config.tie_word_embeddings == shape.tied
    found.add(model.config.rope_parameters["rope_theta"])
    assert found == {shapes.ROPE[shape.kind]["rope_theta"]}


def test_a_model_is_built_once_and_its_biases_are_not_zero(tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    monkeypatch.setitem(shapes.SHAPES, "small", shapes.Shape(64, 96, 1, 2, 1, 32, 128, True, "qwen2"))
    path = shapes.build("small", tmp_path / "m")
    before = (tmp_path / "m" / "model.safetensors").stat().st_mtime_ns
    assert shapes.build("small", tmp_path / "m") == path
    assert (tmp_path / "m" / "model.safetensors").stat().st_mtime_ns == before
    model = AutoModelForCausalLM.from_pretrained(path)
    assert model.dtype == torch.bfloat16 and model.model.layers[0].self_attn.q_proj.bias.abs().min() > 0
    assert model.model.norm.weight.std() > 0


def test_rotation_gives_every_input_its_turn():
    assert gpu.copies(gpu.ROTATED_BYTES) == 1 and gpu.copies(gpu.ROTATED_BYTES - 1) == 2 and gpu.copies(8 << 20) == 25
    calls = [lambda i=i: i for i in range(7)]
    turned = [call() for call in gpu.rotate(calls)]
    assert len(turned) == gpu.GRAPH_LAUNCHES and {turned.count(i) for i in range(7)} == {2, 3}


def test_the_targets_of_our_own_attention_and_the_sizes_that_have_them():
    found = {work.name: work.own_target for work in attention.WORKLOADS}
    assert {name: found[f"decode {name}"] for name in ("1 at 8192", "1 at 32768")} == {"1 at 8192": 1.25, "1 at 32768": 1.25}
    assert [found[f"decode {name}"] for name in ("16 at 8192", "64 at 2048", "256 at 2048")] == [1.05] * 3
    assert found["decode 16 at 8192 in a window of 1024"] == 1.1
    assert [found[f"prefill {name}"] for name in ("8 x 2048", "4 x 8192", "1 x 32768")] == [1.4] * 3
