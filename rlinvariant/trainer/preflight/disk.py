"""Is there room on the disk for the checkpoints of a run?"""

import copy
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, cast

from rlinvariant.text import plural
from rlinvariant.types import Untyped

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from trl.trainer.grpo_config import GRPOConfig

COPIES = 2  # the last checkpoint stays until the next is whole
MOMENTS = {"adam": 2, "lion": 1, "rmsprop": 1, "lamb": 2, "ademamix": 3}
"""Beginning of an optimizer's name -> tensors of the weights' size that it keeps; one that is not here: none."""


def disk_problems(
    args: "GRPOConfig", config: "PreTrainedConfig", models: int, prefix: str = "", adapter: Untyped = None
) -> list[str]:
    """Say that two checkpoints do not fit on the disk, if they do not.

    Args:
        args: TRL's configuration; checkpoints go to `output_dir`.
        config: the model's configuration.
        models: how many models are trained: the policy, and in PPO its critic.
        prefix: what the user writes before a field's name.
        adapter: the `peft.LoraConfig` of the adapters that are trained and saved; None: whole models are.
    """
    if getattr(args.save_strategy, "value", args.save_strategy) == "no":
        return []
    name = str(getattr(args.optim, "value", args.optim))
    moments = next((count for word, count in MOMENTS.items() if name.removeprefix("paged_").startswith(word)), 0)
    moments = 0 if args.save_only_model else moments
    there = Path(cast(str, args.output_dir)).absolute()  # transformers names one where None is given
    copies = COPIES - any(there.glob("checkpoint-*"))  # of a run that is resumed
    needed = copies * 4 * parameters(config, adapter) * (models * (1 + moments) + bool(args.sync_ref_model))
    at = next(path for path in (there, *there.parents) if path.exists())
    if (free := shutil.disk_usage(at).free) >= needed:
        return []
    what = f"{'' if adapter is None else 'the adapters of '}{plural(models, 'model')}"
    parts = f"{plural(copies, 'checkpoint')} of {what}, float32 weights and {moments} moments of the optimizer"
    room = f"{free / 2**30:.1f} GiB free, and {needed / 2**30:.1f} GiB are needed for {parts}"
    return [f"{at}: {room}; free space, or write {prefix}save_strategy=no"]


def parameters(config: "PreTrainedConfig", adapter: Untyped = None) -> int:
    """Return how many parameters a model of a configuration has, or its adapters have; none are allocated."""
    import torch
    from transformers import AutoModelForCausalLM

    from rlinvariant.models import lora

    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
        if adapter is not None:
            return sum(weight.numel() for _, weight in lora.trained(lora.applied(model, copy.deepcopy(adapter), 0)))
    return sum(weight.numel() for weight in model.parameters())
