"""The recipe reasoning_gym: any of its tasks draws rows that can be trained on, and scores its own answers as right."""

import importlib.util
import json
import os
import pickle
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from rlinvariant.config import Config, parse
from rlinvariant.errors import ConfigErrors, UserError
from rlinvariant.recipes import reasoning_gym as recipe
from rlinvariant.recipes._gym import Drawer, Problem, Tasks, read_tasks, task_names
from rlinvariant.trainer.preflight.prompts import Prompts
from rlinvariant.trainer.preflight.rows import row_problems
from tests.recipes.hub_rows import chat_tokenizer
from tests.recipes.smollm2 import SMALL, needs_the_model, rlinvariant, rows

SAMPLED = ("chain_sum", "acre", "isomorphic_strings", "gsm_symbolic", "knights_knaves", "propositional_logic", "codeio")
"""Tasks of each kind: a plain one, no curriculum, made by hash order, objects in its entries, no answer of its own."""
ORACLES = {"propositional_logic": "example_answer", "rubiks_cube": "example_correct_answer", "graph_color": "possible_answer"}
"""Tasks that give no answer of their own -> where in `metadata` they show one."""
WITHOUT_ANSWER = (*ORACLES, "boxnet", "rush_hour")
WITHOUT_ORACLE = ("boxnet", "rush_hour")
FLOOR = 0.2  # most that any task gives for an answer that is not even tried


@pytest.fixture(scope="module")
def drawer() -> Iterator[Drawer]:
    with Drawer() as shared:
        yield shared


def config(*argv: str) -> Config:
    sizes = ["data.train_size=24", "data.eval_size=4", "model=org/name"]
    given = {argument.partition("=")[0] for argument in argv}
    return parse(["recipe=reasoning_gym", *(size for size in sizes if size.partition("=")[0] not in given), *argv], {})


def asked(row: Any) -> str:
    return row["prompt"][-1]["content"]


def oracle(task: str, entry: Mapping[str, Any]) -> str | None:
    found = entry["metadata"][ORACLES[task]] if task in ORACLES else entry["answer"]
    return json.dumps(found) if isinstance(found, dict) else found


def require_sound(problem: Problem, tasks: Tasks) -> None:
    """Score a problem's own answer, twice, as the run does: from the bytes of its row; and no answer as the control."""
    entry = pickle.loads(problem.entry)
    assert problem.question == entry["question"] and entry["metadata"]["source_dataset"] == problem.task
    if problem.task not in WITHOUT_ORACLE:
        completions = [[{"role": "assistant", "content": f"So: <answer>{oracle(problem.task, entry)}</answer>"}]] * 2
        scores = recipe.gym_score(tasks, completions, [problem.entry] * 2)
        assert scores == [1.0, 1.0], (problem.task, problem.answer, scores)
    (nothing,) = recipe.gym_score(tasks, [[{"role": "assistant", "content": "I do not know."}]], [problem.entry])
    assert 0 <= nothing <= FLOOR, (problem.task, nothing)


def test_tasks_of_each_kind_score_their_own_answers_in_a_mixture(drawer: Drawer) -> None:
    tasks, problems = read_tasks(",".join(SAMPLED), {}, None)
    assert problems == []
    drawn = list(drawer.draw(tasks, 48, 7))
    assert {problem.task for problem in drawn} == set(SAMPLED)
    for problem in drawn:
        require_sound(problem, tasks)


@pytest.mark.slow
@pytest.mark.parametrize("task", task_names())
def test_every_task_gives_rows_that_can_be_trained_on(task: str) -> None:
    # The tokenizer here has a token for each character, so that most prompts take four times the room that they take elsewhere
    few = ["data.examples=0"] if task in WITHOUT_ANSWER else []
    made = config(
        f"data.task={task}", "data.train_size=3", "data.eval_size=2", "data.level=None", "sampler.max_model_len=98304", *few
    )
    tokenizer = chat_tokenizer()
    rows = recipe.datasets(made, tokenizer)
    assert [len(part) for part in rows] == [3, 2]
    for part in rows:
        assert row_problems(part, "train", Prompts(tokenizer, longest=98304, completion=128), ["entry"])[0] == []
    tasks, _ = read_tasks(task, {}, None)
    row: Any
    for row in rows[0]:
        require_sound(Problem(task, asked(row), row["answer"], row["entry"]), tasks)


