"""`rlinvariant verify`: what is exact is certified, what is not is not, and what was not shown is not either."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from rlinvariant import ops
from rlinvariant.config import LoraConfig
from rlinvariant.errors import UserError
from rlinvariant.models import lora, make_trainable, unsupported
from rlinvariant.models.families import FAMILIES
from rlinvariant.models.random import save_random
from rlinvariant.report.console import Console
from rlinvariant.rollout import Completion
from rlinvariant.sampler import vllm_attention, vllm_linear
from rlinvariant.sampler.drive import Request, Trace
from rlinvariant.verification import certificate, compositions, controls, ladder, load, relations, start, table, verify
from rlinvariant.verification.pair import FULL_SIZES, SHORT_SIZES, Pair, Sizes
from rlinvariant.verification.relation import Relation
from tests import commands, forks
from tests.parity.harness import off_by_an_ulp
from tests.verification.certificates import a_certificate

UNKNOWN = {"qwen2-window", "qwen3-window"}.__contains__  # to stock vLLM: windows in some of the layers
SUPPORTED = [name for name, config in FAMILIES.items() if not list(unsupported(config(), load.device()))]
QUICK = Sizes(requests=4, prompt=70, tokens=6, longest=160, in_step=256, in_forward=4096, context=160)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """Give each test certificates of its own; the compiled kernels stay where they are."""
    monkeypatch.setattr(certificate, "cache_dir", lambda: tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def verified(tmp_path):
    """Verify a random model of a family, print the table, and return the certificate."""

    def run(family: str, **options: Any) -> certificate.Certificate:
        FAMILIES[family]().save_pretrained(tmp_path / family)
        return verify.verify(str(tmp_path / family), random=True, short=True, console=Console(), **options)

    return run


FAST_FAMILIES = (
    "llama",
    "gemma3",
)  # one as most are, one with windows and most forms of its own


@pytest.mark.parametrize("family", [x if x in FAST_FAMILIES else pytest.param(x, marks=pytest.mark.slow) for x in SUPPORTED])
def test_every_supported_family_is_exact(verified, family):
    found = verified(family)
    assert found["exact"], [r for r in found["relations"] if r["mismatched"] or not r["shown"] or r["first"]]
    assert found["mismatched"] == 0 and found["tokens"] > 900
    names = [r["name"] for r in found["relations"]]
    assert len(names) == len(set(names)) and sum(n.startswith("op ") for n in names) >= 6
    assert all(r["compared"] > 0 for r in found["relations"])
    blind = [c["name"] for c in found["controls"] if c["blind"]]
    # whether torch's linear varies depends on the processor
    assert {*blind} <= {
        "stock: torch's linear, a row = among others",
        "stock: vLLM's top-k and top-p, a row = among 7 or 8",  # one kernel on a CPU
        *(["stock: vLLM, transformers (invariance=off)"] * UNKNOWN(family)),
    }
    # the stock engine has decorated the class of a family that vLLM has no model of; others of that class still work here
    model = AutoModelForCausalLM.from_config(FAMILIES[family]())
    assert model(input_ids=torch.arange(5)[None]).logits.shape[1] == 5


@pytest.mark.slow
def test_adapters_are_certified(verified, tmp_path):
    """Random ones by their shape, and a directory's own: of that, one with B = 0 proves nothing."""
    found = verified("llama", lora=LoraConfig(r=8))
    assert found["exact"] and found["mismatched"] == 0 and found["tokens"] > 900
    about = certificate.subject(FAMILIES["llama"](), "bfloat16", ranks={"model.layers.0.self_attn.q_proj": 8})
    assert found["subject"]["adapters"] and found["model"]["adapters"].startswith("LoRA adapters, r 8, on 14 projections")
    assert about["adapters"] != found["subject"]["adapters"] and "adapters" not in certificate.subject(
        FAMILIES["llama"](), "bfloat16"
    )
    planted = {c["name"]: c["mismatched"] for c in found["controls"] if c["name"].startswith("planted")}
    planted = {name: count for name, count in planted.items() if not name.startswith("planted: op ")}
    assert len(planted) == 6 and all(planted.values())
    assert sum("adapters" in name for name in planted) == 3
    assert "nats away on average" in str(found["controls"]) and "rank not padded" in str(found["controls"])

    base = str(save_random(FAMILIES["llama"](), tmp_path / "base"))
    model = lora.applied(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=4).peft_config(), 0)
    model.save_pretrained(tmp_path / "new")
    found = verify.verify(str(tmp_path / "new"), short=True)
    assert not found["exact"] and found["mismatched"] == 0, "who ignores adapters computes the same"
    blind = {c["name"] for c in found["controls"] if c["blind"]}
    assert "planted: the sampler without its adapters" in blind


