"""The part of a server's engine that trainers ask, in the engine's process; arguments and results are plain values."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import safetensors
import torch
from vllm.config import CompilationMode

from rlinvariant.errors import UserError
from rlinvariant.models import lora
from rlinvariant.sampler import adapters, wire
from rlinvariant.sampler.engine import external
from rlinvariant.sampler.vllm_linear import pack_weights
from rlinvariant.types import JsonObject

ROOM_KEY = "rlinvariant_room"  # of vLLM's additional_config: ranks of the adapters that a trainer is expected to bring


class ForTrainers:
    """Answers `vllm_trainers.Trainers`; the other part of `vllm_serve.Worker` is vLLM's worker."""

    vllm_config: Any
    model_config: Any
    model_runner: Any

    def keep_drawn(self) -> None:
        """Keep, from now on, what is drawn."""
        self._drawn: dict[str, tuple[list[int], list[float]]] = {}
        self.model_runner.sampler.keep_drawn()

    def take_drawn(self, requests: Sequence[str], others: bool) -> dict[str, tuple[bytes, bytes]]:
        """Return tokens, int32, and log-probs, float32, of requests that have ended, by their names.

        Args:
            requests: their names, as the front end knows them.
            others: whether more requests are running, of which something is kept; else the rest, of cancelled ones, is dropped.
        """
        self.model_runner.sampler.add_drawn(self._drawn)
        inner = {external(name): name for name in self._drawn}
        taken = [(name, *self._drawn.pop(inner[name])) for name in requests]
        if not others:
            self._drawn.clear()
        return {name: (np.array(t, "<i4").tobytes(), np.array(x, "<f4").tobytes()) for name, t, x in taken}

    def unfit(self, ranks: dict[str, int]) -> str | None:
        """Say why this engine cannot have these adapters: ranks by the names of projections. None if it can."""
        if wrong := [r for r in ranks.values() if type(r) is not int or r < 1]:
            return f"lora.r={wrong[0]}: expected a whole number, 1 or more"
        if wide := lora.width_problem("lora.", max(ranks.values(), default=1), self.model_config.hf_config):
            return wide
        if (name := adapters.unknown(self.model_runner.get_model(), ranks)) is not None:
            return f"lora.target_modules has {name}, which this server's model has not"
        room = self.vllm_config.additional_config.get(ROOM_KEY, {})
        if self.vllm_config.compilation_config.mode == CompilationMode.NONE or ranks == room:
            return None
        if not room:
            return wire.COMPILED
        own, theirs = lora.in_words(room), lora.in_words(ranks) if ranks else "none"
        return f"it was compiled with room for {own}; the trainer has {theirs}; start it with --lora and the trainer's lora.*"

    def make_room(self, ranks: dict[str, int]) -> None:
        """Make room for the adapters that a trainer will bring, and for no others."""
        model = self.model_runner.get_model()
        if adapters.make_room(model, ranks):
            pack_weights(model)

    def take_weights(self, path: str) -> str | None:
        """Load the weights of a file of safetensors, by their Hugging Face names; say which of them there is no room for."""
        try:
            with torch.no_grad(), safetensors.safe_open(path, "pt") as file:
                self.model_runner.get_model().load_weights((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118
        except UserError as error:
            return str(error)

    def differing(self, expected: JsonObject) -> list[str]:
        """Name the parameters whose words do not have the sums of a trainer's weights, by `wire.checksums_to_json`."""
        return adapters.differing_checksums(self.model_runner.get_model(), wire.checksums_of(expected))
