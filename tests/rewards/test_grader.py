r"""The grader of mathematics: the last \boxed{}, equal by text or by math-verify, and answers that are made to hurt."""

import threading
from typing import Any

import pytest

from rlinvariant.errors import UserError
from rlinvariant.rewards import checked_reward, final_answer, math_answer
from rlinvariant.rewards.grader import GRADING_CPU_S
from tests.rewards.test_checked import end, processes_of


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{2}.", "2"),
        (r"\boxed{3}, no, \boxed{ \frac{1}{2} }", r"\frac{1}{2}"),
        (r"\boxed{\boxed{2}}", "2"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed {2}", "2"),
        (r"\boxed{2} and \boxed{3", None),  # cut off
        (r"\boxed{2\}", None),
        ("it is so\n#### 1,200", "1,200"),
        ("The final answer is $12$.", "12"),
        ("**Answer:** 12\nThat was it.", "12"),
        ("answer: 3\nAnswer: 4", "4"),
        (r"Answer: 3, or \boxed{4}", "4"),
        ("it is 12", None),
        ("the answer is", None),
        ("", None),
        ("x" * 10**6 + r"\boxed{2}", "2"),
        (r"\boxed{" * 10**5, None),
    ],
)
def test_the_final_answer_is_the_last_box_or_what_is_called_so(text: str, answer: str | None) -> None:
    """The longest texts end only if each is read once."""
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("right", "equal", "different"),
    [
        (
            "2",
            ["2", "2.0", r"\frac{4}{2}", "x=2", r"2\text{ pens}", r"\sqrt{4}", "$2$", "1+1"],
            ["3", "2,3", r"2 \text{ or } 3", "x<2", "-2", "2.01", "", "2x", r"\{1,2,3\}"],
        ),
        (r"\frac{1}{2}", ["0.5", "1/2", r"\dfrac12", r"\frac{1}{2}", "2^{-1}"], ["1", "2", r"\frac{1}{3}", "0.49"]),
        ("2,100", ["2100", r"2{,}100", r"\$2,100"], ["2,101", "100", "2"]),
        (r"\text{Evelyn}", ["Evelyn", r"\text{Evelyn}"], ["Briana", r"\text{Evelyn and Briana}"]),
        (r"\left( 3, \frac{\pi}{2} \right)", [r"(3, \pi/2)"], [r"(\pi/2, 3)", "3"]),
        (
            r"\begin{pmatrix}1&2\\3&4\end{pmatrix}",
            [r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}"],
            [r"\begin{pmatrix} 1 & 2 \\ 4 & 3 \end{pmatrix}"],
        ),
        ("x^2+2x+1", ["(x+1)^2", "1+2x+x^2"], ["(x-1)^2", "x^2+2x"]),
    ],
)
def test_equal_is_mathematically_equal(right: str, equal: list[str], different: list[str]) -> None:
    boxed = [rf"Thus \boxed{{{text}}}." for text in [*equal, *different]]
    assert math_answer(boxed, [right] * len(boxed)) == [1.0] * len(equal) + [0.0] * len(different)


@pytest.mark.slow
def test_an_answer_that_would_run_for_ever_costs_its_own_reward_alone() -> None:
    huge = [r"\boxed{9^{9^{9^{9}}}}", r"\boxed{\binom{10^{9}}{500000000}}"]
    deep = [r"\boxed{" + "(" * 240 + "2" + ")" * 240 + "}", r"\boxed{" + r"\frac{1}{" * 45 + "3" + "}" * 45 + "}"]
    texts = [r"\boxed{4/2}", *huge, *deep, r"\boxed{" + "1+" * 10**5 + "1}", r"\boxed{exit()}", "\0", r"\boxed{4/2}"]
    logged: dict[str, float] = {}
    rewards = math_answer(texts, ["2"] * len(texts), log_metric=logged.__setitem__)
    assert rewards == [1, *[0] * (len(texts) - 2), 1]
    assert 2 <= logged["grader_stopped"] <= 4  # the huge ones, and the deep ones where the machine is slow
    assert math_answer([r"\boxed{4/2}"] * 20, ["2"] * 20) == [1] * 20  # every grader is there again


def test_a_grader_that_was_ended_between_two_questions_costs_no_reward() -> None:
    """The kernel ends a grader so where memory is short."""
    right = [r"\boxed{4/2}"] * 20
    assert math_answer(right, ["2"] * 20) == [1] * 20
    for grader in (ended := processes_of("grader")):
        end(grader)
    logged: dict[str, float] = {}
    assert math_answer(right, ["2"] * 20, log_metric=logged.__setitem__) == [1] * 20 and logged["grader_stopped"] == 0
    assert ended, "blind: none was ended"


def test_graders_work_in_any_thread() -> None:
    """Control: math-verify itself does not, unless its limits on time are given up."""
    from math_verify import parse

    found: dict[str, Any] = {}

    def grade() -> None:
        found["ours"] = math_answer([[{"role": "assistant", "content": r"\boxed{2/4}"}]] * 32, ["0.5"] * 32)
        try:
            parse(r"\boxed{2}")
        except ValueError as error:
            found["theirs"] = str(error)

    thread = threading.Thread(target=grade)
    thread.start()
    thread.join()
    assert found["ours"] == [1] * 32 and "threaded" in found["theirs"]


def test_a_grader_that_cannot_start_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from rlinvariant.rewards import grader

    grader._graders.cache_clear()  # processes that are not there yet
    with monkeypatch.context() as patch:
        patch.setattr("sys.executable", "/bin/false")
        with pytest.raises(UserError, match=r"^reward function math_answer, .*math-verify: cannot be loaded; pip install"):
            checked_reward(math_answer)(prompts=["?"], completions=[r"\boxed{1+1}"], answer=["2"])
    grader._graders.cache_clear()
    assert GRADING_CPU_S < 10
