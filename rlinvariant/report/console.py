"""The lines that a run prints: stages, one line per step, samples, a summary.

Counts of tokens are printed as integers, so that no rounding can make a mismatch look like none.
"""

import math
import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, cast

import rich.console
from rich.cells import cell_len, set_cell_size
from rich.console import RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from rlinvariant.held_out import WHEN, HeldOut, is_accuracy
from rlinvariant.report.terminal import Screen, others_above
from rlinvariant.text import plural, printable

if TYPE_CHECKING:  # it imports torch, which takes longer than a whole report
    from rlinvariant.metrics import FirstMismatch

WIDTH = 120
HEADER_EVERY = 20
# title, key in the row, format, width
_COLUMNS = (
    ("reward", "reward", ".3f", 6),
    ("len", "completions/mean_length", ",.1f", 6),
    ("tok/s sampler", "perf/sampler_tok_s", ",.0f", 13),
    ("trainer", "perf/trainer_tok_s", ",.0f", 7),
    ("s draw", "time/rollout", ".2f", 6),
    ("score", "time/score", ".2f", 5),
    ("train", "time/train", ".2f", 6),
    ("sync", "time/sync", ".2f", 4),
    ("save", "time/save", ".2f", 4),
)
_CRITIC = (("v loss", "value/loss", ".4f", 6), ("v expl", "value/explained_variance", ".2f", 6))  # of rows of PPO
# label in the line about a mismatch, key
_DRIFT = (
    ("kl_k1", "onpolicy/kl_k1"),
    ("kl_k3", "onpolicy/kl_k3"),
    ("max |dlogprob|", "onpolicy/logprob_absdiff/max"),
    ("min ratio", "onpolicy/is_ratio/min"),
    ("max ratio", "onpolicy/is_ratio/max"),
)

_COLOUR = re.compile(r"(\x1b\[[\d;]*m)")  # key of what a run has survived, its name in the line below the step
_FAILURES = (("reward/errors", "error"), ("reward/timeouts", "time-out"), ("reward/crashes", "crash", "crashes"))

Advance = Callable[[int], None]
Row = Mapping[str, Any]


