"""Text of a model, a reward, a file or a command line reaches a terminal as characters, never as something it obeys."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlinvariant import cli
from rlinvariant.errors import ParityError, UserError, one_line
from rlinvariant.report.console import Console
from rlinvariant.text import escaped, printable, say, shown
from tests.report.runs import write_run

HOSTILE = (
    "\x1b[2J\x1b]0;title\x07\x1b]8;;http://evil\x1b\\link\x1b]8;;\x1b\\\x1b]52;c;aGk=\x07\x1bPq\x1b\\\x9b31m\x85\r\x08\x7f"
    "\u202egnp\u2066\u200b\u2028\ufeff[bold red]markup[/] :skull: \udcff"
)
COMMANDS = [name for name, *_ in cli.COMMANDS]


def obeyed(text: str) -> set[str]:
    """Return the characters of a text that a terminal obeys, or that cannot be seen."""
    return {c for c in text if not c.isprintable() and c != "\n"}


def test_the_text_has_what_it_is_for():
    """Control: printed as it is, it is obeyed."""
    assert {"\x1b", "\x9b", "\r", "\u202e", "\udcff", "\u2028", "\x07", "\x08"} <= obeyed(HOSTILE)


@pytest.mark.parametrize("function", [printable, shown, escaped, one_line])
def test_the_functions_that_escape(function):
    assert not obeyed(function(HOSTILE)) and "[bold red]markup[/] :skull:" in function(HOSTILE)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_says_no_hostile_argument_as_it_is(command, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments in ([f"--{HOSTILE}"], [f"steps={HOSTILE}", f"{HOSTILE}=1", "a", "b", "c"], [HOSTILE, f"--{HOSTILE}"]):
        if command == "serve":
            arguments = []  # its arguments go to vLLM's own parser
        assert cli.main([command, *arguments]) == 2
        out, err = capsys.readouterr()
        assert err.startswith("error: ") and not obeyed(out + err), (arguments, err)


@pytest.mark.parametrize("kind", [UserError, ParityError])
def test_an_error_is_printed_without_them(kind, capsys):
    def command() -> None:
        raise kind(f"reward length: {HOSTILE}\n{HOSTILE}")

    assert cli.exit_code(command) == {UserError: 2, ParityError: 1}[kind]
    err = capsys.readouterr().err
    assert not obeyed(err) and "[bold red]markup[/]" in err and len(err.splitlines()) == 2


@pytest.mark.parametrize("thread", [False, True])
def test_a_traceback_is_printed_without_them(thread, tmp_path):
    """A process, since the interpreter prints it: an error of a reward that no one expected, in a thread too."""
    code = (
        "import sys, threading\nfrom rlinvariant import cli\n"
        f"def crash(): raise RuntimeError({ascii(HOSTILE)})\n"
        f"def command():\n    {'t = threading.Thread(target=crash); t.start(); t.join()' if thread else 'crash()'}\n"
        "sys.exit(cli.exit_code(command))\n"
    )
    for start, is_clean in ((code, True), (code.replace("cli.exit_code(command)", "command()"), False)):  # the last: control
        done = subprocess.run([sys.executable, "-c", start], capture_output=True, cwd=tmp_path, env=os.environ | PATHS)
        err = done.stderr.decode("utf-8", "surrogateescape")
        assert "Traceback" in err and "RuntimeError" in err and (not obeyed(err)) is is_clean


PATHS = {"PYTHONPATH": str(Path(__file__).parents[1])}


def test_a_console_prints_characters_whatever_it_is_given():
    for encoding in ("utf-8", "ascii", "latin-1"):
        raw = io.BytesIO()
        file = io.TextIOWrapper(raw, encoding=encoding)
        console = Console(file=file)
        console.print(HOSTILE)
        console.samples([{"prompt": HOSTILE, "completion": HOSTILE, "reward": 1.0}])
        with console.stage(HOSTILE, total=2) as advance:
            advance(1)
        file.flush()
        assert not obeyed(raw.getvalue().decode(encoding))


def test_say_prints_characters_whatever_it_is_given(monkeypatch):
    for encoding in ("utf-8", "ascii"):
        raw = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
        say(HOSTILE)
        assert not obeyed(raw.getvalue().decode(encoding))


def test_what_libraries_print_beside_a_spinner_keeps_its_colours_alone():
    """A reward that prints a completion, while a spinner turns on a terminal."""
    file = io.StringIO()
    console = Console(file=file)
    console._rich._force_terminal = True
    console._print_others(f"\x1b[31mred\x1b[0m {HOSTILE}")
    printed = file.getvalue()
    assert (
        "red" in printed
        and "]8;;" not in printed.replace("\\x1b]8;;", "")
        and "\u202e" not in printed
        and "\x9b" not in printed
    )
    assert not [part for part in printed.split("\x1b")[1:] if not part.startswith("[")]


def test_a_report_and_a_dashboard_print_none_of_a_run(tmp_path, capsys, monkeypatch):
    """Names and settings of a run that somebody sent."""
    pytest.importorskip("wandb_workspaces")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = write_run(tmp_path / "run", 0, steps=2, recipe=HOSTILE.encode("utf-8", "backslashreplace").decode(), finished=False)
    run.write_result({"finished": False, "outcome": HOSTILE, "error": HOSTILE})
    for command in (["report"], ["dashboard", "push"], ["replay", "--step", "1"]):
        cli.main([*command, str(run.path)])
        out, err = capsys.readouterr()
        assert out + err and not obeyed(out + err), command
    page = (run.path / "report.html").read_text()
    assert not obeyed(page) and "http://evil" in page