def test_a_fault_in_the_sampler_is_no_certificate(verified, monkeypatch, capsys):
    monkeypatch.setattr(vllm_linear._Head, "apply", off_by_an_ulp(40))
    found = verified("llama")
    assert not found["exact"] and found["mismatched"] > 0
    broken = {r["name"] for r in found["relations"] if r["mismatched"]}
    assert {"sampler = trainer, packed", "random batch compositions = trainer"} <= broken
    assert not {"alone = in a batch", "warm prefix = cold"} & broken  # the fault is the same in every batch
    out = capsys.readouterr().out
    assert "NOT EXACT" in out and "0x" in out
    lines = "\n".join(table.verdict(found))
    assert "NOT EXACT: mismatched" in lines and "rlinvariant bisect" in lines


def test_what_is_not_shown_or_not_seen_is_no_certificate():
    """It is none whatever else holds."""
    held, seen = Relation("alone", compared=5), Relation("planted: an ulp", compared=5, mismatched=3)
    blind_stock = Relation("stock: attention", compared=5)
    assert verify.is_exact([held], [seen]) and verify.is_exact([held], [seen, blind_stock])
    for wrong in (Relation("preempted", compared=5, shown=False), Relation("none"), Relation("other", 5, 1)):
        assert not verify.is_exact([held, wrong], [seen])
    assert not verify.is_exact([held], [seen, Relation("planted: stale", compared=5)])
    assert not verify.is_exact([], [seen]) and not verify.is_exact([held], [blind_stock])


def test_log_probs_are_compared_word_by_word():
    relation = Relation("words")
    a = np.array([0.0, -1.0, np.nan, -2.0], np.float32)
    relation.add([a], [np.array([-0.0, -1.0, np.nan, np.nextafter(np.float32(-2), np.float32(0))], np.float32)])
    assert (relation.compared, relation.mismatched) == (4, 3) and "position 0: 0 0x00000000 != -0 0x80000000" in str(
        relation.first
    )
    relation.add([[-1.0, -2.0]], [[-1.0]])  # what is missing differs
    assert (relation.compared, relation.mismatched) == (6, 4)


def test_the_ladder_sees_a_row_that_depends_on_others():
    rows = ladder.FORWARD_LENGTHS[0]
    x, w = torch.randn(rows, 8), torch.randn(8, 8)
    for call, differs in (
        (lambda a: (a["x"] * 2,), False),
        (lambda a: (a["x"].cumsum(0),), True),
        (lambda a: (a["x"] + len(a["x"]),), True),
        (lambda a: (a["x"] + 0 * a["x"].sum(),), True),  # NaN of another row
    ):
        relation = Relation("op")
        ladder._rows(relation, call, {"x": x, "w": w}, (rows,))
        assert bool(relation.mismatched) is differs and relation.compared > 10_000


def test_compositions_are_of_their_seed_and_keep_to_the_budget():
    def of(seed: int, number: int) -> list[Any]:
        return compositions.composition(Pair(None, None, QUICK, seed, 100), number, 2000)  # type: ignore[arg-type]

    assert of(0, 3) == of(0, 3) != of(1, 3) and of(0, 3) != of(0, 6)
    for number in range(30):
        found, kind = of(7, number), compositions.COMPOSITION_KINDS[number % 3]
        assert sum(len(r.prompt) for r in found) <= 2000 + len(found) and all(
            1 <= len(r.prompt) <= QUICK.longest for r in found
        )
        if kind == "crowd":
            assert compositions.CROWD_SIZES[0] <= len(found) <= compositions.CROWD_SIZES[1]
        elif kind == "full":
            assert len(found) == compositions.ENGINE_REQUESTS and not any(r.arrives or r.aborts for r in found)
        else:  # whatever is drawn, one comes while another decodes, and one is cancelled on its way
            assert found[0].aborts is None is found[1].aborts and found[1].arrives == 3 < QUICK.tokens
            assert found[-1].aborts is not None and found[-1].aborts < found[-1].arrives + found[-1].max_tokens


