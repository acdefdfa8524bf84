"""A pass over a batch, forward and backward of all its parts, and what it leaves for the end of its optimizer step.

A host that asks a device for a number waits until all kernels before it have run, and starts none of those that follow. So a
pass asks for none: what is to be compared, measured or noted of it stays on the device, and is put off until the last backward
of the optimizer step is under way. Nothing is lost by it: that is before gradients are clipped and the step is taken.

Method of TRL's trainer that is overridden:

    _compute_loss           lets TRL note numbers of a part without reading them
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from trl.trainer import grpo_trainer

from rlinvariant.trainer.entropy import WholeEntropyTrainer

TOKEN_MEANS = ("bnpo", "dapo", "cispo", "vespo")  # TRL's losses that are means over tokens; the others are means over rows
SUMMED = ("dapo", "cispo", "vespo")  # of these, those whose parts are normalised by the tokens of the whole step

_trl: Any = grpo_trainer


@dataclass
class Pass:
    """Holds a batch that is trained on.

    Args:
        batch: as TRL gives it.
        weights, rows: of each of its parts, the share that its loss has in the batch's, and how many rows it has.
        noted: what TRL notes of each part, by name: numbers, or tensors [] that nobody has read.
        later: what is put off, in order.
    """

    batch: dict[str, Any]
    weights: list[float] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    noted: dict[str, list[Any]] = field(default_factory=lambda: defaultdict(list))
    later: list[Callable[[], object]] = field(default_factory=list)


class Unread(TorchFunctionMode):
    """Gives whoever asks a tensor for its number the tensor itself, and TRL's minima and maxima without asking for one.

    What is made of a Python number is filled in on the device. TRL notes the mean, least and greatest of what it has computed,
    and does nothing else with them.
    """

    def __enter__(self) -> Self:
        self._kept = _trl.nanmin, _trl.nanmax
        _trl.nanmin, _trl.nanmax = nanmin, nanmax
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        _trl.nanmin, _trl.nanmax = self._kept
        super().__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.item:
            return args[0].detach()
        if func is torch.tensor and isinstance(args[0], float):  # a copy, for which the host waits
            return torch.full((), args[0], **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def nanmin(values: Tensor) -> Tensor:
    """Return the least of some numbers [n], n > 0, but NaN, as a tensor []; NaN where all are."""
    least = torch.where(values.isnan(), math.inf, values).min()
    return torch.where(values.isnan().all(), math.nan, least)


def nanmax(values: Tensor) -> Tensor:
    """Return the greatest of some numbers [n], n > 0, but NaN, as a tensor []; NaN where all are."""
    return -nanmin(-values)


class PassingTrainer(WholeEntropyTrainer):
    """Keeps what is to be read of a step until its end, as the module says."""

    _window: list[Pass]  # over the batches of the optimizer step in progress
    _pass: Pass | None = None  # of these, the one in progress
    _unread: ExitStack | None = None  # closed when TRL's loss of a part has been computed
    _metrics: Any
    loss_type: str

    def _compute_loss(self, model, inputs):
        if self._pass is None or self.use_adaptive_entropy:  # which TRL asks whether it is above its target
            return super()._compute_loss(model, inputs)
        with ExitStack() as self._unread:
            try:
                return super()._compute_loss(model, inputs)
            finally:
                self._unread = None

    @contextmanager
    def _passing(self, started: Pass) -> Iterator[None]:
        """Keep what is noted, and what is put off, with a pass."""
        noted, self._metrics["train"], self._pass = self._metrics["train"], started.noted, started
        try:
            yield
        finally:
            self._metrics["train"], self._pass = noted, None

    def _put_off(self, note: Callable[[], object]) -> None:
        """Call a function after the last backward of the optimizer step; at once, if no pass is in progress."""
        if self._pass is None:
            note()
        else:
            self._pass.later.append(note)

    def _finish_passes(self) -> None:
        """Do what the passes of the optimizer step have put off: the host waits here for the device. All ranks call this."""
        for done in self._window:
            for note in done.later:
                note()
            self._weigh_metrics(done)
            for key, values in done.noted.items():
                self._metrics["train"][key].extend(values)
        self._window = []

    def _weigh_metrics(self, done: Pass) -> None:
        """Make one number of what TRL has noted of each part, as the whole batch's would be; the losses have `weights`."""
        for key, values in done.noted.items():
            values[:] = [x.item() if isinstance(x, Tensor) else x for x in values]
            if len(values) == len(done.rows) > 1:
                share = done.weights if key == "policy_loss" else done.rows
                total = math.fsum(x * w for x, w in zip(values, share, strict=True)) / sum(share)
                values[:] = [math.fsum(values) if key == "policy_loss" and self.loss_type in SUMMED else total]
