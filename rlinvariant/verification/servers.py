"""Find out, before weights are loaded, whether the servers that a trainer is to draw from are what the trainer is."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlinvariant import trainer_token
from rlinvariant.errors import ConfigErrors, UserError
from rlinvariant.kernels import choice
from rlinvariant.launch import on_main_process
from rlinvariant.sampler.server import Server, proven
from rlinvariant.sampler.wire import COMPILED
from rlinvariant.text import shown
from rlinvariant.types import JsonObject, JsonRow
from rlinvariant.verification.certificate import differences, subject

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Servers:
    """Holds servers that compute what a trainer does.

    Args:
        servers: they.
        max_model_len: longest prompt plus completion that all of them take, and the run needs, in tokens.
        eager: whether they run without CUDA graphs.
    """

    servers: Sequence[Server]
    max_model_len: int
    eager: bool


def found(
    urls: Sequence[str],
    token_file: str,
    config: "PreTrainedConfig",
    name: str,
    dtype: str,
    max_model_len: int | None,
    adapted: bool = False,
) -> Servers:
    """Return servers that compute what the trainer does, by their own account. All ranks call this, and the main one asks.

    Args:
        urls: where they are.
        token_file: which holds the token that they want.
        config: transformers' configuration of the model that is trained.
        name: the model's name for messages.
        dtype: of activations, "bfloat16" or "float32".
        max_model_len: longest prompt plus completion that the run needs, in tokens; None: as long as all servers take.
        adapted: whether LoRA adapters are trained.

    Raises:
        ConfigErrors: a line for each server that cannot be used.
    """

    def asked() -> tuple[int, bool]:
        token, problems, limits, eager = trainer_token.read(token_file, "sampler.trainer_token_file="), [], [], []
        own = subject(config, dtype)
        for url in urls:
            server = Server(url, token)
            try:
                about = proven(server)
                problems += server.understood(_problems, server, about, own, name, max_model_len)
                limits.append(about["max_model_len"])
                eager.append(about["subject"]["eager"])
                problems += [str(server.error(COMPILED))] if adapted and not (eager[-1] or about["room"]) else []
            except UserError as error:
                problems.append(str(error))
            finally:
                server.close()
        if problems:
            raise ConfigErrors(problems)
        return max_model_len or min(limits), all(eager)

    longest, eager = on_main_process(asked)
    token = trainer_token.read(token_file, "sampler.trainer_token_file=")
    return Servers([Server(url, token) for url in urls], longest, eager)


def _problems(server: Server, about: JsonRow, own: JsonObject, name: str, max_model_len: int | None) -> list[str]:
    """List why a server, by what it says about itself, cannot draw for a trainer whose subject is `own`."""
    theirs: JsonObject = about["subject"]
    if theirs["architecture"] != own["architecture"]:
        return [str(server.error(f"it serves another model, {shown(about['model'])}; start it with {name}"))]
    found = []
    if theirs["dtype"] != own["dtype"]:
        found.append(f"its dtype is {shown(theirs['dtype'])}; start it with --dtype {own['dtype']}")
    if (attention := theirs.get("attention", choice.AUTO)) != own["attention"]:
        fix = f"start it with {choice.VARIABLE}={own['attention']}"
        found.append(f"it runs attention={shown(attention)}, the trainer attention={own['attention']}; {fix}")
    # The threads of the server's engine are not known here; the first rollout shows it
    said = {"threads": own["threads"], "attention": own["attention"]}
    other = differences({**theirs, **said}, own)
    other += [f"environment variables {theirs['variables']} -> {own['variables']}"] * (theirs["variables"] != own["variables"])
    if other:
        found.append(f"its kernels may be others than the trainer's: {shown('; '.join(other))}; start it with what trains")
    if max_model_len is not None and about["max_model_len"] < max_model_len:
        limit = f"it takes {about['max_model_len']} tokens, sampler.max_model_len={max_model_len}"
        found.append(f"{limit}; start it with --max-model-len {max_model_len}")
    return [str(server.error(line)) for line in found]