def test_a_completion_that_is_cut_or_lost_is_not_shown():
    """It is not shown whatever the log-probs say that are there."""
    pair = Pair(None, None, QUICK, 0, 100)  # type: ignore[arg-type]
    requests = [Request((1,), 0, 1.0, 2), Request((2,), 0, 1.0, 2), Request((3,), 0, 1.0, 2, aborts=1)]
    whole = Completion([4, 5], [-1.0, -2.0])
    for second, shown in ((whole, True), (Completion([4], [-1.0]), False), (None, False)):
        drawn = [c.sampler_logprobs for c in (whole, second) if c is not None]
        pair.score = lambda *_, drawn=drawn: [np.float32(x) for x in drawn]  # type: ignore[method-assign]
        relation = Relation("r")
        pair.against_trainer(relation, requests, Trace([whole, second, None]))
        assert relation.shown is shown is relation.holds and relation.mismatched == 0


@pytest.mark.parametrize("fault", [True, False])
def test_a_planted_fault_is_seen_and_no_fault_is_not(exact_engine, arithmetic_dir, monkeypatch, fault):
    """A control would be seen without its fault if anything else moved."""
    pair = start.pair_of(load.trained(arithmetic_dir, "bfloat16"), exact_engine, 99)
    exact_engine.sync(pair.model.named_parameters())
    assert relations.sampler_and_trainer(pair).holds
    if not fault:
        monkeypatch.setattr(controls, "_one_ulp_larger", lambda x: x)
        monkeypatch.setattr(controls, "_torch_attention", ops.attention)
    for control in (controls.one_ulp(pair, torch.bfloat16), controls.stock_attention(pair)):
        assert control.compared > 100 and bool(control.mismatched) is fault


@pytest.mark.parametrize("fault", ["decode beyond 100 keys", "one request alone beyond 100 keys", None])
def test_a_fault_of_long_contexts_is_seen_around_edges_alone(fault, exact_engine, arithmetic_dir, monkeypatch):
    pair = start.pair_of(load.trained(arithmetic_dir, "bfloat16"), exact_engine, 99)
    pair.sizes = dataclasses.replace(pair.sizes, context=140)
    exact_engine.sync(pair.model.named_parameters())
    forward = vllm_attention._AttentionImpl.forward

    def faulty(self, layer, query, key, value, kv_cache, attn_metadata, output, **more):
        out, m = forward(self, layer, query, key, value, kv_cache, attn_metadata, output, **more), attn_metadata
        if fault and m is not None and m.max_seqlen_k > 100 and (m.tokens == 1 or "decode" in fault and m.max_seqlen_q == 1):
            output[: m.tokens].view(torch.int16).add_(1)
        return out

    monkeypatch.setattr(vllm_attention._AttentionImpl, "forward", faulty)
    assert relations.sampler_and_trainer(pair).holds and relations.alone(pair).holds
    found = relations.contexts(pair)
    assert found.how == "around 16, 32, 64, 128; the longest alone, and among 63" and found.shown
    assert found.holds is (fault is None) and found.compared == 8 * (3 * 4 + 2)


def test_no_context_is_not_shown(exact_engine, arithmetic_dir):
    pair = start.pair_of(load.trained(arithmetic_dir, "bfloat16"), exact_engine, 99)
    assert not relations.contexts(pair).holds


# ---- the certificate


