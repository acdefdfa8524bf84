"""TRL's GRPO trainer with checkpoints that are whole or absent, hold no pickle, and continue a run at any step.

A checkpoint has what TRL and transformers save for others to load (model.safetensors, config.json, the tokenizer,
trainer_state.json), `manifest.json`, by which `rlinvariant.checkpoints` knows every byte, and what a run needs to go on:

    training/state.safetensors     optimizer, scheduler, gradient scaler, a reference that moves (`sync_ref_model`), and what
                                   else all ranks share
    training/rank-R.safetensors    of rank R: random number generators, the rollout in progress, counters; where ranks have
                                   shards of the weights, its optimizer's state too

Methods of TRL's trainer, and of transformers' below it, that are overridden:

    train                           finds the checkpoint to go on from, and waits for the last one to be on the disk
    _save_checkpoint                lets TRL save into a hidden directory, which a thread hashes, flushes and renames
    _get_output_dir                 is that directory meanwhile
    _save_optimizer_and_scheduler, _save_scaler, _save_rng_state
    _load_optimizer_and_scheduler, _load_scaler, _load_rng_state
                                    write and read our files in place of pickles
    _init_training_state            brings the order of the data to the epoch of the checkpoint
    _get_train_sampler              keeps the sampler for that
    _issue_warnings_after_load      stops where a weight is missing or unknown
    _load_best_model                waits for the best one to be on the disk
"""

import random
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from rlinvariant import checkpoints
from rlinvariant.checkpoints import FREE_SPACE, Checkpoint
from rlinvariant.errors import UserError
from rlinvariant.files import disk_errors
from rlinvariant.launch import on_main_process
from rlinvariant.models import shards
from rlinvariant.models.shards import unwrapped
from rlinvariant.trainer import state_file
from rlinvariant.trainer.published import PublishedTrainer

SHARED_STATE = "training/state.safetensors"
RANK_STATE = "training/rank-{}.safetensors"


