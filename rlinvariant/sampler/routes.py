"""Keeps which experts the engine has sent each token to, of the positions that predict what is drawn.

R: rows of a step, one for each request, L: layers with experts.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from rlinvariant.models.routing import Routing, slots_of
from rlinvariant.rollout import Completion
from rlinvariant.sampler.engine import external
from rlinvariant.types import Untyped


class Routes:
    """Keeps the experts of every step of an engine's runner between `start` and `given`."""

    def __init__(self, runner: Untyped, slots: int) -> None:
        self.runner, self.routing = runner, Routing(runner.get_model(), slots)
        self._steps: list[tuple[list[str], np.ndarray, Tensor]] | None = None

    def start(self) -> None:
        """Keep the experts from here on, until `given`."""
        self._steps = []
        self.routing.begin()

    def note(self, rows: int) -> None:
        """Note a step, after its forward: the last token of each request predicts what is drawn for it now."""
        if self._steps is None:
            return
        batch = self.runner.input_batch
        positions = batch.num_tokens_no_spec[:rows].astype(np.int64) - batch.num_prompt_tokens[:rows]
        last = self.runner.query_start_loc.np[1 : rows + 1] - 1
        if (seen := self.routing.take()) is None:  # a block that is built otherwise
            self._steps = None
            return
        self._steps.append((list(batch.req_ids[:rows]), positions, seen[last]))
        self.routing.begin()

    def given(self, completions: Sequence[Completion], requests: Sequence[str]) -> list[Completion]:
        """Return the completions with the experts of each of their tokens; a position that was drawn twice has the last.

        Where a step's experts were not seen they are as they were.

        Args:
            completions, requests: what was drawn, and vLLM's id for each.
        """
        if self._steps is None:
            return list(completions)
        found: dict[str, dict[int, np.ndarray]] = {}
        for names, positions, experts_RL in self._steps:
            for name, position, experts_L in zip(names, positions.tolist(), experts_RL.cpu().numpy(), strict=True):
                found.setdefault(external(name), {})[position] = experts_L
        self._steps = None
        self.routing.end()
        return [
            replace(c, experts=np.stack([found[r][i] for i in range(len(c.token_ids))]) if c.token_ids else None)
            for c, r in zip(completions, requests, strict=True)
        ]


def routes(runner: Untyped) -> Routes | None:
    """Return what notes the experts of an engine's steps; None where it is no mixture, or its forward is compiled."""
    settings: Any = runner.model_config
    slots = slots_of(settings.hf_config) if settings.enforce_eager else None
    return None if slots is None else Routes(runner, slots)
