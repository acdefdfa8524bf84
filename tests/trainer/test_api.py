"""The one call that a TRL script changes, and the greedy reward."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.trainer_utils import SaveStrategy
from trl import GRPOConfig

import rlinvariant
from rlinvariant.errors import ConfigErrors
from rlinvariant.trainer.evaluate import greedy_reward
from tests.parity.device import CUDA
from tests.parity.harness import new_trainer, questions, variety


def arguments(directory) -> GRPOConfig:
    return GRPOConfig(
        str(directory),
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=12,
        max_steps=2,
        learning_rate=1e-3,
        logging_steps=1,
        bf16=False,
        use_cpu=not CUDA,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )


@pytest.mark.parametrize("loaded", [False, True], ids=["directory", "model"])
def test_grpo_trainer_takes_what_trl_takes(loaded, arithmetic_dir, tmp_path):
    """TRL's defaults otherwise: importance-sampling correction and gradient checkpointing are on."""
    model = AutoModelForCausalLM.from_pretrained(arithmetic_dir, dtype=torch.float32) if loaded else arithmetic_dir
    rows: list[dict] = []
    trainer = rlinvariant.grpo_trainer(
        model,
        variety,
        arguments(tmp_path),
        questions(),
        processing_class=AutoTokenizer.from_pretrained(arithmetic_dir),
        sampler_options={"max_model_len": 64, "kv_cache_gib": 0.02, "options": {"enforce_eager": True}},
        on_row=lambda row, mismatch: rows.append(row),
    )
    trainer.train()
    assert [row["onpolicy/mismatched_tokens"] for row in rows] == [0, 0]
    # 8 completions of up to 12 tokens, of which a few end early
    assert all(row["onpolicy/coverage"] == 1 and row["onpolicy/compared_tokens"] >= 8 * 8 for row in rows)


def test_a_script_that_has_done_its_steps_takes_no_more(arithmetic_dir, tmp_path):
    """Batch systems start a script again and again; transformers would look at the number of steps after one more."""
    sampler = {"max_model_len": 64, "kv_cache_gib": 0.02, "options": {"enforce_eager": True}}

    def trained(steps: int, resume: bool) -> tuple[list[int], int, dict[str, torch.Tensor]]:
        args, taken = arguments(tmp_path), []
        args.save_strategy, args.save_steps, args.max_steps = SaveStrategy.STEPS, 1, steps
        given = {"sampler_options": sampler, "on_row": lambda row, mismatch: taken.append(row["step"])}
        trainer = rlinvariant.GRPOTrainer(arithmetic_dir, variety, args, questions(), **given)
        done = trainer.train(resume_from_checkpoint=resume)
        trainer.close()
        return taken, done.global_step, trainer.model.state_dict()

    steps, last, weights = trained(2, False)
    assert (steps, last) == ([1, 2], 2)
    steps, last, again = trained(2, True)
    assert (steps, last) == ([], 2) and all(torch.equal(weights[name], again[name]) for name in weights)
    assert trained(3, True)[:2] == ([3], 3)


def test_the_directory_of_a_run_is_no_output_directory(tmp_path):
    """Checkpoints of two runs in one directory would replace each other; any other directory will do."""
    run = tmp_path / "runs" / "first"
    (run / "checkpoints").mkdir(parents=True)
    paths = (run, run / "checkpoints")
    assert not any("is the directory of a run" in refusal(path) for path in paths), "nothing has begun there"
    for name in ("config.json", "environment.json"):
        (run / name).write_text("{}")
    for path in paths:
        assert f"output_dir={path}: {run} is the directory of a run" in refusal(path)
    assert "is the directory of a run" not in refusal(tmp_path / "runs" / "out")


def refusal(output_dir: Path) -> str:
    with pytest.raises(ConfigErrors) as error:
        rlinvariant.GRPOTrainer("no/such/directory", variety, arguments(output_dir), questions())
    return str(error.value)


def test_ppo_trainer_takes_the_same_and_ppos_settings(arithmetic_dir, tmp_path):
    """One sample of each prompt, which TRL's arguments are given after they are made."""
    args, rows = arguments(tmp_path), []
    args.num_generations = 1
    trainer = rlinvariant.ppo_trainer(
        arithmetic_dir,
        variety,
        args,
        questions(),
        ppo=rlinvariant.PPOConfig(kl_coef=0.1),
        processing_class=AutoTokenizer.from_pretrained(arithmetic_dir),
        sampler_options={"max_model_len": 64, "kv_cache_gib": 0.02, "options": {"enforce_eager": True}},
        on_row=lambda row, mismatch: rows.append(row),
    )
    trainer.train()
    assert [(row["onpolicy/mismatched_tokens"], row["onpolicy/coverage"]) for row in rows] == [(0, 1), (0, 1)]
    assert all(row["value/loss"] > 0 for row in rows)


