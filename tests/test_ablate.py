"""`rlinvariant ablate`: what it runs and refuses, and how it goes on with what is there."""

import json
import shutil
import typing
from pathlib import Path

import pytest

from rlinvariant import checkpoints, cli
from rlinvariant.ablate import check, runs
from rlinvariant.ablate.arms import CORRECTION_MODES, DEFAULT_ARMS, Arm, setting
from rlinvariant.ablate.check import checked, refuse_mixed
from rlinvariant.ablate.plan import Plan, extended, read
from rlinvariant.ablate.runs import prepare
from rlinvariant.config import TRAINER_CHOICES, parse
from rlinvariant.errors import ConfigErrors, UserError
from rlinvariant.report.rundir import RunDir
from tests.config.common import with_defaults
from tests.report.runs import row

ROOT = Path(__file__).parents[1]
SMALL = ["recipe=arithmetic", "seeds=2", "arms=exact,drift", "steps=3", "run=x"]


@pytest.fixture(autouse=True)
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def plan(*argv: str) -> Plan:
    return read(with_defaults(argv, "recipe=arithmetic"))


def errors(*argv: str) -> list[str]:
    with pytest.raises(ConfigErrors) as raised:
        plan(*argv)
    return raised.value.errors


# ---- what to run


@pytest.mark.parametrize(
    ("argument", "seeds"), [("", (0, 1, 2)), ("seeds=1", (0,)), ("seeds=2", (0, 1)), ("seeds=7,", (7,)), ("seeds=5,3", (5, 3))]
)
def test_seeds_are_a_number_or_a_list(argument, seeds):
    assert plan(*([argument] if argument else [])).seeds == seeds


@pytest.mark.parametrize("recipe", ["arithmetic", "arithmetic_stale", "arithmetic_tis", "arithmetic_off"])
def test_every_arm_is_what_its_name_says(recipe):
    """The runs' own configuration has the arm's corrections, sides and lag, whatever the recipe's defaults are."""
    configs = checked(
        plan(f"recipe={recipe}", "steps=5", "arms=" + ",".join([*(arm.name for arm in DEFAULT_ARMS), "stale-2-sequence-mask"]))
    )
    found = {
        name: (
            c.invariance,
            c.staleness,
            c.trainer.vllm_importance_sampling_correction and c.trainer.vllm_importance_sampling_mode,
        )
        for name, c in configs.items()
    }
    modes = {mode: mode.replace("-", "_") for mode in CORRECTION_MODES}
    assert set(modes.values()) == set(typing.get_args(TRAINER_CHOICES["vllm_importance_sampling_mode"]))
    assert found == {
        "exact": ("exact", 0, False),
        "drift": ("off", 0, False),
        **{f"drift-{mode}": ("off", 0, trl) for mode, trl in modes.items()},
        "sampler": ("sampler", 0, False),
        "trainer": ("trainer", 0, False),
        "stale-4": ("exact", 4, False),
        "stale-4-token-truncate": ("exact", 4, "token_truncate"),
        "stale-2-sequence-mask": ("exact", 2, "sequence_mask"),
    }


def test_runs_of_a_seed_differ_by_their_arm_alone():
    wanted = plan("arms=exact,drift", "seeds=2", "trainer.beta=0.1", "run=x")
    assert [(arm.name, seed) for arm, seed in wanted.jobs()] == [("exact", 0), ("drift", 0), ("exact", 1), ("drift", 1)]
    lines = [wanted.arguments(arm, seed) for arm, seed in wanted.jobs()]
    shared = ["recipe=arithmetic", "trainer.beta=0.1", "wandb.group=ablation-x"]
    own = ["staleness=0", "trainer.vllm_importance_sampling_correction=false"]
    assert lines[0] == [*shared, "invariance=exact", *own, "seed=0", "run=ablation-x/exact/seed-0"]
    assert lines[3] == [*shared, "invariance=off", *own, "seed=1", "run=ablation-x/drift/seed-1"]


