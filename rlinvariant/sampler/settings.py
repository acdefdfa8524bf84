"""Settings of sampling that a request may have: those that leave the distribution as it is, and those that are proven."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rlinvariant.errors import UserError
from rlinvariant.rollout import RANGES
from rlinvariant.types import Untyped

if TYPE_CHECKING:
    from vllm import SamplingParams

SHAPELESS_SETTINGS = (
    "ignore_eos",
    "logprobs",
    "detokenize",
    "output_kind",
)  # further ones that leave the distribution as it is
NEUTRAL_SETTINGS = {
    "n": (1,),
    "repetition_penalty": (1.0,),
    "presence_penalty": (0.0,),
    "frequency_penalty": (0.0,),
}
"""Setting -> the values by which it leaves the distribution as it is; None does so for all."""


def sampling_params(
    seed: int,
    *,
    invariant: bool,
    temperature: float,
    max_tokens: int,
    stop_token_ids: Sequence[int] = (),
    **sampling: Untyped,
) -> "SamplingParams":
    """Return vLLM's settings of one request to an engine that is invariant, or stock.

    The other arguments, and what is raised, are those of `Sampler.generate`.
    """
    shaping = {
        k: v
        for k, v in sampling.items()
        if k not in (*SHAPELESS_SETTINGS, *RANGES) and v not in (None, *NEUTRAL_SETTINGS.get(k, ()))
    }
    refused = [f"{k}={v}" for k, v in shaping.items()]
    if invariant and 0 < temperature < 0.01:
        refused.append(f"temperature={temperature}, which vLLM would raise to 0.01")
    if invariant and refused:
        raise UserError(f"{', '.join(refused)}: an exact sampler draws from the distribution that is trained; remove it")
    for name, (allows, expected) in RANGES.items():
        if (value := sampling.get(name)) is not None and not allows(value):
            raise UserError(f"{name}={value}: expected {expected}")
    from vllm import SamplingParams

    shared: dict[str, Any] = {"temperature": temperature, "max_tokens": max_tokens, "detokenize": False}
    shared |= {} if invariant else {"logprobs": 0}
    shared |= {"stop_token_ids": list(stop_token_ids), **sampling}
    return SamplingParams(seed=None if temperature == 0 else seed, **shared)


def require_room(prompts: Sequence[Sequence[int]], max_tokens: int | Sequence[int], limit: int) -> Sequence[int]:
    """Return the most tokens of each completion; `limit` is the most of a prompt and its completion.

    Raises:
        UserError: a prompt is empty, or does not fit with its completion.
    """
    if empty := [i for i, p in enumerate(prompts) if not p]:
        raise UserError(f"prompt {empty[0]} of this batch has no tokens: is it blank, or has model= no tokenizer?")
    most = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else max_tokens
    _, prompt, tokens = max(((len(p) + n, len(p), n) for p, n in zip(prompts, most, strict=True)), default=(0, 0, 0))
    if prompt + tokens > limit:
        raise UserError(
            f"a prompt of {prompt} tokens and a completion of {tokens} do not fit sampler.max_model_len={limit}; "
            "raise it, or lower trainer.max_completion_length"
        )
    return most
