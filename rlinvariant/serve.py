"""`rlinvariant serve MODEL [options of vllm serve]`: vLLM's OpenAI-compatible server with the invariant ops on.

The same request gets the same tokens, text and log-probs, bit for bit, whatever else is being served: at temperature 0, or
with a seed. The parts that run inside vLLM are in sampler/vllm_serve.py.
"""

from collections.abc import Sequence

from rlinvariant.report.console import Console

HELP = """usage: rlinvariant serve MODEL [options of vllm serve]     e.g. --port 8000 --max-model-len 4096 --max-num-seqs 64

vLLM's OpenAI-compatible server with the invariant ops on: the same request (temperature 0, or any with a seed) gets the same
tokens, text and log-probs, bit for bit, whatever else is being served. Listens on 127.0.0.1 unless --host says otherwise.
Options that could change bits are refused, and so are requests with top_p, top_k, min_p, penalties, logit_bias, structured
output (status 400): it draws from the model's whole distribution. `rlinvariant serve --help=all` lists vLLM's options.
VLLM_LOGGING_LEVEL=INFO shows vLLM's own log."""


def serve(argv: Sequence[str]) -> None:
    """Serve until stopped. Raises UserError for what the user can mend, before any weights are loaded."""
    if not argv or argv[0] in ("--help", "-h"):
        print(HELP)
        return
    console = Console()
    console.print("starting vLLM: half a minute on a CPU, a minute or more on a GPU ...")
    from rlinvariant.sampler import vllm_serve

    vllm_serve.serve(argv)
