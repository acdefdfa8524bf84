"""gradients=ordered: what ranks add has the same bits in DDP, whatever its buckets, and in shards."""

import os
from pathlib import Path

import pytest
import torch

from rlinvariant import bits
from rlinvariant.models import ordered
from tests import forks
from tests.parity.device import cpu_only

HERE = Path(__file__).parent


def test_the_tree_adds_neighbours():
    one = [torch.tensor(x) for x in (1e8, 1.0, -1e8, 1.0, 3.0)]
    expected = ((one[0] + one[1]) + (one[2] + one[3])) + one[4]
    assert bits.compare(ordered.tree_sum(one), expected) is None
    assert bits.compare(sum(one[1:], one[0]), expected) is not None, "control: one after the other"


def differ(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> int:
    assert a.keys() == b.keys() and len(a) > 0
    return sum(bits.compare(x, b[name]) is not None for name, x in a.items())


@cpu_only("several processes are joined by gloo")
@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_ordered_gradients_are_the_same_in_ddp_and_in_shards(ranks, tmp_path):
    done = forks.run_ranks(ranks, [str(HERE / "ordered_on_ranks.py"), str(tmp_path)], cwd=tmp_path, env=os.environ)
    assert [rank.returncode for rank in done] == [0] * ranks, done[0].stderr[-3000:]
    first, *others = [torch.load(tmp_path / f"{rank}.pt") for rank in range(ranks)]
    for other in others:
        assert all(differ(first[kind], other[kind]) == 0 for kind in first), "all ranks have the same"
    assert differ(first["ddp ordered"], first["shards ordered"]) == 0
    assert differ(first["ddp ordered"], first["ddp ordered, small buckets"]) == 0
    assert differ(first["mean"], first["tree"]) == 0
    if ranks > 2:  # of two, a + b is all that there is
        stock = differ(first["ddp stock"], first["shards stock"]), differ(first["ddp stock"], first["ddp stock, small buckets"])
        assert max(stock) > 0, "control: as the library adds them"
