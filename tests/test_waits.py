"""No test depends on how fast the machine is: what one waits for may take minutes, and whether it has come is looked at."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.trees import parsed

ROOT = Path(__file__).parents[1]
LEAST_S = 300.0  # a limit that ends a test which would hang, and no other
EXCEPTIONS = {
    ("tests/test_stopping.py", "run.process.wait"): "the process must still be there when this time is over",
    ("tests/rewards/test_checked.py", "child.join"): "what comes of it is looked at, and it is killed then",
    ("tests/report/test_rundir.py", "time.sleep"): "a kill at any time: what was said by then is there",
    ("tests/test_cli.py", "closed.bind"): "kept while it is named: nobody listens there",
}
"""(file, call) -> why it may."""
MAY_WAIT = re.compile(r"timeout=|\.(wait|wait_procs|sleep|bind)\(|\.join\(\d")


def is_poll(node: ast.AST) -> bool:
    """Return whether a loop looks, each time, whether what it waits for is there."""
    return isinstance(node, ast.While) or (isinstance(node, ast.For) and any(isinstance(x, ast.Break) for x in ast.walk(node)))


def findings(source: str) -> Iterator[str]:
    """Yield calls that wait for a short time, that sleep once and go on, or that ask for a port which another may take then."""
    if not MAY_WAIT.search(source):  # most files: they need not be parsed
        return
    tree = parsed(source)
    polls = {id(call) for loop in ast.walk(tree) if is_poll(loop) for call in ast.walk(loop)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        name = node.func.attr
        given = [keyword.value for keyword in node.keywords if keyword.arg == "timeout"]
        given += node.args if name in ("wait", "join", "sleep") else node.args[1:] if name == "wait_procs" else []
        seconds = [x.value for x in given if isinstance(x, ast.Constant) and type(x.value) in (int, float) and x.value]
        if id(node) not in polls and any(s < (60 if name == "sleep" else LEAST_S) for s in seconds):
            yield ast.unparse(node.func)
        if name == "bind" and any(ast.unparse(x).endswith(", 0)") for x in node.args):
            yield ast.unparse(node.func)


def found() -> set[tuple[str, str]]:
    files = [path for path in (ROOT / "tests").rglob("*.py") if not path.is_relative_to(ROOT / "tests/gpu2")]
    assert len(files) > 200
    return {(str(path.relative_to(ROOT)), call) for path in files for call in findings(path.read_text())}


def test_no_test_waits_for_a_short_time():
    assert found() == EXCEPTIONS.keys()


@pytest.mark.parametrize(
    "planted",
    [
        "process.wait(20)",
        "process.communicate(timeout=60)",
        "subprocess.run(command, timeout=120)",
        "forks.run_ranks(2, command, timeout=200)",
        "psutil.wait_procs(engines, 10)",
        "time.sleep(0.1)",
        "for _ in range(3): time.sleep(1)",
        "probe.bind(('127.0.0.1', 0))",
    ],
)
def test_a_planted_one_is_found(planted):
    assert list(findings(planted))


def test_what_waits_for_a_condition_is_left_alone():
    for source in ("process.wait()", "run.wait(500)", "while not there(): time.sleep(0.1)", "time.sleep(600)"):
        assert not list(findings(source)), source
