"""A decoder's CUDA graphs: log-probs and gradients have the bits of passes without; whatever would break that is seen."""

import copy
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig

from rlinvariant.bits import assert_bits_equal, compare
from rlinvariant.models import lora, make_trainable
from rlinvariant.models.graphs import MOST_SHAPES, DecoderGraphs, _addresses, _Graph, _Replay, runs_as_graphs, use_graphs
from rlinvariant.trainer.memory import decoder_of
from rlinvariant.trainer.packing import Packed, pack
from tests.models.small import build
from tests.parity.device import CUDA, DEVICE

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not CUDA, reason="CUDA graphs")  # selected by -m gpu, on a GPU


def batch(seed: int, rows: int = 6, longest: int = 40) -> Packed:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(97, (rows, longest), generator=generator)
    lengths = torch.randint(5, longest + 1, (rows,), generator=generator)
    mask = (torch.arange(longest) < lengths[:, None]).long()
    return pack(ids.to(DEVICE), mask.to(DEVICE), longest - 2, few_shapes=True)


def passes(model, seeds=(0, 1, 2)) -> list[torch.Tensor]:
    """Log-probs of several micro-batches, whose gradients add up."""
    found = []
    for seed in seeds:
        packed = batch(seed)
        logprobs, _ = model(
            **packed.inputs,
            attention_mask=None,
            token_ids=packed.token_ids,
            predicted_from=packed.predicted_from,
            temperature=0.7,
        )
        (logprobs * torch.linspace(-1, 1, len(logprobs), device=DEVICE)).sum().backward()
        found.append(logprobs.detach())
    return found


