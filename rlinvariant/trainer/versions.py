"""The versions of the weights that sampler, last rollout and disk hold: a version counts the optimizer steps done.

Equal versions do not show that weights are equal: somebody may have loaded others, or edited them. Nor do the counters in
tensors (`Tensor._version`), which fused optimizers and writes to `.data` leave as they are. `InvariantGRPOTrainer.sync` takes
another version for a change, and compares the bits where the version is the same.
"""

from collections import deque
from collections.abc import Iterable

from torch import Tensor

from rlinvariant.models.shards import local
from rlinvariant.types import JsonObject

Weights = Iterable[tuple[str, Tensor]]


class PolicyVersions:
    """Counts versions of the policy, and keeps copies of older weights, or of this process's shards, for a sampler that lags.

    Args:
        staleness: how many optimizer steps the sampler's weights lag behind in training; as many fp32 copies of the
            weights are held in host memory.
    """

    def __init__(self, staleness: int) -> None:
        self.staleness = staleness
        self.rollout = self.rollout_step = 0  # the version that sampled the last rollout for training, and when it did
        self._older: deque[tuple[int, dict[str, Tensor]]] = deque(maxlen=staleness)  # oldest first
        self.forget()

    def forget(self) -> None:
        """Start anew: nothing is known of the sampler, and the disk holds whatever the first rollout is sampled with."""
        self.sampler: int | None = None
        self.disk: int | None = None
        self._older.clear()

    def state(self) -> dict[str, object]:
        """Return what a resumed run needs to know, for `restore`."""
        return {"rollout": self.rollout, "rollout_step": self.rollout_step, "older": list(self._older)}

    def restore(self, state: JsonObject, disk: int) -> None:
        """Take over what `state` returned, where the disk holds the weights of `disk` optimizer steps."""
        self.rollout, self.rollout_step, self.disk = state["rollout"], state["rollout_step"], disk
        self._older.extend(state["older"])

    def to_sample_with(self, step: int, stale: bool) -> tuple[int, dict[str, Tensor] | None]:
        """Return the version that the sampler should have, and its weights; None: those that the trainer has now.

        Args:
            step: optimizer steps done so far.
            stale: whether the sampler is to lag behind; as far as there are older versions yet.
        """
        return self._older[0] if stale and self._older else (step, None)

    def keep(self, step: int, weights: Weights) -> None:
        """Copy the weights before the optimizer step that follows `step`, once, if the sampler will need them later."""
        if self.staleness and not (self._older and self._older[-1][0] == step):
            self._older.append((step, {name: local(w.detach()).to("cpu", copy=True) for name, w in weights}))

    def edited(self) -> None:
        """Note that the weights have changed without an optimizer step: no checkpoint has them, until the next is saved."""
        self.disk = -1

    def sampled(self, step: int) -> None:
        """Note that a rollout for training was sampled after `step` optimizer steps."""
        assert self.sampler is not None, "no weights were synced"
        self.rollout, self.rollout_step = self.sampler, step
        self.disk = step if self.disk is None else self.disk

    @property
    def on_policy(self) -> bool:
        """Return whether the last rollout was sampled with the weights that the trainer had then."""
        return self.rollout == self.rollout_step

    def on_disk(self, step: int) -> bool:
        """Return whether the weights that a rollout was sampled with just now can be loaded again."""
        return self.disk == self.sampler == step
