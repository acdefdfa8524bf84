"""The recipe's task, tokenizer, model and warm start."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlinvariant import warmstart
from rlinvariant.config import Config, parse
from rlinvariant.errors import ConfigErrors, UserError
from rlinvariant.recipes import arithmetic
from rlinvariant.trainer.preflight.prompts import Prompts
from rlinvariant.trainer.preflight.rows import row_problems
from tests.config.common import with_defaults

REPO = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def config(*argv: str) -> Config:
    return parse(with_defaults(argv, "recipe=arithmetic", "data.train_size=500", "data.eval_size=50"), {})


def test_worked_sum_is_right() -> None:
    assert arithmetic.worked_sum(348, 275) == "8+5+0=13,4+7+1=12,3+2+1=06;623"
    assert arithmetic.worked_sum(999, 999) == "9+9+0=18,9+9+1=19,9+9+1=19;1998"
    for a in range(10, 100, 7):
        for b in range(10, 100, 9):
            assert arithmetic.worked_sum(a, b).endswith(f";{a + b}")


def test_reward_is_the_exact_answer_alone() -> None:
    right = arithmetic.worked_sum(348, 275)
    completions = [right, right + " ", right[:-1], "623", ";623", "", right + ";623", right + ";9"]
    answers = ["623"] * len(completions)
    assert arithmetic.exact_answer(completions, answers) == [1, 0, 0, 1, 1, 0, 1, 0]


def test_held_out_operands_are_not_trained_on() -> None:
    train, evaluation = arithmetic.datasets(config("data.digits=2"), None)
    assert row_problems(train, "train", Prompts(arithmetic.build_tokenizer())) == ([], [])
    assert row_problems(evaluation, "eval", Prompts(arithmetic.build_tokenizer())) == ([], [])
    assert (len(train), len(evaluation)) == (500, 50)

    def operands(rows: Any) -> set[frozenset[str]]:
        return {frozenset(prompt[:-1].split("+")) for prompt in rows["prompt"]}

    assert not operands(train) & operands(evaluation)
    row: Any
    for row in evaluation:
        a, b = row["prompt"][:-1].split("+")
        assert row["answer"] == str(int(a) + int(b))


def test_datasets_are_deterministic_and_seeded() -> None:
    prompts = [list(arithmetic.datasets(config(*argv), None)[0]["prompt"]) for argv in ((), (), ("data.seed=1",))]
    assert prompts[0] == prompts[1] != prompts[2]


def test_data_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "1+1=", "answer": "2"}\n{"answer": "3"}\n')
    with pytest.raises(UserError, match=r"^data\.path=.*mine\.jsonl, row 1: expected text as `prompt`, found None$"):
        arithmetic.datasets(config(f"data.path={path}"), None)
    path.write_text('{"prompt": "1+1="}\n')
    with pytest.raises(UserError, match=r"^data\.path=.*, line 1: expected a JSON object with `prompt` and `answer`$"):
        config(f"data.path={path}")  # before anything is loaded


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("data.digits=0", "data.digits=0: expected 1 to 6"),
        ("data.train_size=0", "data.train_size=0: expected 1 to 10000000"),
        (
            "data.digits=1",
            "data.eval_size=50: expected at most 4, a tenth of the problems with data.digits=1; lower it or change those",
        ),
        ("data.path=no.jsonl", "data.path=no.jsonl: no such file; give a JSON lines file with `prompt` and `answer`"),
    ],
)
def test_wrong_data_is_refused_before_the_warm_start(argument: str, message: str) -> None:
    with pytest.raises(ConfigErrors) as raised:
        config(argument)
    assert raised.value.errors == [message]


def test_defaults_are_a_valid_configuration() -> None:
    parsed = parse(["recipe=arithmetic"], {})
    samples = parsed.trainer.per_device_train_batch_size * parsed.trainer.gradient_accumulation_steps
    # About 32 tokens per completion: the contract of the run is 200,000 tokens.
    assert parsed.steps * samples * 30 > 200_000
    longest = len(f"{10**3 - 1}+{10**3 - 1}=" + arithmetic.worked_sum(999, 999)) + 2
    assert longest <= (parsed.sampler.max_model_len or 0)
    assert len(arithmetic.worked_sum(999, 999)) + 1 <= (parsed.trainer.max_completion_length or 0)


def test_tokenizer_round_trips_characters(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    arithmetic.build_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "37+58= aZ~\n\"\\'<s>"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id and len(ids) == len(text) + 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.decode([*ids, tokenizer.eos_token_id, tokenizer.pad_token_id], skip_special_tokens=True) == text
    assert tokenizer.unk_token_id not in ids and tokenizer("é")["input_ids"][1] == tokenizer.unk_token_id
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3
    assert tokenizer(["1", "22"], padding=True)["input_ids"][0][0] == tokenizer.pad_token_id


def test_model_is_one_that_the_ops_support() -> None:
    model, tokenizer = arithmetic.build_model()
    assert model.config.head_dim in (64, 128, 256)  # on a CPU and on a GPU
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    assert model.config.tie_word_embeddings and model.config.vocab_size == len(tokenizer)


SHORT = {"stop_at": 1.0, "max_steps": 3, "batch_size": 4, "learning_rate": 1e-3, "seed": 0}


def warm(key: int = 0, **changes: Any) -> str:
    def example(generator: Any) -> tuple[str, str]:
        return f"{generator.randint(10, 99)}+", "1"

    return warmstart.warm_start("t", arithmetic.build_model, example, key={"k": key}, **{**SHORT, **changes})


def test_warm_start_is_cached_and_keyed() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    first = Path(warm())
    written = {path.name: path.stat().st_mtime_ns for path in first.iterdir()}
    assert warm() == str(first)
    assert {path.name: path.stat().st_mtime_ns for path in first.iterdir()} == written
    assert len({str(first), warm(key=1), warm(seed=1), warm(max_steps=2)}) == 4
    AutoModelForCausalLM.from_pretrained(first)
    AutoTokenizer.from_pretrained(first)


def test_warm_start_is_deterministic_and_leaves_the_random_state() -> None:
    import shutil

    import torch

    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = Path(warm())
    weights = (first / "model.safetensors").read_bytes()
    assert torch.equal(torch.get_rng_state(), before)
    shutil.rmtree(first)
    torch.manual_seed(6)
    assert (Path(warm()) / "model.safetensors").read_bytes() == weights


def test_interrupted_warm_start_leaves_no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", interrupted)
        patch.setattr("os.rename", interrupted)
        with pytest.raises(KeyboardInterrupt):
            warm()
    assert not [path for path in warmstart.CACHE.iterdir() if path.is_dir() and path.suffix != ".partial"]
    assert Path(warm()).is_dir()


def test_processes_that_start_together_train_once(tmp_path: Path) -> None:
    code = (
        "import rlinvariant.recipes.arithmetic as a; from rlinvariant.warmstart import warm_start\n"
        "e = lambda g: (f'{g.randint(10, 99)}+', '1')\n"
        f"print('path', warm_start('t', a.build_model, e, key={{}}, **{SHORT!r}))\n"
    )
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(REPO)!r})\n{code}"]
    runs = [subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [run.communicate(timeout=500)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    assert sum("warm start: done" in output for output in outputs) == 1
    assert len({output.splitlines()[-1] for output in outputs}) == 1


def test_supervised_learns_and_stops_early() -> None:
    import torch

    torch.manual_seed(0)
    model, tokenizer = arithmetic.build_model()
    learned = warmstart.supervised(
        model, tokenizer, lambda _: ("1+1=", "2"), stop_at=0.5, max_steps=100, batch_size=4, learning_rate=3e-3, seed=0
    )
    assert 0.5 <= learned < 0.9
