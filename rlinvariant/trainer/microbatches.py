"""The layer of the trainer that fills micro-batches by tokens: a step's rows in as few forwards as memory allows.

A forward here does not depend on what it is packed with, so a micro-batch may hold any rows. TRL counts rows: it is told that a
step has one micro-batch, or as few as the rollout's size allows, and what TRL calls a batch is cut in parts, each of at most
`tokens_per_microbatch` tokens. Each part's loss is TRL's, with the weight that the part has in the step; so losses and
gradients are those of one large batch, but for the order in which gradients are added. That order has to be the same after a
resume: the number of tokens is settled once, and a checkpoint holds it.

Methods of TRL's trainer, and of transformers' below it, that are overridden:

    train                   says in one line where else memory was too small
    _prepare_for_training   says how a step is divided
    training_step           starts an optimizer step again with half as many tokens where memory was too small for a pass
    _prepare_inputs         gives such a step its rows again
    compute_loss            runs forward and backward of all parts but the last

B: rows of a batch, b: of a part.
"""

import copy
import gc
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlinvariant.errors import UserError, one_line
from rlinvariant.models.shards import unwrapped
from rlinvariant.text import say
from rlinvariant.trainer.division import Rows, lengths, merged, pack_rows, rows_of, sizes_of
from rlinvariant.trainer.memory import Fit, settle
from rlinvariant.trainer.passes import TOKEN_MEANS, Pass, PassingTrainer, Unread
from rlinvariant.trainer.turns import sampled_mask
from rlinvariant.types import JsonObject, JsonRow

ENTROPY_STATE = ("_entropy_window_stats", "entropy_coef", "_last_world_entropy")  # what TRL's passes move of its controller


