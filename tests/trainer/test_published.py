"""A model that is saved for others has dtype, configuration and tokenizer as it came, and a card that says what was done."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.trainer.grpo_trainer import GRPOTrainer

import rlinvariant
from rlinvariant.bits import assert_bits_equal
from rlinvariant.errors import ConfigErrors, UserError
from rlinvariant.trainer.card import Card, stated
from rlinvariant.trainer.fields import GRPOConfig
from rlinvariant.trainer.preflight.parts import hub_problems
from rlinvariant.trainer.published import MARK, cast, place_problems
from tests.parity.harness import Run, assert_exact, new_trainer
from tests.trainer.hub import serving


@pytest.fixture
def run(arithmetic_dir, exact_engine, tmp_path) -> Run:
    """Two steps, each with a checkpoint."""
    run = new_trainer(arithmetic_dir, exact_engine, tmp_path / "run", save_strategy="steps", save_steps=1)
    run.trainer.save_dtype = torch.bfloat16
    run.trainer.train()
    assert_exact(run, 2 * 128)
    return run


def loaded(path: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(path, dtype="auto").state_dict())


def test_the_published_weights_are_the_masters_in_the_dtype_asked_for(run, tmp_path):
    path, checkpoint = run.trainer.publish(), tmp_path / "run/checkpoint-2"
    assert path == tmp_path / "run/model"
    published, kept = loaded(path), loaded(checkpoint)
    masters = run.trainer.accelerator.unwrap_model(run.trainer.model).state_dict()
    for name, weight in masters.items():
        assert_bits_equal(kept[name], weight.cpu(), f"the checkpoint keeps {name}")
        assert_bits_equal(published[name], weight.cpu().bfloat16(), f"the published {name} is rounded once")
    assert any((published[name].float() != kept[name]).any() for name in kept), "the control: rounding is seen"
    sizes = [(at / "model.safetensors").stat().st_size for at in (path, checkpoint)]
    assert sizes[0] < 0.51 * sizes[1], "half the bytes, and the tied head is there once"
    assert json.loads((path / "config.json").read_text())["dtype"] == "bfloat16"
    assert json.loads((checkpoint / "config.json").read_text())["dtype"] == "float32"


def test_configuration_and_tokenizer_are_as_the_model_came(run, arithmetic_dir, tmp_path, monkeypatch):
    run.trainer._tokenizer(["1+2=", "1+22="], padding=True, truncation=True, max_length=4)  # stays in what a tokenizer saves
    path, came = run.trainer.publish(), Path(arithmetic_dir)
    for saved in (path, tmp_path / "run/checkpoint-1"):
        assert json.loads((saved / "config.json").read_text())["use_cache"] is True
        a, b = AutoTokenizer.from_pretrained(saved), AutoTokenizer.from_pretrained(came)
        assert (a.padding_side, a.truncation_side, a.pad_token) == (b.padding_side, b.truncation_side, b.pad_token)
        assert (saved / "tokenizer.json").read_text() == (came / "tokenizer.json").read_text()
        assert not [file for file in saved.rglob("*") if file.suffix in (".bin", ".pt", ".pkl")], "no pickle"
    GRPOTrainer._save(run.trainer, str(tmp_path / "stock"))
    stock = json.loads((tmp_path / "stock/config.json").read_text())
    assert stock["use_cache"] is False, "the control: transformers' trainer leaves its own setting"
    assert (tmp_path / "stock/tokenizer.json").read_text() != (came / "tokenizer.json").read_text()


def test_a_tokenizer_without_padding_and_right_sided_stays_so(arithmetic_dir, exact_engine, tmp_path):
    settings = shutil.copytree(arithmetic_dir, tmp_path / "base") / "tokenizer_config.json"
    changed = {"padding_side": "right", "truncation_side": "left", "pad_token": None}
    settings.write_text(json.dumps(json.loads(settings.read_text()) | changed))
    run = new_trainer(str(tmp_path / "base"), exact_engine, tmp_path / "run")
    saved = AutoTokenizer.from_pretrained(run.trainer.publish())
    assert (saved.padding_side, saved.truncation_side, saved.pad_token) == ("right", "left", None)
    assert run.trainer._tokenizer.pad_token is not None, "the control: TRL has given the run's own one"


def test_a_card_says_what_was_trained_and_what_was_compared(run, tmp_path):
    run.trainer.about_run = lambda: {"data": "sums", "command": "rlinvariant train recipe=x\x1b[31m"}
    card = (run.trainer.publish() / "README.md").read_text()
    compared = run.total("compared_tokens")
    assert f"| sampler against trainer | mismatched 0 of {compared:,} tokens:" in card and "not compared" not in card
    assert "| base model | `arithmetic` |" in card and "trained by GRPO for 2 optimizer steps" in card
    assert "| weights | bfloat16 |" in card and "| data | sums |" in card
    assert "rlinvariant train recipe=x\\x1b[31m" in card, "nothing that a terminal would obey"
    for row in run.rows:
        assert f"| {row['step']} | {row['reward']:.3f} |" in card
    assert "None" not in card and "generated_from_trainer" not in card
    kept = (tmp_path / "run/checkpoint-1/README.md").read_text()
    assert "| weights | float32, as they are trained: a run goes on from them |" in kept and "for 1 optimizer step." in kept
    assert not (tmp_path / "run/README.md").exists(), "TRL's template is gone"
    run.trainer.model_directory = None
    GRPOTrainer.create_model_card(run.trainer)
    assert "huggingface.co/None" in (tmp_path / "run/README.md").read_text(), "the control: that is TRL's"


def test_a_card_counts_what_differs_and_what_was_left_out():
    rows = [
        {"step": s, "reward": s / 100, "onpolicy/compared_tokens": 500, "onpolicy/mismatched_tokens": 3} for s in range(1, 31)
    ]
    rows[0]["onpolicy/unscored_tokens"] = 7
    text = Card("m", "org/base", "PPO", 30, "float32", "x", rows, {"a": "b|c"}, dataset="org/data", tags=["mine"]).text()
    assert "mismatched 90 of 15,000 tokens" in text and "7 sampled tokens were not compared" in text
    assert text.startswith("---\nbase_model: org/base\n") and "datasets:\n- org/data" in text and "- mine" in text
    assert "| 1 to 3 | 0.020 |" in text and "| 28 to 30 | 0.290 |" in text and "| a | b\\|c |" in text
    assert "no token was compared" in Card("m", "org/base", "GRPO", 0, "float32", "x", []).text()


def test_licence_and_origin_are_what_the_base_model_says(tmp_path):
    (tmp_path / "said").mkdir()
    (tmp_path / "said/README.md").write_text("---\nlicense: apache-2.0\nbase_model: org/first\n---\n# Base\n")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/README.md").write_text("---\nlicense: [\n---\n")
    text = Card("m", str(tmp_path / "said"), "GRPO", 1, "float32", "x", []).text()
    assert "\nlicense: apache-2.0\n" in text and text.startswith("---\nbase_model: org/first\n")
    assert "| base model | `said`, made of `org/first` |" in text and "| licence | apache-2.0 |" in text
    assert stated(str(tmp_path / "broken")) == {} == stated(str(tmp_path))
    assert "license:" not in Card("m", str(tmp_path), "GRPO", 1, "float32", "x", []).text(), "the control"


def test_a_directory_is_whole_or_as_it_was(run, monkeypatch):
    path = run.trainer.publish()
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    monkeypatch.setattr(run.trainer, "model_card", lambda resumable: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.trainer.publish()
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    assert [p.name for p in path.parent.iterdir() if p.name.startswith(".model")] == []


def test_only_what_was_published_is_replaced(run, arithmetic_dir, tmp_path):
    """Nothing that a user keeps in OUTPUT_DIR/model is lost: neither files, nor a link, nor the base model."""
    path = tmp_path / "run/model"
    path.mkdir()
    assert run.trainer.publish() == path == run.trainer.publish(), "the control: an empty directory, and our own"
    assert json.loads((path / MARK).read_text()) == {"published_by": "rlinvariant", "step": 2}
    (path / MARK).unlink()
    (path / "mine.txt").write_text("mine")
    line = f"{path}: not written by rlinvariant (it has no {MARK}), and the trained model would replace it; move it, or choose"
    with pytest.raises(UserError, match="^" + re.escape(line)):
        run.trainer.publish()
    run.trainer.args.hub_always_push = True
    with pytest.raises(UserError, match="^" + re.escape(line)):
        run.trainer._push_from_checkpoint(str(tmp_path / "run/checkpoint-2"))
    assert (path / "mine.txt").read_text() == "mine" and (path / "model.safetensors").is_file()
    (tmp_path / "link").symlink_to(path)
    assert place_problems(tmp_path / "link", "org/base") and not place_problems(tmp_path / "absent", "org/base")
    (base,) = place_problems(Path(arithmetic_dir), arithmetic_dir)
    assert base.startswith(f"{arithmetic_dir}: the base model is there")


def test_a_run_that_would_replace_what_is_there_does_not_start(arithmetic_dir, tmp_path, monkeypatch):
    """Before weights are loaded: of a script that pushes, and of one with a run's directory."""
    monkeypatch.chdir(tmp_path)
    rows = Dataset.from_dict({"prompt": ["1+1="] * 8})
    for place, given, options in (("out/model", {"push_to_hub": True}, {}), ("runs/a/model", {}, {"run": "a"})):
        Path(place).mkdir(parents=True)
        (Path(place) / "mine.txt").write_text("mine")
        args = GRPOConfig(
            "out", per_device_train_batch_size=4, num_generations=4, max_completion_length=4, report_to=[], **given
        )
        with pytest.raises(ConfigErrors) as raised, serving(monkeypatch):
            rlinvariant.GRPOTrainer(arithmetic_dir, lambda completions, **_: [0.0] * len(completions), args, rows, **options)
        said = f"{place}: not written by rlinvariant (it has no {MARK}), and the trained model would replace it"
        assert [error for error in raised.value.errors if error.startswith(said)], raised.value.errors
        assert (Path(place) / "mine.txt").read_text() == "mine"


