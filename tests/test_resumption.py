"""The checkpoint that a run goes on from, and the settings that make another run of it."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from rlinvariant import checkpoints, resume
from rlinvariant.arguments import SCRIPT
from rlinvariant.config import Config, parse
from rlinvariant.errors import ConfigErrors, UserError
from rlinvariant.report.rundir import RunDir
from rlinvariant.resumption import Resumption, dataset_digest, find, require_same_data, settings
from tests import commands

BASE = ("recipe=arithmetic", "run=x", "steps=6", "wandb.mode=disabled")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def config(*more: str) -> Config:
    given = {a.partition("=")[0]: a for a in (*BASE, "resume=true", *more)}
    return parse(list(given.values()), {})


def left(step: int, **about: Any) -> RunDir:
    """A run that has done `step` steps, and its checkpoint."""
    run = RunDir("runs/x")
    if not run.config.exists():
        RunDir.create(run.path, parse(list(BASE), {}).resolved())
    for done in range(1, step + 1):
        run.append_metrics({"step": done})
    partial = run.checkpoints / ".partial"
    partial.mkdir(parents=True)
    (partial / "model.safetensors").write_bytes(b"weights")
    whole = {"settings": settings(parse([a for a in BASE if a != "run=x"] + ["run=y"], {}))}
    whole |= {"logs": {"metrics.jsonl": run.metrics.stat().st_size}, "data": "d" * 64} | about
    checkpoints.finish(partial, run.checkpoints / f"checkpoint-{step}", step, whole)
    return run


def test_a_run_goes_on_from_its_newest_checkpoint():
    left(4)
    found = find(config())
    assert found.step == 4 and found.lines == ["resuming from checkpoint-4"] and not found.changed
    assert find(parse([a for a in BASE if a != "run=x"] + ["run=z"], {})) == Resumption(), "no resume"


def test_one_that_left_no_checkpoint_starts_at_step_1():
    assert find(config()).lines == ["no checkpoint in runs/x/checkpoints: from step 1"]
    RunDir.create("runs/x", parse(list(BASE), {}).resolved())
    with pytest.raises(ConfigErrors, match="seed=3: the run was started with 0; resume with that, or write resume=force"):
        find(config("seed=3"))


def test_damaged_checkpoints_are_told_and_skipped():
    run = left(4)
    (run.checkpoints / "checkpoint-9").mkdir()
    lines = find(config()).lines
    assert lines[0].startswith("skipped, as it is not whole: runs/x/checkpoints/checkpoint-9: no manifest.json")
    assert lines[1] == "resuming from checkpoint-4"


DECIDES = (
    "seed=1",
    "trainer.learning_rate=0.1",
    "trainer.per_device_train_batch_size=32",
    "data.eval_size=3",
    "dtype=float32",
    "attention=chunked",
    "invariance=off",
    "trainer.num_iterations=2",
    "algorithm=ppo",
    "staleness=2",
    "steps=8",
    "trainer.gradient_accumulation_steps=2",
    "trainer.eval_strategy=epoch",
)
FREE = ("wandb.mode=offline", "save_minutes=1", "trainer.save_steps=3", "sampler.max_num_seqs=4", "trainer.report_to=none")


@pytest.mark.parametrize("setting", DECIDES)
def test_a_setting_that_decides_the_result_is_refused_or_forced(setting):
    left(4)
    with pytest.raises(ConfigErrors) as caught:
        find(config(setting))
    key = setting.partition("=")[0]
    assert any(line.startswith(f"{key}=") and line.endswith("or write resume=force") for line in caught.value.errors)
    found = find(config(setting, "resume=force"))
    assert found.checkpoint is not None and found.checkpoint.forced
    assert any(line.startswith(f"{key}=") for line in found.changed)
    assert any(line.startswith(f"by resume=force: {key}=") for line in found.lines)


@pytest.mark.parametrize(
    "setting, before",
    [
        ("attention=flash", "auto; resume with that, or"),
        ("gradients=ordered", "stock; resume with that, or"),
        ("lora.r=4", "0, which its adapters"),
        ("tools=json:dumps", r"\[\]; resume with that, or"),
    ],
)
def test_a_run_of_an_earlier_version_did_what_there_was(setting, before):
    """A setting that its checkpoint does not know is no way around the comparison."""
    known = settings(config())
    key = setting.partition("=")[0]
    del known[key]
    left(4, settings=known)
    with pytest.raises(ConfigErrors, match=rf"^{key}=.*: the run was started with {before}"):
        find(config(setting))
    assert find(config()).step == 4


@pytest.mark.parametrize("setting", FREE)
def test_a_setting_that_decides_nothing_is_said(setting):
    left(4)
    found = find(config(setting))
    assert [line.partition("=")[0] for line in found.lines[1:]] == [f"note: {setting.partition('=')[0]}"]
    assert found.checkpoint is not None and not found.checkpoint.forced


def test_the_samplers_settings_decide_where_it_is_stock():
    left(4, settings=settings(config("invariance=off")))
    with pytest.raises(ConfigErrors, match="sampler.max_num_seqs=4: the run was started with"):
        find(config("invariance=off", "sampler.max_num_seqs=4"))


@pytest.mark.parametrize("now", [("lora.r=8",), ("lora.r=4", "lora.target_modules=q_proj"), ("lora.r=0",)])
def test_adapters_of_other_shapes_cannot_be_forced(now):
    """There is nothing to load them into: it ended in a traceback."""
    pytest.importorskip("peft")
    left(4, settings=settings(config("lora.r=4")))
    with pytest.raises(ConfigErrors, match="lora.* its adapters are made for; resume with that, or start a new run"):
        find(config(*now, "resume=force"))
    assert find(config("lora.r=4", "lora.alpha=4", "resume=force")).step == 4


def test_fewer_steps_than_are_done_cannot_be_forced_and_a_constant_rate_needs_no_force_for_more():
    left(4)
    for how in ("true", "force"):
        with pytest.raises(UserError, match="steps=3: the run has done 4; expected as many or more"):
            find(config("steps=3", f"resume={how}"))
    left(5, settings=settings(config("trainer.lr_scheduler_type=constant")))
    found = find(config("trainer.lr_scheduler_type=constant", "steps=60"))
    assert found.lines == ["resuming from checkpoint-5", "note: steps=60: the run was started with 6"]


def test_rows_that_a_checkpoint_builds_on_are_missed_and_damaged_ones_are_named():
    run = left(4)
    lines = run.metrics.read_bytes().splitlines(keepends=True)
    run.metrics.write_bytes(b"".join([lines[0], lines[3]]))
    assert find(config()).lines[1:] == ["note: runs/x/metrics.jsonl has no row of 2 of the first 4 steps, 2 first"]
    run.metrics.write_bytes(lines[0] + b"{]\n" + lines[3])
    with pytest.raises(UserError, match=r"runs/x/metrics.jsonl:2: not a line of JSON .*remove that line"):
        find(config())


def test_other_training_data_is_refused_or_forced():
    rows = [{"prompt": f"{i}", "answer": str(i)} for i in range(2500)]
    digest = dataset_digest(Dataset.from_list(rows))
    assert digest == dataset_digest(Dataset.from_list(rows)), "the same rows, another object"
    rows[2499]["answer"] = "x"
    other = dataset_digest(Dataset.from_list(rows))
    assert digest != other != dataset_digest(Dataset.from_list(rows[::-1]))
    left(4, data=digest)
    found = find(config())
    assert require_same_data(found, digest, config()) == found
    with pytest.raises(UserError, match="training data: other rows .* or write resume=force"):
        require_same_data(found, other, config())
    assert require_same_data(found, other, config("resume=force")).changed[0].startswith("training data: other rows")


# ---- rlinvariant resume


def test_the_command_has_the_settings_that_the_user_wrote():
    written = [
        *BASE,
        "data.eval_size=16",
        "trainer.lr_scheduler_kwargs={'a': 1.5}",
        "trainer.reward_weights=2.0,1e-05",
        "wandb.tags=a,b",
        "trainer.lr_scheduler_type=constant",
        "sampler.kv_cache_gib=0.1",
        "save_minutes=None",
    ]
    before = parse(written, {})
    RunDir.create("runs/x", before.resolved())
    again = parse([*resume.arguments(Path("runs/x"), ["steps=9"]), "run=x"], {})
    expected = settings(before) | {"steps": 9, "resume": True}
    assert settings(again) == expected


def test_a_run_is_named_by_its_directory_or_its_name(tmp_path, monkeypatch):
    (tmp_path / "runs/a/b").mkdir(parents=True)
    given = ("a", "a/b", "runs/a", "./runs/a/b/", str(tmp_path / "runs/a"))
    assert [resume.run_name(name) for name in given] == ["a", "a/b", "a", "a/b", "a"]
    for wrong in ("c", "runs/c", "/etc", ".."):
        with pytest.raises(UserError, match=f"{wrong}: no such run; expected a directory under"):
            resume.run_name(wrong)


@pytest.mark.parametrize("more", [[], ["resume=force"], ["steps=9"]])
def test_a_run_of_a_script_is_refused_by_one_line_whatever_command_goes_on_with_it(more):
    entries = parse(list(BASE), {}).resolved()
    RunDir.create("runs/x", entries | {"recipe": {"value": "mine.py", "source": SCRIPT}})
    train = {word.partition("=")[0]: word for word in (*BASE, "resume=true", *more)}
    for command in (["train", *train.values()], ["resume", "runs/x", *more]):
        with pytest.raises(UserError) as caught:
            commands.run(*command)
        assert str(caught.value) == "runs/x: a run of mine.py; start that again, with resume=True beside run= of its trainer"


@pytest.mark.parametrize("text", [None, "", "[]", "{", '{"a": 1}', "[" * 100_000])
def test_a_damaged_configuration_is_one_line(text):
    Path("runs/x").mkdir(parents=True)
    if text is not None:
        Path("runs/x/config.json").write_text(text)
    with pytest.raises(UserError, match="damaged|holds no run|use the command that started the run"):
        resume.arguments(Path("runs/x"), [])


def test_the_machine_file_is_the_one_that_the_run_was_launched_with(monkeypatch):
    for name in ("LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    run = RunDir.create("runs/x", parse(list(BASE), {}).resolved())
    for machine, expected in (("cpu2", ["machine=cpu2"]), ("gone.yaml", []), (None, [])):
        run.environment.write_text(json.dumps({"machine_file": machine}))
        assert [a for a in resume.arguments(run.path, []) if a.startswith("machine=")] == expected
    run.environment.write_text(json.dumps({"machine_file": "cpu2"}))
    assert "machine=cpu" in resume.arguments(run.path, ["machine=cpu"])
    assert "machine=cpu2" not in resume.arguments(run.path, ["machine=cpu"])
