"""Look at what a script gives a trainer, by name and kind, before anything is loaded: a slip of the pen costs no start."""

import itertools
from collections.abc import Callable, Collection, Mapping
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from rlinvariant.arguments import suggestion
from rlinvariant.config import PPOConfig
from rlinvariant.errors import UserError
from rlinvariant.files import require_writable
from rlinvariant.trainer.interface import SamplerOptions, ScriptOptions, StartOptions, TRLArguments

NAMES = {*TRLArguments.__annotations__, *ScriptOptions.__annotations__, *StartOptions.__annotations__, "quantization_config"}
KINDS: dict[str, tuple[UnionType | type | tuple[Any, ...], str]] = {  # name -> what it may be, in Python and in words
    "sampler_options": (Mapping | None, f"a dict of {', '.join(SamplerOptions.__annotations__)}"),
    "sampler_options.max_model_len": (Integral | None, "a number of tokens, or None"),
    "sampler_options.kv_cache_gib": (Real | None, "a number of GiB, or None"),
    "sampler_options.options": (Mapping | None, "a dict of arguments of vllm.LLM"),
    "processing_class": (
        PreTrainedTokenizerBase | ProcessorMixin | None,
        "a tokenizer, as of AutoTokenizer.from_pretrained; or none",
    ),
    "callbacks": (list | None, "a list of callbacks"),
    "optimizers": (tuple, "a pair (optimizer, scheduler), each of which may be None"),
    "rollout_func": ((Callable, NoneType), "a function, or None"),
    "staleness": (Integral, "a number of optimizer steps"),
    "tokens_per_microbatch": (Integral | None, "a number of tokens, or None: as many as fit"),
    "recompute": (bool | None, "True, False, or None: as memory needs it"),
    "ppo": (PPOConfig | None, "a PPOConfig; write ppo=PPOConfig(...)"),
}


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
    sampler = options.get("sampler_options")
    sampler = sampler if isinstance(sampler, Mapping) else {}
    found += _unknown("sampler_options.", sampler, SamplerOptions.__annotations__)
    given = {**options, "ppo": ppo, **{f"sampler_options.{name}": value for name, value in sampler.items()}}
    for name, (kind, said) in KINDS.items():
        if name in given and not isinstance(given[name], kind):
            found.append(f"{name}={type(given[name]).__name__}: expected {said}")
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