def trained(model, steps: int = 3) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """All log-probs of some optimizer steps, and the weights and gradients after them."""
    optimizer, found = torch.optim.AdamW(model.parameters(), 1e-3), []
    for step in range(steps):
        found += passes(model, range(3 * step, 3 * step + 3))
        last = {f"{name}.grad": p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
        optimizer.step()
        optimizer.zero_grad()
    return found, last | {name: p.detach().clone() for name, p in model.named_parameters()}


@gpu
@needs_gpu
@pytest.mark.parametrize("adapted", [False, True], ids=["whole", "adapters"])
@pytest.mark.parametrize("family", ["qwen3 tied", "llama tied", "qwen2"])
def test_graphs_change_no_bit_of_log_probs_gradients_or_weights(family, adapted):
    """A tied embedding's gradient has a part that no graph computes. Control: other weights are other bits."""
    model = build(family)
    if adapted:
        model = lora.applied(model.bfloat16(), LoraConfig(r=8, target_modules="all-linear"), 0)
        lora.randomise(model, 0)
    eager = make_trainable(model).train()
    graphs = copy.deepcopy(eager)
    decoder = decoder_of(graphs)
    use_graphs(decoder, True)
    one, two = trained(eager), trained(graphs)
    recorded = len(decoder.graphs._graphs)
    assert decoder.graphs.passes == 9 - len(decoder.graphs._seen) and recorded >= 1, "the first pass of a shape is no graph's"
    for a, b in zip(one[0], two[0], strict=True):
        assert_bits_equal(a, b, "log-probs")
    assert one[1].keys() == two[1].keys()
    for name in one[1]:
        assert_bits_equal(one[1][name], two[1][name], name)
    assert compare(passes(eager, (0,))[0], one[0][0]) is not None, "the weights have moved"


@gpu
@needs_gpu
def test_moved_weights_are_recorded_again_and_a_lost_forward_is_refused():
    model = make_trainable(build("qwen3")).train()
    use_graphs(model.base_model, True)
    first = passes(model, (0, 0))[1]
    (graph,) = model.base_model.graphs._graphs.values()
    for p in model.parameters():
        p.data = p.data.clone()
    assert_bits_equal(passes(model, (0,))[0], first, "log-probs")
    assert [*model.base_model.graphs._graphs.values()] != [graph]
    packed = batch(0)
    ids = packed.inputs["input_ids"], packed.inputs["position_ids"], packed.inputs["cu_seq_lens_q"]
    hidden = model.base_model.graphs(*ids, packed.inputs["max_length_q"])
    model.base_model.graphs(*ids, packed.inputs["max_length_q"])
    with pytest.raises(RuntimeError, match="ran forward again"):
        hidden.sum().backward()


@gpu
@needs_gpu
def test_few_graphs_are_kept_and_all_are_freed():
    model = make_trainable(build("qwen3")).train()
    use_graphs(model.base_model, True)
    for rows in (rows for rows in range(4, 6 * MOST_SHAPES, 4) for _ in range(2)):
        packed = batch(0, rows)
        of = {"token_ids": packed.token_ids, "predicted_from": packed.predicted_from}
        model(**packed.inputs, attention_mask=None, **of)[0].sum().backward()
    assert len(model.base_model.graphs._graphs) == MOST_SHAPES
    held = torch.cuda.memory_allocated()
    use_graphs(model.base_model, False)
    assert model.base_model.graphs is None and torch.cuda.memory_allocated() < held


class Decoder(torch.nn.Module):
    """Says how often it ran by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.runs = torch.nn.Parameter(torch.ones(())), 0

    def forward(self, input_ids, **_):
        self.runs += 1
        return SimpleNamespace(last_hidden_state=input_ids * self.weight)


def test_a_shape_is_recorded_when_it_comes_again_and_the_longest_unused_is_dropped(monkeypatch):
    """A CPU records nothing: what would be recorded is noted, and no graph runs."""
    decoder, recorded = Decoder(), []
    graphs = DecoderGraphs(decoder)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: 0)
    monkeypatch.setattr("rlinvariant.models.graphs._Replay.apply", lambda *_: None)

    def record(decoder, inputs, longest, *_):
        recorded.append(inputs[0].shape[1])
        return SimpleNamespace(holds=lambda *_: True)

    monkeypatch.setattr("rlinvariant.models.graphs._Graph", record)

    def run(n: int) -> None:
        graphs(torch.ones(1, n), torch.ones(1, n), torch.zeros(2, dtype=torch.int32), n)

    for n in (*range(1, MOST_SHAPES + 1), 99):
        run(n)
    assert decoder.runs == MOST_SHAPES + 1 and not recorded, "each came once"
    for n in range(1, MOST_SHAPES + 1):
        run(n)
        run(n)
    assert recorded == [*range(1, MOST_SHAPES + 1)] and decoder.runs == MOST_SHAPES + 1
    run(1)
    run(99)
    assert recorded[-1] == 99 and len(graphs._graphs) == MOST_SHAPES
    run(1)
    run(2)
    assert recorded[-1] == 99 and decoder.runs == MOST_SHAPES + 2, "2 was dropped, and comes as if for the first time"
    run(2)
    assert recorded[-1] == 2


def test_a_graph_holds_until_a_weight_or_a_table_lies_elsewhere():
    decoder, graph = Decoder(), object.__new__(_Graph)
    decoder.register_buffer("table", torch.ones(4))
    trained = [decoder.weight]
    for name in ("table", "weight"):
        graph.trained, graph.addresses = trained, _addresses(decoder)
        assert graph.holds(decoder, trained)
        moved = getattr(decoder, name)
        moved.data = moved.data.clone()
        assert not graph.holds(decoder, trained), name
    assert not graph.holds(decoder, [])


def test_a_backward_runs_once():
    """A CPU replays nothing: the second backward of a pass has to be refused before it would."""
    weight, replays = torch.nn.Parameter(torch.ones(2)), []
    forward, backward = (SimpleNamespace(replay=lambda name=name: replays.append(name)) for name in ("forward", "backward"))
    held = {"inputs": [], "hidden": torch.ones(2), "dhidden": torch.zeros(2), "gradients": [torch.ones(2)], "used": [True]}
    graph = SimpleNamespace(forward=forward, backward=backward, **held)
    hidden = _Replay.apply(DecoderGraphs(Decoder()), graph, (), weight)
    hidden.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="or this backward before"):
        hidden.sum().backward()
    assert replays == ["forward", "backward"]
    assert weight.grad is not None and weight.grad.data_ptr() != graph.gradients[0].data_ptr(), (
        "a replay writes over the latter"
    )


def test_only_passes_with_gradients_run_as_graphs_and_a_copy_has_none():
    decoder = torch.nn.Linear(2, 2)
    assert not runs_as_graphs(decoder)
    use_graphs(decoder, True)
    assert runs_as_graphs(decoder) and isinstance(decoder.graphs, DecoderGraphs)
    with torch.no_grad():
        assert not runs_as_graphs(decoder)
    assert not runs_as_graphs(copy.deepcopy(decoder)) and decoder.state_dict().keys() == {"weight", "bias"}
    use_graphs(decoder, False)
    assert not runs_as_graphs(decoder)