def test_a_certificate_is_found_for_its_own_subject_alone(cache, monkeypatch):
    path = certificate.write(a_certificate())
    about = certificate.subject(FAMILIES["llama"](), "bfloat16")
    assert certificate.find(about) == json.loads(path.read_text()) and path.is_relative_to(cache)
    assert certificate.find(certificate.subject(FAMILIES["llama"](), "float32")) is None
    assert certificate.find(certificate.subject(FAMILIES["qwen2"](), "bfloat16")) is None
    renamed = FAMILIES["llama"]()
    renamed._name_or_path, renamed.eos_token_id = "elsewhere", 5
    assert certificate.find(certificate.subject(renamed, "bfloat16")) is not None
    with monkeypatch.context() as other:
        other.setattr(torch, "get_num_threads", lambda: 63)
        assert certificate.find(certificate.subject(FAMILIES["llama"](), "bfloat16")) is None
    with monkeypatch.context() as other:
        other.setattr(certificate, "SUBJECT_SOURCES", ("kernels",))
        assert certificate.find(certificate.subject(FAMILIES["llama"](), "bfloat16")) is None


def test_none_is_found_while_one_says_that_it_is_not_exact(tmp_path):
    """A short one does not take the place of a full one, either way."""
    about = a_certificate()["subject"]
    certificate.write(a_certificate(form="short", tokens=3))
    assert certificate.find(about) == json.loads(certificate.path_of(about, "short").read_text())
    path = certificate.write(a_certificate())
    assert certificate.find(about) == json.loads(path.read_text())
    assert certificate.write(a_certificate(exact=False), tmp_path / "deep" / "copy.json") == path
    assert json.loads((tmp_path / "deep" / "copy.json").read_text())["exact"] is False
    certificate.write(a_certificate(form="short", tokens=3))
    assert certificate.find(about) is None
    certificate.write(a_certificate())
    assert certificate.find(about) is not None
    path.write_text(path.read_text()[:40])
    assert certificate.find(about) is None, "a damaged one may have said anything"


def test_what_chooses_kernels_is_part_of_the_subject(monkeypatch):
    about = certificate.subject(FAMILIES["llama"](), "bfloat16")
    assert certificate.subject(FAMILIES["llama"](), "bfloat16", eager=not about["eager"]) != about
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert certificate.subject(FAMILIES["llama"](), "bfloat16") != about


def test_a_file_that_cannot_be_written_is_refused_at_the_start(tmp_path):
    FAMILIES["qwen3"]().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="--out: /proc/x/y.json cannot be written .*another file"):
        commands.run("verify", str(tmp_path), "--random", "--out", "/proc/x/y.json")


def test_an_interrupted_verification_leaves_none(tmp_path, cache, monkeypatch, capsys):
    def interrupted(pair: Pair) -> Relation:
        raise KeyboardInterrupt

    FAMILIES["qwen3"]().save_pretrained(tmp_path / "model")
    monkeypatch.setattr(relations, "BATCH_RELATIONS", (relations.sampler_and_trainer, interrupted))
    assert commands.run("verify", str(tmp_path / "model"), "--random", "--short") == 130
    assert "interrupted" in capsys.readouterr().out and not list(cache.rglob("*.json"))