def test_a_setting_of_our_sides_is_of_the_arms_that_have_them():
    """A stock side refuses it, and is compared all the same."""
    wanted = plan("arms=exact,drift,sampler", "seeds=1", "attention=chunked", "trainer.tokens_per_microbatch=4096", "run=x")
    found = {name: (config.attention, config.trainer.tokens_per_microbatch) for name, config in checked(wanted).items()}
    assert found == {"exact": ("chunked", 4096), "drift": ("auto", None), "sampler": ("chunked", None)}
    for arms, unused in (("drift", "attention=chunked"), ("drift,sampler", "trainer.tokens_per_microbatch=-1")):
        with pytest.raises(ConfigErrors, match=f"^{unused}: of no arm here, as each has stock kernels where it is for; leave"):
            checked(plan(f"arms={arms}", "seeds=1", unused, "run=x"))


def test_the_command_makes_the_plan_again():
    wanted = plan("arms=exact,stale-3", "seeds=4,", "steps=9", "run=x", "wandb.tags=a,b", "at_once=2")
    program, command, *argv = wanted.command.split()
    assert (program, command) == ("rlinvariant", "ablate") and read(argv) == wanted


MISTAKES = {
    "seeds=0": "seeds=0: expected at least 1 seed",
    "seeds=two": "seeds=two: expected a number of seeds, or a list a,b,c",
    "seeds=1,1": "seeds=1,1: a seed is given twice",
    "seed=3": "seed=3: not a setting of ablate; write seeds=, a number of seeds or a list",
    "arms=exact,exact": "arms: exact given twice",
    "arms=": "arms=: expected at least one; rlinvariant ablate --help lists them",
    "arms=stale-0": "arms=stale-0: unknown arm; did you mean stale-4? There are exact, drift, ",
    "arms=drfit": "arms=drfit: unknown arm; did you mean drift? There are exact, drift, ",
    "arms=fp16": "arms=fp16: float16 on both sides: not possible",
    "invariance=off": "invariance=off: not a setting of ablate; each arm sets its own; choose with arms=",
    "staleness=1": "staleness=1: not a setting of ablate; each arm sets its own; choose with arms=",
    "machine=2gpu": "machine=2gpu: not a setting of ablate; write launch=FILE, an accelerate configuration",
    "resume=true": "resume=true: not a setting of ablate; the same command goes on where it ended",
    "run=": "run=: expected a name of letters",
    "run=../x": "run=../x: expected a name of letters, digits, '.', '_' and '-'; it becomes runs/ablation-NAME",
    "launch=nowhere.yaml": "launch=nowhere.yaml: no such file; give an accelerate configuration, e.g. configs/cpu2.yaml",
    "at_once=0": "at_once=0: expected how many runs at the same time, 1 or more",
    "--seeds=3": "--seeds=3: expected key=value, e.g. seeds=3",
}


@pytest.mark.parametrize("argument", MISTAKES)
def test_one_mistake_gives_one_line(argument):
    (line,) = errors(argument)
    assert line.startswith(MISTAKES[argument])


def test_mistakes_come_in_one_list():
    with pytest.raises(ConfigErrors) as raised:
        read(["seeds=0", "arms=x"])
    assert [line.split(":")[0] for line in raised.value.errors] == ["recipe", "seeds=0", "arms=x"]


