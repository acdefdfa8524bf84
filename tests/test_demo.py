"""`rlinvariant demo` counts what differs, draws it, and fails where the invariant engine does."""

import json
import re
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import pytest

from rlinvariant import cli, ops
from rlinvariant.demo.measure import measured
from rlinvariant.demo.page import page
from rlinvariant.errors import ConfigErrors, ParityError, UserError
from rlinvariant.models.shapes import SHAPES
from rlinvariant.rollout import Completion
from tests import commands
from tests.parity.harness import load

SPELL = SimpleNamespace(decode=lambda ids: "".join(chr(97 + i) for i in ids))


def completion(tokens: str, *logprobs: float) -> Completion:
    return Completion([ord(c) - 97 for c in tokens], list(logprobs))


def test_what_is_counted():
    alone = completion("abc", -1.0, -2.0, -3.0)
    other = completion("abd", -1.0, -2.5, -3.0)
    found = measured([alone, alone, other, completion("abc", -1.0, -2.0, -3.0000000001)], alone, SPELL)
    assert (found["unique"], found["first_token"], found["as_alone"]) == (2, 3, 3)
    assert (found["unique_logprobs"], found["first_logprob"], found["logprobs_as_alone"]) == (3, 2, 2)
    assert found["branches"] == [["c", 3], ["d", 1]] and found["of"] == [0, 0, 1, 0]
    assert found["texts"] == [["a", "b", "c"], ["a", "b", "d"]]
    assert found["unique_by_token"] == [1, 1, 2] and found["unique_logprobs_by_token"] == [1, 2, 3]
    same = measured([alone] * 3, alone, SPELL)
    assert (same["unique"], same["first_token"], same["first_logprob"], same["branches"]) == (1, None, None, [])


def test_log_probs_are_told_apart_by_their_bits():
    assert measured([completion("a", 0.0), completion("a", -0.0)], completion("a", 0.0), SPELL)["unique_logprobs"] == 2
    nan = float("nan")
    assert measured([completion("a", nan), completion("a", nan)], completion("a", nan), SPELL)["unique_logprobs"] == 1


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("completion=5", "did you mean completions?"),
        ("completions=0", "expected a whole number of at least 1"),
        ("tokens=1e3", "expected a whole number of at least 1"),
        ("dtype=float16", "expected bfloat16 or float32"),
        ("run=a/b", "expected a name, not a path"),
        ("--completions=5", "without dashes"),
    ],
)
def test_what_is_wrong_is_said_before_anything_starts(argument, message):
    with pytest.raises(ConfigErrors, match=re.escape(message)) as raised:
        commands.run("demo", argument, "tiny", "another")
    assert sorted(line.partition(": ")[0] for line in raised.value.errors) == sorted([argument, "another"])


@pytest.mark.slow
def test_a_model_that_is_not_there_is_refused_before_vllm_is_imported():
    code = "import sys; from rlinvariant import cli; code = cli.main(sys.argv[1:]); sys.exit(code + ('vllm' in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code, "demo", "tinny"], capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout, done
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: MODEL=tinny: no such directory") and line.endswith("did you mean tiny?")


