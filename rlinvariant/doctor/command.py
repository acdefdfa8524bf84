"""`rlinvariant doctor [MODEL]`: all checks in order, as a table or as JSON."""

import argparse
import contextlib
import json
import os
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from rlinvariant.doctor import engine, kernels, machine, model, packages
from rlinvariant.doctor.finding import Finding
from rlinvariant.errors import NOT_EXACT, OK, UserError, one_line
from rlinvariant.install import install_hint
from rlinvariant.kernels import choice
from rlinvariant.machine import environment
from rlinvariant.model_source import model_problems
from rlinvariant.report.rundir import SCHEMA
from rlinvariant.text import plural, printable, say

DESCRIPTION = """Is this machine able to run exact mode, which kernels would be used and why, and what is in the way. One line
each: ok, note (slower, or worth knowing; exact all the same) or problem, with the fix. Exit code 1 if there is a problem."""
EXAMPLE = "rlinvariant doctor Qwen/Qwen3-0.6B"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `doctor`."""
    about = """a Hugging Face directory or hub id: is it supported, and which kernel takes each of its weight shapes; its
    configuration is read, no weights are loaded"""
    parser.add_argument("model", metavar="MODEL", nargs="?", help=about)
    parser.add_argument("--json", action="store_true", help="one JSON object in place of the table")
    start = "also start vLLM with a tiny random model, in a process of its own, and ask it what it runs: about 20 s"
    parser.add_argument("--engine", action="store_true", help=start)


def run(options: argparse.Namespace) -> int:
    """Print the report, and return 1 if exact mode cannot run here, else 0.

    Raises:
        UserError: MODEL is no name of a model.
    """
    if "=" in (options.model or ""):
        raise UserError(f"doctor: {options.model}: expected a directory or hub id, without a key")
    if options.model is not None and (problems := model_problems("MODEL", options.model, adapters=True)):
        raise UserError(f"doctor: {problems[0]}")
    choice.chosen()  # a value that does not exist is refused, as by every command
    findings: list[Finding] = []
    found = examine(options.model, options.engine)
    if options.json:
        with contextlib.redirect_stdout(sys.stderr):  # a library's remark must not end up in the JSON
            findings += found
            report = summary(findings)
        say(json.dumps(report, indent=2))
    else:
        for finding in found:
            findings.append(finding)
            _print(finding)
        say(conclusion(findings))
    return NOT_EXACT if any(x.verdict == "problem" for x in findings) else OK


def examine(name: str | None = None, ask_engine: bool = False) -> Iterator[Finding]:
    """Look at everything, one finding at a time; where torch cannot be imported, only at the packages.

    Args:
        name: a model's directory or hub id.
        ask_engine: whether to start vLLM's engine.
    """
    yield from packages.packages()
    try:
        import torch
    except Exception as error:  # a broken install raises OSError, ImportError, RuntimeError, ...
        yield Finding("torch", "problem", f"cannot be imported ({one_line(error)}); install it anew: {install_hint()}", False)
        return
    cuda = torch.cuda.is_available()
    yield from packages.vllm_package("cuda" if cuda else "cpu")
    yield from machine.cpu()
    yield from machine.compiler()
    yield from machine.gpu(cuda)
    yield from machine.threads()
    yield from machine.variables(os.environ, cuda)
    yield from machine.accelerate_config(os.environ, cuda)
    yield from packages.vllm_plugin(os.environ)
    if name is not None:
        yield from model.of_model(name, cuda)
    else:
        small = [(n, k, False) for n, k in kernels.SMALL_WEIGHT_SHAPES]
        yield from kernels.kernels_cuda() if cuda else kernels.kernels_cpu(small, ("bfloat16", "float32"))
        yield from model.known_models(cuda)
    if ask_engine:
        yield from engine.ask_engine()


def summary(findings: Sequence[Finding]) -> dict[str, object]:
    """Return the report as JSON has it: schema, findings, environment (or null), and whether each mode can run here."""
    try:
        about = environment()
    except Exception:  # without torch, which is a finding of its own
        about = None
    return {
        "schema": SCHEMA,
        "exact": all(x.verdict != "problem" for x in findings),
        "invariance_off": all(x.invariance_off for x in findings),
        "findings": [asdict(x) for x in findings],
        "environment": about,
    }


def conclusion(findings: Sequence[Finding]) -> str:
    """Return the last line of the report."""
    if not (problems := [x for x in findings if x.verdict == "problem"]):
        return "exact mode can run here"
    blocking = sum(not x.invariance_off for x in problems)
    off = f"{blocking} of these also block invariance=off" if blocking else "invariance=off works: none of these is in its way"
    return f"exact mode cannot run here: {plural(len(problems), 'problem')}, fixes above; {off}"


def _print(finding: Finding) -> None:
    """Print a finding: one line to a pipe; on a terminal wrapped below the text's own column."""
    head = f"{finding.verdict:<8} {finding.name:<14} "
    if sys.stdout.isatty():
        width = max(60, shutil.get_terminal_size().columns)
        say(textwrap.fill(printable(finding.text), width, initial_indent=head, subsequent_indent=" " * len(head)))
    else:
        say(head + finding.text)
