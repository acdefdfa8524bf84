"""`rlinvariant bisect` as a command: its output, its exit codes, and its mistakes in one line."""

import re

import pytest
from transformers import DistilBertConfig

from rlinvariant.bisect import command
from rlinvariant.errors import UserError
from tests import commands
from tests.bisect.faults import split_k
from tests.bisect.pairs import CONFIG, Pair


def test_the_command(pair, tmp_path, monkeypatch, capsys):
    """It needs a config.json alone, and exits with 0, or with 1 where there is a fault."""
    CONFIG.save_pretrained(tmp_path)
    sides = command.load_sides
    made = []

    def kept(*args):
        made.append(sides(*args))
        return made[-1]

    monkeypatch.setattr(command, "load_sides", kept)
    few = ["--random", "--tokens", "4", "--sequences", "5"]
    assert commands.run("bisect", str(tmp_path), *few, "--chunk", "64", "--seed", "2") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "nothing to bisect: 0 of 348 tokens differ (temperature 0.7)" in said
    in_words = (
        r"5 prompts of up to 48 tokens .*; 1 of up to 1; 3 of up to 48 .*; 64 of up to 1; "
        r"2 of up to 129 \([1-9] prefills? cut\); 2 of up to 129 \(.*drawn again, [1-9]\d+ tokens from the cache\); "
        r"5 of up to 48 \(.*[1-5] preemptions?\); "
        r"5 of up to \d+ \(.*a second turn, \d+ tokens from the cache\) exit code 0"
    )
    assert re.search(in_words, said), said
    with_fault = Pair("", made[0][1], made[0][0])
    monkeypatch.setattr(command, "load_sides", lambda *args: made[0])
    with split_k(with_fault):
        assert commands.run("bisect", str(tmp_path), *few) == 1
    said = capsys.readouterr().out
    assert "first      layer 1, down projection" in said and "cause      split-K" in said
    assert "differs    5 prompts of up to 48 tokens (1 prefill cut)" in said


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        ([], "MODEL"),
        (["a", "b"], "unrecognized arguments: b"),
        (["a", "--token", "4"], "--token 4"),
        (["a", "--chunk", "16"], "--chunk: 16: expected a whole number of at least 64"),
        (["a", "--tokens", "0"], "--tokens: 0: expected a whole number of at least 1"),
        (["a", "--temperature", "0"], "--temperature: 0: expected a number from 0.01 to 2"),
        (["a", "--dtype", "fp8"], "fp8"),
        (["a", "--seed", "x"], "--seed: x: expected a whole number"),
        (["a", "--top-p", "1.5"], "--top-p: 1.5: expected more than 0 and at most 1"),
        (["a", "--top-p", "nan"], "--top-p: nan: expected more than 0"),
        (["a", "--top-k", "-2"], "--top-k: -2: expected a whole number of tokens"),
        (["a", "--min-p", "1"], "--min-p: 1: expected 0 or more and less than 1"),
    ],
)
def test_bad_arguments_are_one_line(argv, problem):
    with pytest.raises(UserError) as caught:
        commands.run("bisect", *argv)
    assert problem in str(caught.value) and len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("config", "arguments", "problem"),
    [
        (None, [], "cannot be loaded|found no config.json"),
        (DistilBertConfig(attention_dropout=0.0), ["--random"], "is not a transformers causal language model"),
        (CONFIG, [], "cannot be loaded: .*random needs the configuration alone"),
        (CONFIG, ["--random", "--prompt", "250"], "expected at most 255 together"),
        (CONFIG, ["--top-k", "5", "--invariance", "trainer"], "--top-k: expected --invariance exact or off"),
    ],
)
def test_a_model_that_cannot_be_had_is_one_line(config, arguments, problem, tmp_path):
    if config is not None:
        config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=problem) as caught:
        commands.run("bisect", str(tmp_path), *arguments)
    assert len(str(caught.value).splitlines()) == 1
