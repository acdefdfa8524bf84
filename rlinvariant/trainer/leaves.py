"""The layer of the trainer by which a step's gradient does not depend on how many processes or micro-batches it had.

What `gradients=invariant` is made of:

* A leaf is the gradient that a forward and backward of one sample alone gives, without padding and without another's tokens: a
  kernel that is called with the same operands gives the same bits, so it depends on the sample and the weights.
* Leaves are added in float32, in a tree over the number that a sample has in its step (`models.leaves`). A process has
  neighbours in that order, a branch of the tree, and adds them; the top is the tree over ranks of `gradients=ordered`. So the
  number of processes is a power of two. Which samples a step has, and their tokens, is the same on any number.
* A leaf's loss is TRL's, divided by what the step has over all ranks: its tokens, or its samples, which are whole numbers.
  Nothing is divided after the sum: a subnormal number would be rounded then.
* TRL's micro-batches, gradient accumulation among them, are one batch, and a rollout is one step's; with `num_iterations` it is
  trained on again, by the same tree. DDP adds nothing; of weights in shards, FSDP hands on the gradients of each backward.
* `tokens_per_microbatch` is left to passes without gradients, whose log-probs it does not change; to give it is refused, as is
  all else that `gradients.gradients_problems` lists. Recomputing changes no bit. There are no CUDA graphs.

Methods of TRL's trainer, and of transformers' below it, that are overridden:

    _prepare_for_training   takes gradients from the parameters as they come
    training_step           gives the optimizer their sum, and the log the step's loss

B: samples of a rank, C: columns of the padded completions.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

from torch import Tensor

from rlinvariant.models.leaves import Leaves
from rlinvariant.text import say
from rlinvariant.trainer.microbatches import MicroBatchedTrainer
from rlinvariant.trainer.passes import SUMMED
from rlinvariant.types import JsonObject, JsonRow


def without_padding(part: JsonRow) -> JsonObject:
    """Return a part of one sample without the columns behind its completion, but one where that has no token."""
    width, length = part["completion_mask"].shape[1], max(1, part["completion_tokens"][0])

    def cut(key: str, x: Any) -> Any:
        of_tokens = isinstance(x, Tensor) and x.ndim > 1 and x.shape[1] == width and not key.startswith("prompt")
        return x[:, :length] if of_tokens else x

    return {key: cut(key, x) for key, x in part.items()}


class LeavesTrainer(MicroBatchedTrainer):
    """Adds a step's gradients as the module says, with `gradients=invariant`."""

    _leaves: Leaves | None = None

    @property
    def _adds_leaves(self) -> bool:
        return self.gradients == "invariant"

    @property
    def held_gradients(self) -> int:
        if not self._adds_leaves:
            return super().held_gradients
        return 1 + (self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps - 1).bit_length()

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)
        if self._adds_leaves and self._leaves is None:
            self._leaves = Leaves(self._trained(), self._models())
            if self.accelerator.is_main_process:
                held = f"{self.held_gradients} gradients of each parameter at once, at most"
                say(f"gradients=invariant: a forward and backward for each sample, whatever its tokens; {held}")
        return prepared

    def _parts_of(self, batch: Any) -> list[Tensor]:
        if self._leaves is None:
            return super()._parts_of(batch)
        order = batch["sample"].argsort()
        if batch["sample"][order].tolist() != list(range(len(order))):
            raise RuntimeError("gradients=invariant: a step's samples are not those of one rollout")
        self._leaves.begin(len(order))
        return list(order.split(1))

    def _weights_of(self, inputs: Any, parts: list[Tensor]) -> list[float]:
        if not self._adds_leaves:
            return super()._weights_of(inputs, parts)
        samples = len(parts) * self.accelerator.num_processes
        return [1.0 if self.loss_type in SUMMED else 1 / samples] * len(parts)

    def _part(self, batch: Any, rows: Tensor, weight: float) -> JsonObject:
        part = super()._part(batch, rows, weight)
        if not self._adds_leaves:
            return part
        tokens = part["num_items_in_batch"] * self.accelerator.num_processes  # by which TRL divides it, as DDP takes a mean
        return without_padding(part | {"num_items_in_batch": tokens})

    def _restore_progress(self, progress: dict[str, Any]) -> None:
        super()._restore_progress(progress)
        if self._adds_leaves and self._fit is not None:  # of a run that went on with other gradients
            self._fit = replace(self._fit, graphs=False)

    def _no_sync(self, model: Any) -> AbstractContextManager[None]:
        return nullcontext() if self._adds_leaves and self.sharded else super()._no_sync(model)

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self._leaves is None:
            return super().training_step(model, inputs, num_items_in_batch)
        with self._no_sync(model):
            loss = super().training_step(model, inputs, num_items_in_batch)
        self._leaves.finish()
        return loss * self.accelerator.num_processes  # of whose losses the mean is logged
