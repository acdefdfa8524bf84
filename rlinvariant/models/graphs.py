"""A decoder's forward and backward as CUDA graphs: a small model's kernels end sooner than a host can start them.

A graph is a forward, or a backward, that was recorded once and is started as a whole: the same kernels on the same addresses,
so the same bits. It has one shape, therefore packed rows are padded to few shapes (`packing.pack`, `shaped`); and its operands
stay where they were, therefore inputs are copied to where it reads them, and gradients are copied out of what it wrote. On one
H200, 22,400 tokens of SmolLM2-135M: forward and backward take 136 ms with 61 ms of work, and 61 ms as graphs, where no bit of
log-probs and gradients differs (tests/models/test_graphs.py compares them). A recording takes the time of some passes: a shape
is recorded when it comes for the second time.

N: tokens of a packed row, H: width of the hidden states.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rlinvariant.types import Untyped

MOST_SHAPES = 8  # graphs that are kept; each holds its inputs and its output, and all share the memory of activations
INPUTS = ("input_ids", "position_ids", "cu_seq_lens_q")


def hidden_states(decoder: nn.Module, *args: Untyped, **inputs: Untyped) -> Tensor:
    """Return a decoder's hidden states [1, N, H]: by its graphs, if it has any and a backward is to follow.

    Args:
        decoder: of transformers, after `make_trainable`.
        args, inputs: what it takes; for its graphs those of `Packed.inputs`, of a shape that `pack` has made.
    """
    if "cu_seq_lens_q" in inputs:
        inputs["attention_mask"] = _no_mask(inputs["input_ids"])
    if args or not runs_as_graphs(decoder) or "cu_seq_lens_q" not in inputs:
        return decoder(*args, use_cache=False, **inputs).last_hidden_state
    return decoder.__dict__["graphs"](*(inputs[name] for name in INPUTS), inputs["max_length_q"])


def runs_as_graphs(decoder: nn.Module) -> bool:
    """Return whether the decoder has graphs, and a backward is to follow."""
    return decoder.__dict__.get("graphs") is not None and torch.is_grad_enabled()


def use_graphs(decoder: nn.Module, use: bool) -> None:
    """Let a decoder's passes with gradients run as graphs from now on, or, which frees theirs, no longer."""
    if use != (decoder.__dict__.get("graphs") is not None):
        decoder.__dict__["graphs"] = DecoderGraphs(decoder) if use else None


class DecoderGraphs:
    """Holds the graphs of one decoder, by shape. They share memory, so a forward's backward has to come before the next one."""

    def __init__(self, decoder: nn.Module) -> None:
        self._decoder = decoder
        self._graphs: dict[tuple[int, int, int], _Graph] = {}
        self._seen: set[tuple[int, int, int]] = set()
        self._pool: Any = None
        self._gradients: list[Tensor] = []
        self.passes = 0  # forwards by graphs so far

    def __deepcopy__(self, memo: dict) -> None:
        """Give a copy of the model none: these are of this one's addresses."""

    def __call__(self, ids: Tensor, positions: Tensor, cu: Tensor, longest: int) -> Tensor:
        """Return hidden states [1, N, H]; ids and positions: [1, N] int64, cu: [sequences + 1] int32."""
        trained = [p for p in self._decoder.parameters() if p.requires_grad]
        shape, inputs = (ids.shape[1], len(cu), longest), (ids, positions, cu)
        graph = self._graphs.pop(shape, None)
        if graph is not None and not graph.holds(self._decoder, trained):
            graph = None
        if graph is None and shape not in self._seen:
            self._seen.add(shape)
            return self._decoder(**_batch(inputs, longest)).last_hidden_state
        self._graphs[shape] = graph or self._record(shape, inputs, trained)  # the last one: the first is the longest unused
        self.passes += 1
        return _Replay.apply(self, self._graphs[shape], inputs, *trained)

    def _record(self, shape: tuple[int, int, int], inputs: tuple[Tensor, ...], trained: list[nn.Parameter]) -> "_Graph":
        if self._graphs and not next(iter(self._graphs.values())).holds(self._decoder, trained):
            self._graphs.clear()
        while len(self._graphs) >= MOST_SHAPES:
            unused = next(iter(self._graphs))
            self._seen.discard(unused)
            del self._graphs[unused]
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        if not self._graphs:
            self._gradients = [torch.empty_like(p) for p in trained]
        return _Graph(self._decoder, inputs, shape[2], trained, self._gradients, self._pool)