REFUSED_LEVELS = {
    ("caesar_cipher", True),
    ("knight_swap", False),
    ("knight_swap", True),
    ("rubiks_cube", True),
    ("survo", True),
}
"""(task, whether the last level of its curriculum, not its first): reasoning-gym 0.1.25's own config refuses what it sets."""
FAILING_LEVELS = {("jugs", True)}
"""The same, for a level at which reasoning-gym 0.1.25 finds no problem."""


@pytest.mark.slow
@pytest.mark.parametrize("task", task_names())
def test_every_curriculum_draws_at_its_first_and_last_level(task: str, drawer: Drawer) -> None:
    from reasoning_gym.factory import CURRICULA

    if task not in CURRICULA:
        assert read_tasks(task, {}, 0) == read_tasks(task, {}, None)
        assert read_tasks(task, {}, 1)[1] == [f"data.level=1: expected 0 for {task}, which has no curriculum; use data.config"]
        return
    (line,) = read_tasks(task, {}, 99)[1]
    most = int(line.split("expected 0 to ")[1].split()[0])
    for level in (0, most):
        tasks, problems = read_tasks(task, {}, level)
        if (task, level > 0) in REFUSED_LEVELS:
            assert len(problems) == 1 and f"{task} refuses it" in problems[0], problems
        elif (task, level > 0) in FAILING_LEVELS:
            with pytest.raises(UserError, match=f"data.task={task}: reasoning-gym fails: .*; change data.config or data.task"):
                list(drawer.draw(tasks, 1, 7))
        else:
            assert problems == [] and len(list(drawer.draw(tasks, 1, 7))) == 1


def test_rows_are_held_out_by_question() -> None:
    """The control: reasoning-gym's problem i is that of seed + i, so the next seed gives the same problems, shifted."""
    import reasoning_gym

    near = [[e["question"] for e in reasoning_gym.create_dataset("gcd", size=24, seed=seed)] for seed in (0, 1)]
    assert set(near[0][1:]) == set(near[1][:-1])
    made = config("data.task=gcd:3,coin_flip", "data.config={'coin_flip': {'min_trials': 3, 'max_trials': 3}}")
    train, held_out = ([asked(row) for row in part] for part in recipe.datasets(made, chat_tokenizer()))
    assert (len(train), len(held_out), len(set(held_out))) == (24, 4, 4) and not set(train) & set(held_out)
    assert sum("coin" in question for question in train) < 12 < sum("GCD" in question for question in train)


