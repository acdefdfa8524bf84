"""Mistakes that a TRL script may hand to InvariantGRPOTrainer: all of them in one message, before an engine starts."""

import re
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen3Config
from trl import GRPOConfig

from rlinvariant.errors import ConfigErrors, UserError
from rlinvariant.models import UnsupportedModel
from rlinvariant.sampler.engine import Sampler
from rlinvariant.trainer.refusals import settings_problems
from tests.models.small import build
from tests.parity import harness
from tests.parity.device import CUDA, DEVICE
from tests.parity.harness import load, new_trainer, questions, variety


class NoEngine:
    """Not to be reached."""

    def __getattr__(self, name):
        raise AssertionError(f"the engine was used: {name}")


@pytest.fixture
def refused(arithmetic_dir, tmp_path):
    """The lines of the error that a trainer with these settings gives."""

    def lines(kind=UserError, **changes) -> list[str]:
        with pytest.raises(kind) as error:
            new_trainer(arithmetic_dir, NoEngine(), tmp_path, **changes)
        return str(error.value).splitlines()

    return lines


def test_all_conflicts_come_at_once(refused):
    settings = {"top_p": 1.9, "top_k": -5, "min_p": 1.1, "repetition_penalty": 1.1, "logging_steps": 2, "bf16": True}
    settings |= {"use_vllm": True, "peft_config": object(), "use_liger_kernel": True, "torch_compile": True}
    settings |= {"neftune_noise_alpha": 5.0, "cast_lm_head_to_fp32": True}
    found = refused(ConfigErrors, **settings)
    for name in settings:
        assert any(line.startswith(name) and "expected" in line for line in found), f"{name}: {found}"


def test_adapters_that_cannot_be_exact_are_refused(refused):
    assert refused(peft_config=object()) == ["peft_config=object: expected a peft.LoraConfig"]
    dropout = LoraConfig(lora_dropout=0.1)
    assert refused(peft_config=dropout) == ["peft_config.lora_dropout=0.1: expected 0.0: exact adapters have no lora_dropout"]
    (line,) = refused(peft_config=LoraConfig(), invariance="trainer")
    assert line.startswith("peft_config: expected None with invariance=trainer: a stock engine takes whole weights")


def test_a_model_with_adapters_of_another_form_is_refused(tmp_path):
    args = GRPOConfig(str(tmp_path), use_cpu=not CUDA, bf16=False, logging_steps=1)
    config = LoraConfig(target_modules=["q_proj"])

    def lines(model, **options) -> list[str]:
        return [
            x for x in settings_problems(args, "exact", torch.bfloat16, options, model=model) if x.startswith(("model", "peft"))
        ]

    added, named, right = build("llama"), *(get_peft_model(build("llama"), config, name) for name in ("mine", "default"))
    added.add_adapter(config)
    beside = lines(right, peft_config=config)
    assert len(beside) == 1 + CUDA and "with a model that has an adapter" in beside[-1]
    assert lines(added)[-1].startswith("model=LlamaForCausalLM: expected PEFT's; use get_peft_model")
    assert lines(named)[-1].endswith("found mine") and len(lines(right)) == CUDA
    right.get_base_model().model.norm.weight.requires_grad_(True)
    assert lines(right)[-1].startswith("model: model.norm.weight.requires_grad=True: expected a frozen base")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"report_to": "nobody"}, "report_to=.*nobody.*: the callback cannot be made: ValueError: nobody is not supported"),
        ({"log_level": "loud"}, "log_level=loud: expected one of detail, debug, info"),
        ({"eval_strategy": "steps", "eval_steps": 1}, "eval_strategy=steps: expected no, as there is no evaluation data set"),
        ({"eval_on_start": True}, "eval_on_start=True: expected False, as there is no evaluation data set; or give one"),
        ({"sync_ref_model": True}, "TRL cannot make the trainer: You passed `sync_ref_model=True` while `beta=0.0`"),
    ],
)
def test_what_a_constructor_refuses_is_one_line(setting, words, refused):
    """The last is one that nothing looks for: TRL's own constructor finds it."""
    (line,) = refused(**setting)
    assert re.match(words, line)


def test_an_evaluation_that_would_cut_a_group_is_one_line(refused, arithmetic_dir, exact_engine, tmp_path):
    """TRL's own check is for `eval_strategy`; a first evaluation, or a call of `evaluate`, met torch's error of a shape."""
    settings = {"per_device_eval_batch_size": 3, "num_generations_eval": 2, "eval_dataset": questions(4)}
    line = "per_device_eval_batch_size=3: expected a multiple of 2, the completions of a prompt, with 1 process; set it, or "
    assert refused(**settings, eval_on_start=True) == [line + "num_generations_eval"]
    with pytest.raises(UserError, match=re.escape(line)):
        new_trainer(arithmetic_dir, exact_engine, tmp_path, **settings).trainer.evaluate()


@pytest.mark.parametrize("name", ["per_device_eval_batch_size", "num_generations_eval"])
def test_the_sizes_of_an_evaluation_are_at_least_1(name, refused):
    """TRL takes a batch of 0, and groups of -1: an error of a data loader after the first step."""
    value = 0 if name.startswith("per") else -1
    sets = {"eval_dataset": questions(4), "eval_strategy": "steps", "eval_steps": 1, name: value}
    assert refused(**sets) == [f"{name}={value}: expected at least 1"]


