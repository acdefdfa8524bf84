"""The package's own code never runs data as code, nor writes to a terminal past the functions that escape."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.trees import parsed

ROOT = Path(__file__).parents[1]
FILES = [*(ROOT / "rlinvariant").rglob("*.py"), *(ROOT / "recipes").glob("*.py"), ROOT / "train.py"]
MODULES = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "code", "codeop"}
CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "os.system",
    "os.popen",
    "subprocess.getoutput",
    "subprocess.getstatusoutput",
    "torch.load",
    "torch.save",
    "yaml.load",
    "yaml.unsafe_load",
    "torch.hub.load",
}
PRINTS = {"print", "sys.stdout.write", "sys.stderr.write", "sys.__stdout__.write", "sys.__stderr__.write", "os.write"}
EXCEPTIONS = {
    ("rlinvariant/text.py", "print"): "`say` itself, which escapes",
    ("rlinvariant/rewards/grader.py", "print"): "to a pipe, which the process that asked reads: words of ours",
    ("rlinvariant/rewards/watchdog.py", "os.write"): "to the pipe of the watchdog's process",
    ("rlinvariant/rewards/watch.py", "os.write"): "a process without the package; a function's name, and numbers",
    ("rlinvariant/rewards/cage.py", "cloudpickle"): "the user's own function, on its way to a process of the same user",
    ("rlinvariant/rewards/keeper.py", "cloudpickle"): "the other end: it reads the pipe of the trainer that started it",
    ("recipes/_gym.py", "pickle"): "a problem, on the pipe of a process that the recipe has started to draw it",
    ("recipes/reasoning_gym.py", "pickle"): "the entry of a problem, in a row that the recipe itself has made, in this process",
    ("rlinvariant/deadline.py", "os.write"): "from a process without the package; a signal's name and a run's",
    ("rlinvariant/stopping.py", "os.write"): "in a signal handler, where printing may be going on; a signal's name",
    ("rlinvariant/config/trl_fields.py", "print"): "for developers; a path and a version",
    ("rlinvariant/bench", "print"): "for developers; numbers of ours",
    ("rlinvariant/models/adapter_files.py", "from_pretrained that may ask whether to run code"): "PEFT's: JSON and safetensors",
    ("rlinvariant/bench", "from_pretrained that may ask whether to run code"): "for developers; models that it makes itself",
}
"""(file or directory, what) -> why it may."""


def name_of(node: ast.AST) -> str:
    """Return a dotted name as it is written; "" for anything else."""
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}" if name_of(node.value) else ""
    return node.id if isinstance(node, ast.Name) else ""


def findings(source: str) -> Iterator[str]:
    """Yield what a source does that it should not."""
    for node in ast.walk(parsed(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            yield from (name for name in names if name.split(".")[0] in MODULES)
            if isinstance(node, ast.ImportFrom):
                yield from (name for alias in node.names if (name := f"{node.module}.{alias.name}") in CALLS)
        if not isinstance(node, ast.Call):
            continue
        name = name_of(node.func)
        if name in CALLS | PRINTS:
            yield name
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        constants = {key: value.value for key, value in given.items() if isinstance(value, ast.Constant)}
        if constants.get("shell"):
            yield "shell=True"
        if constants.get("trust_remote_code"):
            yield "trust_remote_code=True"
        runs_code = name.endswith(".from_pretrained") and name != "GenerationConfig.from_pretrained"  # that is JSON alone
        if runs_code and "trust_remote_code" not in given:
            yield "from_pretrained that may ask whether to run code"
        if constants.get("weights_only", True) is False:
            yield "weights_only=False"
        if name.split(".")[-1] == "fork_rng" and not node.args and "devices" not in given:
            yield "fork_rng that starts a context on every GPU: runtime.random_state_kept"
        if name in ("np.load", "numpy.load") and constants.get("allow_pickle", True):
            yield "np.load with pickles"


def excused(file: str, what: str) -> bool:
    return any(what == name and (file == place or file.startswith(f"{place}/")) for place, name in EXCEPTIONS)


def test_no_data_is_run_as_code_and_nothing_reaches_a_terminal_unescaped():
    found = {(str(file.relative_to(ROOT)), what) for file in FILES for what in findings(file.read_text())}
    assert len(FILES) > 150 and not sorted(x for x in found if not excused(*x))


def test_every_exception_is_needed():
    found = {(str(file.relative_to(ROOT)), what) for file in FILES for what in findings(file.read_text())}
    for place, what in EXCEPTIONS:
        assert any(what == name and (file == place or file.startswith(f"{place}/")) for file, name in found), (place, what)


@pytest.mark.parametrize(
    "planted",
    [
        "import pickle",
        "from pickle import loads",
        "import cloudpickle as c",
        "eval('1')",
        "exec(text)",
        "os.system('ls')",
        "subprocess.run('ls', shell=True)",
        "torch.load(path)",
        "torch.load(path, weights_only=True)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "print(text)",
        "sys.stderr.write(text)",
        "f(weights_only=False)",
        "from torch import load",
        "yaml.load(text)",
        "AutoConfig.from_pretrained(x)",
        "with torch.random.fork_rng(): pass",
    ],
)
def test_a_planted_violation_is_found(planted):
    assert list(findings(planted))


def test_what_is_safe_is_left_alone():
    safe = "np.load(p, allow_pickle=False); console.print(x); subprocess.run(['ls']); re.compile(x); say(x); model.eval()"
    for source in (
        *safe.split("; "),
        "m(trust_remote_code=False)",
        "m(trust_remote_code=flag)",
        "ast.literal_eval(x)",
        "fork_rng([])",
    ):
        assert not list(findings(source)), source
