import io
import os
import re
import subprocess
import sys
import time

import pytest

from rlinvariant.held_out import HeldOut
from rlinvariant.metrics import FirstMismatch
from rlinvariant.report.console import HEADER_EVERY, Console

ROW = {
    "step": 12,
    "reward": 0.4312,
    "completions/mean_length": 14.21,
    "perf/sampler_tok_s": 5120.4,
    "perf/trainer_tok_s": 8400.0,
    "time/rollout": 0.61,
    "time/score": 0.01,
    "time/train": 0.52,
    "time/sync": 0.01,
    "onpolicy/mismatched_tokens": 0,
    "onpolicy/compared_tokens": 2048,
    "onpolicy/unscored_tokens": 0,
    "onpolicy/kl_k1": 0.0,
    "onpolicy/kl_k3": 0.0,
}
DRIFT = ROW | {
    "onpolicy/mismatched_tokens": 1999,
    "onpolicy/kl_k1": -1.25e-7,
    "onpolicy/kl_k3": 3.2109e-6,
    "onpolicy/logprob_absdiff/max": 0.047,
    "onpolicy/is_ratio/min": 0.98,
    "onpolicy/is_ratio/max": 1.04,
}


@pytest.fixture(autouse=True)
def no_ci(monkeypatch):
    monkeypatch.delenv("CI", raising=False)


def printed(*calls, **arguments) -> str:
    file = io.StringIO()
    console = Console(file=file, **arguments)
    for call in calls:
        call(console)
    return file.getvalue()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_an_exact_step_is_one_line_of_exact_integers():
    header, line = printed(lambda c: c.step(ROW, 150)).splitlines()
    assert re.sub(" +", " ", line).strip() == "12/150 0.431 14.2 5,120 8,400 0.61 0.01 0.52 0.01 - mismatched 0 / 2,048"
    assert "reward" in header and "tok/s sampler" in header
    assert "0.0000" not in line


def test_values_stand_under_their_titles():
    header, line = printed(lambda c: c.step(ROW, 150)).splitlines()
    for title, value in (("step", "12/150"), ("reward", "0.431"), ("trainer", "8,400"), ("train ", "0.52 ")):
        assert header.index(title) + len(title) == line.index(value) + len(value)


def test_drift_is_in_scientific_notation_with_the_first_mismatch():
    mismatch = FirstMismatch(3, 7, -1.25, -1.2500001, "0xBFA00000", "0xBFA00001")
    _, line, drift, first = printed(lambda c: c.step(DRIFT, 150, mismatch)).splitlines()
    assert line.endswith("mismatched 1,999 / 2,048")
    assert drift.strip().split("  ") == [
        "kl_k1 -1.250e-07",
        "kl_k3 3.211e-06",
        "max |dlogprob| 4.700e-02",
        "min ratio 9.800e-01",
        "max ratio 1.040e+00",
    ]
    assert first.strip() == ("first mismatch: sequence 3, position 7: sampler -1.25 0xBFA00000, trainer -1.2500001 0xBFA00001")


def test_a_tiny_number_is_never_printed_as_zero():
    row = ROW | {"onpolicy/mismatched_tokens": 1, "onpolicy/kl_k3": 1e-300, "onpolicy/kl_k1": float("nan")}
    text = printed(lambda c: c.step(row))
    assert "kl_k3 1.000e-300" in text and "kl_k1 nan" in text and "mismatched 1 / 2,048" in text


def test_a_count_that_is_no_integer_is_refused():
    assert "mismatched 3 / 2,048" in printed(lambda c: c.step(ROW | {"onpolicy/mismatched_tokens": 3.0}))
    with pytest.raises(ValueError, match="whole number of tokens, got 0.4"):
        printed(lambda c: c.step(ROW | {"onpolicy/mismatched_tokens": 0.4}))


def test_missing_coverage_is_said():
    assert "coverage" not in printed(lambda c: c.step(ROW))
    assert "coverage 2,048 / 2,060" in printed(lambda c: c.step(ROW | {"onpolicy/unscored_tokens": 12}))
    repeated = ROW | {"onpolicy/compared_tokens": 0, "onpolicy/kl_k3": float("nan")}
    assert "coverage" not in printed(lambda c: c.step(repeated))  # a further step on a rollout compared before
    assert "coverage -" in printed(lambda c: c.step({"step": 1}))


def test_titles_come_again():
    text = printed(*[lambda c: c.step(ROW)] * (HEADER_EVERY + 1))
    assert text.count("tok/s sampler") == 2


def test_the_time_left_is_that_of_the_last_steps():
    def said(*seconds, steps=100) -> list[str]:
        rows = [{"step": i, "step_time": s} for i, s in enumerate(seconds, 1)]
        lines = printed(*[lambda c, row=row: c.step(row, steps) for row in rows]).splitlines()
        return [line.split()[1].replace("-", "") for line in lines if "mismatched" in line]  # next is the reward: -

    assert said(1.0, 3.0) == ["99s", "3m"]  # 98 steps of 2 s each
    assert said(100.0, *[1.0] * HEADER_EVERY)[-1] == "79s"  # the first step is too long ago
    assert said(3600.0, 1e6) == ["99h", "569d"]
    assert said(1.0, steps=None) == said(1.0, steps=1) == [""]
    assert said(None) == [""]