def test_out_of_memory_is_one_line(tmp_path, monkeypatch):
    def large(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nGPU 0 has ...")

    FAMILIES["qwen3"]().save_pretrained(tmp_path / "model")
    monkeypatch.setattr(load, "trained", large)
    with pytest.raises(UserError, match="out of memory .*20 GiB.*smaller model") as error:
        commands.run("verify", str(tmp_path / "model"), "--random", "--short")
    assert "\n" not in str(error.value)


# ---- the command


@pytest.mark.parametrize("how", ["fork", pytest.param("process", marks=pytest.mark.slow)])
def test_the_command_from_outside(how, tmp_path):
    """It runs in a process of its own, as a user has it; with all that it imports, the same is slow."""
    FAMILIES["qwen3"]().save_pretrained(tmp_path / "model")
    environment = os.environ | {"RLINVARIANT_CACHE": str(tmp_path / "cache")}
    arguments = ["verify", str(tmp_path / "model"), "--random", "--short", "--seed", "3", "--out", str(tmp_path / "mine.json")]
    command = ["-m", "rlinvariant.cli", *arguments]
    if how == "fork":
        done = forks.run(command, cwd=tmp_path, env=environment)
    else:
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "exact: mismatched 0 / " in done.stdout and str(tmp_path / "mine.json") in done.stdout
    found = json.loads((tmp_path / "mine.json").read_text())
    assert found["exact"] and found["seed"] == 3 and found["model"]["random_weights"] and found["model"]["weights_sha256"]
    (kept,) = (tmp_path / "cache" / "certificates").iterdir()
    assert json.loads(kept.read_text()) == found


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "MODEL"),
        (["m", "--toknes", "5"], "--toknes"),
        (["m", "--tokens", "0"], "0: expected a whole number of at least 1"),
        (["m", "--tokens", "9", "--short"], "--tokens 9 with --short"),
        (["m", "--dtype", "float16"], "float16"),
        (["m", "--lora", "r=0"], r"--lora r=0: expected a rank"),
        (["m", "--lora", "r=x"], r"--lora r=x: expected int"),
        (["m", "--lora", "rank=8"], r"--lora rank=8: unknown key"),
        (["m", "--lora", "r=129"], r"--lora r=129: expected at most 128, the model's width"),  # "m" has no weights
        (["m", "--lora", "r=4", "target_modules=w1"], "--lora target_modules: .*w1.* not found in the base model"),
    ],
)
def test_a_wrong_command_line_is_one_line(argv, message, tmp_path, monkeypatch):
    FAMILIES["llama"]().save_pretrained(tmp_path / "m")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        commands.run("verify", *argv)
    assert "\n" not in str(error.value)


def bad(path: Path, **changes: Any) -> str:
    """Return a directory with a configuration that has been changed."""
    FAMILIES["llama"]().save_pretrained(path)
    config = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "drop"}))
    return str(path)


def test_a_model_that_cannot_be_verified_is_one_line(tmp_path, monkeypatch):
    corrupt = bad(tmp_path / "corrupt")
    (tmp_path / "corrupt" / "model.safetensors").write_bytes(b"\0" * 100)
    remote = {"auto_map": {"AutoConfig": "x.C", "AutoModelForCausalLM": "x.M"}, "model_type": "unheard-of"}
    for path, message in (
        (bad(tmp_path / "weightless"), "--random"),
        (corrupt, "cannot be loaded"),
        (bad(tmp_path / "unknown", model_type="unheard-of"), "unheard-of"),
        (bad(tmp_path / "remote", **remote), "remote|trust_remote_code"),
        (bad(tmp_path / "encoder", model_type="t5", architectures=["T5Model"]), "not a transformers causal language model"),
        (bad(tmp_path / "quantised", quantization_config={"quant_method": "awq"}), "quantised"),
        (bad(tmp_path / "short", max_position_embeddings=32), "max_position_embeddings=32"),
        (str(tmp_path / "nowhere"), "nowhere"),
    ):
        with pytest.raises(UserError, match=message) as error:
            verify.verify(path, short=True)
        assert "\n" not in str(error.value), error.value


@pytest.mark.parametrize("size", [{"vocab_size": 521}, {"intermediate_size": 509}])
def test_no_dimension_is_taken_for_the_rows(size):
    config = FAMILIES["qwen3"]()
    for name, value in size.items():
        setattr(config, name, value)
    model = make_trainable(AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval(), torch.bfloat16)
    found = [r for r in ladder.ladder(model, torch.Generator().manual_seed(0)) if r.name.startswith("op ")]
    assert len(found) >= 6 and all(r.holds for r in found)


def test_sizes_fit_any_number_of_positions():
    for positions in (64, 100, 128, 512, 5000):
        for sizes in (SHORT_SIZES, FULL_SIZES):
            found = sizes.within(positions)
            assert found.positions <= positions + 1 and found.prompt >= 8 and found.tokens >= 2
            assert all(v > 0 for v in dataclasses.asdict(found).values())


@pytest.mark.parametrize("width", [None, 80])
def test_a_long_remark_goes_below_its_row_on_a_narrow_terminal(width):
    relation = Relation("warm prefix = cold", compared=1_000, how="words " * 20)
    found = table.lines(relation, width=width)
    assert " ".join(" ".join(found).split()) == "warm prefix = cold 0 / 1,000 " + "words " * 19 + "words"
    assert len(found) == (1 if width is None else 3) and all(len(line) <= (width or 1_000) for line in found)
