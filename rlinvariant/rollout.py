"""The values that sampler and trainer share about one rollout."""

import hashlib
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rlinvariant.types import Untyped

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Completion:
    """Holds what the sampler returns for one request.

    Args:
        token_ids: the sampled tokens, the end token included when it was sampled.
        sampler_logprobs: one fp32 value per token, held in Python floats (which hold every fp32 exactly).
        cached_tokens: how many of its prompt's tokens came from the prefix cache: the engine's work, which two equal ones may
            differ in.
        experts: of a mixture, a number for each token and layer with experts, [tokens, layers] int64: the same where the
            position that predicts it went to the same experts; None where the engine does not say. `models.routing` makes them.
    """

    token_ids: list[int]
    sampler_logprobs: list[float]
    cached_tokens: int = field(default=0, compare=False)
    experts: "np.ndarray | None" = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if len(self.token_ids) != len(self.sampler_logprobs):
            raise ValueError(f"a completion of {len(self.token_ids)} tokens came with {len(self.sampler_logprobs)} log-probs")


RANGES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "top_k": (lambda x: x is None or (type(x) is int and x >= -1), "a whole number of tokens, 1 or more; or 0: no limit"),
    "top_p": (lambda x: isinstance(x, int | float) and 0 < x <= 1, "more than 0 and at most 1; 1.0: no limit"),
    "min_p": (lambda x: x is None or (isinstance(x, int | float) and 0 <= x < 1), "0 or more and less than 1; 0: no limit"),
}
"""Setting of truncated sampling -> whether it can have a value, and which are expected."""


@dataclass(frozen=True)
class Truncation:
    """Says which tokens a request is drawn from: the likeliest, as `ops.threshold` keeps them; by default all.

    Args:
        top_k: so many, and their equals; 0: no limit.
        top_p: so many that they have this share of the probability, and their equals; 1: no limit.
        min_p: those that have this share of the likeliest token's probability; 0: no limit.
    """

    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    @classmethod
    def of(cls, settings: Untyped) -> "Truncation":
        """Take the fields of `trl.GRPOConfig`, in which None, and for top_k -1 too, is no limit."""
        return cls(max(settings.top_k or 0, 0), 1.0 if settings.top_p is None else settings.top_p, settings.min_p or 0.0)

    def __bool__(self) -> bool:
        return self != Truncation()

    def settings(self, prefix: str = "") -> list[str]:
        """Return what differs from the default, as the user writes it: ["top_k=20", "top_p=0.9"]."""
        return [f"{prefix}{f.name}={getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) != f.default]

    def __str__(self) -> str:
        return ", ".join(self.settings())


ALL_TOKENS = Truncation()
"""The truncation that drops no token."""


@dataclass(frozen=True)
class Batch:
    """Holds requests that one engine drew together, as of one turn.

    Args:
        prompts: token ids of each; of a later turn, with all that came before it.
        seeds: one for each.
        completions: what came back.
        max_tokens: most tokens of each; None: the rollout's for all.
    """

    prompts: Sequence[Sequence[int]]
    seeds: Sequence[int]
    completions: Sequence[Completion]
    max_tokens: Sequence[int] | None = None


@dataclass(frozen=True)
class Rollout:
    """Holds all that a step drew, and what it takes to draw it again.

    Args:
        batches: of every rank, in order of ranks; of a step that samples more than once, or in turns, in order of time.
        temperature, max_tokens, stop_token_ids: as for `Sampler.generate`.
        weights_sha256: `bits.digest` of the parameters that it was drawn with; of weights in shards, `checksums.digest`.
        truncation: which tokens it was drawn from.
    """

    batches: Sequence[Batch]
    temperature: float
    max_tokens: int
    stop_token_ids: Sequence[int]
    weights_sha256: str
    truncation: Truncation = ALL_TOKENS

    @property
    def requests(self) -> list[tuple[Sequence[int], int, int]]:
        """Return prompt, seed and most tokens of each request, in order."""
        return [request for batch in self.batches for request in self.requests_of(batch)]

    def requests_of(self, batch: Batch) -> list[tuple[Sequence[int], int, int]]:
        """Return the same of one batch."""
        most = batch.max_tokens or [self.max_tokens] * len(batch.seeds)
        return list(zip(batch.prompts, batch.seeds, most, strict=True))

    @property
    def completions(self) -> list[Completion]:
        return [completion for batch in self.batches for completion in batch.completions]


def runs(token_ids: Sequence[int], tool_mask: Sequence[int]) -> list[tuple[bool, list[int]]]:
    """Return the parts of a completion between which sampled tokens and others meet: whether sampled, and the tokens."""
    pairs = groupby(zip(tool_mask, token_ids, strict=True), key=lambda pair: bool(pair[0]))
    return [(sampled, [token for _, token in run]) for sampled, run in pairs]


def is_cut(token_ids: Sequence[int], end_ids: Collection[int]) -> bool:
    """Say whether a completion was cut by its limit: it does not end in a token that ends one."""
    return not token_ids or token_ids[-1] not in end_ids


def request_seed(run_seed: int, step: int, prompt: int, sample: int) -> int:
    """Derive the sampling seed of one request from its place in the run.

        seed = first 8 bytes of blake2b("run_seed/step/prompt/sample"), big-endian, without the lowest bit

    Args:
        run_seed: the seed of the run.
        step: the step at which the rollout is sampled.
        prompt: index of the prompt in that step, counted over all ranks.
        sample: index of the completion among those of that prompt.

    Returns:
        An int in [0, 2**63), which torch's generators and vLLM's `SamplingParams.seed` both accept.

    Raises:
        TypeError: an argument is no integer (2 and 2.0 would be two seeds).

    Bits: depends on the four integers alone; the same in every process, on every machine, in every Python version.
    """
    place = "/".join(str(operator.index(part)) for part in (run_seed, step, prompt, sample))
    return int.from_bytes(hashlib.blake2b(place.encode(), digest_size=8).digest(), "big") >> 1