def test_lines_fit_120_columns():
    large = DRIFT | {
        "step": 120,
        "completions/mean_length": 1024.5,
        "perf/sampler_tok_s": 128_797.0,
        "perf/trainer_tok_s": 128_400.0,
        "step_time": 240.0,
        "time/rollout": 120.61,
        "time/train": 110.52,
        "onpolicy/mismatched_tokens": 61_440,
        "onpolicy/compared_tokens": 1_061_440,
        "onpolicy/kl_k3": 1e-300,
    }
    mismatch = FirstMismatch(1023, 32767, -1.23456789e-12, -1.23456788e-12, "0xBFA00000", "0xBFA00001")
    text = printed(
        lambda c: c.step(large | {"step": 120}, 150, mismatch),
        lambda c: c.samples([{"prompt": "漢" * 500, "completion": "漢" * 500, "reward": 1}]),
    )
    assert max(len(line) for line in text.splitlines()) <= 120
    assert re.search("漢 ?[.]{3}\n", text) and "漢" * 60 not in text  # two columns each


def test_nothing_in_a_sample_reaches_the_terminal_as_a_command():
    evil = "a\nb\r\x07\x1b[31mred\x1b]0;title\x07 [bold]x[/bold] [/] :smile: \u202e \ud800 é"
    text = printed(lambda c: c.samples([{"prompt": evil, "completion": evil, "reward": 0.5}]))
    assert len(text.splitlines()) == 3
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\ud800]", text)
    assert r"a\nb\r\x07\x1b[31mred\x1b]0;title\x07 [bold]x[/bold] [/] :smile: \u202e \ud800 é" in text


def test_long_samples_are_cut():
    text = printed(lambda c: c.samples([{"prompt": "p" * 10**6, "completion": "\n" * 10**6, "reward": None}]))
    assert all(len(line) <= 120 for line in text.splitlines())
    assert text.count("...") == 2


def test_of_a_long_prompt_the_end_is_shown():
    """Prompts of one task begin with the same template."""
    text = printed(lambda c: c.samples([{"prompt": "<system>" * 99 + "What is one plus six?", "completion": "7"}]))
    assert "What is one plus six?\n" in text and "  prompt      ..." in text


def test_a_sample_that_just_fits_is_not_cut():
    room = 120 - len("  completion  ")
    assert "..." not in printed(lambda c: c.samples([{"completion": "x" * room}]))
    assert "..." in printed(lambda c: c.samples([{"completion": "x" * (room + 1)}]))


def test_the_summary_adds_up():
    rows = [ROW | {"step": i, "reward": 0.3 if i < 10 else 0.9} for i in range(20)]
    text = printed(
        lambda c: c.summary(rows, {"before": HeldOut(0.31, False), "after": HeldOut(0.925, True)}, "runs/a" + "b" * 200, 372.0)
    )
    assert "20 in 6 min 12 s" in text
    assert "0.300 (first 10 steps) -> 0.900 (last 10), +0.600" in text
    assert "held out    0.310 before -> 0.925 after, mean reward, greedy" in text
    assert "mismatched 0 / 40,960 tokens, coverage 1\n" in text
    assert "runs/a" + "b" * 200 + "\n" in text  # whole, to be copied


def test_the_summary_does_not_claim_what_no_row_says():
    assert "mismatched - / - tokens, coverage -" in printed(lambda c: c.summary([], {}, "runs/a"))
    text = printed(lambda c: c.summary([ROW, {"step": 2}], {}, "runs/a"))
    assert "mismatched - / - tokens, coverage -" in text and "held out" not in text
    unscored = ROW | {"onpolicy/unscored_tokens": 1}
    assert "coverage 4,096 / 4,097" in printed(lambda c: c.summary([ROW, unscored], {}, "runs/a"))


def test_a_silent_stage_says_for_how_long():
    file = io.StringIO()
    with Console(file=file, heartbeat_s=0.05).stage("starting the engine", total=3) as advance:
        advance(2)
        while not re.search(r"^starting the engine \.\.\. 2 / 3, \d+\.\d s$", file.getvalue(), re.MULTILINE):
            time.sleep(0.01)
    lines = file.getvalue().splitlines()
    assert lines[0] == "starting the engine ..."
    assert re.fullmatch(r"starting the engine: done in \d+\.\d s", lines[-1])


@pytest.mark.parametrize("file", [io.StringIO, Terminal])
def test_a_failed_stage_says_so_and_lets_the_error_through(file):
    console = Console(file=file())
    with pytest.raises(KeyError), console.stage("loading"):
        raise KeyError
    assert "loading: failed after 0." in console._rich.file.getvalue()  # pyright: ignore


def test_a_terminal_gets_a_spinner_and_ci_gets_lines(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    outputs = []
    for ci in ("", "true"):
        monkeypatch.setenv("CI", ci)
        file, before = Terminal(), sys.stdout
        with Console(file=file).stage("loading [bold]", total=2) as advance:
            assert sys.stdout is before  # loggers made in a stage must not keep a redirected stream
            advance(1)
        outputs.append(file.getvalue())
    assert "\x1b[" in outputs[0] and "loading [bold]: done in" in outputs[0]
    assert "\x1b[" not in outputs[1] and outputs[1].startswith("loading [bold] ...\n")


def test_other_processes_print_nothing():
    def everything(console):
        with console.stage("loading") as advance:
            advance(1)
        console.step(DRIFT, 150, FirstMismatch(0, 0, 0.0, 0.0, "", ""))
        console.samples([{"prompt": "x"}])
        console.summary([ROW], {"before": HeldOut(0.0, True)}, "runs/a")
        console.print("x")

    assert printed(everything) != ""  # control
    assert printed(everything, main_process=False) == ""


def test_a_pipe_gets_each_line_at_once_and_in_its_own_encoding():
    code = (
        "import sys; from rlinvariant.report.console import Console; c = Console()\n"
        "c.print('é' + 'x' * 300); sys.stdin.readline(); c.print('end')"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"\\xe9" + b"x" * 300 + b"\n"  # while it waits: flushed, not wrapped
    rest, _ = process.communicate(b"\n", timeout=500)
    assert rest == b"end\n" and process.returncode == 0
