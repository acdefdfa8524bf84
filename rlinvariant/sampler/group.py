"""One engine for several processes of a trainer: each draws the requests of all, and keeps its own.

The processes of an engine compute each of its steps together, so none may ask alone. They exchange what each asks for, and ask
the engine for all of it, in the order of their ranks. One whose rollout has ended before the others' goes on to do so, in
`finish`, until none asks for more.
"""

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import NamedTuple

from torch import Tensor

from rlinvariant.rollout import Completion
from rlinvariant.sampler.engine import Sampler
from rlinvariant.types import JsonObject, Untyped


class _Call(NamedTuple):
    """Holds the arguments of a `generate`."""

    prompts: Sequence[Sequence[int]]
    seeds: Sequence[int]
    limits: Sequence[int]
    how: JsonObject


class GroupSampler(Sampler):
    """Draws as `Sampler` does, for processes that ask for different things. All processes of the engine make the same calls.

    What a request draws depends on its own prompt and seed: it is the same whoever asks, and in an engine of one process.
    """

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        *,
        temperature: float,
        max_tokens: int | Sequence[int],
        stop_token_ids: Sequence[int] = (),
        **sampling: Untyped,
    ) -> list[Completion]:
        """Draw one completion for each prompt of this process; arguments and errors are those of `Sampler.generate`.

        Raises:
            RuntimeError: another process asks for another temperature, or for other settings.
        """
        limits = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else max_tokens
        how = {"temperature": temperature, "stop_token_ids": list(stop_token_ids), **sampling}
        return self._drawn_together(_Call(prompts, seeds, limits, how)) or []

    def memory_of(self, weights: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Return nothing: this process's memory of a weight is some rows of it."""
        return {}

    def finish(self) -> None:
        """Draw what the other processes ask for, until none asks for more."""
        while self._drawn_together(None) is not None:
            pass

    def _drawn_together(self, own: _Call | None) -> list[Completion] | None:
        """Draw what all processes ask for, and return what this one asked for; None where nobody asks."""
        from rlinvariant.sampler.vllm_columns import of_all, rank

        calls = of_all(own)
        asked = [call for call in calls if call is not None]
        if not asked:
            return None
        if any(call.how != asked[0].how for call in asked):
            raise RuntimeError(f"processes of one engine ask for different settings: {[call.how for call in asked]}")
        prompts, seeds, limits = (list(chain.from_iterable(parts)) for parts in zip(*(call[:3] for call in asked), strict=True))
        drawn = super().generate(prompts, seeds, max_tokens=limits, **asked[0].how)
        first = sum(len(call.prompts) for call in calls[: rank()] if call is not None)
        return drawn[first : first + len(own.prompts)] if own is not None else []
