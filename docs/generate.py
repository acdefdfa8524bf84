"""Write the pages that the code itself knows: docs/reference (commands, configuration, metrics, Python API, ops), docs/explain.

    python docs/generate.py

tests/docs/test_docs.py compares what is committed with what this generates.
"""

import argparse
import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

REFERENCE = Path(__file__).resolve().parent / "reference"
EXPLANATION = REFERENCE.with_name("explain") / "index.html"
BY = "<!-- Written by docs/generate.py: edit the code, then run it. -->\n\n"


def pages() -> dict[Path, str]:
    """Return every generated page: path to text."""
    from rlinvariant.bench import pairs
    from rlinvariant.report import html_explain

    made = {"cli": commands(), "config": configuration(), "metrics": metrics(), "api": api(), "ops": ops()}
    made["pairs"] = BY + pairs.page()
    return {REFERENCE / f"{name}.md": text for name, text in made.items()} | {EXPLANATION: html_explain.page()}


def table(head: str, rows: list[tuple[str, ...]]) -> str:
    """Return a Markdown table; `|` in a cell is escaped."""
    lines = [f"| {head} |", "|---" * (head.count("|") + 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)])


def commands() -> str:
    """Return the page of commands, from their parsers."""
    from rlinvariant import cli, errors

    os.environ["COLUMNS"] = "110"  # the width of help texts, which is a terminal's otherwise
    text = [BY + "# Commands", "```\nrlinvariant COMMAND --help\n```"]
    text.append(table("command | what it does", [(f"[`{c.name}`](#{c.name})", c.summary) for c in cli.COMMANDS]))
    text.append("`rlinvariant --version` prints the version. Errors go to stderr, one line each; a mistake has no traceback.")
    text += ["## Exit codes", table("code | meaning", [(str(code), said) for code, said in errors.EXIT_CODES.items()])]
    for command in cli.COMMANDS:
        module = importlib.import_module(command.module)
        whole = cli.build_parser(command.name, module)
        (below,) = (action for action in whole._actions if isinstance(action, argparse._SubParsersAction))
        parser = below.choices[command.name]
        text += [f"## {command.name}", " ".join(module.DESCRIPTION.split())]
        text += [f"```\n{module.EXAMPLE.strip()}\n```", *options(parser)]
    return "\n\n".join(text).rstrip() + "\n"


