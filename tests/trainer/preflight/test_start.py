"""Settings, parts, tokens, rewards and the disk are looked at before weights are loaded, and said in one list."""

import json
import shutil
import warnings
from collections import namedtuple
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import transformers
from datasets import Dataset
from packaging.version import Version
from peft import LoraConfig
from transformers import AutoConfig, AutoTokenizer, GenerationConfig
from trl.trainer.grpo_config import GRPOConfig

from rlinvariant import runtime
from rlinvariant.errors import ConfigErrors, UserError
from rlinvariant.model_source import load_tokenizer
from rlinvariant.trainer.preflight import Start, check_start
from rlinvariant.trainer.preflight.disk import disk_problems, parameters
from rlinvariant.trainer.preflight.parts import hub_problems, part_problems, weight_problems
from rlinvariant.trainer.preflight.signatures import needed_columns, signature_problems
from rlinvariant.trainer.preflight.tokens import generation_problems, load_generation, token_problems


def settings(path: Any = "out", **changes: Any) -> GRPOConfig:
    given: dict[str, Any] = {"per_device_train_batch_size": 4, "num_generations": 2, "max_steps": 10, "report_to": "none"}
    given |= {"max_completion_length": 64}
    return GRPOConfig(str(path), bf16=False, use_cpu=True, **{**given, **changes})


def exact(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    return [0.0] * len(completions)


@pytest.mark.parametrize(
    ("changes", "start"),
    [
        ({"learning_rate": -1.0}, "optim=adamw_torch_fused"),
        ({"adam_beta2": float("nan")}, "optim=adamw_torch_fused"),
        ({"optim": "adamw_bnb_8bit"}, "optim=adamw_bnb_8bit"),
        ({"optim": "galore_adamw"}, "optim=galore_adamw"),
        ({"optim_args": "x"}, "optim=adamw_torch_fused trainer.optim_args=x"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "lr_scheduler_type=cosine_with_min_lr"),
        ({"lr_scheduler_kwargs": {"nothing": 1}}, "lr_scheduler_type=linear"),
        ({"dataloader_num_workers": -1}, "dataloader_num_workers=-1"),
        ({"dataloader_persistent_workers": True}, "dataloader_num_workers=0"),
    ],
)
def test_parts_that_cannot_be_made_are_said_at_the_start(changes: dict[str, Any], start: str) -> None:
    (line,) = part_problems(settings(**changes), "trainer.")
    assert line.startswith(f"trainer.{start}") and "cannot be made: " in line and "\n" not in line


@pytest.mark.parametrize("changes", [{}, {"optim": "sgd"}, {"optim": "adafactor"}, {"lr_scheduler_type": "cosine"}])
def test_parts_that_can_be_made_pass(changes: dict[str, Any]) -> None:
    import torch

    before = torch.random.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # whoever reads stderr would take it for an error of the run
        runtime.quiet()
        assert part_problems(settings(**changes)) == []
    assert torch.equal(torch.random.get_rng_state(), before), "the run's own random numbers are not used up"


def test_reward_weights_have_a_number_for_each_function() -> None:
    assert weight_problems(settings(), [exact]) == [] == weight_problems(settings(reward_weights=[1.0]), exact)
    (line,) = weight_problems(settings(reward_weights=[1.0, 2.0]), [exact], "trainer.")
    assert line == "trainer.reward_weights=[1.0, 2.0]: expected 1, one for each reward function"
    assert weight_problems(settings(reward_weights=[float("nan")]), exact)


def test_the_hub_is_asked_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    args = settings()
    assert hub_problems(args) == []
    args.push_to_hub = True
    assert hub_problems(args) == ["push_to_hub=True: HF_HUB_OFFLINE switches the hub off; unset it, or remove push_to_hub"]
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    (line,) = hub_problems(args)
    assert line.startswith("push_to_hub=True: no login at the hub; set HF_TOKEN")


def test_columns_and_arguments_of_rewards_go_together() -> None:
    def narrow(completions: list[str]) -> list[float]:
        return []

    def needs_prompt(prompt: list[str], **_: Any) -> list[float]:
        return []

    assert needed_columns([exact, narrow, "org/model"]) == ["answer"]
    assert signature_problems([exact, "org/model"], ["prompt", "answer"], "train") == []
    (line,) = signature_problems(exact, ["prompt", "target"], "train")
    assert line == (
        "reward function exact: needs `answer`, and there is no such column; add it to the train dataset, whose columns are "
        "prompt, target"
    )
    (line,) = signature_problems(narrow, ["prompt", "answer"], "train")
    assert line.startswith("reward function narrow: does not take `answer`, `completion_ids`") and line.endswith("with **_")
    (line,) = signature_problems(needs_prompt, ["prompt"], "eval")
    assert line.startswith("reward function needs_prompt: needs `prompt`, which TRL does not hand on; `prompts` has all")


def test_tokens_that_do_not_go_with_the_model_are_said(arithmetic_dir: str) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(arithmetic_dir)
    assert token_problems(tokenizer, 99, "m") == []
    (line,) = token_problems(tokenizer, 2, "m")
    assert line.startswith("model=m: its tokenizer's eos_token '<eos>' is token 2, and the model has embeddings for 2")
    tokenizer.eos_token = None
    (line,) = token_problems(tokenizer, 99, "m")
    assert line.startswith("model=m: its tokenizer has no eos_token")


def test_a_model_directory_without_a_tokenizer_is_named(arithmetic_dir: str, tmp_path: Path) -> None:
    """The tokenizer that transformers returns where no file is there has special tokens alone; the control has files."""
    config = AutoConfig.from_pretrained(arithmetic_dir)
    assert len(load_tokenizer(arithmetic_dir, config)) > 10
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"^model={tmp_path}: no tokenizer: .*; save it beside the model"):
        load_tokenizer(str(tmp_path), config)


