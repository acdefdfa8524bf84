"""A user's `rollout_func`: what it draws by `trainer.draw` is exact; what it returns wrong is one line with the sequence."""

from typing import Any

import pytest

from rlinvariant.errors import UserError
from tests.parity.harness import assert_exact, assert_same_weights, assert_stops, new_trainer, weights

HINT = "7=?"


class Asking:
    """Draws, answers half of the samples with a hint, and draws those again."""

    def __init__(self, rewritten: bool = False, filler: float = 0.0) -> None:
        self.rewritten, self.filler, self.seeds = rewritten, filler, []

    def __call__(self, prompts: list[str], trainer: Any) -> dict[str, Any]:
        tokenizer = trainer.processing_class
        ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
        first = trainer.draw(ids, max_tokens=4)
        found = [list(c.token_ids) for c in first]
        logprobs, masks = [list(c.sampler_logprobs) for c in first], [[1] * len(c.token_ids) for c in first]
        again = range(0, len(prompts), 2)
        for i in again:
            hint = tokenizer(HINT, add_special_tokens=False)["input_ids"]
            if self.rewritten:  # the text is written anew, in small letters: what the sampler read is not what is trained on
                found[i] = [
                    tokenizer(tokenizer.decode([t]).lower(), add_special_tokens=False)["input_ids"][0] for t in found[i]
                ]
            found[i] += hint
            logprobs[i] += [self.filler] * len(hint)
            masks[i] += [0] * len(hint)
        for i, c in zip(again, trainer.draw([ids[i] + found[i] for i in again], again), strict=True):
            found[i] += c.token_ids
            logprobs[i] += c.sampler_logprobs
            masks[i] += [1] * len(c.token_ids)
        self.seeds.append([batch.seeds for batch in trainer._turns.batches])
        return {"prompt_ids": ids, "completion_ids": found, "logprobs": logprobs, "env_mask": masks}


def test_what_a_rollout_func_draws_is_exact_and_repeats(arithmetic_dir, exact_engine, tmp_path):
    samples, functions = [], [Asking(), Asking()]
    for function in functions:
        run = new_trainer(arithmetic_dir, exact_engine, tmp_path, rollout_func=function, on_samples=samples.extend)
        run.trainer.train()
        assert_exact(run, 200)
    assert functions[0].seeds == functions[1].seeds
    assert {tuple(row["tool_results"]) for row in samples} == {(), (HINT,)}
    flat = [seed for step in functions[0].seeds for batch in step for seed in batch]
    assert len(flat) == 2 * (16 + 8) == len(set(flat))


def test_what_was_not_sampled_may_have_any_logprob(arithmetic_dir, exact_engine, tmp_path):
    """TRL takes the old log-probs of a rollout that is used twice, and a NaN among them times a mask of 0 would be NaN."""
    ended = []
    for filler in (0.0, float("nan")):
        changes = {"rollout_func": Asking(filler=filler), "num_iterations": 2}
        run = new_trainer(arithmetic_dir, exact_engine, tmp_path, **changes)
        run.trainer.train()
        ended.append(weights(run))
    assert_same_weights(*ended, "with NaN where nothing was sampled")


def test_text_that_is_tokenized_anew_is_stopped(arithmetic_dir, exact_engine, tmp_path):
    run = new_trainer(arithmetic_dir, exact_engine, tmp_path, rollout_func=Asking(rewritten=True))
    assert_stops(run)
    assert "turn " in str(run.mismatches[-1])


ROW = {"prompt_ids": [5, 6], "completion_ids": [7, 8, 9], "logprobs": [-1.0, -2.0, -3.0], "env_mask": [1, 0, 1]}


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"logprobs": None}, "no `logprobs`: expected prompt_ids, completion_ids, logprobs"),
        ({"logprobs": [-1.0, -2.0]}, "sequence 3: 2 numbers in `logprobs`: expected 3, one for each token of `completion_ids`"),
        ({"logprobs": [-1.0, -2.0, None]}, "sequence 3: token 2 has the log-prob None: expected a finite number; keep the sam"),
        ({"logprobs": [-1.0, float("nan"), -1.0], "env_mask": [1, 1, 1]}, "sequence 3: token 1 has the log-prob nan"),
        ({"logprobs": [[-1.0], [-1.0], [-1.0]]}, r"sequence 3: token 0 has the log-prob \[-1.0\]: expected a finite number"),
        ({"env_mask": [1, 0]}, "sequence 3: 2 numbers in `env_mask`: expected 3"),
        ({"env_mask": [1, 0.5, 0]}, "sequence 3: 0.5 in `env_mask`: expected 1 for each sampled token"),
        ({"env_mask": [0, 0, 0]}, "sequence 3: `env_mask` is 0 everywhere"),
        ({"completion_ids": []}, "sequence 3: no token in `completion_ids`"),
        ({"prompt_ids": []}, "sequence 3: no token in `prompt_ids`"),
        ({"completion_ids": [7, 8, 1000]}, "sequence 3: 1000 in `completion_ids`: expected token ids, integers from 0 to 99"),
        ({"completion_ids": [7, 8, "x"]}, "sequence 3: x in `completion_ids`"),
        (
            {"completion_ids": [7] * 13, "logprobs": [-1.0] * 13, "env_mask": [1] * 13},
            "sequence 3: 13 tokens in `completion_ids`: expected at most max_completion_length=12; cut it, with its log-probs",
        ),
        (
            {"prompt_ids": [5] * 254},
            "sequence 3: 254 tokens in `prompt_ids` and 3 in `completion_ids`: expected at most 256 together",
        ),
    ],
)
def test_what_is_wrong_is_said_with_the_sequence(wrong, words, arithmetic_dir, exact_engine, tmp_path):
    def returned(prompts, trainer):
        rows = [ROW | (wrong if i == 3 else {}) for i in range(len(prompts))]
        columns = {name: [row[name] for row in rows] for name in ROW}
        return {name: None if wrong.get(name, 0) is None else column for name, column in columns.items()}

    run = new_trainer(arithmetic_dir, exact_engine, tmp_path, rollout_func=returned)
    with pytest.raises(UserError, match=f"step 1: rollout_func: {words}") as error:
        run.trainer.train()
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda prompts, trainer: None, "returned NoneType: expected a dict"),
        (
            lambda prompts, trainer: {name: [row] for name, row in ROW.items()},
            "1 rows of `prompt_ids`: expected 16, one for each",
        ),
        (lambda prompts, trainer: dict.fromkeys(ROW, 5), "`prompt_ids` is 5: expected a list of rows, one for each prompt"),
        (lambda prompts, trainer: dict.fromkeys(ROW, [5] * 16), "sequence 0: `prompt_ids` is 5: expected a list of numbers"),
        (
            lambda prompts, trainer: trainer.draw([[5]], [-1]),
            "draw: sample -1: expected 0 to 15, the prompts of `rollout_func`",
        ),
        (lambda prompts, trainer: trainer.draw([[5]], [0, 1]), "draw: 2 samples for 1 prompts; expected one for each"),
        (lambda prompts, trainer: 1 / 0, r"ZeroDivisionError: division by zero \(.*test_custom_rollouts\.py, line \d+\)"),
    ],
)
def test_what_is_wrong_with_all_of_it_is_said(function, words, arithmetic_dir, exact_engine, tmp_path):
    run = new_trainer(arithmetic_dir, exact_engine, tmp_path, rollout_func=function)
    with pytest.raises(UserError, match=words):
        run.trainer.train()
