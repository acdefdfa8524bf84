"""The values that sampler and trainer share about one rollout."""

import hashlib
import operator
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import groupby


@dataclass(frozen=True)
class Completion:
    """Holds what the sampler returns for one request.

    Args:
        token_ids: the sampled tokens, the end token included when it was sampled.
        sampler_logprobs: one fp32 value per token, held in Python floats (which hold every fp32 exactly).
    """

    token_ids: list[int]
    sampler_logprobs: list[float]

    def __post_init__(self) -> None:
        if len(self.token_ids) != len(self.sampler_logprobs):
            raise ValueError(f"a completion of {len(self.token_ids)} tokens came with {len(self.sampler_logprobs)} log-probs")


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
        weights_sha256: `bits.digest` of the parameters that it was drawn with.
    """

    batches: Sequence[Batch]
    temperature: float
    max_tokens: int
    stop_token_ids: Sequence[int]
    weights_sha256: str

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