def shown_problems(row: Any) -> list[tuple[str, str]]:
    """Return question and answer of each example of a prompt, whose turns must alternate after the system line."""
    system, *turns, last = row["prompt"]
    assert [turn["role"] for turn in [system, *turns, last]] == ["system", *["user", "assistant"] * (len(turns) // 2), "user"]
    return [(turns[i]["content"], turns[i + 1]["content"]) for i in range(0, len(turns), 2)]


def test_a_prompt_shows_answered_problems_of_its_own_task_that_are_in_no_row(drawer: Drawer) -> None:
    made = config("data.task=gcd,lcm:0.2", "data.examples=3", "data.eval_size=8")
    train, held_out = recipe.datasets(made, chat_tokenizer())
    rows = [*train, *held_out]
    tasks, _ = read_tasks("gcd,lcm", {}, 0)
    entries = {problem.question: problem for problem in drawer.draw(tasks, 96, recipe.EXAMPLE_SEED)}
    words = {"gcd": "Greatest Common Divisor", "lcm": "Least Common Multiple"}
    assert {row["task"] for row in rows} == set(words)
    shown = set[str]()
    for row in rows:
        examples = shown_problems(row)
        assert len(dict(examples)) == 3 and all(words[row["task"]] in text for text in [asked(row), *dict(examples)])
        for question, answer in examples:
            content = [[{"role": "assistant", "content": answer}]]
            assert answer.startswith("<answer>") and recipe.gym_score(tasks, content, [entries[question].entry]) == [1.0]
        shown |= dict(examples).keys()
    assert len(shown) == 6 and not shown & {asked(row) for row in rows}


def test_the_question_of_an_example_is_neither_trained_on_nor_held_out() -> None:
    """Few questions, all drawn; the control: without the examples, the rows have their questions."""
    few = ("data.task=coin_flip", "data.config={'min_trials': 3, 'max_trials': 5}", "data.train_size=200", "data.eval_size=2")
    train, held_out = recipe.datasets(config(*few), chat_tokenizer())
    first: Any = next(iter(train))
    shown = dict(shown_problems(first)).keys()
    assert len(shown) == config(*few).data.examples > 0 and not shown & {asked(row) for row in [*train, *held_out]}
    train, held_out = recipe.datasets(config(*few, "data.examples=0"), chat_tokenizer())
    assert shown <= {asked(row) for row in [*train, *held_out]}, "blind"


def test_examples_take_room() -> None:
    """The control: the same problems fit without examples."""
    few = ("data.task=chain_sum", "sampler.max_model_len=700", "trainer.max_completion_length=64")
    assert len(recipe.datasets(config(*few, "data.examples=0"), chat_tokenizer())[0]) == 24
    with pytest.raises(UserError, match=r"^data\.eval_size=4: .* 14 as too long; lower it or data\.examples, raise sam"):
        recipe.datasets(config(*few, "data.examples=8"), chat_tokenizer())


def test_answers_that_no_completion_has_room_for_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    """A character is a token here. The control: with more room nothing is said."""
    few = ("data.task=spell_backward", "data.config={'min_word_len': 4, 'max_word_len': 6}", "data.examples=1")
    recipe.datasets(config(*few, "trainer.max_completion_length=22"), chat_tokenizer())
    line = r"data\.task=spell_backward: \d+ of 24 right answers, up to 23 tokens long, do not fit in .*=22; raise it"
    assert re.search(line, capsys.readouterr().out)
    recipe.datasets(config(*few, "trainer.max_completion_length=23"), chat_tokenizer())
    assert "right answers" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (
            ["data.task=gcd,boxnet", "data.examples=2"],
            r"data\.examples=2: boxnet gives no answers to show; write data",
        ),
        (
            ["data.task=coin_flip", "data.examples=90"],
            r"data\.examples=90: expected at most \d+, which 1,440 p",
        ),
    ],
)
def test_a_task_that_has_no_examples_is_refused(argv: list[str], line: str) -> None:
    with pytest.raises(UserError, match=f"^{line}"):
        recipe.datasets(config(*argv), chat_tokenizer())


def test_a_small_task_says_how_many_it_can_hold_out() -> None:
    with pytest.raises(UserError, match=r"^data\.eval_size=64: expected at most \d+: of 256 problems drawn, \d+ left out as"):
        recipe.datasets(config("data.task=coin_flip", "data.eval_size=64"), chat_tokenizer())


@pytest.mark.slow
def test_rows_do_not_depend_on_the_hashes_of_a_process() -> None:
    """The control: the task itself, in two processes with other hashes, draws other problems."""
    ours = (
        "from rlinvariant.recipes._gym import *\n"
        "with Drawer() as drawer: print([p.entry for p in drawer.draw(read_tasks('ransom_note', {}, None)[0], 4, 7)])"
    )
    stock = "from reasoning_gym import *; d = create_dataset('ransom_note', size=4, seed=7); print([d[i] for i in range(4)])"

    def printed(code: str, hashes: str) -> str:
        environment = os.environ | {"PYTHONHASHSEED": hashes}
        return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True).stdout

    assert printed(ours, "1") == printed(ours, "2") != ""
    assert printed(stock, "1") != printed(stock, "2"), "blind"


def test_what_is_drawn_before_or_left_unread_leaves_no_trace(drawer: Drawer) -> None:
    tasks, _ = read_tasks("chain_sum", {}, None)
    first = next(drawer.draw(tasks, 10**6, 7))  # of so many, one
    assert next(drawer.draw(tasks, 1, 8)) != first == next(drawer.draw(tasks, 1, 7))


def test_programs_that_draw_from_numpy_have_the_same_answers_every_time(drawer: Drawer) -> None:
    tasks, _ = read_tasks("chain_sum:2,acre,codeio", {}, None)  # without the seed, the 13th had another answer each time
    assert list(drawer.draw(tasks, 13, 11)) == list(drawer.draw(tasks, 13, 11))


