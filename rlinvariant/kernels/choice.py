"""The choice which attention a GPU runs: one for a process and all that it starts, made before a model or an engine is.

* auto: FlashAttention-3 where it is exact for a layer's form, the attention of our own elsewhere (kernels/attention.py).
* flash: FlashAttention-3 alone; a model with a layer that it cannot take is refused.
* chunked: the attention of our own for every layer: slower in prefill, many times as fast where few long requests decode.

Sampler and trainer read the same choice, and it is part of what a certificate, a checkpoint, a recording and a server say of
themselves. It travels to other processes as an environment variable.
"""

import os
from collections.abc import Mapping
from typing import Literal, cast, get_args

from rlinvariant.errors import UserError
from rlinvariant.text import shown

Attention = Literal["auto", "flash", "chunked"]
ATTENTIONS: tuple[Attention, ...] = get_args(Attention)
AUTO: Attention = "auto"
VARIABLE = "RLINVARIANT_ATTENTION"
FIX = f"write attention=auto (of commands without settings: unset {VARIABLE})"
_decided: list[Attention] = []  # of this process, by the first that asked


def asked() -> Attention:
    """Return the choice that the environment names, and decide nothing: what is refused for it can be asked for anew.

    Raises:
        UserError: the variable has no known value, or another one than this process has decided for.
    """
    given = os.environ.get(VARIABLE) or AUTO
    if given not in ATTENTIONS:
        raise UserError(f"{VARIABLE}={shown(given)}: expected {', '.join(ATTENTIONS[:-1])} or {ATTENTIONS[-1]}; unset it")
    if _decided and given != _decided[0]:
        raise _too_late(given)
    return cast(Attention, given)


def chosen() -> Attention:
    """Return the choice of this process. The first call decides it. Raises UserError as `asked` does."""
    if not _decided:
        _decided.append(asked())
    return asked()


def choose(value: Attention) -> None:
    """Choose for this process and those that it starts: `attention=` of a configuration, or what a recorded run had.

    Raises:
        UserError: the environment says otherwise, or this process has chosen otherwise.
    """
    if (problem := disagreement(value, os.environ)) is not None:
        raise UserError(problem)
    if _decided and _decided[0] != value:
        raise _too_late(value)
    if value != AUTO:
        os.environ[VARIABLE] = value
    chosen()


def _too_late(value: str) -> UserError:
    return UserError(f"attention={value}: this process has begun with attention={_decided[0]}; start another process")


def disagreement(value: Attention, env: Mapping[str, str]) -> str | None:
    """Say that an environment names another attention than a configuration does; None where it names none, or the same."""
    given = env.get(VARIABLE)
    if not given or given == value:
        return None
    fix = f"unset it (train and eval take attention={shown(given)})"
    return f"attention={value}: the environment has {VARIABLE}={shown(given)}; {fix}"


def misplaced(value: Attention, invariance: str, device: str | None) -> list[str]:
    """Refuse, in one line, a choice that would do nothing.

    Args:
        value: the choice.
        invariance: "exact", "off", "sampler" or "trainer".
        device: "cpu" or "cuda"; None: not looked at.
    """
    if value == AUTO:
        return []
    if invariance == "off":
        return [f"attention={value}: expected auto with invariance=off, both of whose sides are stock; {FIX}"]
    if device == "cpu":
        return [f"attention={value}: expected auto on a CPU, which has one attention, kernels/attention.c; {FIX}"]
    return []
