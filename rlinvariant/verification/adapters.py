"""LoRA adapters in `verify`: what is put around a model, and the faults that must be seen where there are adapters.

B = 0, as a new adapter has it, hides a side that ignores adapters: those that `--lora` asks for get random values.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from rlinvariant.models import adapter_files, lora
from rlinvariant.ops.lora import RANK_STEP, unpadded
from rlinvariant.types import Untyped
from rlinvariant.verification.pair import Pair
from rlinvariant.verification.relation import Relation

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rlinvariant.config import LoraConfig

Adapt = Callable[["PreTrainedModel"], Any]
"""Puts PEFT's model around a model."""


def adapt(directory: str | None, asked: "LoraConfig | None", seed: int) -> Adapt | None:
    """Return what puts adapters around a model: those of a directory, or random ones; None where there are to be none.

    Args:
        directory: PEFT's files; None: random adapters, if they are asked for.
        asked: the shape of random adapters; None: there are none.
        seed: decides the values of random adapters.
    """
    if directory is not None:
        return lambda model: adapter_files.loaded(model, directory)
    if asked is None:
        return None

    def random(model: "PreTrainedModel") -> Untyped:
        adapted = lora.applied(model, asked.peft_config(), seed)
        lora.randomise(adapted, seed)
        return adapted

    return random


def without(pair: Pair) -> Relation:
    """Draw with a sampler that has no adapters, and score with the trainer's."""
    relation = Relation("planted: the sampler without its adapters")
    with _synced(pair, lora.without(lora.adapters(pair.model))):
        _drawn_again(pair, relation)
    return relation


def merged(pair: Pair) -> Relation:
    """Draw with weights into which adapters are merged, as other systems sync them and `rlinvariant merge` writes them."""
    relation = Relation("planted: adapters merged into the sampler's weights")
    with _synced(pair, [*lora.merged(pair.model), *lora.without(lora.adapters(pair.model))]):
        drawn, scored = _drawn_again(pair, relation)
    apart = np.abs(np.concatenate(drawn) - np.concatenate(scored))
    relation.how = f"a merged export is {apart.mean():.2g} nats away on average, {apart.max():.2g} at most"
    return relation


def without_padding(pair: Pair) -> Relation:
    """Score again with A and B as they are, in the trainer, not padded to the step of a matrix unit."""
    relation = Relation("stock: the trainer's rank not padded")
    step = RANK_STEP[next(pair.model.parameters()).device.type]
    if not any(rank % step for rank in lora.ranks(pair.model).values()):
        relation.how, relation.shown = f"not run: every rank is a multiple of {step}; choose another, as --lora r=8", False
        return relation
    with unpadded():
        relation.add(pair.batch.scored, pair.score(pair.batch.requests, pair.batch.completions, pair.packed()))
    return relation


@contextmanager
def _synced(pair: Pair, weights: Iterable[tuple[str, Tensor]]) -> Iterator[None]:
    """Give the sampler other weights for a while."""
    try:
        pair.sampler.sync(weights)
        yield
    finally:
        pair.sampler.sync(lora.pairs(pair.model))


def _drawn_again(pair: Pair, relation: Relation) -> tuple[list[Any], list[np.ndarray]]:
    """Draw the batch again, add it to the relation, and return the log-probs of both sides."""
    requests = pair.batch.requests
    completions = [c for c in pair.draw(requests).completions if c is not None]
    drawn = [np.asarray(c.sampler_logprobs, np.float32) for c in completions]
    scored = pair.score(requests, completions, pair.packed())
    relation.add(drawn, scored)
    return drawn, scored
