"""`python -m rlinvariant.bench NAME`: measure, and write DIRECTORY/NAME.json; or print what is there as Markdown."""

import argparse
import importlib
import os
import sys
from pathlib import Path

from rlinvariant.errors import UserError
from rlinvariant.files import require_writable

RESULTS = Path(__file__).parent / "results"
# name -> (module on a CPU, on a GPU, what it measures)
BENCHMARKS = {
    "ops": ("ops", None, "each op against PyTorch's, transformers' or vLLM's own, forward and forward + backward"),
    "linear": (None, "linear", "matrix products of Qwen3 1.7B and 8B against cuBLAS"),
    "norms": (None, "norms", "rms_norm, add_rms_norm, rope and swiglu against vLLM's kernels"),
    "attention": (None, "attention", "prefill and decode against FlashAttention-3 as vLLM runs it"),
    "logprob": (None, "logprob", "token_logprobs and sample against TRL's and vLLM's"),
    "sampler": ("sampler", "sampler", "tokens/s against stock vLLM; on a GPU also against VLLM_BATCH_INVARIANT=1"),
    "long": ("long_context", "long_context", "few requests of 16k and 32k: stock vLLM, and exact with each attention"),
    "trainer": ("trainer", "gpu_trainer", "log-probs and their gradients, with peak memory, against TRL's own path"),
    "step": ("step", "gpu_step", "whole steps, exact against stock TRL and stock vLLM"),
    "profile": ("step_profile", "step_profile", "where the time of a whole step goes: seconds of each part, and GPU busy"),
    "lora": ("lora", "lora", "adapters: steps against full training and stock's adapters, and rollouts"),
    "lora_large": ("lora_large", "lora_large", "adapters: the memory that training large models takes"),
    "moe": ("moe", "moe", "a mixture: rollouts against stock vLLM's fused experts, training against grouped_mm"),
    "parity": ("parity", "gpu_parity", "tokens whose log-prob differs: sampler against itself and the trainer, with controls"),
    "families": ("certify", "certify", "verify every model family with random weights: the matrix of what is supported"),
    "report_speed": ("report_speed", None, "the page of 12 runs x 1,000 steps; what writing the metrics adds to a step"),
    "served": ("served", "served", "a rollout and a sync by a server on loopback, against an engine in the trainer's process"),
    "saving": ("saving", "saving", "a checkpoint, hashed and flushed, against TRL's own: how long training waits"),
    "drift": ("drift", "drift", "keep what drift.md compares of the ablation in runs/ablation-NAME, wherever it was run"),
    "tune": (None, "tune", "find the tiles of the small matrix products: writes kernels/linear_tiles.json"),
    "report": ("report", "report", "print the results as Markdown"),
}


def main(argv: list[str]) -> int:
    """Run a benchmark, or print results. Returns the exit code."""
    where = {(True, True): "", (True, False): " (CPU)", (False, True): " (GPU)"}
    names = "\n".join(f"  {n:12} {text}{where[cpu is not None, gpu is not None]}" for n, (cpu, gpu, text) in BENCHMARKS.items())
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m rlinvariant.bench", description=str(__doc__) + "\n\n" + names, formatter_class=form
    )
    parser.add_argument("name", choices=BENCHMARKS, metavar="NAME")
    parser.add_argument(
        "--out", type=Path, metavar="DIRECTORY", help=f"default: {RESULTS}/GPU, or /cpu; of tune: where the package reads it"
    )
    parser.add_argument("--tiny", action="store_true", help="small shapes and few samples: does it run?")
    parser.add_argument(
        "--tokens", type=int, metavar="N", help="parity on a GPU: N more tokens of parity_soak.json; families: tokens of each"
    )
    parser.add_argument("--long", action="store_true", help="parity --tokens: all beyond 8k of context; parity_soak_long.json")
    parser.add_argument(
        "paths",
        nargs="*",
        type=Path,
        metavar="PATH",
        help="with report: pages to fill, and print nothing; with drift: the ablation; with families: names of these alone",
    )
    options = parser.parse_args(argv)
    # As `rlinvariant train` does, for ours and for the stock side; libgomp reads it when torch is imported
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from rlinvariant.bench import gpu, measure

    machine = gpu.name()
    module = BENCHMARKS[options.name][machine != "cpu"]
    if module is None:
        here = ", ".join(n for n, modules in BENCHMARKS.items() if modules[machine != "cpu"])
        parser.error(f"{options.name}: not for this machine ({machine}); here: {here}")
    out = options.out or RESULTS / machine
    try:
        require_writable(out, "--out", "name another directory", directory=True)
        for page in options.paths if options.name == "report" else []:
            require_writable(page, "FILE.md", "name another file")
    except UserError as error:
        parser.error(str(error))
    bench = importlib.import_module(f"rlinvariant.bench.{module}")
    if options.long and (options.tokens is None or module != "gpu_parity"):
        parser.error("--long: only with parity --tokens on a GPU")
    if options.name == "report":
        bench.main(options.out, options.paths)
    elif options.name == "drift":
        if len(options.paths) != 1:
            parser.error("drift: give the directory of one ablation, runs/ablation-NAME")
        try:
            print(bench.write(options.paths[0], out))
        except UserError as error:
            parser.error(str(error))
    elif options.name == "tune":
        from rlinvariant.bench.tune import TILES_FILE

        directory = options.out or (Path("runs") if options.tiny else TILES_FILE.parent)
        bench.run(directory / TILES_FILE.name, options.tiny)
    elif options.name == "families":
        try:
            return bench.run(out, options.tokens, options.tiny, [*map(str, options.paths)])
        except UserError as error:
            parser.error(str(error))
    else:
        if options.tokens is not None and module != "gpu_parity":
            parser.error("--tokens: only with families, and with parity on a GPU")
        if options.tokens is not None:
            bench.soak(out / f"parity_soak{'_long' * options.long}.json", options.tokens, options.tiny, options.long)
        else:
            measure.write(out / f"{options.name}.json", bench.rows(options.tiny), options.tiny)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