def options(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Yield the table of a command's arguments, then what its help says in groups, as settings and arms."""
    rows = []
    for action in parser._actions:
        if action.help != argparse.SUPPRESS and action.dest != "help":
            rows.append((f"`{shown(action)}`", default(action), " ".join(str(action.help or "").split()).replace("%%", "%")))
    if rows:
        yield table("argument | default | meaning", rows)
    for group in parser._action_groups:
        if group.description:
            yield f"{str(group.title).capitalize()}:"
            yield f"```\n{group.description}\n```"


def shown(action: argparse.Action) -> str:
    """Return an argument as it is written: `--tokens N`, `MODEL`, `key=value ...`."""
    metavar = action.metavar or (f"{{{','.join(map(str, action.choices))}}}" if action.choices else action.dest.upper())
    value = metavar if isinstance(metavar, str) else " ".join(metavar)
    if not action.option_strings:
        return f"{value} ..." if action.nargs in ("*", "+") else value
    return action.option_strings[-1] + ("" if action.nargs == 0 else f" {value}")


def default(action: argparse.Action) -> str:
    """Return what an option is without being given, where that is worth a word."""
    unsaid = action.default is None or action.default is False or action.default == [] or action.default == argparse.SUPPRESS
    return "" if unsaid or action.nargs == 0 else f"`{action.default}`"


def configuration() -> str:
    """Return the page of settings, from the tree `Config` with its defaults."""
    from rlinvariant import config
    from rlinvariant.config import help as said
    from rlinvariant.config.tree import leaves

    text = [
        BY + "# Configuration",
        "`rlinvariant train key=value ...`. A value comes from the command line, else from the recipe's `DEFAULTS`, else from "
        "here; `config.json` in the [run directory](run-directory.md) says for each which it was. Unknown keys, wrong "
        "types and conflicts are listed all at once, before anything is loaded. Each recipe adds its own `data.*`: "
        "`rlinvariant train recipe=NAME --help`.",
    ]
    found = leaves(config.draft([]).config)
    for section, title in said.SECTIONS.items():
        keys = [key for key in found if (key.partition(".")[0] if "." in key else "") == section]
        if keys:
            text += [
                f"## {title}",
                table("key | type | default | meaning", [setting(key, found[key]) for key in keys]),
            ]
    owned = [(f"`trainer.{key}`", why) for key, why in config.OWNED.items()]
    owned += [(f"`{key}`", f"use {name}=") for key, name in config.ALIASES.items()]
    text += ["## Fields of TRL that are set elsewhere", table("key | in its place", owned)]
    return "\n\n".join(text).rstrip() + "\n"


def setting(key: str, leaf: Any) -> tuple[str, ...]:
    """Return the row of one setting."""
    from rlinvariant.config.parse import expected
    from rlinvariant.config.tree import plain

    shown = "" if key in ("recipe", "run") else f"`{plain(key, leaf.value)}`"  # run= is named after the time
    return f"`{key}`", expected(leaf.type).replace("one of ", "").replace(" | ", " or "), shown, leaf.doc.replace("<", "&lt;")


def metrics() -> str:
    """Return the page of metrics, from the table in `rlinvariant.keys`."""
    from rlinvariant import keys

    rows = {
        "every": "Every row of a step has these keys, whether invariance is on or off.",
        "ppo": "A step's row has these keys with `algorithm=ppo`.",
        "some": "A step's row has these keys where there is such a thing.",
        "evaluation": "No row of a step has these keys.",
    }
    text = [
        BY + "# Metrics",
        "`metrics.jsonl` has a row for each step, and one for each evaluation. W&B and TensorBoard have the same keys. What "
        "TRL has a name for carries that name alone; the other names are ours. Rows of earlier versions, which had "
        + ", ".join(f"`{old}` for `{new}`" for old, new in keys.RENAMED.items())
        + ", are read with the names of today by `rlinvariant.report.rundir.read_metrics`.",
        "Numbers are of all ranks and micro-batches together: a mean over a step is one over its tokens, or over its "
        "completions, and never a mean of means. But for `loss`, `grad_norm`, clocks, `vespo/*` and what a reward function "
        "logs itself, a number does not depend on how many micro-batches and processes a rollout is trained in, not in its "
        "last bit: sums are correctly rounded, or taken over "
        'sorted values. JSON has no NaN and no infinities: they are written as `"NaN"`, `"Infinity"` and `"-Infinity"`, and '
        "`read_metrics` gives the floats back.",
        "In formulas, r = trainer log-prob - sampler log-prob of one token, in float64, which is exactly 0 where the two "
        "32-bit words are the same; w = exp(r); N = tokens compared. A token counts as *mismatched* if its two words differ, "
        "or if one of them is NaN. A NaN makes every number that is derived from values NaN.",
    ]
    for section in keys.SECTIONS:
        found = [(f"`{m.key}`", m.formula, m.unit, m.exact) for m in section.metrics]
        text += [
            f"## {section.title}",
            f"{rows[section.rows]} {section.lead}",
            table("key | formula | unit | when exact", found),
        ]
    return "\n\n".join(text) + "\n"


def api() -> str:
    """Return the page of the package's public names, whose docstrings mkdocstrings reads."""
    import rlinvariant

    text = [
        BY + "# Python API",
        "`import rlinvariant` loads no framework and touches no device: a name is imported when it is first used.",
    ]
    text += [f"::: {place(getattr(rlinvariant, name), name)}" for name in sorted(rlinvariant.__all__, key=str.lower)]
    return "\n\n".join(text) + "\n"


def ops() -> str:
    """Return the page of ops."""
    from rlinvariant import ops

    text = [
        BY + "# Ops",
        "The ops of which sampler and trainer are both made. Nothing else in a model may sum, and nothing else may call a "
        "transcendental function. Each contract has *Order* (in which order sums are taken), *Bits* (what the bits of a row "
        "depend on, which is what the tests check) and *Ref*. Beside each op stands its reference, the same formula in plain "
        "PyTorch, by which tests and benchmarks measure it.",
    ]
    for name in ops.__all__:
        if not name.endswith("_ref"):
            text.append(f"::: {place(getattr(ops, name), name)}")
            text.append(f"::: {place(getattr(ops, name + '_ref'), name)}\n    options:\n      show_source: true")
    return "\n\n".join(text) + "\n"


def place(found: Any, name: str) -> str:
    """Return where an object is defined, as mkdocstrings wants it."""
    return f"{found.__module__}.{getattr(found, '__qualname__', name)}"


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text)
        print(path)