def test_it_is_not_for_a_launcher(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    (line,) = errors("seeds=1")
    assert line.startswith("WORLD_SIZE is set: ablate starts the runs itself; run it without accelerate launch")


def test_what_a_run_would_refuse_is_refused_before_any_starts():
    with pytest.raises(ConfigErrors) as raised:
        checked(plan("arms=exact,drift,stale-4", "trainer.bf16=true", "trainer.top_p=1.9", "steps=4", "stps=3"))
    lines = raised.value.errors
    assert [line.split(":")[0] for line in lines] == ["stps=3", "trainer.top_p=1.9", "trainer.bf16=True"]
    assert lines[2].endswith("(arm exact, stale-4)") and "arm" not in lines[0]
    with pytest.raises(
        ConfigErrors, match=r"^steps=4: expected more than the lag of arm stale-4; raise steps, or choose arms="
    ):
        checked(plan("arms=exact,stale-4", "steps=4"))


def test_the_arm_of_merged_adapters_needs_adapters():
    with pytest.raises(ConfigErrors, match="^arms=lora_merged: recipe=arithmetic trains no adapters; add lora.r=16"):
        checked(plan("arms=lora_merged"))
    assert checked(plan("arms=exact,lora_merged", "lora.r=4"))["lora_merged"].invariance == "off"


def test_processes_of_a_launch_count_in_batch_sizes():
    Path("two.yaml").write_text("num_processes: 2\n")
    small = ("arms=exact", "trainer.per_device_train_batch_size=4", "trainer.num_generations=8")
    with pytest.raises(ConfigErrors, match="divisor of the 4 samples"):
        checked(plan(*small))
    wanted = plan(*small, "launch=two.yaml")
    checked(wanted)
    command = runs._command(wanted, ["seed=1"])
    assert command[-5:] == ["-m", "rlinvariant.cli", "train", "machine=two.yaml", "seed=1"]


def test_runs_that_would_depend_on_each_other_are_refused(monkeypatch):
    def refused(gpus: int, *settings: str) -> None:
        monkeypatch.setattr(check, "visible_gpus", lambda: list(map(str, range(gpus))))
        wanted = plan(*settings)
        check.refuse_crowds(wanted, checked(wanted))

    with pytest.raises(UserError, match="^at_once=2: expected 1 without a GPU"):
        refused(0, *SMALL, "at_once=2")
    with pytest.raises(UserError, match="^at_once=3: expected at most 2, the number of GPUs"):
        refused(2, *SMALL, "at_once=3")
    refused(2, *SMALL, "at_once=2")
    refused(0, *SMALL)
    stock = [word if "arms" not in word else "arms=drift" for word in SMALL]
    refused(2, *stock, "at_once=4")  # stock steps are divided by rows


# ---- going on


def written(wanted: Plan, arm: Arm, seed: int, *changes: str, finished: bool = True) -> RunDir:
    """Write the files that a run leaves."""
    run = wanted.run_dir(arm, seed)
    config = parse(
        [*(a for a in wanted.arguments(arm, seed) if a.split("=")[0] not in [c.split("=")[0] for c in changes]), *changes]
    )
    RunDir.create(run.path, config.resolved())
    if finished:
        run.write_result({"finished": True, "heldout_reward_before": 0.5, "heldout_reward_after": 0.75, "seconds": 1.0})
    return run


def test_other_settings_are_refused_by_the_first_that_differs():
    wanted = plan("arms=exact,drift", "seeds=1", "steps=20", "run=x")
    written(wanted, wanted.arms[1], 0)
    refuse_mixed(wanted, checked(wanted))
    refuse_mixed(other := plan("arms=exact,drift", "seeds=1", "steps=20", "run=x", "wandb.mode=disabled"), checked(other))
    for change, then in (("steps=30", 20), ("trainer.learning_rate=0.5", 0.0006), ("data.digits=2", 3)):
        other = plan("arms=exact,drift", "seeds=1", *with_defaults([change], "steps=20"), "run=x")
        key, _, now = change.partition("=")
        with pytest.raises(UserError) as raised:
            refuse_mixed(other, checked(other))
        assert str(raised.value) == (
            f"run=x: runs/ablation-x/drift/seed-0 was run with {key}={then}, and now it is {now}; "
            "an ablation has one setting for all: add run=NAME for a new one"
        )


def test_runs_of_an_earlier_version_had_the_attention_that_there_was():
    wanted = plan("arms=exact", "seeds=1", "run=x")
    run = written(wanted, wanted.arms[0], 0)
    entries = json.loads(run.config.read_text())
    del entries["attention"]
    run.config.write_text(json.dumps(entries))
    refuse_mixed(wanted, checked(wanted))
    other = plan("arms=exact", "seeds=1", "attention=chunked", "run=x")
    with pytest.raises(UserError, match="was run with attention=auto, and now it is chunked"):
        refuse_mixed(other, checked(other))


def test_arms_and_seeds_are_added_to_what_is_there():
    assert extended(plan("seeds=1", "run=x")) == plan("seeds=1", "run=x")
    Path("runs/ablation-x").mkdir(parents=True)
    file = Path("runs/ablation-x/ablation.json")
    arms = [{"name": "exact", "description": "d", "overrides": list(setting("exact"))}]
    file.write_text(json.dumps({"schema": 1, "seeds": [0, 5], "arms": arms}))
    found = extended(plan("seeds=2", "arms=drift", "run=x"))
    assert found.seeds == (0, 1, 5) and [arm.name for arm in found.arms] == ["exact", "drift"]
    file.write_text(json.dumps({"schema": 2}))
    with pytest.raises(UserError, match=r"run=x: .*ablation.json has schema 2, expected 1; choose another run=NAME"):
        extended(plan("run=x"))
    file.write_text("{")
    with pytest.raises(UserError, match="ablation.json: cannot be read as JSON .*; choose another run=NAME"):
        extended(plan("run=x"))
    for name, given in (("drift", ["recipe=/tmp/theirs.py"]), ("nosuch", []), (["drift"], [])):
        arm = {"name": name, "description": "", "overrides": given}
        file.write_text(json.dumps({"schema": 1, "seeds": [0], "arms": [arm]}))
        with pytest.raises(UserError, match="run=x: .* is not an ablation's"):
            extended(plan("run=x"))


def checkpoint(run: RunDir, step: int, whole: bool = True) -> None:
    """Write what a trainer leaves; one that is not whole has lost a byte since."""
    partial = run.checkpoints / ".partial"
    partial.mkdir(parents=True)
    (partial / "model.safetensors").write_bytes(b"weights")
    path = run.checkpoints / f"checkpoint-{step}"
    checkpoints.finish(partial, path, step, {})
    if not whole:
        (path / "model.safetensors").write_bytes(b"weight")


def test_an_interrupted_run_goes_on_or_is_set_aside_and_nothing_is_lost():
    wanted = plan("arms=exact,stale-2", "seeds=1", "steps=20", "run=x")
    exact, old = wanted.arms
    run = wanted.run_dir(exact, 0)
    assert prepare(run, 20) == (False, "") and run.path.is_dir()
    written(wanted, exact, 0, finished=False)
    checkpoint(run, 10)
    checkpoint(run, 15, whole=False)
    assert prepare(run, 20) == (True, "was interrupted; goes on from its checkpoint of step 10")
    checkpoint(run, 20)  # all steps done, but what follows them is not
    assert prepare(run, 20) == (True, "was interrupted; goes on from its checkpoint of step 20")
    resume, note = prepare(run, 19)
    assert not resume and "starts anew, and what there was is in runs/ablation-x/exact/seed-0.interrupted-1" in note
    assert (run.path.with_name("seed-0.interrupted-1") / "checkpoints/checkpoint-10").is_dir() and not run.config.exists()
    written(wanted, exact, 0, finished=False)
    assert prepare(run, 20)[1].endswith("seed-0.interrupted-2")
    run = written(wanted, old, 0, finished=False)
    checkpoint(run, 10)
    assert prepare(run, 20)[0], "older weights are in the checkpoint too"


def test_arms_that_were_run_elsewhere_are_joined_by_four_small_files_of_each_run(tmp_path, monkeypatch, capsys):
    """Sittings on several machines: their runs come together without checkpoints, and the same command starts none of them."""
    joined = tmp_path / "joined"
    for machine, arm in (("a", "exact"), ("b", "drift")):
        (tmp_path / machine).mkdir()
        monkeypatch.chdir(tmp_path / machine)
        sitting = plan(*SMALL[:2], f"arms={arm}", *SMALL[3:])
        for seed in sitting.seeds:
            run = written(sitting, sitting.arms[0], seed)
            run.environment.write_text(json.dumps({"cpu": {"model": machine}}))
            write_rows(run.metrics, seed)
            to = joined / run.path
            to.mkdir(parents=True)
            for file in (run.config, run.environment, run.metrics, run.path / "result.json"):
                shutil.copy(file, to)
    monkeypatch.chdir(joined)
    monkeypatch.setattr(runs, "_run", lambda *_: pytest.fail("a run was started"))
    assert cli.main(["ablate", *SMALL]) == 0
    said = capsys.readouterr().out
    assert "4 of 4 runs done before" in said and "2 different CPU models" in said
    arms = json.loads(Path("runs/ablation-x/summary.json").read_text())["arms"]
    assert {name: arm["tokens"]["compared"] for name, arm in arms.items()} == {"exact": 384, "drift": 384}
    monkeypatch.undo()
    monkeypatch.chdir(joined)
    Path("runs/ablation-x/drift/seed-1/result.json").unlink()
    assert [(arm.name, seed) for arm, seed in extended(plan(*SMALL)).left()] == [("drift", 1)], "control"


def write_rows(file: Path, seed: int) -> None:
    """Write three steps' metrics, as training does."""
    file.write_text("".join(json.dumps(row(step, seed, 0.0)) + "\n" for step in (1, 2, 3)))
