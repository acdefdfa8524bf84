"""An engine over several processes: its bits are those of one process, and its weights are those that it was given."""

import json
import os
from pathlib import Path

import pytest

from tests import forks
from tests.parity.device import cpu_only

HERE = Path(__file__).parent


@cpu_only("several processes are joined by gloo")
@pytest.mark.slow  # whole engines; ops/test_linear_columns.py and test_heads_apart.py have the parts
@pytest.mark.parametrize(("family", "ranks"), [("qwen3", 2), ("qwen2", 2), ("gemma2", 2), ("llama", 4)])
def test_an_engine_over_several_processes_has_the_bits_of_a_trainer_in_one(family, ranks, tmp_path):
    """llama has two heads of keys: over four processes two have the same."""
    arguments = [str(HERE / "columns_on_ranks.py"), str(tmp_path), family]
    done = forks.run_ranks(ranks, arguments, cwd=tmp_path, env=os.environ)
    assert [rank.returncode for rank in done] == [0] * ranks, done[0].stderr[-3000:]
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(ranks)]
    for own in found:
        assert own["start"] == own["after"] == [0, 8 * 12]
        assert own["tokens"] == found[0]["tokens"]
        assert own["equal"] == own["synced"] == [[], []]
        by_words, by_sums = own["moved"]
        assert len(by_words) >= own["parameters"] and len(by_sums) >= own["parameters"], "control: all weights had moved"
        assert own["rows"][0] > 0.9 * own["rows"][1] == 0.9 * 8 * 12, "control: cut as vLLM cuts"
        assert own["one word"][1] == ["model.norm.weight"], "every process finds by sums what one has"
    assert [own["one word"][0] for own in found] == [[]] * (ranks - 1) + [["model.norm.weight"]]
    assert [own["apart"] for own in found] == [[0, 8 * (3 + rank)] for rank in range(ranks)]
    assert found[0]["one more turn"] == [0, 15]
