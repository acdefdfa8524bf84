"""Signals that end a run, sent to real processes that take steps as a run does, each step as long as the test wants."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest

AFTER_A_STEP = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
# A run without a model: a step begins with a line "step" and ends when the test sends a line.
RUN = """
import itertools, os, signal, sys, time
from contextlib import nullcontext
from types import SimpleNamespace
from rlinvariant import cli, deadline, stopping

AGAIN = "rlinvariant resume runs/x"

def say(text):
    print(text, flush=True)

def take_steps(listens=True, step=input, echo_s=0.0, agree=int):
    control = SimpleNamespace(should_save=False, should_evaluate=True, should_training_stop=False)
    with stopping.listening(AGAIN, echo_s, True) if listens else nullcontext():
        with stopping.after_a_step(agree):
            while not control.should_training_stop:
                say("step")
                step()
                stopping.obey(stopping.asked(), control)
                say(f"saved={control.should_save}")

deadline.FORCE_AFTER_S = deadline.WITHIN_S[signal.SIGINT] = 600.0  # a loaded machine may need long for what takes no time
cli.main = lambda *_: cli.exit_code(COMMAND)
def COMMAND():
    BODY
cli.end()
"""


class Run:
    """A process that runs `body`, and what it says."""

    def __init__(self, body: str, before: Callable[[], None] | None = None) -> None:
        """`before` is called in the process before it becomes Python."""

        def prepare() -> None:
            for number in (signal.SIGINT, *AFTER_A_STEP):  # a shell's background ignores SIGINT, nohup SIGHUP
                signal.signal(number, signal.SIG_DFL)
            if before is not None:
                before()

        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        code = RUN.replace("BODY", body)
        environment = {name: value for name, value in os.environ.items() if name not in ("LOCAL_RANK", "RANK")}
        self.process = subprocess.Popen([sys.executable, "-c", code], text=True, env=environment, preexec_fn=prepare, **pipes)
        self.pid = self.process.pid

    def expect(self, line: str) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == f"{line}\n"

    def send(self, number: int, answer: str = "") -> None:
        """Send a signal, and wait for the line that answers it."""
        self.process.send_signal(number)
        if answer:
            assert self.process.stderr is not None
            assert self.process.stderr.readline().startswith(answer)

    def ends(self, line: str = "") -> tuple[int, str, str]:
        """Send a line, and return the exit code and what was said since. The end of its input is what no process waits for."""
        with self.process:
            assert self.process.stdin is not None and self.process.stdout is not None and self.process.stderr is not None
            self.process.stdin.write(line)
            self.process.stdin.flush()
            out, err = self.process.stdout.read(), self.process.stderr.read()
        return self.process.returncode, out, err


DROPPED = """
    class Slow:
        def __del__(self):
            say("finaliser")
            input()
    with stopping.listening(AGAIN, 3.0, True):
        slow = Slow()
        del slow
        say("goes on")
        for _ in range(3000):
            time.sleep(0.1)
        say("never stopped")
"""


@pytest.mark.parametrize("number", [*AFTER_A_STEP, signal.SIGINT])
def test_a_signal_in_a_finaliser_ends_the_run_all_the_same(number):
    """Python drops an exception that rises there, and the process would go on."""
    run = Run(DROPPED.strip())
    run.expect("finaliser")
    run.send(number)
    assert run.process.stdout.readline() in ("goes on\n", "")  # nothing where the signal comes again at once
    code, out, err = run.ends()
    assert (code, out) == (128 + number, "") and "Traceback" not in err, err


def test_what_a_finaliser_drops_otherwise_is_said_as_before():
    """Control: an exception that is no signal's is left to Python."""
    body = DROPPED.strip().replace("input()", "raise ValueError('other')").replace("range(3000)", "range(3)")
    code, out, err = Run(body).ends()
    assert code == 0 and out.endswith("never stopped\n") and "ValueError: other" in err, (code, out, err)


@pytest.mark.parametrize("number", AFTER_A_STEP)
def test_a_signal_ends_a_run_after_the_step_which_is_saved(number):
    run = Run("take_steps()")
    run.expect("step")
    name = signal.Signals(number).name
    limit = f"{600 if number == signal.SIGUSR1 else 25} s"
    run.send(
        number, f"{name}: the run ends when this step is done and saved, after {limit} at most; once more ends it at once\n"
    )
    assert run.ends("\n") == (128 + number, "saved=True\n", f"stopped by {name}\n")


@pytest.mark.parametrize("number", AFTER_A_STEP)
def test_a_process_that_does_not_listen_saves_nothing(number):
    """Control."""
    run = Run("take_steps(listens=False)")
    run.expect("step")
    run.send(number)
    assert run.ends() == (-number, "", "")


def test_a_step_that_no_signal_asked_to_be_the_last_is_not():
    run = Run("take_steps()")
    for _ in range(2):
        run.expect("step")
        run.process.stdin.write("\n")
        run.process.stdin.flush()
        run.expect("saved=False")
    run.send(signal.SIGINT)
    run.ends()


@pytest.mark.parametrize("number", AFTER_A_STEP)
def test_the_second_signal_ends_a_run_at_once(number):
    run = Run("take_steps()")
    run.expect("step")
    run.send(number, signal.Signals(number).name)
    run.send(signal.SIGTERM)
    assert run.ends() == (143, "", "stopped by SIGTERM\n")


