"""The number of tokens that a forward and backward may hold, measured on the model and in the free memory."""

import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rlinvariant.models import lora
from rlinvariant.models.graphs import use_graphs
from rlinvariant.models.limits import mixture_of
from rlinvariant.models.shards import local, unwrapped
from rlinvariant.ops.token_logprobs import CHUNK_BYTES
from rlinvariant.trainer.packing import pack
from rlinvariant.types import JsonRow, Untyped

if TYPE_CHECKING:
    from rlinvariant.trainer.microbatches import MicroBatchedTrainer

MOST_TOKENS = {"cuda": 32768, "cpu": 8192}  # a larger forward is no faster
ENOUGH_TOKENS = {"cuda": 8192, "cpu": 1024}  # from here on, recomputing costs more than smaller forwards do
USABLE = {
    "cuda": 0.9,
    "cpu": 0.15,
}  # share of the memory, of a GPU's that is free, and of all of a CPU's: the same at every start
BACKWARD = 2.5  # layers whose activations and their gradients are there at once in a backward
STATES = 12  # bytes of a parameter's fp32 gradient and of Adam's two moments
PROBE = 64  # tokens
# Parameters of a layer times tokens. A host starts the kernels of a layer, both ways, in 4.5 ms; an H200 needs as long for
# 3e11, at 6 operations each: SmolLM2-135M waits with any number of tokens, Qwen3-0.6B with fewer than 20,000.
HOST_BOUND = 3e11
# By how much more: a layer with adapters has some 90 kernels for 33 (it had 145), and 4 operations for 6. That is 4 by count;
# 3 is careful, and not measured. With 145, and no graphs, 8,192 tokens of the 1.7B shape took 1.78 times full training's time.
ADAPTED = 3.0
LEAST_TOKENS = 256.0  # of a part; a longer row is a part of its own