class CheckpointedTrainer(PublishedTrainer):
    """Saves and resumes as the module says; everything else is `PublishedTrainer`'s and TRL's."""

    optimizer: Any
    lr_scheduler: Any
    save_minutes: float | None = None  # the longest time between two checkpoints, in minutes; None: as save_steps says alone
    on_save: Callable[[], Mapping[str, Any]] | None = None  # called on the main process; returns what else the manifest holds
    _saving: threading.Thread | None = None
    _saving_error: BaseException | None = None
    _resumed: Checkpoint | None = None
    _owes_evaluation: bool = False  # of the step that is saved, after which the run stopped
    _last_save: float | None = None  # time.perf_counter() of the main process

    def train(self, resume_from_checkpoint: str | bool | Checkpoint | None = None, *args, **kwargs):
        """Train as TRL does.

        Args:
            resume_from_checkpoint: a checkpoint's directory; True for the newest whole one in `args.output_dir`; a checkpoint
                that was verified already.

        Raises:
            DamagedCheckpoint: the directory is no whole checkpoint.
            UserError: no checkpoint is whole, or it is not of this kind of run.
            DiskError: a checkpoint cannot be written.
        """
        checkpoint = self._resumed = self._checkpoint(resume_from_checkpoint)
        if checkpoint is not None:
            self._require_same_kind(checkpoint)
        self._last_save, self._step, self._buffered_inputs = None, 0, None
        try:
            result = super().train(None if checkpoint is None else str(checkpoint.path), *args, **kwargs)
        except KeyboardInterrupt:
            raise  # at once: a checkpoint that is not on the disk yet is given up
        except BaseException:
            if self._saving is not None:
                self._saving.join()
            raise
        self._wait_for_disk()
        return result

    def _checkpoint(self, asked: str | bool | Checkpoint | None) -> Checkpoint | None:
        """Find the checkpoint that is meant."""
        if not asked or isinstance(asked, Checkpoint):
            return asked or None
        return on_main_process(lambda: self._named(Path(asked)) if isinstance(asked, str) else self._newest())

    def _named(self, path: Path) -> Checkpoint:
        if not path.is_dir():
            raise UserError(f"resume_from_checkpoint={path}: no such directory; True takes the newest one")
        return checkpoints.verified(path)

    def _newest(self) -> Checkpoint:
        found, damages = checkpoints.newest(Path(self.args.output_dir))
        if found is None:
            none = f"resume_from_checkpoint=True: no whole checkpoint in {self.args.output_dir}"
            raise UserError("\n".join([none, *damages]))
        return found

    def _require_same_kind(self, checkpoint: Checkpoint) -> None:
        """Refuse a checkpoint that this trainer could only half take over."""
        checkpoint.require_layout(self.accelerator.num_processes, self.sharded)
        weights = {True: "LoRA adapters", False: "whole weights"}
        adapted = (checkpoint.path / shards.ADAPTER).is_file()
        own = (self._kind, weights[hasattr(self.model, "peft_config")])
        for theirs, ours in zip((checkpoint.about["trainer"], weights[adapted]), own, strict=True):
            if theirs != ours:
                why = f"written by a run of {theirs}, this one is of {ours}; start a new run"
                raise UserError(f"{checkpoint.path}: {why}", agreed=True)

    # ---- saving

    def _save_checkpoint(self, model, trial):
        self._wait_for_disk()
        directory, step, main = Path(self.args.output_dir), self.state.global_step, self.accelerator.is_main_process
        partial = directory / checkpoints.PARTIAL
        if main:
            checkpoints.clean(directory)
        self.accelerator.wait_for_everyone()
        self._saving_to = str(partial)
        try:
            with disk_errors(directory, FREE_SPACE):
                super()._save_checkpoint(model, trial)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        finally:
            self._saving_to = None
        self.accelerator.wait_for_everyone()
        if main:
            about = {
                "processes": self.accelerator.num_processes,
                "trainer": self._kind,
                "sharded": self.sharded,
                **(self.on_save() if self.on_save else {}),
            }
            self._start_finishing(partial / f"checkpoint-{step}", directory / f"checkpoint-{step}", step, about)

    def _start_finishing(self, partial: Path, path: Path, step: int, about: Mapping[str, Any]) -> None:
        """Hash, flush and rename while training goes on: a checkpoint is there when its last byte is on the disk."""
        ranks = [RANK_STATE.format(rank) for rank in range(about["processes"])]
        if missing := [name for name in ranks if not (partial / name).is_file()]:
            shared = "all hosts must see the run's directory; put it on a file system that they share"
            raise UserError(f"{path}: {missing[0]} is missing: {shared}")
        keep, best = self.args.save_total_limit, self.state.best_model_checkpoint

        def work() -> None:
            try:
                checkpoints.finish(partial, path, step, about)
                partial.parent.rmdir()
                checkpoints.rotate(path.parent, keep, step, best)
            except BaseException as error:
                self._saving_error = error

        self._saving = threading.Thread(target=work, name=path.name, daemon=True)
        self._saving.start()

    def _wait_for_disk(self) -> None:
        """Wait until the last checkpoint is on the disk, and raise what went wrong with it."""
        if self._saving is not None:
            self._saving.join()
            self._saving, error = None, self._saving_error
            self._saving_error = None
            if error is not None:
                with disk_errors(Path(self.args.output_dir), FREE_SPACE):
                    raise error

    def _last_checkpoint(self) -> str:
        """Say which checkpoint is the last; one that is being written is waited for."""
        if self._saving is not None:
            self._saving.join()
        steps = [step for step, _ in checkpoints.found(Path(self.args.output_dir))]
        return f"checkpoint-{max(steps)} is the last" if steps else "there is no checkpoint"

    def _save_if_due(self, now: float) -> None:
        """Ask for a checkpoint if the last is `save_minutes` old; `now` is the main process's clock, the same on all ranks."""
        if self._last_save is None or self.control.should_save:
            self._last_save = now
        elif self.save_minutes is not None and now - self._last_save >= 60 * self.save_minutes:
            self.control.should_save, self._last_save = True, now

    def _get_output_dir(self, trial):
        return self._saving_to or super()._get_output_dir(trial)

    def _save_optimizer_and_scheduler(self, output_dir):
        if self.args.should_save:
            state_file.write(Path(output_dir) / SHARED_STATE, self._shared_state())

    def _save_scaler(self, output_dir):
        pass  # part of the shared state

    def _save_rng_state(self, output_dir):
        """Write what is this rank's own; and name the best checkpoint, which transformers looks for in the hidden directory."""
        best = Path(self.args.output_dir) / f"checkpoint-{self.state.best_global_step}"
        if self.state.best_global_step == self.state.global_step or best.is_dir():
            self.state.best_model_checkpoint = str(best)
        rank = RANK_STATE.format(self.accelerator.process_index)
        own = {"generators": _generators(), "progress": self._progress()}
        own |= {"optimizer": shards.optimizer_state(self.optimizer)} if self.sharded else {}
        state_file.write(Path(output_dir) / rank, own)

    def _shared_state(self) -> dict[str, Any]:
        """Return what a run needs to go on, beside the weights, and has the same on all ranks."""
        scaler = getattr(self.accelerator, "scaler", None)
        return {
            "optimizer": None if self.sharded else self.optimizer.state_dict(),
            "scheduler": self.lr_scheduler.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "reference": dict(self._moving_reference()),
        }

    def _moving_reference(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the reference's weights, if they follow the policy's; those that stay are loaded where they came from."""
        if self.args.sync_ref_model:
            yield from unwrapped(self.ref_model).named_parameters()

    def _progress(self) -> dict[str, Any]:
        """Return what this rank needs to take its next step as if it had not stopped."""
        done = self._step % (self.args.steps_per_generation * self.num_iterations) == 0
        rollout = None if done else self._buffered_inputs
        return {"micro_steps": self._step, "rollout": rollout, "owes_evaluation": self._owes_evaluation}

    def _put_off_evaluation(self) -> None:
        """Leave a due evaluation, but not that of the last step, to the run that goes on: one that is to stop has seconds."""
        if self.state.global_step < self.state.max_steps:
            self._owes_evaluation, self.control.should_evaluate = self.control.should_evaluate, False

    # ---- resuming

    def _init_training_state(self, *args, **kwargs):
        epochs, batches = super()._init_training_state(*args, **kwargs)
        sampler = self._train_sampler
        for _ in range(epochs if getattr(sampler, "shuffle", False) else 0):
            torch.randperm(sampler.num_samples, generator=sampler.generator)  # as TRL's sampler does, once an epoch
        return epochs, batches

    def _get_train_sampler(self, *args, **kwargs):
        self._train_sampler: Any = super()._get_train_sampler(*args, **kwargs)
        return self._train_sampler

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)  # finds none of its files; TRL reads its entropy controller's state
        if checkpoint is None:
            return
        state = state_file.read(Path(checkpoint) / SHARED_STATE)
        own = state_file.read(Path(checkpoint) / RANK_STATE.format(self.accelerator.process_index))
        if self.sharded:
            state["optimizer"] = shards.as_shards(own["optimizer"], self.optimizer)
        self._restore_shared_state(state)
        self._generators = own["generators"]
        self._restore_progress(own["progress"])

    def _load_scaler(self, checkpoint):
        pass  # part of the shared state

    def _load_rng_state(self, checkpoint):
        if checkpoint is not None:  # `_load_optimizer_and_scheduler` has read them
            _restore_generators(self._generators)
        if self._owes_evaluation:
            self._owes_evaluation = False
            self._determine_best_metric(self._evaluate(None, None), None)

    def _restore_shared_state(self, state: dict[str, Any]) -> None:
        optimizer, scheduler = state["optimizer"], state["scheduler"]
        forced = self._resumed is not None and self._resumed.forced
        if forced:  # what was learned is taken over, and this run's settings hold, those that both keep too
            now = self.optimizer.state_dict()["param_groups"]
            groups = zip(now, optimizer["param_groups"], strict=True)
            optimizer["param_groups"] = [new | {"params": old["params"]} for new, old in groups]
            scheduler |= {key: value for key, value in self.lr_scheduler.state_dict().items() if key == "base_lrs"}
        self.optimizer.load_state_dict(optimizer)
        self.lr_scheduler.load_state_dict(scheduler)
        if forced and isinstance(self.lr_scheduler, LambdaLR):
            rates = self.lr_scheduler._last_lr = self.lr_scheduler.get_lr()
            for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
        if state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        saved = state.get("reference", {})
        for name, weight in self._moving_reference():
            if name not in saved:
                why = "its run moved none, or an earlier version saved it without; start a new run"
                raise UserError(f"sync_ref_model=True: the checkpoint has no reference: {why}")
            with torch.no_grad():
                weight.copy_(saved[name])

    def _restore_progress(self, progress: dict[str, Any]) -> None:
        self._step, rollout = progress["micro_steps"], progress["rollout"]
        self._owes_evaluation = progress.get("owes_evaluation", False)  # which earlier versions did not put down
        if rollout is not None:
            self._buffered_inputs = [{key: _to(self.args.device, value) for key, value in batch.items()} for batch in rollout]

    def _issue_warnings_after_load(self, load_result):
        """Stop where the checkpoint has not the model's weights, each of which is saved once, by one of its names."""
        weights, missing = self.model.state_dict(), set(load_result.missing_keys)
        loaded = {w.data_ptr() for name, w in weights.items() if name not in missing}
        missing = {name for name in missing if weights[name].data_ptr() not in loaded}
        if missing or load_result.unexpected_keys:
            name = min(missing or load_result.unexpected_keys)
            why = f"{len(missing)} weights are missing and {len(load_result.unexpected_keys)} unknown, {name} first"
            raise UserError(f"{self._resumed.path if self._resumed else 'checkpoint'}: of another model: {why}")

    def take_weights(self, checkpoint: Checkpoint) -> None:
        """Load the weights that a run with this last checkpoint ended with: the best ones, if `args` asks for them.

        What the run has logged, and which step was the best, come with them: the model card tells that.
        """
        self._require_same_kind(checkpoint)
        self._resumed = on_main_process(lambda: self._last_or_best(checkpoint))
        self._load_from_checkpoint(str(self._resumed.path))
        ended = _state_of(checkpoint)
        self.state.global_step, self.state.log_history = checkpoint.step, ended.log_history
        self.state.best_global_step, self.state.best_metric = ended.best_global_step, ended.best_metric
        self.state.best_model_checkpoint = ended.best_model_checkpoint

    def _last_or_best(self, last: Checkpoint) -> Checkpoint:
        if not self.args.load_best_model_at_end:
            return last
        best = _state_of(last).best_global_step
        return last if best in (None, last.step) else checkpoints.verified(last.path.with_name(f"checkpoint-{best}"))

    def _load_best_model(self):
        self._wait_for_disk()
        self.accelerator.wait_for_everyone()
        super()._load_best_model()


def _state_of(checkpoint: Checkpoint) -> TrainerState:
    return TrainerState.load_from_json(str(checkpoint.path / TRAINER_STATE_NAME))


def _generators() -> dict[str, Any]:
    """Return the states of the random number generators of this process."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    numpy = np.random.get_state(legacy=False)
    return {"python": random.getstate(), "numpy": numpy, "torch": torch.get_rng_state(), "cuda": cuda}


def _restore_generators(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _to(device: torch.device, value: Any) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value