@pytest.mark.parametrize("metric", ["reward", "eval_reward", "eval_a", "loss"])
def test_the_metric_of_several_evaluation_sets_names_one(metric, refused):
    sets = {"eval_dataset": {"a": questions(4), "b": questions(4)}, "eval_strategy": "steps", "eval_steps": 1}
    of = "expected that of one evaluation data set, as eval_a_reward or eval_b_reward"
    assert refused(**sets, metric_for_best_model=metric) == [f"metric_for_best_model={metric}: {of}"]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"question": "1+1="}] * 32, "train dataset, row 0: no `prompt`; columns found: question"),
        ([{"prompt": "1+1="}] * 7 + [{"prompt": None}], "train dataset, row 7: no `prompt`"),
    ],
)
def test_rows_without_a_prompt_are_named(rows, words, refused):
    (line,) = refused(train_dataset=Dataset.from_list(rows))
    assert words in line


HEADS = {"vocab_size": 99, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
MODELS = {
    "head of 16": (LlamaConfig(**HEADS), ["LlamaForCausalLM", "head_dim=16 is not one of"]),
    "head of 48": (Qwen3Config(**HEADS, num_key_value_heads=2, head_dim=48), ["Qwen3ForCausalLM", "head_dim=48"]),
    "dynamic angles": (
        LlamaConfig(**HEADS, head_dim=64, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
        ["rope_type=dynamic"],
    ),
    "two reasons": (LlamaConfig(**HEADS, hidden_act="gelu"), ["head_dim=16", "hidden_act=gelu"]),
    "GPT-2": (GPT2Config(vocab_size=99, n_embd=64, n_layer=1, n_head=2), ["GPT2LMHeadModel"]),
}


@pytest.mark.parametrize("name", MODELS)
def test_an_unsupported_model_is_refused_with_its_reasons(name, refused):
    config, expected = MODELS[name]
    (line,) = refused(UnsupportedModel, model=AutoModelForCausalLM.from_config(config))
    assert all(words in line for words in expected), line


def test_a_reward_that_fails_names_step_and_sample(arithmetic_dir, exact_engine, tmp_path):
    def fails(completions, trainer_state, **_):
        if trainer_state.global_step == 1:
            return [len(text) / (0 if text == first[0] else 1) for text in completions]
        return variety(completions)

    def remember(completions, **_):
        first[:] = [completions[3]] if len(completions) == 16 else first
        return [0.0] * len(completions)

    first: list[str] = []
    run = new_trainer(arithmetic_dir, exact_engine, tmp_path, reward_funcs=[remember, fails], max_steps=3)
    with pytest.raises(UserError, match=r"reward function fails, step 2, sample 3: raised ZeroDivisionError"):
        run.trainer.train()
    assert len(run.rows) == 1


def test_one_process_on_a_host_of_several_gpus_trains_on_one(arithmetic_dir, exact_engine, tmp_path, monkeypatch, capsys):
    """Transformers would let one process train on all GPUs that it sees, which TRL refuses."""
    config = harness.small_config

    def of_two_gpus(*args: Any, **changes: Any) -> Any:
        made = config(*args, **changes)
        assert made.device and made.n_gpu < 2
        made._n_gpu = 2
        return made

    monkeypatch.setattr(harness, "small_config", of_two_gpus)
    trainer = new_trainer(arithmetic_dir, exact_engine, tmp_path).trainer
    assert trainer.args.n_gpu == 1 and "of the 2 visible; machine=2gpu" in capsys.readouterr().out


def test_a_reward_of_another_length_is_named(arithmetic_dir, exact_engine, tmp_path):
    run = new_trainer(arithmetic_dir, exact_engine, tmp_path, reward_funcs=lambda completions, **_: [0.0] * 15)
    with pytest.raises(UserError, match=r"step 1: returned 15 rewards, expected 16"):
        run.trainer.train()


def test_a_prompt_longer_than_the_engine_takes_is_one_line(arithmetic_dir, exact_engine, tmp_path):
    """The engine takes 192 tokens."""
    prompts = Dataset.from_list([{"prompt": "1" * 200}] * 8)
    run = new_trainer(arithmetic_dir, exact_engine, tmp_path, train_dataset=prompts)
    with pytest.raises(UserError, match="201 tokens.*192"):
        run.trainer.train()


def test_a_prompt_without_tokens_is_one_line(exact_engine):
    """A blank prompt, or the empty tokenizer that transformers makes up where a model directory has none."""
    with pytest.raises(UserError, match="prompt 1 .*no tokens"):
        exact_engine.generate([[1, 2], []], [0, 1], temperature=1.0, max_tokens=2)


def test_sampling_that_changes_the_distribution_is_refused(exact_engine):
    penalties = ({"repetition_penalty": 1.1}, {"frequency_penalty": 0.1}, {"presence_penalty": 0.1})
    masks = ({"logit_bias": {1: 2.0}}, {"min_tokens": 2}, {"allowed_token_ids": [1, 2]}, {"bad_words": ["a"]})
    for setting in ({"top_p": 1.9}, {"top_k": -3}, {"min_p": 1.1}, *penalties, *masks):
        with pytest.raises(UserError, match=next(iter(setting))):
            exact_engine.generate([[1, 2]], [0], temperature=1.0, max_tokens=2, **setting)


def test_an_engine_environment_that_would_change_bits_is_refused(arithmetic_dir, monkeypatch):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    with pytest.raises(UserError, match="VLLM_USE_V2_MODEL_RUNNER=1: expected VLLM_USE_V2_MODEL_RUNNER=0"):
        Sampler(arithmetic_dir, invariant=True)


def test_a_padded_batch_is_refused(arithmetic_dir):
    """A patched model builds no mask; a caller that relies on one must hear of it."""
    from rlinvariant.models import make_invariant

    model = make_invariant(load(arithmetic_dir))
    ids = mask = torch.ones(2, 5, dtype=torch.long, device=DEVICE)
    model(input_ids=ids, attention_mask=mask)
    mask = mask.clone()
    mask[0, 0] = 0
    with pytest.raises(UserError, match="pack"):
        model(input_ids=ids, attention_mask=mask)