def test_generation_settings_that_no_checkpoint_could_hold_are_said(arithmetic_dir: str, tmp_path: Path) -> None:
    """The control is what transformers does: before 5.24 it refuses to save them."""
    config = AutoConfig.from_pretrained(arithmetic_dir)
    assert generation_problems(arithmetic_dir, load_generation(arithmetic_dir, config)) == []
    (tmp_path / "generation_config.json").write_text(json.dumps({"do_sample": False, "temperature": 0.6, "eos_token_id": 2}))
    problems = generation_problems(str(tmp_path), load_generation(str(tmp_path), config))
    refused = Version(transformers.__version__) < Version("5.24")
    assert len(problems) == refused
    for line in problems:
        assert line.startswith(f"model={tmp_path}: generation_config.json: ") and "temperature" in line and "\n" not in line
    with pytest.raises(ValueError) if refused else nullcontext():
        GenerationConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "saved")
    (tmp_path / "generation_config.json").write_text('["no", "object"]')
    with pytest.raises(UserError, match=r"^model=.*: generation_config\.json cannot be read: .*; mend or delete it$"):
        load_generation(str(tmp_path), config)


def test_two_checkpoints_must_fit_on_the_disk(arithmetic_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = AutoConfig.from_pretrained(arithmetic_dir)
    weights = parameters(config) * 4
    disk = namedtuple("disk", "free")
    args = settings(tmp_path / "new" / "checkpoints")
    for free, models, refused in ((6 * weights, 1, False), (6 * weights - 1, 1, True), (6 * weights, 2, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: disk(free) if path == tmp_path else None)
        found = disk_problems(args, config, models)
        assert bool(found) is refused
    assert found[0].startswith(f"{tmp_path}: 0.0 GiB free, and 0.0 GiB are needed for 2 checkpoints of 2 models")
    adapter = LoraConfig(r=4, target_modules="all-linear")
    least = 6 * 4 * parameters(config, adapter)
    assert 0 < least < weights
    for free in (least, least - 1):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: disk(free))
        found = disk_problems(args, config, 1, adapter=adapter)
        assert bool(found) is (free < least), "a frozen base is not saved"
    assert "2 checkpoints of the adapters of 1 model, float32 weights" in found[0]
    assert disk_problems(settings(args.output_dir, save_strategy="no"), config, 1) == []
    (Path(args.output_dir) / "checkpoint-1").mkdir(parents=True)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: disk(3 * weights))
    assert disk_problems(args, config, 1) == [], "one is there already, of a run that is resumed"


def test_everything_comes_in_one_list(arithmetic_dir: str) -> None:
    rows = Dataset.from_list([{"prompt": "1+1="}, {"prompt": " "}])
    config, tokenizer = AutoConfig.from_pretrained(arithmetic_dir), AutoTokenizer.from_pretrained(arithmetic_dir)
    args = settings(learning_rate=-1.0, reward_weights=[1.0, 1.0])
    with pytest.raises(ConfigErrors) as raised:
        check_start(Start(args, arithmetic_dir, config, GenerationConfig(), tokenizer, [exact], rows, rows.select([0])))
    found = "\n".join(raised.value.errors)
    for start in ("optim=", "reward_weights=", "reward function exact: needs `answer`", "train dataset, row 1: a blank"):
        assert f"\n{start}" in f"\n{found}", found
    good = Dataset.from_list([{"prompt": "1+1=", "answer": "2"}, {"prompt": "<eos>", "answer": "2"}])
    (note,) = check_start(Start(settings(), arithmetic_dir, config, GenerationConfig(), tokenizer, exact, good))
    assert note.startswith("train dataset, row 1: '<eos>'")
