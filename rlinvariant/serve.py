"""`rlinvariant serve MODEL [options of vllm serve]`: vLLM's OpenAI-compatible server with the invariant ops on.

The same request gets the same tokens, text and log-probs, bit for bit, whatever else is being served: at temperature 0, or
with a seed. The parts that run inside vLLM are in sampler/vllm_serve.py.
"""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rlinvariant import stopping
from rlinvariant.arguments import CommandParser
from rlinvariant.errors import ConfigErrors
from rlinvariant.model_source import source_problems

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

DESCRIPTION = """vLLM's OpenAI-compatible server with the invariant ops on: the same request (temperature 0, or any with a seed)
gets the same tokens, text and log-probs, bit for bit, whatever else is being served. It listens on 127.0.0.1; --host with
another address needs a key (VLLM_API_KEY, or --api-key). A request whose Host is not the bound address gets status 400
(--allowed-hosts names others), and routes that administer the engine get 404.

Options that could change bits are refused. Requests with penalties, logit_bias or structured output get status 400: the server
draws from the model's own distribution, of which top_p, top_k and min_p keep the same tokens every time.
VLLM_LOGGING_LEVEL=INFO shows vLLM's own log.

With --trainer-token-file FILE it serves a trainer (train ... sampler.servers=http://HOST:PORT) that shows the token in FILE,
and nobody else: the trainer sends weights and draws rollouts. On a GPU, one that trains adapters needs a server with room for
them from its start (--lora r=16, as the trainer's lora.*), as CUDA graphs are made for it, or --enforce-eager."""
EXAMPLE = """rlinvariant serve Qwen/Qwen3-0.6B --port 8000 --max-num-seqs 64
rlinvariant serve Qwen/Qwen3-0.6B --port 8000 --trainer-token-file trainer.token
VLLM_API_KEY=... rlinvariant serve Qwen/Qwen3-0.6B --host 0.0.0.0"""


def add_arguments(parser: CommandParser) -> None:
    """Describe the arguments. All of them go to vLLM's own parser, in the order in which they were written."""
    parser.add_argument("model", metavar="MODEL", help="a Hugging Face directory or hub id, or a PEFT adapter's directory")
    parser.add_argument("options", nargs="*", default=[], metavar="OPTION", help="options of `vllm serve`")
    parser.add_argument("--help=all", action="store_true", help="list vLLM's options")
    parser.passes_on = "arguments"


def run(options: argparse.Namespace) -> int:
    """Serve until stopped, by Stopped. Raises UserError for what the user can mend, before any weights are loaded."""
    from rlinvariant.report.console import Console

    model = next(iter(options.arguments), "-")
    if not model.startswith("-") and (problems := source_problems("MODEL", model, adapters=True)):
        raise ConfigErrors(problems)
    Console().print("starting vLLM: half a minute on a CPU, a minute or more on a GPU ...")
    with stopping.handled(stopping.raise_stopped):
        from rlinvariant.sampler import vllm_serve
        from rlinvariant.verification.certificate import subject

        return vllm_serve.serve(options.arguments, subject, room)


def room(settings: Sequence[str], config: "PreTrainedConfig") -> dict[str, int]:
    """Return the ranks of the adapters that `--lora` asks for, by the names of a model's projections.

    Raises:
        ConfigErrors, UserError: a setting is wrong, or the model has no such projection.
    """
    from rlinvariant.models import lora
    from rlinvariant.verification.options import lora_config

    asked = lora_config(settings)
    return {} if asked is None else lora.ranks_for("--lora ", asked.peft_config(), config)
