"""Look at what a script gives a trainer, by name and kind, before anything is loaded: a slip of the pen costs no start."""

import itertools
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from rlinvariant.arguments import suggestion
from rlinvariant.config import PPOConfig
from rlinvariant.errors import UserError
from rlinvariant.files import require_writable
from rlinvariant.trainer.interface import SamplerOptions, ScriptOptions, StartOptions, TRLArguments

NAMES = {*TRLArguments.__annotations__, *ScriptOptions.__annotations__, *StartOptions.__annotations__, "quantization_config"}


def given_problems(
    options: Mapping[str, object], ppo: object, output_dir: str | None, model: torch.nn.Module | None
) -> list[str]:
    """Return a line for each argument of a script that has no such name, or is of another kind than its name says.

    Args:
        options: keyword arguments, as given.
        ppo: settings of PPO; None with GRPO.
        output_dir: where checkpoints go; None with `run`, whose directory is looked at elsewhere.
        model: the one that was given; None where it is a directory or an id.
    """
    found = _unknown("", options, NAMES)
    sampler = options.get("sampler_options") or {}
    if isinstance(sampler, Mapping):
        found += _unknown("sampler_options.", sampler, SamplerOptions.__annotations__)
    else:
        found.append(f"sampler_options={_kind(sampler)}: expected a dict of {', '.join(SamplerOptions.__annotations__)}")
    if not isinstance(ppo, PPOConfig | None):
        found.append(f"ppo={_kind(ppo)}: expected a PPOConfig; write ppo=PPOConfig(...)")
    tokenizer = options.get("processing_class")
    if not isinstance(tokenizer, PreTrainedTokenizerBase | ProcessorMixin | None):
        found.append(f"processing_class={_kind(tokenizer)}: expected a tokenizer, as of AutoTokenizer.from_pretrained; or none")
    pair = options.get("optimizers")
    optimizer = pair[0] if isinstance(pair, tuple) and pair else None
    if isinstance(optimizer, torch.optim.Optimizer):
        own = set() if model is None else {id(parameter) for parameter in model.parameters()}
        every = [*itertools.chain.from_iterable(group["params"] for group in optimizer.param_groups)]
        if foreign := sum(id(parameter) not in own for parameter in every):
            why = f"{foreign} of its {len(every)} parameters are not of the model that is trained"
            found.append(f"optimizers: {why}; make it of model.parameters(), and give that model, not its name")
    if output_dir is not None:
        try:
            require_writable(Path(output_dir), f"output_dir={output_dir}", "choose another", directory=True)
        except UserError as error:
            found.append(str(error))
    return found


def _unknown(prefix: str, given: Collection[str], known: Collection[str]) -> list[str]:
    return [f"{prefix}{name}: no such argument{suggestion(name, known)}" for name in given if name not in known]


def _kind(value: object) -> str:
    return type(value).__name__
