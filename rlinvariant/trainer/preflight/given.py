"""Look at what a script gives a trainer, by name and kind, before anything is loaded: a slip of the pen costs no start."""

import inspect
import itertools
import reprlib
from collections.abc import Callable, Collection, Mapping
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback

from rlinvariant.arguments import suggestion
from rlinvariant.config import PPOConfig
from rlinvariant.errors import one_line
from rlinvariant.text import shown
from rlinvariant.trainer.fields import TRLConfig
from rlinvariant.trainer.interface import SamplerOptions, ScriptOptions, StartOptions, TRLArguments

OWN = {"model", "args", "quantization_config"}  # named by the trainer alone
CHECKED = {"invariance", "dtype", "sampler_model", "save_dtype", "gradients", "reward_errors", "tool_errors"}  # by their values
CHECKED |= {"eval_dataset", "tools", "environment_factory", "peft_config"}  # when the start looks at them
NAMES = {*TRLArguments.__annotations__, *ScriptOptions.__annotations__, *StartOptions.__annotations__, *OWN}
TOKENIZER = PreTrainedTokenizerBase | ProcessorMixin | None
FUNCTION: tuple[Any, ...] = (Callable, NoneType)
KINDS: dict[str, tuple[UnionType | type | tuple[Any, ...], str]] = {  # name -> what it may be, in Python and in words
    "model": (str | Path | torch.nn.Module, "a directory, a hub id, or a loaded model"),
    "args": (TRLConfig | None, "a GRPOConfig"),
    "run": (str | None, "a name under runs/, or None"),
    "resume": (bool | str, 'True, False or "force"'),
    "sampler_options": (Mapping | None, f"a dict of {', '.join(SamplerOptions.__annotations__)}"),
    "sampler_options.max_model_len": (Integral | None, "a number of tokens, or None"),
    "sampler_options.kv_cache_gib": (Real | None, "a number of GiB, or None"),
    "sampler_options.options": (Mapping | None, "a dict of arguments of vllm.LLM"),
    "sampler_options.servers": (list | tuple | None, "a list of addresses, as http://127.0.0.1:8000"),
    "sampler_options.trainer_token_file": (str | Path | None, "a file's name, or None"),
    "processing_class": (TOKENIZER, "a tokenizer, as of AutoTokenizer.from_pretrained; or none"),
    "reward_processing_classes": (TOKENIZER | list, "a tokenizer of the reward model, a list of them, or None"),
    "callbacks": (list | None, "a list of callbacks"),
    "optimizers": (tuple, "a pair (optimizer, scheduler), each of which may be None"),
    "rollout_func": (FUNCTION, "a function, or None"),
    "quantization_config": (NoneType, "none, as quantised weights have no exact kernels; leave it out"),
    "reward_timeout": (Real, "a number of seconds; 0: no limit"),
    "reward_cage": (Integral, "a number of processes; 0: none of its own"),
    "tool_timeout": (Real, "a number of seconds; 0: no limit"),
    "tool_cage": (bool, "True or False"),
    "staleness": (Integral, "a number of optimizer steps"),
    "tokens_per_microbatch": (Integral | None, "a number of tokens, or None: as many as fit"),
    "recompute": (bool | None, "True, False, or None: as memory needs it"),
    **dict.fromkeys(("on_row", "on_evaluation", "on_samples", "on_rollout"), (FUNCTION, "a function, or None")),
    "ppo": (PPOConfig | None, "a PPOConfig; write ppo=PPOConfig(...)"),
}


def given_problems(given: Mapping[str, object]) -> list[str]:
    """Return a line for each argument of a script that has no such name, or is of another kind than its name says.

    Args:
        given: all arguments of a trainer that have a name here, among them "ppo", the settings of PPO, None with GRPO.
    """
    found = _unknown("", given.keys() - {"ppo"}, NAMES)
    sampler = given.get("sampler_options")
    sampler = sampler if isinstance(sampler, Mapping) else {}
    found += _unknown("sampler_options.", sampler, SamplerOptions.__annotations__)
    values = {**given, **{f"sampler_options.{name}": value for name, value in sampler.items()}}
    for name, (kind, said) in KINDS.items():
        if name in values and not isinstance(values[name], kind):
            found.append(f"{name}={_written(values[name])}: expected {said}")
    if found:
        return found
    if (resume := given.get("resume", False)) not in (True, False, "force"):
        found.append(f"resume={resume}: expected {KINDS['resume'][1]}")
    for callback in given.get("callbacks") or ():  # type: ignore[attr-defined]  # a list, as looked at above
        if not isinstance(callback, TrainerCallback) and not (
            inspect.isclass(callback) and issubclass(callback, TrainerCallback)
        ):
            found.append(f"callbacks: {shown(callback)}: expected a transformers.TrainerCallback")
    return found + _optimizer_problems(given.get("optimizers", (None, None)), given.get("model"))


def _optimizer_problems(pair: Any, model: object) -> list[str]:
    """Return what is wrong with a pair of optimizer and scheduler; `model`: the one to train, or its directory or id."""
    kinds = (torch.optim.Optimizer | None, torch.optim.lr_scheduler.LRScheduler | None)
    if len(pair) != 2 or not all(map(isinstance, pair, kinds)):
        return [f"optimizers={_written(pair)}: expected {KINDS['optimizers'][1]}"]
    optimizer = pair[0]
    if optimizer is None:
        return []
    own = {id(parameter) for parameter in model.parameters()} if isinstance(model, torch.nn.Module) else set()
    every = [*itertools.chain.from_iterable(group["params"] for group in optimizer.param_groups)]
    if foreign := sum(id(parameter) not in own for parameter in every):
        why = f"{foreign} of its {len(every)} parameters are not of the model that is trained"
        return [f"optimizers: {why}; make it of model.parameters(), and give that model, not its name"]
    return []


def _written(value: object) -> str:
    """Write a value of another kind than its name says in a few words, as Python writes it, and its kind."""
    return f"{one_line(reprlib.repr(value), 60)} ({type(value).__name__})"


def _unknown(prefix: str, given: Collection[str], known: Collection[str]) -> list[str]:
    return [f"{prefix}{name}: no such argument{suggestion(name, known)}" for name in given if name not in known]
