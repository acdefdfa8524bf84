"""Public signatures have types: no bare `Any` but where this file says why; `rlinvariant/types.py` names the rest."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.trees import parsed

PACKAGE = Path(__file__).parents[1] / "rlinvariant"
TRL = "TRL's or transformers' own argument or result, handed on as it is"
ASGI = "the arguments of an ASGI application, for which it has no types"
ABSENT = "a model or an engine, or in words why there is none"
REWARD = "a user's: a function, a reward model or its name, one or a list, refused by name if it is none of these"
NULLABLE = "declared as if any value could be None, which TRL's __post_init__ has replaced"
ALLOWED = {  # file: function -> why no type says it
    "bench/gpu.py: capture": "PyTorch's handle of a memory pool is opaque",
    "bench/measure.py: write": "rows of any bench, each a dataclass of its own",
    "bisect/case.py: Case.rotary": "a module of transformers that has been given our tables",
    "conflicts.py: ppo_conflicts": "a config.PPOConfig, and config imports this module",
    "trainer/preflight/tokens.py: end_tokens": "eos_token_id of a tokenizer is declared to be text, or a list, too",
    "models/modules.py: become": "a module of transformers, whose class is replaced",
    "models/modules.py: epsilon": "a number under either of two names, as the module has it",
    "ops/register.py: define": "an operator gives a tensor, or a tuple of them: its schema says which",
    "plan.py: arguments": "arguments of a trainer, by name",
    "report/wandb_log.py: start": "config.WandbConfig, or a namespace that has its fields",
    "rewards/checked.py: checked_reward": REWARD,
    "rewards/grades.py: grades": "whatever a user's function has returned: that is what it finds out",
    "sampler/vllm_guard.py: Guard.__call__": ASGI,
    "sampler/vllm_serve.py: Proof.__call__": ASGI,
    "sampler/vllm_trainers.py: Trainers.__call__": ASGI,
    "script.py: ScriptRun.carry_out": TRL,
    "script.py: ScriptRun.start": "hooks of four kinds, among a trainer's arguments",
    "script.py: steps_of": NULLABLE,
    "trainer/fields.py: settled": NULLABLE,
    "trainer/grading.py: call_rewards": TRL,
    "trainer/grading.py: checked_rewards": REWARD,
    "trainer/published.py: PublishedTrainer.__init__": TRL,
    "trainer/published.py: PublishedTrainer.push_to_hub": TRL,
    "trainer/published.py: PublishedTrainer.upload": TRL,
    "verification/load.py: or_reason": ABSENT,
    "verification/pair.py: Pair.draw": "options of sampler.drive.drive, handed on",
    "verification/speed.py: rates": ABSENT,
}


def has_any(annotation: ast.expr | None) -> bool:
    """Return whether an annotation says `Any`, at any depth, quoted or not."""
    for node in ast.walk(annotation) if annotation is not None else ():
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if node is not annotation and not node.value.isidentifier():
                continue  # a word of Literal
            if has_any(parsed(node.value, mode="eval").body):
                return True
        if (isinstance(node, ast.Name) and node.id == "Any") or (isinstance(node, ast.Attribute) and node.attr == "Any"):
            return True
    return False


def bare(source: str) -> Iterator[str]:
    """Yield the name of each public function or method whose signature says `Any`, and where: `f(x)`, or `f ->`."""
    yield from _bare(parsed(source).body, "")


def _bare(body: list[ast.stmt], prefix: str) -> Iterator[str]:
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from _bare(node.body, f"{prefix}{node.name}.")
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if node.name.startswith("_") and node.name not in ("__init__", "__call__"):
            continue
        a = node.args
        for argument in (*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg):
            if argument is not None and has_any(argument.annotation):
                yield f"{prefix}{node.name}({argument.arg})"
        if has_any(node.returns):
            yield f"{prefix}{node.name} ->"


def found() -> list[str]:
    """List every such place of the package, with its file."""
    places = ((path.relative_to(PACKAGE).as_posix(), path) for path in sorted(PACKAGE.rglob("*.py")))
    return [f"{name}: {place}" for name, path in places for place in bare(path.read_text())]


def function(place: str) -> str:
    return place.removesuffix(" ->").partition("(")[0]


def test_public_signatures_have_types():
    new = [place for place in found() if function(place) not in ALLOWED]
    assert not new, "give these a type, or one of rlinvariant/types.py:\n" + "\n".join(new)


def test_no_reason_outlives_its_signature():
    assert not ALLOWED.keys() - {function(place) for place in found()}


@pytest.mark.parametrize(
    ("source", "places"),
    [
        ("def f(x: Any): ...", ["f(x)"]),
        ("async def f(*x: Any, **y: Any) -> None: ...", ["f(x)", "f(y)"]),
        ("def f(*, x: list[dict[str, Any]] | None = None): ...", ["f(x)"]),
        ("def f() -> 'tuple[Any, int]': ...", ["f ->"]),
        ("def f(x: dict[str, 'Any']): ...", ["f(x)"]),
        ("def f(x: typing.Any): ...", ["f(x)"]),
        ("class A:\n    def __init__(self, x: Any): ...\n    def g(self) -> Any: ...", ["A.__init__(x)", "A.g ->"]),
        ("class A:\n    class B:\n        def g(self, x: Any): ...", ["A.B.g(x)"]),
    ],
)
def test_a_planted_any_is_found(source, places):
    assert list(bare(source)) == places


@pytest.mark.parametrize(
    "source",
    [
        "def f(x: object, y: Json) -> 'Anything': ...",
        "def _f(x: Any): ...",
        "class _A:\n    def f(self, x: Any): ...",
        "def f(x: Literal['Any of them', 'in b']) -> Callable[..., object]: ...",
        "def f():\n    x: Any = 1",
    ],
)
def test_what_has_types_passes(source):
    assert list(bare(source)) == []