class _Output(rich.console.Console):
    """Leaves it to the command line to end quietly when nobody reads the output any more; rich would exit with code 1."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


class Console:
    """Prints to stdout (or `file`) from the main process, and nothing from the others.

    Args:
        main_process: whether this process prints.
        file: where to, instead of stdout.
        heartbeat_s: without a terminal (a pipe, or CI is set) a stage prints a line this often, instead of a spinner.
    """

    def __init__(self, main_process: bool = True, file: TextIO | None = None, heartbeat_s: float = 20.0) -> None:
        self._screen = Screen(file)
        self._rich = _Output(
            file=cast(TextIO, self._screen), quiet=not main_process, markup=False, highlight=False, emoji=False
        )
        terminal = self._rich.file.isatty() and not self._rich.is_dumb_terminal
        self.plain = not terminal or os.environ.get("CI", "").lower() not in ("", "0", "false")
        self.width = self._rich.width if terminal else None
        """Characters of a line on the terminal; None where lines may have any length."""
        self._main_process = main_process
        self._heartbeat_s = heartbeat_s
        self._steps_printed = 0
        self._step_s: deque[float] = deque(maxlen=HEADER_EVERY)  # of the last steps

    def print(self, text: str, style: str = "") -> None:
        """Print a line as it is: no markup, no control characters, no wrapping; flushed."""
        self._rich.print(Text(self.printable(text), style=style), soft_wrap=True)

    def show(self, renderable: RenderableType) -> None:
        """Print a table or another of rich's, as wide as the terminal; its texts are `printable` already."""
        self._rich.print(renderable)

    def _print_others(self, line: str) -> None:
        """Print a library's line with its colours, and nothing else that a terminal obeys."""
        parts = [part if _COLOUR.fullmatch(part) else printable(part, keep="\t") for part in _COLOUR.split(line)]
        self._rich.print(Text.from_ansi("".join(parts)), soft_wrap=True)

    @contextmanager
    def stage(self, text: str, total: int | None = None) -> Iterator[Advance]:
        """Say what is happening and for how long while a block runs; yields a function to call with how much is done.

        On a terminal: a spinner, with a bar if `total` is given. Else a line at the start and every `heartbeat_s`.
        """
        if not self._main_process:
            yield lambda done: None
            return
        start, outcome = time.monotonic(), "failed after"
        try:
            with self._heartbeat(text, total) if self.plain else self._spinner(text, total) as advance:
                yield advance
            outcome = "done in"
        except KeyboardInterrupt:
            outcome = "stopped after"
            raise
        finally:
            self.print(f"{text}: {outcome} {_duration(time.monotonic() - start)}")

    def step(self, row: Row, steps: int | None = None, first_mismatch: "FirstMismatch | None" = None) -> None:
        """Print the line of a step, the column titles every HEADER_EVERY lines, and below it whatever is not exact.

        Args:
            row: as in metrics.jsonl, with "step"; a key that is missing is printed as -.
            steps: how many there are in all.
            first_mismatch: printed if there is one.
        """
        columns = (*_COLUMNS, *(_CRITIC if "value/loss" in row else ()))
        if self._steps_printed % HEADER_EVERY == 0:
            titles = [f"{title:>{width}}" for title, _, _, width in columns]
            self.print("  ".join([f"{'step':>7}", "eta", *titles]), style="dim")
        self._steps_printed += 1
        place = f"{row['step']}/{steps}" if steps else str(row["step"])
        cells = [f"{_decimal(row.get(key), spec):>{width}}" for _, key, spec, width in columns]
        mismatched, compared = row.get("onpolicy/mismatched_tokens"), row.get("onpolicy/compared_tokens")
        self.print(
            "  ".join(
                [
                    f"{place:>7}",
                    f"{self._eta(row, steps):>3}",
                    *cells,
                    f"mismatched {integer(mismatched)} / {integer(compared)}",
                ]
            ),
            style="yellow" if mismatched else "",
        )
        new = (compared or 0) + (row.get("onpolicy/unscored_tokens") or 0)  # 0: a further step on an earlier rollout
        if mismatched or (new and any(row.get(key) for key in ("onpolicy/kl_k1", "onpolicy/kl_k3"))):
            drift = [f"{label} {_scientific(row.get(key))}" for label, key in _DRIFT]
            self.print("  " + "  ".join(drift), style="yellow")
        if first_mismatch is not None:
            self.print(f"  first mismatch: {first_mismatch}", style="yellow")
        if survived := [plural(int(row[key]), *nouns) for key, *nouns in _FAILURES if row.get(key)]:
            self.print(f"  reward functions: {', '.join(survived)}", style="yellow")
        if (covered := coverage([row])) != "1" and (new or compared is None):
            self.print(f"  coverage {covered}", style="yellow")

    def _eta(self, row: Row, steps: int | None) -> str:
        """Say how long the steps after this one will take, at the pace of the last HEADER_EVERY; "" where that is not known."""
        if (took := row.get("step_time")) is not None:
            self._step_s.append(took)
        left = 0 if steps is None else steps - row["step"]
        if left <= 0 or not self._step_s:
            return ""
        seconds = left * sum(self._step_s) / len(self._step_s)
        return next(
            (f"{seconds / unit:.0f}{name}" for unit, name in ((1, "s"), (60, "m"), (3600, "h")) if seconds < 99.5 * unit),
            f"{seconds / 86400:.0f}d",
        )

    def evaluation(self, row: Row) -> None:
        """Print the line of one of TRL's evaluations: step, rewards and losses of each set, seconds."""
        shown = [f"{key} {_decimal(x, '.3f')}" for key, x in row.items() if key.endswith(("_reward", "_loss"))]
        shown += [f"{x:.1f} s" for key, x in row.items() if key.endswith("_runtime")]
        self.print(f"evaluation  step {row['step']}: {', '.join(shown)}")

    def samples(self, rows: Iterable[Row]) -> None:
        """Print decoded samples, three lines each, cut to the width: reward, the prompt's end, the completion's beginning.

        Prompts of one task begin alike, with a template or a system line.
        """
        for row in rows:
            self.print(f"sample  reward {_decimal(row.get('reward'), '.3f')}")
            # A text of 120 cells is cut from 121 characters at the latest, so no long one is escaped whole.
            prompt = self.printable(str(row.get("prompt", ""))[-WIDTH - 1 :])
            room = WIDTH - len("  completion  ")
            if cell_len(prompt) > room:
                prompt = "..." + set_cell_size(prompt[::-1], room - 3)[::-1]
            self.print(f"  prompt      {prompt}")
            line = self.printable(f"  completion  {str(row.get('completion', ''))[: WIDTH + 1]}")
            self.print(line if cell_len(line) <= WIDTH else set_cell_size(line, WIDTH - 3) + "...")

    def summary(
        self,
        rows: Sequence[Row],
        held_out: Mapping[str, HeldOut],
        run_dir: str | Path,
        elapsed_s: float | None = None,
    ) -> None:
        """Print the outcome of a run from its metrics rows: reward, held-out reward, the contract, where the files are."""
        rewards = [r for row in rows if (r := row.get("reward")) is not None and not math.isnan(r)]
        window = min(10, max(1, len(rewards) // 2)) if rewards else 0
        mismatched, compared = total(rows, "onpolicy/mismatched_tokens"), total(rows, "onpolicy/compared_tokens")
        lines = [("steps", f"{len(rows):,}" + (f" in {_duration(elapsed_s)}" if elapsed_s is not None else ""))]
        if window:
            first, last = sum(rewards[:window]) / window, sum(rewards[-window:]) / window
            begin, end = f"{first:.3f} (first {plural(window, 'step')})", f"{last:.3f} (last {window})"
            lines.append(("reward", f"{begin} -> {end}, {last - first:+.3f}"))
        if held_out:
            before, after = (_decimal(held_out[when].reward if when in held_out else None, ".3f") for when in WHEN)
            name = "accuracy" if is_accuracy(held_out) else "mean reward"
            lines.append(("held out", f"{before} before -> {after} after, {name}, greedy"))
        lines += [
            (
                "on policy",
                f"mismatched {integer(mismatched)} / {integer(compared)} tokens, coverage {coverage(rows)}",
            ),
            ("files", str(run_dir)),
        ]
        self.print("")
        for name, value in lines:
            self.print(f"{name:<10}  {value}")

    def printable(self, text: str) -> str:
        """Escape what a terminal would obey or what this stream cannot encode; completions are a model's own text."""
        return printable(text).encode(self._rich.encoding, "backslashreplace").decode(self._rich.encoding)

    @contextmanager
    def _spinner(self, text: str, total: int | None) -> Iterator[Advance]:
        bar = (BarColumn(), MofNCompleteColumn()) if total else ()
        columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), *bar, TimeElapsedColumn())
        # rich would put a stream of its own in place of sys.stdout, and a logger set up meanwhile (vLLM's) keep it for good
        live = Progress(*columns, console=self._rich, transient=True, redirect_stdout=False, redirect_stderr=False)
        task = live.add_task(self.printable(text), total=total)

        def of_a_library(progress: str) -> None:
            live.update(task, description=self.printable(f"{text} ({progress})" if progress else text))

        with others_above(self._screen, self._print_others, of_a_library), live:
            yield lambda done: live.update(task, completed=done)

    @contextmanager
    def _heartbeat(self, text: str, total: int | None) -> Iterator[Advance]:
        start, ended, progress = time.monotonic(), threading.Event(), ""

        def advance(done: int) -> None:
            nonlocal progress
            progress = f"{done:,} / {total:,}, " if total else f"{done:,}, "

        def beat() -> None:
            while not ended.wait(self._heartbeat_s):
                self.print(f"{text} ... {progress}{_duration(time.monotonic() - start)}")

        self.print(f"{text} ...")
        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield advance
        finally:
            ended.set()
            thread.join()


def _decimal(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


def integer(value: float | None) -> str:
    """Write a count with thousands separators; a count that is no integer is a bug, and rounding would hide it."""
    if value is None:
        return "-"
    if value != int(value):
        raise ValueError(f"expected a whole number of tokens, got {value!r}")
    return f"{int(value):,}"


def _scientific(value: float | None) -> str:
    return "-" if value is None else "0" if value == 0 else f"{value:.3e}" if math.isfinite(value) else str(value)


def total(rows: Iterable[Row], key: str) -> int | None:
    """Sum of a count over the rows; None if a row lacks it, as what was not counted is not 0."""
    counts = [row.get(key) for row in rows]
    return None if not counts or None in counts else sum(int(count) for count in counts if count is not None)


def coverage(rows: Sequence[Row]) -> str:
    """Return "1" if every sampled token was compared, else the two counts; "-" if a row does not say."""
    compared, unscored = total(rows, "onpolicy/compared_tokens"), total(rows, "onpolicy/unscored_tokens")
    if compared is None or unscored is None:
        return "-"
    return "1" if compared and not unscored else f"{compared:,} / {compared + unscored:,}"


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else f"{int(seconds // 60)} min {int(seconds % 60)} s"
