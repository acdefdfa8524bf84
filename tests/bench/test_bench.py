"""The benchmark runs, and its JSON has what the README's tables are made from."""

import json
import subprocess
import sys

import pytest

from rlinvariant.bench import certify
from rlinvariant.bench.measure import QUIET_SHARE, Row, quietest
from rlinvariant.bench.report import markdown
from rlinvariant.errors import UserError
from rlinvariant.models.families import REFUSED

FIELDS = {
    "bench": str,
    "case": str,
    "ours": float,
    "stock": float,
    "unit": str,
    "ratio": float,
    "target": float | None,
    "bits_equal": dict,
    "samples": int,
    "others": float,
    "cpu_ratio": float | None,
}


@pytest.fixture(scope="module")
def ops_json(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench")
    command = [sys.executable, "-m", "rlinvariant.bench", "ops", "--tiny", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return out / "ops.json"


def test_rows_have_the_fields_of_the_schema(ops_json):
    content = json.loads(ops_json.read_text())
    assert set(content) == {"environment", "complete", "rows"} and content["complete"] is True
    assert {"cpu", "packages", "git", "threads", "loadavg", "others", "OMP_WAIT_POLICY"} <= set(content["environment"])
    for row in content["rows"]:
        assert {name: isinstance(row[name], kind) for name, kind in FIELDS.items()} == dict.fromkeys(row, True)
        assert row["bench"] == "ops"
        assert row["ours"] > 0 and row["stock"] > 0 and row["samples"] > 0
        assert row["ratio"] == pytest.approx(row["ours"] / row["stock"], rel=0.05, abs=0.002)


def test_every_op_is_measured_and_invariant(ops_json):
    rows = json.loads(ops_json.read_text())["rows"]
    names = {row["case"].split(",")[0].split(" ")[0] for row in rows}
    assert names == {
        "linear",
        "lora_linear",
        "rms_norm",
        "add_rms_norm",
        "rope",
        "swiglu",
        "attention",
        "paged_attention",
        "token_logprobs",
        "sample",
        "threshold",
        "moe_route",
        "moe_experts",
    }
    assert all(row["bits_equal"]["ours"] is True for row in rows)
    # Negative control: the stock fp32 product is not, so the check can see a difference
    assert any(row["bits_equal"]["stock"] is False for row in rows)


def test_the_report_has_a_line_for_each_row(ops_json):
    rows = json.loads(ops_json.read_text())["rows"]
    table = markdown(ops_json.parent)
    assert table.startswith("### ops")
    assert all(table.count(f"| {row['case']} |") == 1 for row in rows)


def test_help_names_the_benchmarks():
    command = [sys.executable, "-m", "rlinvariant.bench", "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert all(f"  {name} " in text for name in ("ops", "trainer", "step", "report"))


def test_quiet_windows_are_kept_and_few_are_enough():
    assert quietest([(0.5, "a"), (0.0, "b"), (QUIET_SHARE, "c"), (0.2, "d")]) == (["b", "c"], QUIET_SHARE)
    assert quietest([(0.5, "a"), (0.4, "b"), (0.9, "c"), (0.6, "d")]) == (["b", "a"], 0.5)


def test_a_row_without_a_target_is_reported(tmp_path):
    row = Row(
        bench="step",
        case="x",
        ours=1.0,
        stock=2.0,
        unit="ms",
        ratio=0.5,
        target=None,
        bits_equal={"ours": True, "stock": False},
        samples=3,
        others=0.0,
    )
    environment = {"cpu": {"model": "M", "cores": 2}, "packages": {"torch": "2.13"}}
    (tmp_path / "step.json").write_text(json.dumps({"environment": environment, "rows": [vars(row)]}))
    assert "| x | 1 | 2 | ms | 0.50 |  | yes | no |" in markdown(tmp_path)


def test_a_refused_family_loses_its_certificate_and_the_others_say_of_when_they_are(tmp_path, monkeypatch):
    certificate = {
        "exact": True,
        "form": "short",
        "date": "2026-01-02T03:04:05Z",
        "tokens": 1118,
        "mismatched": 0,
        "relations": [{}],
        "model": {"name": "llama", "class": "LlamaForCausalLM", "parameters": 2_600_000},
        "controls": [{"blind": False}],
        "seconds": 9.0,
    }
    (tmp_path / "certificates").mkdir()
    for name in ("llama", "qwen2-moe"):
        (tmp_path / "certificates" / f"{name}.json").write_text(json.dumps(certificate))
    monkeypatch.setattr(certify, "FAMILIES", {})
    monkeypatch.setattr(certify, "REFUSED", {"qwen2-moe": REFUSED["qwen2-moe"]})
    assert certify.run(tmp_path, None, True) == 0
    assert [path.stem for path in (tmp_path / "certificates").iterdir()] == ["llama"]
    table = markdown(tmp_path)
    assert "| llama | short, 2026-01-02 | `LlamaForCausalLM`, 2.6M | **0** / 1,118 | 1 | 1 of 1 | 9 |" in table
    refused = "| qwen2-moe | shared_expert_intermediate_size=64: no op has an expert that every token goes to"
    assert refused in table
    monkeypatch.setattr(certify, "REFUSED", {name: REFUSED[name] for name in ("qwen2-moe", "llama, dropout")})
    assert certify.run(tmp_path, None, True, ["llama, dropout"]) == 0
    assert refused in markdown(tmp_path) and "| llama, dropout | attention_dropout=0.1" in markdown(tmp_path)
    with pytest.raises(UserError, match=r"^family lama: expected one of qwen2-moe, llama, dropout$"):
        certify.run(tmp_path, None, True, ["lama"])
