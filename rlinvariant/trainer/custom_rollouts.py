"""A user's `rollout_func`, called so that what it returns is what TRL expects, or one line says which sequence is not."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rlinvariant.errors import UserError, located
from rlinvariant.text import shown
from rlinvariant.types import RolloutCall

if TYPE_CHECKING:
    from rlinvariant.trainer.drawing import DrawingTrainer

Returned = dict[str, Any]
NEEDED = ("prompt_ids", "completion_ids", "logprobs")
LISTS = (*NEEDED, "env_mask")


def checked(function: RolloutCall, vocabulary: int, positions: int | None) -> RolloutCall:
    """Wrap a `rollout_func`: an error of one rank ends all alike, before any of them trains.

    Args:
        function: takes prompts and the trainer, and returns a dict, as TRL says.
        vocabulary: rows of the model's embedding.
        positions: how many tokens the model's prompt and completion may have together; None: not known.

    Raises:
        UserError: from the function that is returned, on every rank, if the user's fails on one or returns something else.
    """

    def call(prompts: list[Any], trainer: "DrawingTrainer") -> Returned:
        found, problem = dict[str, Any](), None
        try:
            found = function(prompts, trainer)
        except UserError as error:  # of `draw`
            problem = f"rollout_func: {error}"
        except Exception as error:  # the user's code may raise anything
            problem = f"rollout_func: {located(error)}"
        trainer.sampler.finish()
        if problem is None:
            wrong = _problem(found, len(prompts), vocabulary)
            wrong = wrong or _length_problem(found, trainer.max_completion_length, positions)
            problem = wrong and f"rollout_func: {wrong}"
        trainer._raise_agreed(problem)
        found = {**found, **{name: [_plain(row) for row in found[name]] for name in LISTS if found.get(name) is not None}}
        masks = found.get("env_mask") or [[1] * len(row) for row in found["logprobs"]]
        # What was not sampled may have any log-prob, NaN too, which a loss that is masked by 0 would not survive.
        pairs = zip(found["logprobs"], masks, strict=True)
        found["logprobs"] = [[x if sampled else 0.0 for x, sampled in zip(*pair, strict=True)] for pair in pairs]
        return found

    return call


def _problem(found: Any, count: int, vocabulary: int) -> str | None:
    """Say what is wrong with what a `rollout_func` has returned for so many prompts; None: nothing."""
    if not isinstance(found, Mapping):
        return f"returned {type(found).__name__}: expected a dict with {', '.join(NEEDED)}"
    if missing := [name for name in NEEDED if found.get(name) is None]:
        return f"no `{missing[0]}`: expected {', '.join(NEEDED)}, and env_mask where some tokens were not sampled"
    names = LISTS if found.get("env_mask") is not None else NEEDED
    for name in names:
        if not _is_list(found[name]):
            return f"`{name}` is {shown(found[name], 60)}: expected a list of rows, one for each prompt"
        if len(found[name]) != count:
            return f"{len(found[name])} rows of `{name}`: expected {count}, one for each prompt"
        if strange := [i for i, row in enumerate(found[name]) if not _is_list(row)]:
            return f"sequence {strange[0]}: `{name}` is {shown(found[name][strange[0]], 60)}: expected a list of numbers"
    for i in range(count):
        prompt, ids, logprobs = (_plain(found[name][i]) for name in NEEDED)
        mask = _plain(found["env_mask"][i]) if "env_mask" in names else [1] * len(ids)
        if (wrong := _row_problem(prompt, ids, logprobs, mask, vocabulary)) is not None:
            return f"sequence {i}: {wrong}"
    return None


def _length_problem(found: Returned, longest: int, positions: int | None) -> str | None:
    """Say which sequence has more tokens than a completion may have, or the model's positions; None: none."""
    for i, (prompt, ids) in enumerate(zip(found["prompt_ids"], found["completion_ids"], strict=True)):
        if len(ids) > longest:
            fix = "cut it, with its log-probs and env_mask, or raise it"
            limit = f"expected at most max_completion_length={longest}"
            return f"sequence {i}: {len(ids)} tokens in `completion_ids`: {limit}; {fix}"
        if positions is not None and len(prompt) + len(ids) > positions:
            have = f"{len(prompt)} tokens in `prompt_ids` and {len(ids)} in `completion_ids`"
            return f"sequence {i}: {have}: expected at most {positions} together, the model's positions"
    return None


def _is_list(value: Any) -> bool:
    """Return whether something is a list, or an array that can be one."""
    return not isinstance(value, str | Mapping) and (isinstance(value, Sequence) or getattr(value, "ndim", 0) > 0)


def _plain(row: Any) -> list[Any]:
    """Return a row as a list of Python's numbers, whatever array it is."""
    return row.tolist() if hasattr(row, "tolist") else list(row)


def _row_problem(
    prompt: Sequence[Any], ids: Sequence[Any], logprobs: Sequence[Any], mask: Sequence[Any], vocabulary: int
) -> str | None:
    """Say what is wrong with one sequence; None: nothing."""
    for name, tokens in (("prompt_ids", prompt), ("completion_ids", ids)):
        if not len(tokens):
            return f"no token in `{name}`"
        if strange := [x for x in tokens if isinstance(x, bool) or not isinstance(x, int) or not 0 <= x < vocabulary]:
            return f"{shown(strange[0])} in `{name}`: expected token ids, integers from 0 to {vocabulary - 1:,}"
    for name, row in (("logprobs", logprobs), ("env_mask", mask)):
        if len(row) != len(ids):
            return f"{len(row)} numbers in `{name}`: expected {len(ids)}, one for each token of `completion_ids`"
    if strange := [x for x in mask if x not in (0, 1)]:
        return f"{shown(strange[0])} in `env_mask`: expected 1 for each sampled token, and 0 for the others"
    if not any(mask):
        return "`env_mask` is 0 everywhere: expected at least one sampled token"
    for at, (x, sampled) in enumerate(zip(logprobs, mask, strict=True)):
        if not isinstance(x, int | float) or (sampled and not math.isfinite(x)):
            fix = "keep the sampler's log-prob of each token: trainer.draw returns them"
            return f"token {at} has the log-prob {shown(x)}: expected a finite number; {fix}"
    return None