def test_what_is_pushed_is_what_is_published(run, tmp_path, monkeypatch):
    run.trainer.args.hub_token = "hf_secret"
    with serving(monkeypatch) as hub:
        run.trainer.push_to_hub(dataset_name="org/sums", tags="mine")
    path = tmp_path / "run/model"
    assert hub.files == {"me/run": {file.name: file.read_bytes() for file in path.iterdir()}}
    card = hub.files["me/run"]["README.md"].decode()
    assert "datasets:\n- org/sums" in card and "- mine" in card and hub.messages == ["End of training"]
    assert not [name for name, content in hub.files["me/run"].items() if b"hf_secret" in content]


def test_a_push_at_each_checkpoint_is_the_published_model_too(arithmetic_dir, exact_engine, tmp_path, monkeypatch):
    saving = {"save_strategy": "steps", "save_steps": 1, "push_to_hub": True, "hub_token": "hf_secret"}
    with serving(monkeypatch) as hub:
        run = new_trainer(arithmetic_dir, exact_engine, tmp_path / "run", hub_always_push=True, **saving)
        run.trainer.save_dtype = torch.bfloat16
        run.trainer.train()
        run.trainer._finish_current_push()
    (files,) = hub.files.values()
    assert hub.messages == ["Training in progress, step 1", "Training in progress, step 2"]
    assert files == {file.name: file.read_bytes() for file in (tmp_path / "run/model").iterdir()}
    assert len(files["model.safetensors"]) < 0.51 * (tmp_path / "run/checkpoint-2/model.safetensors").stat().st_size


def test_pushing_checkpoints_themselves_is_refused(run):
    args = run.trainer.args
    args.push_to_hub, args.hub_strategy = True, "all_checkpoints"
    (line,) = hub_problems(args, "trainer.")
    assert line.startswith("trainer.hub_strategy=all_checkpoints: expected end or every_save")


def test_casting_keeps_tied_weights_tied_and_whole_numbers_whole():
    weight = torch.full((2,), 1 + 2.0**-9)
    done = cast({"a": weight, "b": weight, "c": torch.arange(2)}, torch.bfloat16)
    assert done["a"] is done["b"] and done["a"].dtype == torch.bfloat16 and done["c"].dtype == torch.int64