def test_the_shapes_that_the_help_names_exist(capsys):
    assert cli.main(["demo", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert (
        all(name in shown for name in ("tiny", "qwen3-0.6b", "llama-3.2-1b"))
        and {"tiny", "qwen3-0.6b", "llama-3.2-1b"} <= SHAPES.keys()
    )


@pytest.fixture
def run(tmp_path, monkeypatch, arithmetic_dir, exact_engine, stock_engine):
    """Run the command on the engines of this process: real ones, that need not start again."""
    monkeypatch.chdir(tmp_path)
    engines = {True: exact_engine, False: stock_engine}
    for engine in engines.values():  # other tests have trained them
        engine.sync(load(arithmetic_dir).named_parameters())
    monkeypatch.setattr("rlinvariant.sampler.engine.Sampler", lambda model, invariant, **_: engines[invariant])
    arguments = [arithmetic_dir, "prompt=12+34=", "completions=20", "tokens=12", "concurrency=6", "run=it"]
    return lambda: commands.run("demo", *arguments)


def test_it_counts_real_completions_among_real_traffic(run, tmp_path, capsys):
    run()
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "runs/it" / "demo.json").read_text())
    ours, stock = result["arms"]["ours"], result["arms"]["stock"]
    assert "ours:  20 completions: 1 unique, no difference seen; 1 unique in log-probs, no difference seen" in printed
    assert (ours["unique_logprobs"], ours["logprobs_as_alone"], ours["unique_logprobs_by_token"]) == (1, 20, [1] * 12)
    assert len(stock["unique_by_token"]) == 12 and stock["completions"] == 20
    for arm in (ours, stock):  # the same traffic
        assert (arm["others"], arm["cancelled"], arm["most"]) == (ours["others"], ours["cancelled"], 6) and arm["fewest"] < 6
        assert arm["others"] > 3 and arm["cancelled"] > 0 and arm["tokens_per_s"] > 0
    shown = (tmp_path / "runs/it" / "demo.html").read_text()
    assert "ours, tokens and log-probs: 1" in shown and "<script" not in shown and "http" not in shown.split("</style>")[1]
    with pytest.raises(UserError, match="already holds a demo"):
        run()


def test_it_fails_where_the_invariant_engine_is_not(run, tmp_path, monkeypatch):
    """A product that depends on the row's place in the batch is seen."""

    def placed(linear, x, weight, bias=None, packed=None):
        y = linear(x, weight, bias, packed)
        y.flatten(0, -2)[::3] *= 1 + 2**-7
        return y

    monkeypatch.setattr(ops, "linear", partial(placed, ops.linear))
    with pytest.raises(ParityError, match="the invariant engine gave"):
        run()
    assert json.loads((tmp_path / "runs/it" / "demo.json").read_text())["arms"]["ours"]["unique_logprobs"] > 1


def test_a_models_words_cannot_harm_the_page():
    alone = completion("abc", -1.0, -2.0, -3.0)
    evil = SimpleNamespace(decode=lambda ids: "<script>alert(1)</script>\x1b[2J")
    arm = measured([alone, completion("abd", -1.0, -2.0, -3.0)], alone, evil)
    arm |= {"tokens_per_s": 1.0, "seconds": 1.0, "others": 1, "cancelled": 0, "fewest": 1, "most": 2}
    options = {"completions": 2, "tokens": 3, "dtype": "bfloat16", "prompt": "<b>"}
    result = {"model": "<i>", "random_weights": False, "options": options, "prompt_token_ids": [1], "device": "cpu"}
    shown = page(result | {"arms": {"stock": arm, "ours": arm}})
    assert not any(words in shown for words in ("<script", "prompt=<b>", "\x1b", "<i>"))
    assert "prompt=&lt;b&gt;" in shown and "&lt;script&gt;" in shown


def test_the_page_marks_the_first_token_that_differs_and_what_follows_it():
    alone = completion("abcd", -1.0, -2.0, -3.0, -1.0)
    arm = measured([alone, alone, completion("abed", -1.0, -2.0, -3.0, -1.0)], alone, SPELL)
    arm |= {"tokens_per_s": 1.0, "seconds": 1.0, "others": 1, "cancelled": 0, "fewest": 1, "most": 2}
    options = {"completions": 3, "tokens": 4, "dtype": "bfloat16", "prompt": ""}
    result = {"model": "m", "random_weights": False, "options": options, "prompt_token_ids": [1], "device": "cpu"}
    shown = page(result | {"arms": {"stock": arm, "ours": arm}})
    assert ">abcd</span>" in shown and '>ab<mark>e</mark><span class="later">d</span></span>' in shown