@dataclass(frozen=True)
class Fit:
    """Holds how a step is divided.

    Args:
        tokens: the most of a part.
        recomputed: of how many decoder layers, the first ones, the backward computes the activations again.
        layers: how many there are.
        graphs: whether decoders run as CUDA graphs, on rows padded to few shapes.
    """

    tokens: int
    recomputed: int
    layers: int
    graphs: bool = False

    def __str__(self) -> str:
        how = {0: "no activations recomputed", self.layers: "activations of all layers recomputed"}
        part = f"activations of {self.recomputed} of {self.layers} layers recomputed"
        graphs = ", forward and backward as CUDA graphs" if self.graphs else ""
        return f"micro-batches of at most {self.tokens:,} tokens, {how.get(self.recomputed, part)}{graphs}"

    def apply(self, model: Untyped, kwargs: JsonRow | None = None) -> None:
        """Let the first layers of a model recompute, and the others not: TRL's generation switches all on.

        Of a model with another number of layers, as a critic may be, the same share. `kwargs` are
        `gradient_checkpointing_kwargs`, as transformers takes them.
        """
        if self.recomputed and not model.is_gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False, **(kwargs or {})})
        own = decoder_layers(model)
        for at, layer in enumerate(own):
            layer.gradient_checkpointing = at * self.layers < self.recomputed * len(own)
        use_graphs(decoder_of(model), self.graphs and next(model.parameters()).is_cuda)  # a checkpoint's Fit may be a GPU's

    def halved(self, longest: int, device: str, recomputes: bool) -> "Fit | None":
        """Return what is tried next where memory was too small, without graphs; None: there is nothing left to try.

        Args:
            longest: tokens of the longest row, which no part can be shorter than.
            device: its type, which says from how many tokens on recomputing costs more than smaller parts do.
            recomputes: whether activations may be recomputed, and that would help.
        """
        if self.tokens > (enough := max(longest, ENOUGH_TOKENS[device])):
            return replace(self, tokens=max(enough, self.tokens // 2), graphs=False)
        if recomputes and self.recomputed < self.layers:
            return replace(self, recomputed=self.layers, graphs=False)
        return replace(self, tokens=max(longest, self.tokens // 2), graphs=False) if self.tokens > longest else None


def decoder_layers(model: nn.Module) -> list[Untyped]:
    """Return the layers whose activations can be recomputed."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def decoder_of(model: nn.Module) -> nn.Module:
    """Return what a policy, with adapters or without, or a critic computes hidden states with."""
    backbone = getattr(model, "backbone", None)
    return lora.without_peft(model).base_model if backbone is None else backbone


def settle(trainer: "MicroBatchedTrainer") -> Fit:
    """Find how many tokens fit, and how many layers have to be recomputed for it; all ranks find the same.

    Args:
        trainer: whose model, optimizer and device are looked at, before its first backward.

    Without a number from the user, it is a power of two, so that a little more or less of free memory is no other run: as many
    as fit, at most MOST_TOKENS, with as few layers recomputed as it takes to have ENOUGH_TOKENS.
    """
    policy, device = unwrapped(trainer.model), trainer.accelerator.device
    layers, asked, recompute = len(decoder_layers(policy)), trainer.tokens_per_microbatch, trainer.recompute
    models: list[Any] = [*trainer._models()]
    for model in models:
        if model.is_gradient_checkpointing:  # as it came: from here on it is decided here
            model.gradient_checkpointing_disable()
    # one model's activations are there at a time
    full = max(_bytes_of_a_token(model) / max(1, len(decoder_layers(model))) for model in models)
    kept = policy.config.get_text_config().hidden_size * _itemsize(policy)
    free = _usable(trainer)
    if trainer.accelerator.num_processes > 1:
        free = trainer.accelerator.gather(torch.tensor([float(free)], device=device)).min().item()

    def fits(recomputed: int) -> float:
        return free / (full * (layers - recomputed + BACKWARD) + kept * recomputed)

    choices = {True: [layers], False: [0], None: [round(layers * share / 4) for share in range(5)]}[recompute]
    wanted = asked or ENOUGH_TOKENS[device.type]
    recomputed = next((count for count in choices if fits(count) >= wanted), choices[-1])
    tokens = asked or min(MOST_TOKENS[device.type], 2 ** int(math.log2(max(LEAST_TOKENS, fits(recomputed)))))
    alone = device.type == "cuda" and trainer.accelerator.num_processes == 1 and not trainer.sharded
    alone = alone and trainer.gradients != "invariant"  # several processes have no graphs, whose padding may be in the bits
    dense = all(mixture_of(model.config) is None for model in models)  # a mixture has not been tried
    graphs = alone and dense and not recomputed and all(_waits_for_host(model, tokens) for model in models)
    return Fit(tokens, recomputed, layers, graphs)


def _waits_for_host(model: nn.Module, tokens: int) -> bool:
    """Return whether a forward and backward of so many tokens has less work than a host needs time to start its kernels."""
    layers, more = decoder_layers(model), ADAPTED if lora.ranks(model) else 1.0
    parameters = sum(p.numel() for layer in layers for p in layer.parameters())
    return parameters * tokens < HOST_BOUND * more * len(layers)


def _bytes_of_a_token(model: Any) -> float:
    """Return what a forward keeps of each token for the backward: of twice as many tokens less that of as many."""
    once, twice = (_saved_bytes(model, count * PROBE) for count in (1, 2))
    return (twice - once) / PROBE


def _saved_bytes(model: Any, tokens: int) -> int:
    device, saved = next(model.parameters()).device, dict[int, torch.UntypedStorage]()

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()  # held, or another tensor could get its place
        saved[storage.data_ptr()] = storage
        return x

    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None) or PROBE
    length = min(PROBE, 2 ** int(math.log2(positions)))  # of a row: divides PROBE
    ids = torch.arange(tokens, device=device).view(-1, length) % config.vocab_size
    batch = pack(ids, torch.ones_like(ids), length - 1)
    scored: dict[str, Any] = {"use_cache": False}
    if hasattr(model, "lm_head"):
        scored = {"token_ids": batch.token_ids, "predicted_from": batch.predicted_from, "temperature": 1.0}
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model(**batch.inputs, attention_mask=None, **scored)
    return sum(storage.nbytes() for storage in saved.values())


def _itemsize(model: Any) -> int:
    embeddings: Any = model.get_input_embeddings()
    return embeddings.compute_dtype.itemsize


def _usable(trainer: "MicroBatchedTrainer") -> float:
    """Return the bytes that activations may take.

    Of a GPU, what is free but for what the first step will add: gradients, Adam's moments, the head's logits. Of a CPU, a share
    of all memory, less if those leave less.
    """
    device = trainer.accelerator.device
    has_states = trainer.optimizer is not None and trainer.optimizer.state
    parameters = sum(local(p).numel() for _, p in trainer._trained() if p.requires_grad)
    to_come = parameters * (4 if has_states else STATES) + 3 * CHUNK_BYTES[device.type]
    if trainer.sharded:  # gradients are averaged, and cut, after the last part: until then each rank has its own, whole
        to_come += 4 * sum(p.numel() for _, p in trainer._trained() if p.requires_grad) * trainer.held_gradients
    else:
        to_come += 4 * parameters * (trainer.held_gradients - 1)
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return (torch.cuda.mem_get_info(device)[0] + unused) * USABLE["cuda"] - to_come
    total = _all_memory() / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(USABLE["cpu"] * total, total - to_come - 4 * parameters)


def _all_memory() -> float:
    """Return the bytes that the processes of this machine, or of this container, can have."""
    import psutil

    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    return min(psutil.virtual_memory().total, math.inf if text == "max" else float(text))