class MicroBatchedTrainer(PassingTrainer):
    """Takes an optimizer step in parts of so many tokens, as the module says. A stock trainer keeps TRL's micro-batches."""

    tokens_per_microbatch: int | None = None  # as the user asks for; None: as many as fit
    recompute: bool | None = None  # activations of all layers, or none; None: of as many as memory needs
    _fit: Fit | None = None
    _again: Any = None  # the batch that is taken once more
    _begins: bool = True  # whether the next batch begins an optimizer step
    _last_pass: int = -1  # the step that was trained on, and not taken yet if it is that of the trainer's state
    _marked: tuple[Any, ...]  # TRL's adaptive entropy, before the first pass of the step
    _marked_loss: Tensor  # the sum that is logged, before it
    _loss_before: Any = 0.0  # of all parts of a batch but the last
    _entropy_window_stats: Any
    _trainer_is_invariant: bool
    _buffered_inputs: Any
    _tr_loss: Tensor
    _step: int
    accelerator: Any
    optimizer: Any
    args: Any
    loss_type: str
    current_gradient_accumulation_steps: Any

    def _trl_args(self, args: Any) -> Any:
        """Return what TRL is given for the user's settings, in a copy of them."""
        args = copy.copy(args)
        if self._trainer_is_invariant:
            for name in ("ddp_find_unused_parameters", "ddp_broadcast_buffers"):  # each pass uses all; tables never change
                setattr(args, name, getattr(args, name) or False)
            for name in {"gradient_checkpointing", "activation_checkpointing"} & vars(args).keys():  # since transformers 5.24
                setattr(args, name, False)  # decided for each layer, when memory is known
            rows, steps = args.per_device_train_batch_size, args.gradient_accumulation_steps
            rows, steps, rollout = merged(rows, steps, args.steps_per_generation)
            args.per_device_train_batch_size, args.gradient_accumulation_steps, args.steps_per_generation = rows, steps, rollout
        return args

    def train(self, *args, **kwargs):
        """Train as TRL does, in micro-batches of as many tokens as fit, or as the user asks for."""
        self._again, self._window, self._begins, self._last_pass = None, [], True, -1
        try:
            return super().train(*args, **kwargs)
        except torch.OutOfMemoryError as error:
            problem = error.with_traceback(None)
        raise self._ended(self._why_too_small(), problem)

    def _ended(self, why: str, problem: torch.OutOfMemoryError) -> UserError:
        """Return the line with which a run ends where memory was too small."""
        return UserError(f"step {self.state.global_step + 1}: {why}; {self._last_checkpoint()}: {one_line(problem)}")

    def _why_too_small(self) -> str:
        """Say where memory was too small, outside of the passes that start again, and what helps."""
        less = "lower sampler.kv_cache_gib"
        if self._last_pass == self.state.global_step:
            return f"out of memory in the optimizer; {less}, choose an optim with smaller states, or use a smaller model"
        if not self._trainer_is_invariant:
            return f"out of memory; {less}, per_device_train_batch_size or max_completion_length"
        return f"out of memory outside of a pass; {less}, per_device_eval_batch_size or max_completion_length"

    # ---- dividing rows

    def _parts(self, lengths_B: Tensor, together: bool = False) -> list[Tensor]:
        """Return the rows of each part of a batch, int64, for the tokens of each row.

        Args:
            lengths_B: tokens of each row.
            together: whether all ranks divide a batch now: then all get as many parts, as they meet in each.
        """
        lengths, most = lengths_B.tolist(), self.fit.tokens
        parts = pack_rows(lengths, most)
        if together and self.accelerator.num_processes > 1:
            count = self.accelerator.gather(torch.tensor([len(parts)], device=lengths_B.device)).max().item()
            parts = pack_rows(lengths, most, int(count))
        return [torch.tensor(part, device=lengths_B.device) for part in parts]

    def _in_parts(self, lengths_B: Tensor, compute: Callable[[Rows], tuple[Tensor, ...]]) -> list[Tensor]:
        """Return what a function computes of all rows, part by part: of each of its tensors, [B, ...].

        With gradients, the rows are one part already. Without, nothing has to be undone where memory is too small: they are
        computed again in parts of half the tokens.

        Args:
            lengths_B: tokens of each row.
            compute: takes the rows of a part, and returns tensors [b, ...].
        """
        if torch.is_grad_enabled():
            computed = [*compute(slice(None))]
            if self._unread is not None:  # from here on, as a mode costs every call of torch's some time
                self._unread.enter_context(Unread())
            return computed
        while True:
            parts = self._parts(lengths_B, together=self.sharded)  # whose ranks meet in every forward
            try:
                found = [compute(rows) for rows in parts]
                break
            except torch.OutOfMemoryError as error:
                problem = error.with_traceback(None)  # whose frames hold what has to be freed
            self._halve(problem, int(lengths_B.max()), "scoring the rollout")
        back = torch.cat(parts).argsort()
        return [torch.cat(x)[back] for x in zip(*found, strict=True)]

    def _divide(self, batch: Any) -> list[Tensor]:
        """Return the rows of each part of a batch that all ranks are about to train on."""
        for model in self._models():
            self.fit.apply(model, self.args.gradient_checkpointing_kwargs)
        return self._parts_of(batch)

    def _parts_of(self, batch: Any) -> list[Tensor]:
        """Return the rows of each part, of a batch that all ranks divide now."""
        return self._parts(lengths(batch), together=True)

    def _part(self, batch: JsonRow, rows: Tensor, weight: float) -> JsonObject:
        """Return what a part's loss is computed of, for its rows and the share that it has in the batch's."""
        return rows_of(batch, rows, weight)

    def _models(self) -> Iterator[nn.Module]:
        """Yield the models whose forward and backward are divided."""
        yield unwrapped(self.model)

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield names and parameters of all that the optimizer trains."""
        yield from unwrapped(self.model).named_parameters()

    @property
    def held_gradients(self) -> int:
        """Return how many gradients of each parameter there are at once."""
        return 1

    @property
    def said_of_parts(self) -> JsonObject | None:
        """Return how a step is divided, for JSON; None for a stock trainer, which counts rows."""
        return asdict(self.fit) if self._trainer_is_invariant else None

    @property
    def fit(self) -> Fit:
        """Return how a step is divided; it is settled when it is first asked for. All ranks ask together then."""
        self.settle()
        assert self._fit is not None
        return self._fit

    def settle(self) -> None:
        """Find how a step is divided, unless that is known. All ranks call this."""
        if self._fit is None:
            self._fit = settle(self)

    # ---- a step in parts

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not (self.model.training and self._trainer_is_invariant):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        parts = self._divide(inputs)
        if not self._window:
            self._marked = tuple(getattr(self, name, None) for name in ENTROPY_STATE)
            self._marked_loss = self._tr_loss.clone()
        steps, weights = self.current_gradient_accumulation_steps, self._weights_of(inputs, parts)
        self._window.append(done := Pass(inputs, weights, [len(rows) for rows in parts]))
        whole = inputs | sizes_of(inputs) | (self._entropy_terms(inputs) if len(parts) > 1 else {})
        *earlier, last = [self._part(whole, rows, weight) for rows, weight in zip(parts, weights, strict=True)]
        inputs.pop("values", None)  # PPO's, of a rollout that is one part: their graph is used once
        self._loss_before = 0.0
        try:
            with self._passing(done), self._gathers_any_rows(len(inputs["prompt_ids"])) if earlier else nullcontext():
                for part, weight in zip(earlier, weights[:-1], strict=True):
                    self.current_gradient_accumulation_steps = steps / weight
                    with self._unsynced(model):
                        loss = super().compute_loss(model, part, num_items_in_batch=num_items_in_batch)
                        self.accelerator.backward(loss)
                    self._loss_before += loss.detach()
                self.current_gradient_accumulation_steps = steps / weights[-1]
                loss = super().compute_loss(model, last, num_items_in_batch=num_items_in_batch)
        finally:
            self.current_gradient_accumulation_steps = steps
        if "compared" in last:
            inputs.setdefault("compared", True)
        return loss

    def _weights_of(self, inputs: Any, parts: list[Tensor]) -> list[float]:
        """Return the share that each part's loss has in the batch's: of the rows, or of the tokens, as TRL's loss is a mean."""
        tokens_B = sampled_mask(inputs).sum(1)
        if self.loss_type not in TOKEN_MEANS:
            return [len(rows) / len(tokens_B) for rows in parts]
        tokens = torch.stack([tokens_B[rows].sum() for rows in parts]).tolist()
        return [own / sum(tokens) if own else 1.0 for own in tokens]  # without a token its loss is 0

    @contextmanager
    def _gathers_any_rows(self, most: int) -> Iterator[None]:
        """Let TRL gather a number for each row, of whose parts ranks have other numbers of rows: an all_gather takes as many.

        There are `most`, the rows of a batch. What is missing is NaN, which TRL leaves out of its minima and maxima.
        """
        accelerator = self.accelerator
        gather = accelerator.gather
        accelerator.gather = lambda x: gather(F.pad(x, (0, most - len(x)), value=math.nan) if x.ndim else x)
        try:
            yield
        finally:
            del accelerator.gather  # the class's own is seen again

    @contextmanager
    def _unsynced(self, model: Any) -> Iterator[None]:
        """Let a backward add to this rank's gradients alone, and TRL see that the step goes on."""
        state = self.accelerator.gradient_state
        syncs = state.sync_gradients
        state._set_sync_gradients(False)
        try:
            with self._no_sync(model):
                yield
        finally:
            state._set_sync_gradients(syncs)

    def _no_sync(self, model: Any) -> AbstractContextManager[None]:
        """Let backwards add to this rank's gradients alone."""
        return self.accelerator.no_sync(model)

    # ---- memory that was too small

    def training_step(self, model, inputs, num_items_in_batch=None):
        if not self._trainer_is_invariant:
            return super().training_step(model, inputs, num_items_in_batch)
        if self._begins:
            self._window, self._begins = [], False
        before = len(self._window)
        try:
            loss, problem = super().training_step(model, inputs, num_items_in_batch), None
        except torch.OutOfMemoryError as error:
            loss, problem = None, error.with_traceback(None)  # whose frames hold what has to be freed
        while problem is not None:
            if len(self._window) == before:  # the rollout, and not a pass
                fix = "lower sampler.kv_cache_gib, the rows of a step or max_completion_length"
                raise self._ended(f"out of memory before a pass; {fix}", problem)
            self._halve(problem, max(int(lengths(x.batch).max()) for x in self._window), "the step")
            self._undo()
            loss, problem = self._take_window(model, num_items_in_batch)
        self._begins = bool(self.accelerator.sync_gradients)
        if self._begins:
            self._finish_passes()
            self._last_pass = self.state.global_step
        return loss + self._loss_before

    def _prepare_inputs(self, generation_batch):
        return super()._prepare_inputs(generation_batch) if self._again is None else self._again

    def _halve(self, problem: torch.OutOfMemoryError, longest: int, what: str) -> None:
        """Let parts have half as many tokens, or activations be recomputed; `longest` are the tokens of the longest row.

        Raises:
            UserError: nothing is left to try: memory is too small for one row, or other ranks wait in the same step; or weights
                are in shards, whose unit in progress cannot start again.
        """
        several, too_small = self.accelerator.num_processes > 1, f"out of memory with {self.fit}"
        recomputes = torch.is_grad_enabled() and self.recompute is None  # without gradients nothing is kept
        fit = None if several or self.sharded else self.fit.halved(longest, self.accelerator.device.type, recomputes)
        if fit is None:
            fix = "lower tokens_per_microbatch or sampler.kv_cache_gib, or use a smaller model"
            why = f"the longest row has {longest:,} tokens"
            if several or self.sharded:
                why = "other processes are in the same step" if several else "a layer in shards cannot start again"
            raise self._ended(f"{too_small}; {why}; {fix}", problem)
        say(f"step {self.state.global_step + 1}: {too_small}; {what} starts again with {fit}")
        self._fit = fit
        for model in self._models():
            fit.apply(model, self.args.gradient_checkpointing_kwargs)  # which frees the graphs
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _undo(self) -> None:
        """Forget what the passes of this optimizer step have added, and nothing else: rollouts between them stay."""
        for _, parameter in self._trained():
            parameter.grad = None  # accelerate's optimizer does nothing in the middle of a step
        for done in self._window:
            if done.batch.get("compared") is True:
                del done.batch["compared"]
        for name, value in zip(ENTROPY_STATE, self._marked, strict=True):
            setattr(self, name, value)
        self._tr_loss.copy_(self._marked_loss)

    def _take_window(self, model: Any, num_items_in_batch: Any) -> tuple[Any, torch.OutOfMemoryError | None]:
        """Take the micro-batches of this step once more; return the last one's loss, or why there is none."""
        window, first = self._window, self._step - len(self._window) + 1
        self._window, self._step, loss = [], first, None
        try:
            for at, done in enumerate(window):
                self._again = done.batch
                with ExitStack() as stack:
                    if at < len(window) - 1:
                        stack.enter_context(self._unsynced(model))
                    loss = super().training_step(model, done.batch, num_items_in_batch)
                if at < len(window) - 1:  # the last one's is added by whoever called for it
                    self._tr_loss += loss + self._loss_before
        except torch.OutOfMemoryError as error:
            missing = window[len(self._window) :]
            self._window += [Pass(done.batch) for done in missing]
            self._step = first + len(window) - 1
            return None, error.with_traceback(None)
        finally:
            self._again = None
        return loss, None

    # ---- over a resume

    def _progress(self) -> dict[str, Any]:
        asked = {"tokens": self.tokens_per_microbatch, "recompute": self.recompute}
        return super()._progress() | {"fit": None if self._fit is None else {"asked": asked, "found": asdict(self._fit)}}

    def _restore_progress(self, progress: dict[str, Any]) -> None:
        super()._restore_progress(progress)
        fit = progress.get("fit")  # checkpoints of earlier versions have none
        if fit is not None and fit["asked"] == {"tokens": self.tokens_per_microbatch, "recompute": self.recompute}:
            self._fit = Fit(**fit["found"])

    def _prepare_for_training(self, *args, **kwargs):
        prepared = super()._prepare_for_training(*args, **kwargs)
        if self._trainer_is_invariant:  # only now is it known: a checkpoint's number holds
            self.settle()
            if self.accelerator.is_main_process:
                say(str(self._fit))
        return prepared
