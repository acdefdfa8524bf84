"""Every op has a reference beside it, `X_ref`; tests and benchmarks measure by it, and would see a wrong op."""

import ast
from pathlib import Path

import pytest
import torch

from rlinvariant import ops
from rlinvariant.bench.cases import Case, check
from tests.trees import parsed

ROOT = Path(__file__).parents[2]
OPS = [name for name in ops.__all__ if not name.endswith("_ref")]
# scale_logits is part of `token_logprobs_ref`; sample is measured by `log_softmax_ref` on the tokens that it draws; and
# embedding is a lookup
NOT_MEASURED_APART = {"scale_logits", "sample", "embedding"}


def used_in(folder: str) -> set[str]:
    """Return the X of every `ops.X_ref` that the code of a folder takes; docstrings do not count."""
    files = [path for path in sorted((ROOT / folder).rglob("*.py")) if path != Path(__file__)]
    nodes = (node for path in files for node in ast.walk(parsed(path.read_text())))
    return {node.attr.removesuffix("_ref") for node in nodes if isinstance(node, ast.Attribute) and node.attr.endswith("_ref")}


def test_every_op_has_a_reference():
    assert {f"{name}_ref" for name in OPS} == set(ops.__all__) - set(OPS)


def test_tests_use_every_reference():
    assert set(OPS) - used_in("tests") == set()


def test_benchmarks_use_every_reference():
    assert set(OPS) - used_in("rlinvariant/bench") == NOT_MEASURED_APART


@pytest.mark.parametrize(
    ("ours", "finds"),
    [
        (ops.swiglu, False),
        (lambda gate, up: 1.2 * ops.swiglu(gate, up), True),
        (lambda gate, up: torch.where(torch.arange(len(gate))[:, None] == 3, 0.0, ops.swiglu(gate, up)), True),
    ],
)
def test_a_benchmark_refuses_a_wrong_op(ours, finds):
    """The stock op is as wrong as ours, so that only the reference can tell."""
    gate, up = torch.randn(2, 16, 8)
    case = Case("swiglu", ours, ops.swiglu_ref, ours, (gate, up), 2)
    if finds:
        with pytest.raises(AssertionError, match="swiglu: ours, reference: "):
            check(case)
    else:
        assert check(case)["ours"] is True