class _Graph:
    """Holds a forward and a backward of one shape, and the tensors that both read and write."""

    def __init__(
        self,
        decoder: nn.Module,
        inputs: tuple[Tensor, ...],
        longest: int,
        trained: list[nn.Parameter],
        gradients: list[Tensor],
        pool: Any,
    ) -> None:
        self.trained, self.gradients = trained, gradients
        self.addresses = _addresses(decoder)
        self.inputs = [x.clone() for x in inputs]

        def forward() -> tuple[Tensor, list[Tensor]]:
            # Each recording has leaves of its own, in the memory of the weights: autograd would let the gradient of a weight
            # that was used before wait for the stream of that use, which is none that is recorded.
            leaves = {name: p.detach().requires_grad_(p.requires_grad) for name, p in decoder.named_parameters()}
            hidden = torch.func.functional_call(decoder, leaves, kwargs=_batch(self.inputs, longest)).last_hidden_state
            return hidden, [leaf for leaf in leaves.values() if leaf.requires_grad]

        # Once before, off the main stream, as the recording is: libraries make their workspaces. The kernels were compiled by
        # the pass of this shape that was not recorded.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            hidden, leaves = forward()
            torch.autograd.grad(hidden.sum(), leaves, allow_unused=True)
        torch.cuda.current_stream().wait_stream(stream)
        # Of this thread alone: a reward's or a logger's thread may ask the driver for something meanwhile.
        recording: Any = {"pool": pool, "capture_error_mode": "thread_local"}
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        hidden, leaves = torch.empty(0), []
        with torch.cuda.graph(self.forward, **recording):
            hidden, leaves = forward()
        self.dhidden = torch.empty_like(hidden)
        with torch.cuda.graph(self.backward, **recording):
            found = torch.autograd.grad(hidden, leaves, self.dhidden, allow_unused=True)
            self.used = [g is not None for g in found]
            every: Any = torch._foreach_copy_  # pyright: ignore[reportPrivateImportUsage]
            every([x for x, used in zip(gradients, self.used, strict=True) if used], [g for g in found if g is not None])
        self.hidden = hidden.detach()

    def holds(self, decoder: nn.Module, trained: list[nn.Parameter]) -> bool:
        """Return whether it reads the decoder's weights and tables where they are now, and has the gradients of these."""
        return [*map(id, trained)] == [*map(id, self.trained)] and self.addresses == _addresses(decoder)


def _batch(inputs: Sequence[Tensor], longest: int) -> dict[str, Any]:
    """Return what a decoder takes, of INPUTS and the length of the longest sequence."""
    ids, positions, cu = inputs
    batch = {"input_ids": ids, "position_ids": positions, "cu_seq_lens_q": cu, "cu_seq_lens_k": cu}
    return batch | {"max_length_q": longest, "max_length_k": longest, "attention_mask": _no_mask(ids), "use_cache": False}


def _no_mask(ids: Tensor) -> Tensor:
    """Return a mask that transformers hands on as it is, for having four dimensions, and attention over packed rows ignores.

    Given none, transformers asks the device whether positions are of one sequence, and the host waits.
    """
    return ids.new_ones((1, 1, 1, 1))


def _addresses(decoder: nn.Module) -> list[int]:
    """Return where the weights lie, and what else the decoder reads, as its rotary tables."""
    return [x.data_ptr() for x in (*decoder.parameters(), *decoder.buffers())]


class _Replay(torch.autograd.Function):
    """Starts both graphs. Gradients go to autograd, which adds them to those of other uses of a weight in its own order."""

    @staticmethod
    def forward(ctx: Any, graphs: DecoderGraphs, graph: _Graph, inputs: tuple[Tensor, ...], *trained: Tensor) -> Tensor:
        for at, x in zip(graph.inputs, inputs, strict=True):
            at.copy_(x)
        graph.forward.replay()
        ctx.graphs, ctx.graph, ctx.number = graphs, graph, graphs.passes
        return graph.hidden.clone()  # autograd keeps what it gets; the graph's own is written again by its next pass

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dhidden: Tensor) -> Any:
        if ctx.number != ctx.graphs.passes:
            raise RuntimeError("a decoder's graphs ran forward again, or this backward before, over what it needs")
        graph: _Graph = ctx.graph
        ctx.number = None  # a backward writes over what it has read
        graph.dhidden.copy_(dhidden)
        graph.backward.replay()
        # Held by `graph` too: so autograd copies what it keeps, and the next replay writes over nobody's gradient.
        return None, None, None, *(g if used else None for g, used in zip(graph.gradients, graph.used, strict=True))
