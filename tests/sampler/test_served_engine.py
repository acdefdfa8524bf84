"""Checks of an engine that is served: that it runs what is ours, and orders equal log-probs by token."""

import pytest
import torch

from rlinvariant.errors import UserError
from rlinvariant.sampler import vllm_linear, vllm_model


@pytest.mark.parametrize("what", ["attention", "product", "model"])
def test_what_is_not_ours_in_an_engine_is_named(what, exact_engine, monkeypatch):
    runner = exact_engine._runner
    attentions, products = vllm_model.require_installed(runner)
    assert (attentions, products) == (2, 9)
    if what == "attention":
        name, layer = next(iter(runner.compilation_config.static_forward_context.items()))
        monkeypatch.setattr(layer, "attn_backend", int)
    elif what == "product":
        name = "model.layers.1.mlp.down_proj"
        monkeypatch.setattr(exact_engine.model.get_submodule(name), "quant_method", vllm_linear.UnquantizedLinearMethod())
    else:
        name = "Linear"
        monkeypatch.setattr(runner, "get_model", lambda: torch.nn.Linear(1, 1))
    with pytest.raises(UserError, match=f"{name}.*plugin not active|plugin not active.*{name}"):
        vllm_model.require_installed(runner)


def test_equal_log_probs_are_ordered_by_token_however_many_are_asked_for():
    """Rows of a few values: nearly all are ties. `topk` alone gives another order for each number."""
    values = torch.randint(-3, 1, (5, 200), generator=torch.Generator().manual_seed(0)).float()
    values[0, 7] = float("-inf")
    values[1, 3] = -0.0
    for row, (top, ids) in enumerate(zip(*vllm_model._top(values, 150), strict=True)):
        expected = sorted(range(200), key=lambda i: (-values[row, i].item(), i))[:150]
        assert ids.tolist() == expected and top.tolist() == values[row, expected].tolist()
    for count in (1, 2, 20):
        assert vllm_model._top(values, count)[1].equal(vllm_model._top(values, 150)[1][:, :count])
