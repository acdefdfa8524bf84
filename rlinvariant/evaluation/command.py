"""`rlinvariant eval RUN|MODEL`: how good is it on problems that were not trained on?"""

import argparse
import json
import math
import time
from pathlib import Path

from rlinvariant import runtime
from rlinvariant.arguments import CommandParser, at_least, temperature
from rlinvariant.errors import UserError
from rlinvariant.evaluation import subject
from rlinvariant.files import RUNS, require_writable, write_atomically
from rlinvariant.report.console import Console
from rlinvariant.types import JsonObject

DESCRIPTION = """Draws completions of held-out problems, greedy and, with --samples, sampled, grades them by the rewards
of the recipe, or of reward=, as training does, and prints means with standard errors, and pass@k by the unbiased estimator.
Every completion goes into a JSON file. The sampler is the exact one, so that no number depends on the batch; invariance=off
takes stock vLLM.

RUN is a run's name or directory, whose settings hold and of which RUN/model is evaluated, or the newest checkpoint where there
is none; or one of its checkpoints. MODEL is any model's directory or hub id; it needs recipe=, or data.path=, data.eval_path=
and reward=."""
EXAMPLE = """rlinvariant eval runs/first --samples 8
rlinvariant eval runs/first/checkpoints/checkpoint-60
rlinvariant eval Qwen/Qwen3-0.6B recipe=gsm8k data.eval_size=64 --samples 16 --temperature 0.8 --k 1,8"""


def add_arguments(parser: CommandParser) -> None:
    """Add the arguments of `eval`."""
    parser.add_argument("subject", metavar="RUN|MODEL", help="a run, one of its checkpoints, or a model")
    parser.add_argument("settings", nargs="*", metavar="key=value", help=f"settings of train: {subject.TAKEN}")
    parser.add_argument(
        "--samples", type=at_least(1), metavar="N", help="completions drawn of each problem, beside the greedy one"
    )
    heat = "of the sampled completions; without it trainer.temperature of the run or the recipe, else 1"
    parser.add_argument("--temperature", type=temperature, metavar="T", help=heat)
    parser.add_argument("--k", type=_numbers, metavar="K,...", help="which pass@k; without it 1, 2, 4, ... to N")
    passes = "least weighted reward, in float32 as rewards are, of a completion that passes; without it 1, if all are 0 or 1"
    parser.add_argument("--pass", type=_reward, dest="least", metavar="R", help=passes)
    where = "JSON file; without it eval/TIME.json in the run, or in runs/"
    parser.add_argument("--out", type=Path, metavar="FILE", help=where)


def run(options: argparse.Namespace) -> None:
    """Print the table of an evaluation, and write its JSON file.

    Raises:
        ConfigErrors, UserError: what keeps it from running, before the engine starts; a reward function that fails.
    """
    if options.k and (options.samples or 0) < max(options.k):
        raise UserError(f"eval: --k {max(options.k)}: expected at most --samples, which is {options.samples or 'not given'}")
    if options.temperature is not None and not options.samples:
        fix = "it is of the sampled completions; add --samples N, or remove it"
        raise UserError(f"eval: --temperature {options.temperature:g}: expected --samples beside it: {fix}")
    found = subject.find(options.subject, options.settings)
    directory = (found.run or RUNS) / "eval"
    out = options.out or directory / f"{time.strftime('%Y%m%d-%H%M%S')}.json"
    require_writable(out, "eval: --out", "name another file")
    console = Console()
    runtime.configure()
    runtime.quiet()
    with console.stage("loading transformers, TRL and vLLM"):
        from rlinvariant.evaluation import evaluate
    heat = found.config.trainer.temperature if options.temperature is None else options.temperature
    if options.samples:
        source = "trainer.temperature" if options.temperature is None else "--temperature"
        console.print(f"samples are drawn at temperature {heat:g} ({source})")
    result = evaluate.evaluate(found.config, options.samples or 0, heat, options.k, options.least, console)
    result = {"subject": options.subject, "weights": found.config.model, **result}
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, json.dumps(result, indent=1))
    for line in table(result):
        console.print(line)
    console.print(f"files       {out}")


def table(result: JsonObject) -> list[str]:
    """Return the lines of an evaluation's table."""
    lines = [f"{'':20}{'mean':>8}{'± se':>9}{'problems':>10}{'completions':>13}{'length':>8}{'cut':>7}"]
    for draw in result["draws"]:
        for name, number in draw["estimates"].items():
            label = f"{draw['name']} {name}"
            mean, error = ("-" if number[key] is None else f"{number[key]:.3f}" for key in ("mean", "error"))
            line = f"{label:20}{mean:>8}{error:>9}{number['problems']:10,}{draw['completions']:13,}"
            lines.append(f"{line}{draw['mean_length']:8.1f}{draw['cut']:7.1%}")
    lines.append("se = sqrt(sum (x_i - mean)^2 / (N (N - 1))) over the N problems")
    return lines + result["notes"]


def _reward(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text}: expected a number")
    return value


def _numbers(text: str) -> list[int]:
    try:
        values = sorted({int(part) for part in text.split(",")})
    except ValueError:
        values = [0]
    if values[0] < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected whole numbers of at least 1, as in 1,8")
    return values
