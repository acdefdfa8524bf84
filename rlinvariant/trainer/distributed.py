"""The layer of the trainer for several processes: how DDP is set, and what differs where each has shards of the weights.

accelerate finds the model in shards (`models.shards`), and leaves it so: its own wrapping leaves out what it has no class for,
and its mixed precision would cast what attention and norms compute with. The norm of the gradients is the one that DDP
computes, bit for bit, and weights are saved as one process saves them: whole, as safetensors, each once.

Methods of TRL's trainer, and of transformers' below it, that are overridden:

    create_accelerator_and_postprocess   lets accelerate see shards on a CPU, too
    _build_accelerator_args              lets DDP reduce gradients where they lie
    _prepare_for_training                sets the order in which gradients are added
    _clip_grad_norm, _get_grad_norm      compute the norm of gradients in shards
    save_model                           gathers the weights first: all ranks call it, and the main one saves
    _load_from_checkpoint, _load_best_model
                                         read a rank's own rows, and experts, which files have one by one: transformers would
                                         find none of the names that its model has
"""

import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from trl.trainer.grpo_trainer import GRPOTrainer

from rlinvariant.conflicts import Gradients
from rlinvariant.errors import ConfigErrors
from rlinvariant.launch import is_sharded
from rlinvariant.models import experts, lora, ordered, shards
from rlinvariant.text import say

FUSED = "on a CPU it rounds the last numbers of a process's rows otherwise"


class DistributedTrainer(GRPOTrainer):
    """Trains by several processes as the module says; everything else is TRL's."""

    model: Any
    args: Any
    state: Any
    accelerator: Any
    gradients: Gradients = "stock"

    @property
    def sharded(self) -> bool:
        """Return whether each process keeps a shard of every weight."""
        return is_sharded()

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        if self.sharded and state.distributed_type == DistributedType.MULTI_CPU:  # accelerate does so on devices of its list
            state.fsdp_plugin, state.distributed_type = FullyShardedDataParallelPlugin(), DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.is_fsdp_enabled = True

    def _look_at_cuts(self, model: Any, args: Any) -> None:
        """Say where an optimizer would train other weights in shards than in one piece; with invariant gradients, refuse it."""
        fused = args.device.type == "cpu" and "fused" in args.optim
        name = shards.cut_within_a_vector(model.named_parameters(), args.world_size) if fused else None
        if name is not None and self.gradients == "invariant":
            fix = "set optim=adamw_torch (trainer.optim=adamw_torch on the command line)"
            said = "optim=adamw_torch_fused: expected another with gradients=invariant and weights in shards"
            raise ConfigErrors([f"{said}: {FUSED}, as of {name}; {fix}"])
        if name is not None and args.process_index == 0:
            say(f"note: optim=adamw_torch_fused: {FUSED}, as of {name}; adamw_torch trains what whole models do")

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        arguments = super()._build_accelerator_args(**kwargs)
        for handler in arguments["kwargs_handlers"]:
            if isinstance(handler, DistributedDataParallelKwargs):
                handler.gradient_as_bucket_view = True  # else gradients are there twice
        return arguments

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        with warnings.catch_warnings():  # torch 2.13's new name of it, which accelerate has not
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            prepared = super()._prepare_for_training(*args, **kwargs)
        if self.gradients == "ordered":
            for model in self._models_of_ranks():
                ordered.use(model)
        return prepared

    def _models_of_ranks(self) -> Iterator[nn.Module]:
        """Yield the models whose gradients a backward averages over the ranks."""
        model: Any = self.model_wrapped
        yield model

    def _mean(self, gradient: Tensor) -> Tensor:
        """Average a gradient over the ranks."""
        if self.gradients == "ordered" and self.accelerator.num_processes > 1:
            return ordered.average(gradient)
        return self.accelerator.reduce(gradient, "mean")

    # ---- the norm

    def _clip_grad_norm(self, model: Any) -> Tensor | None:
        return self._clipped(model, self.args.max_grad_norm) if self.sharded else super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        if grad_norm is None and self.sharded:
            return self._clipped(model, math.inf)
        return super()._get_grad_norm(model, grad_norm)

    def _clipped(self, model: nn.Module, most: float) -> Tensor:
        """Limit a model's gradients to a norm, and return the one before, the same on all ranks. Every rank must call this."""
        if not self.sharded:
            return nn.utils.clip_grad_norm_(model.parameters(), most)
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        if not gradients:  # PPO drops a policy's in warm-up, and all where it ends a rollout
            return torch.tensor(0.0)  # as torch says it
        norm = shards.total_norm(gradients)
        shards.scale_gradients(gradients, norm, most)
        return norm

    # ---- weights on the disk

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save as TRL does. Every rank must call this."""
        if not self.sharded:
            return super().save_model(output_dir, _internal_call)
        state = self.gathered()
        if self.args.should_save:
            self._save(output_dir or self.args.output_dir, state)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def gathered(self) -> dict[str, Tensor] | None:
        """Return whole weights, those that are saved, on the host, to the rank that saves; to others, or without shards, None.

        Every rank must call this.
        """
        if not self.sharded:
            return None
        found = shards.state(lora.saved(self.model), keep=self.args.should_save)
        return found if self.args.should_save else None

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self._reads_rows:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        if lora.ranks(self.model):
            shards.load_adapter(lora.trained(self.model), Path(resume_from_checkpoint))  # transformers takes a critic's, too
        else:
            shards.load(self.model, Path(resume_from_checkpoint))

    @property
    def _reads_rows(self) -> bool:
        return self.sharded or hasattr(self.model, "peft_config") or experts.are_apart_in_files(self.model)

    def _load_best_model(self) -> None:
        if not self._reads_rows:
            return super()._load_best_model()
        self._load_from_checkpoint(self.state.best_model_checkpoint)
