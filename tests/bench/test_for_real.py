"""Benchmarks of a GPU whose processes also run on a CPU: small, and for real."""

import json
import subprocess
import sys

import pytest

BF16 = "stock's weights in bfloat16"


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, measured",
    [
        ("lora", ["step", "all but the rollout", "rollout", "weight sync", "rollout with adapters"]),
        ("lora_large", ["memory of tiny, two steps"]),
        (
            "moe",
            [
                "ours: 2 requests alone",
                "ours: tiny-moe, batch 4",
                *(f"tiny-moe, {BF16}, {what}" for what in ("4 equal rows", "tiny, peak memory")),
            ],
        ),
        ("served", [f"tiny, 32 completions of 32 tokens: {part}" for part in ("rollout", "sync of")]),
        ("profile", ["rollout", "log-probs: forward", "backward", "step, not traced"]),
    ],
)
def test_it_measures(name, measured, tmp_path):
    command = [sys.executable, "-m", "rlinvariant.bench", name, "--tiny", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result = json.loads((tmp_path / f"{name}.json").read_text())
    cases = [row.get("case") or row["compared"] for row in result["rows"]]
    assert result["complete"] and all(any(case.startswith(start) for case in cases) for start in measured), cases
    if name == "profile":
        assert all(row["mismatched"] == 0 for row in result["rows"])
    else:
        equal = [row["bits_equal"]["ours"] for row in result["rows"]]
        assert True in equal and False not in equal