def test_greedy_reward_is_the_mean_over_the_rows(arithmetic_dir, exact_engine, tmp_path):
    def length(completions, **_):
        return [float(len(text)) for text in completions]

    trainer = new_trainer(arithmetic_dir, exact_engine, tmp_path, reward_funcs=[length, variety]).trainer
    trainer.sync()
    dataset = questions(8)
    tokenizer = trainer.processing_class
    prompts = [tokenizer(prompt)["input_ids"] for prompt in dataset["prompt"]]
    completions = exact_engine.generate(
        prompts, [0] * 8, temperature=0.0, max_tokens=12, stop_token_ids=[tokenizer.eos_token_id]
    )
    texts = tokenizer.batch_decode([c.token_ids for c in completions], skip_special_tokens=True)
    rewards = torch.tensor([length(texts), variety(texts)], dtype=torch.float32).double()  # TRL holds rewards in fp32
    expected = rewards.sum(0).mean().item()
    assert greedy_reward(trainer, dataset).reward == pytest.approx(expected, rel=1e-7) == greedy_reward(trainer, dataset).reward


def test_greedy_reward_takes_what_trl_takes(arithmetic_dir, exact_engine, tmp_path):
    """An async reward, and one that does not apply to every row; what a reward logs is no metric of a training step."""

    async def asynchronous(completions, log_metric, **_):
        log_metric("asked", 1.0)
        return [float(len(text)) for text in completions]

    def seldom(completions, **_):
        return [None, *[4.0] * (len(completions) - 1)]

    def length(completions, **_):
        return [float(len(text)) for text in completions]

    def reward(*functions):
        def watched(completions, **_):
            told.append([*trainer.args.report_to])
            return [0.0] * len(completions)

        told = []
        trainer = new_trainer(arithmetic_dir, exact_engine, tmp_path, reward_funcs=[*functions, watched]).trainer
        trainer.args.report_to = ["trackio"]  # whose run begins and ends with training: TRL's timers fail without one
        trainer.sync()
        value = greedy_reward(trainer, questions(8)).reward
        assert not trainer._pending_metrics and not trainer._pending_extra_logs
        assert told == [[]] and trainer.args.report_to == ["trackio"]
        return value

    assert reward(asynchronous, seldom) == reward(length) + 4.0 * 7 / 8 > 4.0


def test_the_public_names_are_the_ones_that_are_listed():
    for name in rlinvariant.__all__:
        assert getattr(rlinvariant, name).__name__ == name
    with pytest.raises(AttributeError, match="no_such_name"):
        getattr(rlinvariant, "no_such_name")  # noqa: B009


TYPED = """
from datasets import Dataset
from trl.trainer.grpo_config import GRPOConfig
import rlinvariant

def script(args: GRPOConfig, rows: Dataset, ppo: rlinvariant.PPOConfig):
    reveal_type(rlinvariant.grpo_trainer("model", print, args, rows))
    reveal_type(rlinvariant.ppo_trainer("model", [print], args, rows, ppo=ppo, invariance="off"))
    reveal_type(rlinvariant.PPOTrainer("model", print, rlinvariant.GRPOConfig("out"), rows, run="first").critic)
    reveal_type(rlinvariant.Sampler("model", invariant=True).generate([[1]], [0], temperature=1.0, max_tokens=1))
    reveal_type(rlinvariant.verify("model"))
    rlinvariant.grpo_trainer("model", print, args, rows, invariance="exakt")
    rlinvariant.grpo_trainer("model", print, args, rows, stalenes=1)
"""
REVEALED = ["GRPOTrainer", "PPOTrainer", "Critic", "list[Completion]", "Certificate"]


@pytest.mark.parametrize("transformers", ["stub", pytest.param("whole", marks=pytest.mark.slow)])
def test_a_type_checker_sees_the_types(transformers, tmp_path):
    """pyright's own words: what each call returns, and that a wrong value and an unknown argument are errors.

    Of 3,000 files that it reads, 2,500 are transformers', of which it says nothing here: a stub takes their place.
    """
    script = tmp_path / "script.py"
    script.write_text(TYPED)
    root, environment = Path(rlinvariant.__file__).parents[1], os.environ | {"PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"}
    if transformers == "stub":
        (tmp_path / "typings/transformers").mkdir(parents=True)
        (tmp_path / "typings/transformers/__init__.pyi").write_text("def __getattr__(name: str): ...\n")
    (tmp_path / "pyrightconfig.json").write_text(json.dumps({"extraPaths": [str(root)]}))
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, "--project", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    found = json.loads(done.stdout)["generalDiagnostics"]
    revealed = [d["message"].split('" is "')[1].rstrip('"') for d in found if d["severity"] == "information"]
    assert revealed == REVEALED
    wrong = [d["message"] for d in found if d["severity"] == "error"]
    assert len(wrong) == 2 and "exakt" in wrong[0] and "stalenes" in wrong[1], wrong