def test_a_signal_that_another_process_gets_after_its_last_step_ends_this_one_too():
    body = "\n    with stopping.listening(AGAIN, 0.0, True), stopping.after_a_step(AGREE): pass\n    say('went on')"
    assert Run(body.replace("AGREE", "lambda number: max(number, 15)")).ends()[:2] == (143, "")
    assert Run(body.replace("AGREE", "lambda number: number")).ends()[:2] == (0, "went on\n"), "control"


def test_what_a_launcher_sends_on_is_no_second_signal():
    run = Run("take_steps(echo_s=1e6)")
    run.expect("step")
    run.send(signal.SIGTERM, "SIGTERM")
    run.send(signal.SIGTERM)
    assert run.ends("\n")[:2] == (143, "saved=True\n")


def test_ctrl_c_ends_a_run_at_once_in_one_line():
    run = Run("take_steps()")
    run.expect("step")
    run.send(signal.SIGINT)
    assert run.ends() == (130, "", "interrupted\n")


def test_a_signal_before_the_first_step_ends_a_run_at_once():
    run = Run("\n    with stopping.listening(AGAIN, 0.0, True): say('starts'); input()")
    run.expect("starts")
    run.send(signal.SIGTERM)
    assert run.ends() == (143, "", "stopped by SIGTERM\n")


def test_the_last_words_of_a_run_are_not_cut_short_by_one_signal():
    run = Run("\n    with stopping.listening(AGAIN, 0.0, True), stopping.ending(): say('ends'); input(); say('ended')")
    run.expect("ends")
    run.send(signal.SIGTERM)
    assert run.ends("\n") == (0, "ended\n", "")


def test_sighup_that_nohup_ignores_stays_ignored():
    run = Run("take_steps()", before=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    run.expect("step")
    run.send(signal.SIGHUP)
    run.process.stdin.write("\n")
    run.process.stdin.flush()
    run.expect("saved=False")
    run.expect("step")
    run.send(signal.SIGTERM, "SIGTERM")
    assert run.ends("\n")[:2] == (143, "saved=True\n")


SHORT = "deadline.WITHIN_S[signal.SIGTERM] = deadline.FORCE_AFTER_S = 0.2"
# Says "held" and never ends, all of it in C, which holds the interpreter: no handler of Python's runs in between
HELD = r"lambda: max(itertools.chain(map(os.write, [1], [b'held\n']), itertools.count()))"


def test_a_step_that_does_not_end_in_time_ends_with_its_run():
    run = Run("deadline.WITHIN_S[signal.SIGTERM] = 0.2; take_steps(step=lambda: [time.sleep(0.01) for _ in iter(int, 1)])")
    run.expect("step")
    run.send(signal.SIGTERM, "SIGTERM: the run ends when")
    assert run.ends() == (143, "", "stopped by SIGTERM\n")


def test_a_step_that_holds_the_interpreter_is_killed_when_its_time_is_over():
    run = Run(f"{SHORT}; take_steps(step={HELD})")
    control = Run(f"signal.signal(signal.SIGTERM, lambda *_: None); say('step'); ({HELD})()")  # has a handler too, but no clock
    for process in (control, run):
        process.expect("step")
        process.expect("held")
        process.send(signal.SIGTERM)
    code, _, error = run.ends()
    assert code == -signal.SIGKILL and error.startswith("killed: SIGTERM had not ended this run after ")
    assert error.endswith(" s; its newest checkpoint is what is left; go on with: rlinvariant resume runs/x\n")
    assert control.process.poll() is None
    control.send(signal.SIGKILL)
    control.ends()


FORKS = """
    import multiprocessing
    def fork():
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,), daemon=True)
        child.start()
        child.terminate()
        child.join()
        say(f"the child ended by {-child.exitcode}")
        input()
    take_steps(step=fork)"""


def test_a_process_that_a_step_forks_is_ended_by_its_signal_and_does_not_end_the_run():
    """The limit is short: a signal that the clock counted for the run would end the run while it waits for the test's line."""
    run = Run(f"deadline.WITHIN_S[signal.SIGTERM] = 0.2{FORKS}")
    for _ in range(2):
        run.expect("step")
        run.expect("the child ended by 15")
        with pytest.raises(subprocess.TimeoutExpired):
            run.process.wait(1)
        run.process.stdin.write("\n")
        run.process.stdin.flush()
        run.expect("saved=False")
    run.expect("step")
    run.expect("the child ended by 15")
    run.send(signal.SIGINT)
    assert run.ends() == (130, "", "interrupted\n")


STAYS = """
    INHERITS
    def stay():
        if (child := os.fork()) == 0:
            os.close(1)
            os.close(2)
            time.sleep(600)
            os._exit(0)
        say(child)
        input()
    take_steps(step=stay)"""
BY_C = "stopping._forked.__code__ = (lambda: None).__code__"


@pytest.mark.parametrize("inherits", ["", BY_C], ids=["by Python", "by C"])
def test_a_run_ends_though_a_process_that_it_forked_lives(inherits):
    """A fork of a library's in C runs no code of Python's, and keeps the pipe to the clock."""
    run = Run(STAYS.replace("INHERITS", f"import os; {inherits}"))
    run.expect("step")
    child = int(run.process.stdout.readline())
    try:
        run.send(signal.SIGTERM, "SIGTERM")
        assert run.ends("\n")[0] == 143
        os.kill(child, 0)
    finally:
        os.kill(child, signal.SIGKILL)
