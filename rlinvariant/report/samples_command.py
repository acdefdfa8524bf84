"""`rlinvariant samples RUN`: search and sort what a run has said."""

import argparse
import json
from collections.abc import Sequence
from typing import Any

from rlinvariant.arguments import at_least, written
from rlinvariant.errors import UserError
from rlinvariant.report import search
from rlinvariant.report.completions import Completions
from rlinvariant.report.search import Found, Query, Sample
from rlinvariant.text import plural

DESCRIPTION = """Show what a run has said: every completion is in RUN/completions, a parquet file for each step. Without options
these are the completions of the newest step. A run that is still training can be looked at, too."""
EXAMPLE = """rlinvariant samples first --best 5
rlinvariant samples first --step 10-20 --search "/[0-9]+ apples/" --full
rlinvariant samples first --prompt 3f9a
rlinvariant samples first --worst 100 --sort logprob --json"""
MOST = 20  # rows of a table, where no other number is asked for
PROMPT_COLUMNS, PANEL_COLUMNS = 24, 26  # the widest prompt that has a column; the narrowest completion beside others


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `samples`."""
    parser.add_argument("run", metavar="RUN", help="the run's directory, runs/NAME, or its name")
    parser.add_argument("--step", type=written, metavar="N|A-B|last", help="of these optimizer steps")
    parser.add_argument(
        "--search",
        type=written,
        metavar="TEXT",
        help="with this text, in any case, or /regex/, in prompt or completion",
    )
    parser.add_argument(
        "--prompt",
        type=written,
        metavar="ID",
        help="the completions of one prompt, side by side; an id's beginning",
    )
    parser.add_argument(
        "--sort", default="", choices=list(search.KEYS), help="the highest first; logprob is the mean over tokens"
    )
    ends = parser.add_mutually_exclusive_group()
    ends.add_argument("--best", type=at_least(1), metavar="N", help="the N highest, by reward or as --sort says")
    ends.add_argument("--worst", type=at_least(1), metavar="N", help="the N lowest")
    forms = parser.add_mutually_exclusive_group()
    forms.add_argument("--full", action="store_true", help="whole texts below each other, with each reward")
    forms.add_argument("--json", action="store_true", help="all columns, a line of JSON for each completion")


def run(options: argparse.Namespace) -> None:
    """Print what is asked for. Raises UserError as `search.find` does, and where nothing is found."""
    directory = search.locate(options.run)
    kept = Completions(directory)
    if not kept.steps:
        raise UserError(f"{directory}: has no completions: no step was taken, or completions_gib=0 keeps none")
    query = _query(options, kept.steps)
    found = search.find(directory, kept, query)
    if not found.rows:
        raise UserError(f"{directory}: none of its completions is as asked for{''.join(f'; {note}' for note in found.notes)}")
    if options.json:
        from rlinvariant.report.rundir import jsonable
        from rlinvariant.text import say

        for row in found.rows:
            say(json.dumps(jsonable(row), allow_nan=False))
        return
    _print(found, query, options)


def _query(options: argparse.Namespace, kept_steps: list[int]) -> Query:
    """Read the options; without any that chooses, the newest step is meant."""
    ends = options.best or options.worst
    chooses = options.step or options.search or options.prompt or options.sort or ends
    step = options.step or ("" if chooses else "last")
    return Query(
        steps=search.step_range(step, kept_steps) if step else None,
        prompt=options.prompt or "",
        pattern=search.pattern(options.search) if options.search else None,
        sort=options.sort or ("reward" if ends else ""),
        lowest=options.worst is not None,
        most=ends or (None if options.json or options.prompt else MOST),
    )


def _print(found: Found, query: Query, options: argparse.Namespace) -> None:
    from rlinvariant.report.console import Console

    console = Console()
    if options.full:
        for row in found.rows:
            _print_whole(row, console)
    elif query.prompt and not query.sort:
        _print_beside(found.rows, console)
    else:
        console.show(_table(found.rows, query, console))
        console.print("+: cut by the length limit; logp: mean log-prob of a token, nats", style="dim")
    for note in found.notes:
        console.print(f"note: {note}")
    if len(found.rows) < found.count:
        console.print(f"{len(found.rows):,} of {plural(found.count, 'completion')}; --best N, --search or --step choose others")


def _table(rows: Sequence[Sample], query: Query, console: Any) -> Any:
    """Return a rich table with a line for each completion, as wide as the terminal."""
    from rich.cells import cell_len
    from rich.table import Table

    shows_prompt = all(cell_len(_line(row, "prompt", console)) <= PROMPT_COLUMNS for row in rows)
    differs = any(row.get("mismatched_tokens") for row in rows)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), expand=True)
    for title in ("step", "#", "reward", "adv", "len", "logp", *(["differ"] if differs else [])):
        table.add_column(title, justify="right", no_wrap=True, header_style="dim")
    table.add_column("prompt", no_wrap=True, header_style="dim")
    table.add_column("completion", no_wrap=True, overflow="ellipsis", ratio=1, header_style="dim")
    for row in rows:
        numbers = [str(row["step"]), str(row["sample_id"]), *_numbers(row)]
        numbers += [str(row.get("mismatched_tokens") or "")] if differs else []
        prompt = _line(row, "prompt", console) if shows_prompt else str(row.get("prompt_id", "-"))[:6]
        table.add_row(*numbers, _text(prompt), _text(_line(row, "completion", console, query)))
    return table


def _numbers(row: Sample) -> list[str]:
    """Return reward, advantage, length and mean log-prob, as they are shown; - for what is not known."""
    length = "-" if row.get("length") is None else f"{row['length']:,}{'+' if row.get('truncated') else ''}"
    return [_decimal(row.get("reward")), _decimal(row.get("advantage")), length, _decimal(search.mean_logprob(row))]


def _decimal(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, int | float) else "-"


def _line(row: Sample, name: str, console: Any, query: Query | None = None) -> str:
    """Return a text as one line; where something is searched for, from shortly before it."""
    text = row.get(name)
    text = text if isinstance(text, str) else json.dumps(text)
    if query is not None and query.pattern is not None and (match := query.pattern.search(text)) and match.start() > 20:
        text = "…" + text[match.start() - 10 :]
    return console.printable(text[:1000].replace("\n", "⏎"))


def _text(line: str) -> Any:
    from rich.text import Text

    return Text(line)


def _heading(row: Sample) -> str:
    rewards = row.get("rewards")
    each = ", ".join(f"{name} {_decimal(value)}" for name, value in rewards.items()) if isinstance(rewards, dict) else ""
    reward, advantage, length, logprob = _numbers(row)
    said = f"reward {reward}{f' ({each})' if each else ''}, advantage {advantage}, {length} tokens, mean log-prob {logprob}"
    if results := row.get("tool_results"):
        said += f", {len(results) + 1} turns"
    differ = row.get("mismatched_tokens")
    return f"{said}, {plural(differ, 'token')} differ" if differ else said


def _print_whole(row: Sample, console: Any) -> None:
    console.print(f"step {row['step']}, sample {row['sample_id']}, prompt {row.get('prompt_id', '-')}: {_heading(row)}", "bold")
    for name in ("prompt", "completion"):
        console.print(f"  {name}", style="dim")
        text = row.get(name)
        for line in (text if isinstance(text, str) else json.dumps(text)).split("\n"):
            console.print(f"    {line}")


def _print_beside(rows: Sequence[Sample], console: Any) -> None:
    """Print the completions of a prompt side by side, the newest step that asked it alone."""
    from rich.console import Group
    from rich.panel import Panel
    from rich.table import Table

    steps = sorted({row["step"] for row in rows})
    of = [row for row in rows if row["step"] == steps[-1] and row["prompt_id"] == rows[-1]["prompt_id"]]
    asked = ", ".join(map(str, steps))
    console.print(
        f"prompt {of[0]['prompt_id']}, step {steps[-1]}{f' (asked at steps {asked})' if len(steps) > 1 else ''}", "bold"
    )
    for line in str(of[0].get("prompt")).split("\n"):
        console.print(f"  {line}")
    beside = max(1, min(len(of), (console.width or 80) // PANEL_COLUMNS))
    grid = Table.grid(expand=True)
    for _ in range(beside):
        grid.add_column(ratio=1, overflow="fold")
    panels = []
    for row in of:
        reward, advantage, length, _ = _numbers(row)
        lines = [_text(console.printable(line)) for line in str(row.get("completion")).split("\n")]
        title, below = f"{row['sample_id']}: reward {reward}", f"adv {advantage}, {length} tokens"
        panels.append(
            Panel(Group(*lines), title=_text(title), subtitle=_text(below), title_align="left", subtitle_align="left")
        )
    for at in range(0, len(panels), beside):
        grid.add_row(*panels[at : at + beside])
    console.show(grid)
