"""`python -m rlinvariant.bench NAME`: measure, and write DIRECTORY/NAME.json; or print what is there as Markdown."""

import argparse
import os
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "cpu"
NAMES = {
    "ops": "each op against PyTorch's, transformers' or vLLM's own, forward and forward + backward",
    "trainer": "log-probs and their gradients, with peak memory, against TRL's own path",
    "step": "whole steps of the recipe arithmetic, exact against invariance=off",
    "parity": "tokens whose log-prob differs: sampler against itself and against the trainer, with controls",
    "report": "print the results as Markdown",
}


def main(argv: list[str]) -> int:
    names = "\n".join(f"  {name:8} {text}" for name, text in NAMES.items())
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m rlinvariant.bench", description=str(__doc__) + "\n\n" + names, formatter_class=form
    )
    parser.add_argument("name", choices=NAMES, metavar="NAME")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIRECTORY", help="default: %(default)s")
    parser.add_argument("--tiny", action="store_true", help="small shapes and few samples: does it run?")
    parser.add_argument("--readme", type=Path, metavar="FILE", help="with report: put the tables between the file's markers")
    options = parser.parse_args(argv)
    # As `rlinvariant train` does, for ours and for the stock side; libgomp reads it when torch is imported
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if options.name == "report":
        from rlinvariant.bench.report import markdown, update

        if options.readme is not None:
            update(options.readme, options.out)
        else:
            print(markdown(options.out))
        return 0
    from rlinvariant.bench import measure

    if options.name == "ops":
        from rlinvariant.bench.ops import rows
    elif options.name == "trainer":
        from rlinvariant.bench.trainer import rows
    elif options.name == "parity":
        from rlinvariant.bench.parity import rows
    else:
        from rlinvariant.bench.step import rows
    measure.write(options.out / f"{options.name}.json", rows(options.tiny), options.tiny)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