def test_a_task_that_ends_its_process_is_one_line() -> None:
    with Drawer() as mortal:
        problems = mortal.draw(read_tasks("chain_sum", {}, None)[0], 10**6, 7)
        next(problems)
        os.killpg(mortal._process.pid, signal.SIGKILL)
        with pytest.raises(UserError, match="^data.task=chain_sum: reasoning-gym fails: it ended without a word; change"):
            list(problems)


def test_the_last_answer_tags_count(drawer: Drawer) -> None:
    tasks, _ = read_tasks("chain_sum", {}, None)
    (problem,) = drawer.draw(tasks, 1, 7)
    right = problem.answer
    texts = [
        f"<answer>{right}</answer>",
        f"<answer>1x</answer> <answer>\n{right}</answer>.",
        f"<answer>{right}",
        f"{right}",
        "",
    ]
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    assert recipe.gym_score(tasks, completions, [problem.entry] * 5) == [1, 1, 0, 0, 0]


@pytest.mark.parametrize(
    ("argument", "line"),
    [
        ("data.task=chain_sums", "data.task=chain_sums: reasoning-gym has no such task; the nearest are chain_sum, decimal_ch"),
        ("data.task=lcm:0", "data.task=lcm:0: expected a weight above 0, as in lcm:2"),
        ("data.task=lcm,gcd,lcm", "data.task=lcm,gcd,lcm: lcm is there twice; give it one weight"),
        (
            "data.config={'max_term': 3}",
            "data.config={'max_term': 3}: chain_sum has no field max_term; did you mean max_terms?",
        ),
        ("data.config={'seed': 3}", "data.config={'seed': 3}: `seed` is set by data.seed, data.train_size and data.eval_size"),
        (
            "data.config={'max_terms': 1}",
            "data.config={'max_terms': 1} at data.level=0: chain_sum refuses it: max_terms must be",
        ),
        ("data.config={'max_terms': 'x'}", "data.config={'max_terms': 'x'} at data.level=0: chain_sum refuses it: '>=' not"),
        (
            "data.task=knight_swap",
            "data.config={} at data.level=0: knight_swap refuses it: min_nodes must be >= 6; change one of",
        ),
        ("data.level=99", "data.level=99: expected 0 to 10 for chain_sum"),
        ("data.system=be brief", "data.system=be brief: expected a text that asks for <answer> tags, or one of DeepSeekZero"),
        ("data.eval_size=0", "data.eval_size=0: expected 1 to 100000"),
        ("data.examples=-1", "data.examples=-1: expected 0 to 100"),
    ],
)
def test_wrong_data_is_one_line(argument: str, line: str) -> None:
    with pytest.raises(ConfigErrors) as raised:
        config(argument)
    (found,) = raised.value.errors
    assert found.startswith(line)


def test_without_reasoning_gym_the_line_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "reasoning_gym" else find(name, *rest))
    with pytest.raises(ConfigErrors, match=r"^recipe=reasoning_gym: needs reasoning-gym; pip install -e '\.\[gym\]'$"):
        config()


def test_a_model_without_a_template_is_refused() -> None:
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(UserError, match=r"^model=org/name: messages, and the tokenizer has no chat template; choose an ins"):
        recipe.datasets(config(), tokenizer)


@pytest.mark.slow
@needs_the_model
def test_smollm2_is_trained_exactly(tmp_path: Path) -> None:
    """A mixture, scored in the cage. The control is that of the words: stock kernels differ in most tokens."""
    tasks = "data.task=leg_counting:1,chain_sum:1"
    rlinvariant(tmp_path, "train", "recipe=reasoning_gym", "run=gym", tasks, "data.train_size=32", *SMALL)
    found = rows(tmp_path, "gym")
    assert len(found) == 2
    for row in found:
        assert row["onpolicy/mismatched_tokens"] == row["onpolicy/unscored_tokens"] == 0 and row["onpolicy/coverage"] == 1
        assert row["onpolicy/compared_tokens"] >= 8 and row["reward/errors"] == row["reward/crashes"] == 0 <= row["reward"] <= 1
