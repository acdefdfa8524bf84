"""A run that goes on from any of its checkpoints is the run that was never stopped: weights, rows and samples, bit for bit."""

import random
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from trl.trainer.grpo_trainer import GRPOTrainer

from rlinvariant import checkpoints, stopping
from rlinvariant.checkpoints import Checkpoint, DamagedCheckpoint
from rlinvariant.config import PPOConfig
from rlinvariant.errors import DiskError, UserError
from rlinvariant.trainer import state_file
from rlinvariant.trainer.checkpointed import CheckpointedTrainer
from tests.parity.harness import Run, assert_exact, assert_same_weights, new_trainer, questions, weights

STEPS = 5
TIMES = ("time/", "perf/", "step_time", "profiling/")  # what may differ from run to run
SCHEDULES: dict[str, dict[str, Any]] = {
    "a rollout a step": {},
    "a rollout for four steps": {"steps_per_generation": 4},
    "a rollout used twice": {"num_iterations": 2, "steps_per_generation": 2},
    "gradients of several parts": {"tokens_per_microbatch": 60},
    "an epoch of two steps": {"train_dataset": questions(8)},
    "an epoch of two steps, in order": {"train_dataset": questions(8), "shuffle_dataset": False},
    "evaluation between": {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "eval_dataset": questions(4),
        "per_device_eval_batch_size": 4,
    },
    "a stale sampler": {"staleness": 2},
    "a reference that moves": {"beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 1},
    "PPO, a rollout used twice": {"ppo": PPOConfig(critic_learning_rate=2e-3), "num_iterations": 2, "steps_per_generation": 2},
    "PPO, the rest of a rollout skipped": {"ppo": PPOConfig(target_kl=1e-9), "num_iterations": 3, "save_total_limit": None},
}


def falling(completions: list[str], trainer_state: Any, **_: Any) -> list[float]:
    """Rewards that fall from step to step."""
    return [len(set(text)) / 10 - 10 * trainer_state.global_step for text in completions]


@pytest.fixture
def new(arithmetic_dir, exact_engine, tmp_path):
    """A trainer that saves after each step, and writes down its samples; a directory of its own for each."""

    def start(name: str = "run", **changes: Any) -> Run:
        samples: list[Any] = []
        settings = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 1} | changes
        run = new_trainer(arithmetic_dir, exact_engine, tmp_path / name, on_samples=samples.extend, **settings)
        run.samples = samples  # type: ignore[attr-defined]
        return run

    return start


def seen(run: Run, after: int = 0) -> list[dict[str, str]]:
    """The rows after a step without clocks, NaN written out so that it equals itself."""
    rows = [{k: repr(v) for k, v in row.items() if not k.startswith(TIMES)} for row in run.rows if row["step"] > after]
    return rows + [{"sample": repr(s)} for s in run.samples if s["step"] > after]  # type: ignore[attr-defined]


def assert_same_end(run: Run, whole: Run, after: int, what: str) -> None:
    assert seen(run) == seen(whole, after), what
    assert_same_weights(weights(run), weights(whole), what)
    if hasattr(run.trainer, "critic"):
        of = [dict(each.trainer.critic.named_parameters()) for each in (run, whole)]  # type: ignore[attr-defined]
        assert_same_weights(*of, what)


@pytest.mark.parametrize(
    "schedule", [pytest.param(x, marks=[pytest.mark.slow] * (x == "evaluation between")) for x in SCHEDULES]
)
def test_a_run_goes_on_from_any_step(schedule, new, tmp_path):
    whole = new("whole", **SCHEDULES[schedule])
    whole.trainer.train()
    if not SCHEDULES[schedule].get("staleness"):
        assert_exact(whole, STEPS * 16)
    for step in range(1, STEPS):
        rest = new(f"rest-{step}", **SCHEDULES[schedule])
        rest.trainer.train(resume_from_checkpoint=str(tmp_path / f"whole/checkpoint-{step}"))
        assert_same_end(rest, whole, step, f"{schedule}, from step {step}")


@pytest.mark.parametrize(
    ("schedule", "forgotten"),
    [
        ("a rollout for four steps", {"rollout": None, "micro_steps": 0}),
        ("a rollout a step", {"exact_streak": 0}),
        ("a rollout used twice", {"graded": None}),
    ],
)
def test_what_is_saved_of_a_rollout_is_needed(schedule, forgotten, new, tmp_path, monkeypatch):
    """The control: a resume without it, as TRL's, ends elsewhere."""
    whole = new("whole", **SCHEDULES[schedule])
    whole.trainer.train()
    rest = new("rest", **SCHEDULES[schedule])
    restore = rest.trainer._restore_progress
    monkeypatch.setattr(rest.trainer, "_restore_progress", lambda progress: restore(progress | forgotten))
    rest.trainer.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-1"))
    assert seen(rest) != seen(whole, 1)


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, 4])
def test_an_evaluation_that_a_signal_has_put_off_is_made_before_the_next_step(step, new, tmp_path, monkeypatch):
    """Rewards fall, so that the first evaluation is the best; of the last step it is made at once. Control: it is forgotten."""
    found: dict[str, list[dict[str, str]]] = {}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "reward", "greater_is_better": True}
    best |= {"max_steps": 4, "save_steps": 2, "save_total_limit": None}

    def made(name: str) -> Run:
        rows = found[name] = []
        keep = lambda row: rows.append({k: repr(v) for k, v in row.items() if "time" not in k and "per_second" not in k})  # noqa: E731
        return new(name, reward_funcs=falling, on_evaluation=keep, **(SCHEDULES["evaluation between"] | best))

    whole = made("whole")
    whole.trainer.train()
    stopped = made("stopped")
    with monkeypatch.context() as patch:
        patch.setattr(stopping._state, "number", 0)
        patch.setattr(stopping, "asked", lambda: signal.SIGTERM if stopped.trainer.state.global_step == step else 0)
        stopped.trainer.train()
    assert [row["step"] for row in stopped.rows] == list(range(1, step + 1))
    assert found["stopped"] == (found["whole"] if step == 4 else [])
    if step == 4:
        return
    shutil.copytree(tmp_path / "stopped", tmp_path / "forgotten")
    rest, forgotten = made("stopped"), made("forgotten")
    rest.trainer.train(resume_from_checkpoint=str(tmp_path / f"stopped/checkpoint-{step}"))
    assert found["stopped"] == found["whole"]
    assert rest.trainer.state.best_global_step == whole.trainer.state.best_global_step == step
    assert_same_end(rest, whole, step, "stopped where an evaluation was due")
    restore = forgotten.trainer._restore_progress
    monkeypatch.setattr(forgotten.trainer, "_restore_progress", lambda progress: restore(progress | {"owes_evaluation": False}))
    forgotten.trainer.train(resume_from_checkpoint=str(tmp_path / f"forgotten/checkpoint-{step}"))
    assert forgotten.trainer.state.best_global_step != step


def test_a_reference_that_moves_is_needed(new, tmp_path, monkeypatch):
    """The control: a resume with the reference that the run began with, as TRL's, ends elsewhere; without one it is refused."""
    whole, stayed = new("whole", **SCHEDULES["a reference that moves"]), new("stayed", beta=0.1)
    for run in (whole, stayed):
        run.trainer.train()
    rest = new("rest", **SCHEDULES["a reference that moves"])
    with pytest.raises(UserError, match="^sync_ref_model=True: the checkpoint has no reference"):
        rest.trainer.train(resume_from_checkpoint=str(tmp_path / "stayed/checkpoint-1"))
    monkeypatch.setattr(CheckpointedTrainer, "_moving_reference", lambda self: iter(()))
    rest = new("rest", **SCHEDULES["a reference that moves"])
    rest.trainer.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-1"))
    assert seen(rest) != seen(whole, 1)


def test_without_the_permutations_of_earlier_epochs_the_first_order_comes_again(new, tmp_path, monkeypatch):
    """The control: TRL's sampler begins anew after a resume."""
    whole = new("whole", **SCHEDULES["an epoch of two steps"])
    whole.trainer.train()
    rest = new("rest", **SCHEDULES["an epoch of two steps"])
    monkeypatch.setattr(CheckpointedTrainer, "_init_training_state", GRPOTrainer._init_training_state)
    rest.trainer.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    assert seen(rest) != seen(whole, 2)


def test_two_checkpoints_are_kept_and_nothing_else_is_left(new, tmp_path):
    new("run", save_total_limit=2).trainer.train()
    run = tmp_path / "run"
    assert sorted(p.name for p in run.iterdir() if p.is_dir()) == [f"checkpoint-{STEPS - 1}", f"checkpoint-{STEPS}"]
    last = run / f"checkpoint-{STEPS}"
    files = {str(p.relative_to(last)) for p in last.rglob("*")}
    assert files >= {"manifest.json", "model.safetensors", "training/state.safetensors", "training/rank-0.safetensors"}
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pth", ".pkl"))], "no pickle"


def test_the_newest_whole_checkpoint_is_taken(new, tmp_path):
    whole = new("run")
    whole.trainer.train()
    (tmp_path / f"run/checkpoint-{STEPS}/training/state.safetensors").unlink()
    found, damages = checkpoints.newest(tmp_path / "run")
    assert found is not None and found.step == STEPS - 1
    assert damages == [f"{tmp_path}/run/checkpoint-{STEPS}: training/state.safetensors is missing"]
    rest = new("run")
    rest.trainer.train(resume_from_checkpoint=True)
    assert_same_end(rest, whole, STEPS - 1, "fallen back")
    assert checkpoints.verified(tmp_path / f"run/checkpoint-{STEPS}").step == STEPS, "written anew over the damaged one"


def test_a_damaged_checkpoint_and_none_are_refused(new, tmp_path):
    with pytest.raises(UserError, match="no whole checkpoint in"):
        new("run").trainer.train(resume_from_checkpoint=True)
    with pytest.raises(DamagedCheckpoint, match="no manifest.json"):
        new("run").trainer.train(resume_from_checkpoint=str(tmp_path))


def test_a_checkpoint_of_another_algorithm_or_size_is_refused(new, tmp_path):
    new("run", max_steps=1).trainer.train()
    path = tmp_path / "run/checkpoint-1"
    with pytest.raises(UserError, match="written by a run of GRPO, this one is of PPO"):
        new("ppo", ppo=PPOConfig()).trainer.train(resume_from_checkpoint=str(path))
    several = Checkpoint(path, 1, {"processes": 4, "trainer": "GRPO"})
    with pytest.raises(UserError, match="written by 4 processes, this run has 1; resume with num_processes: 4") as error:
        new("other").trainer.train(resume_from_checkpoint=several)
    assert error.value.agreed, "all processes find it: one says it"
    cut = Checkpoint(path, 1, {"processes": 1, "trainer": "GRPO", "sharded": True})
    with pytest.raises(UserError, match="each had a shard of every weight; resume with a machine file in shards"):
        new("other").trainer.train(resume_from_checkpoint=cut)


def test_forced_settings_hold_after_a_resume(new, tmp_path):
    """The learning rate and what the optimizer keeps in its groups; without force they are the checkpoint's."""
    new("run", max_steps=2).trainer.train()
    found = checkpoints.verified(tmp_path / "run/checkpoint-2")
    rates = {}
    for forced in (False, True):
        rest = new(f"forced-{forced}", max_steps=4, learning_rate=5e-4, lr_scheduler_type="constant", weight_decay=0.25)
        rest.trainer.train(resume_from_checkpoint=Checkpoint(found.path, 2, found.about, forced))
        rates[forced] = [row["learning_rate"] for row in rest.rows], rest.trainer.optimizer.param_groups[0]["weight_decay"]
    assert rates[True] == ([5e-4, 5e-4], 0.25)
    assert rates[False][0] != [5e-4, 5e-4] and rates[False][1] == 0.0


def test_a_full_disk_leaves_the_last_checkpoint(new, tmp_path, monkeypatch):
    run = new("run")
    save = state_file.write

    def full(path: Path, state: object) -> None:
        if "checkpoint-3" in str(path):
            raise OSError(28, "No space left on device", str(path))
        save(path, state)

    monkeypatch.setattr(state_file, "write", full)
    with pytest.raises(DiskError, match=r"checkpoint-3.*No space left on device.*free space, then resume"):
        run.trainer.train()
    found, damages = checkpoints.newest(tmp_path / "run")
    assert found is not None and found.step == 2 and not damages
    assert sorted(p.name for p in (tmp_path / "run").iterdir() if p.is_dir()) == ["checkpoint-1", "checkpoint-2"]


def test_a_disk_that_fills_while_training_goes_on_is_told(new, monkeypatch):
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "finish", full)
    with pytest.raises(DiskError, match="No space left on device"):
        new("run").trainer.train()


def test_a_checkpoint_is_written_by_time_too(new, tmp_path):
    run = new("run", save_strategy="no", max_steps=3)
    run.trainer.save_minutes = 0.0
    run.trainer.train()
    assert [step for step, _ in checkpoints.found(tmp_path / "run")] == [3, 2]


def test_a_best_model_is_kept_and_named_by_where_it_will_be(new, tmp_path):
    settings = SCHEDULES["evaluation between"] | {"eval_steps": 1, "load_best_model_at_end": True, "save_total_limit": 2}
    run = new("run", **settings, metric_for_best_model="reward", greater_is_better=True)
    run.trainer.train()
    best = run.trainer.state.best_model_checkpoint
    assert best == str(tmp_path / f"run/checkpoint-{run.trainer.state.best_global_step}")
    assert checkpoints.verified(Path(best)).step == run.trainer.state.best_global_step


@pytest.mark.parametrize("best", [True, False])
def test_a_finished_run_is_looked_at_with_the_weights_that_it_ended_with(best, new, tmp_path):
    """The first checkpoint is the best; without `load_best...` the last one counts."""
    settings = SCHEDULES["evaluation between"] | {"eval_steps": 1, "max_steps": 3, "reward_funcs": falling}
    settings |= {"load_best_model_at_end": best, "metric_for_best_model": "reward", "greater_is_better": True}
    run, again = (new("run", **settings) for _ in range(2))
    run.trainer.train()
    last = checkpoints.verified(tmp_path / "run/checkpoint-3")
    again.trainer.take_weights(last)
    assert run.trainer.state.best_global_step == 1 and again.trainer.state.global_step == 3
    assert_same_weights(weights(again), weights(run), "resumed")
    card = again.trainer.model_card()
    assert card == run.trainer.model_card() and "mismatched 0 of" in card and f"for {1 if best else 3} optimizer" in card
    (tmp_path / "run/checkpoint-1/model.safetensors").unlink()
    if best:
        with pytest.raises(DamagedCheckpoint, match="checkpoint-1: model.safetensors is missing"):
            again.trainer.take_weights(last)


# ---- the files


def test_a_state_comes_back_with_its_bits_and_types(tmp_path):
    view = torch.arange(6.0).view(2, 3)
    state = {
        "scalars": [None, True, 1, 2**70, 0.1, float("-inf"), "é\ud800"],
        "nan": float("nan"),
        "tuple": (1, (2, [3])),
        3: {"x": torch.tensor(1.5), "bf16": torch.full((2,), 1 / 3, dtype=torch.bfloat16)},
        "views": [view[:, 1], view, view],
        "empty": torch.zeros(0, 4),
        "bool": torch.tensor([True, False]),
        "numpy": np.random.RandomState(0).get_state(legacy=False),
        "python": random.Random(0).getstate(),
    }
    state_file.write(tmp_path / "a" / "x.safetensors", state)
    read = state_file.read(tmp_path / "a" / "x.safetensors")
    assert repr(read) == repr({**state}) and type(read["tuple"]) is tuple
    assert read[3]["bf16"].dtype == torch.bfloat16 and read["scalars"][4] == 0.1


def test_what_cannot_be_saved_is_named(tmp_path):
    with pytest.raises(UserError, match="checkpoint: optimizer/0/extra: set cannot be saved"):
        state_file.write(tmp_path / "x", {"optimizer": [{"extra": {1}}]})


def test_a_checkpoint_is_loaded_by_vllms_and_transformers_rules(new, tmp_path):
    """Weights are the only .safetensors beside config.json: vLLM loads all that it finds there."""
    new("run", max_steps=1).trainer.train()
    assert [p.name for p in (tmp_path / "run/checkpoint-1").glob("*.safetensors")] == ["model.safetensors"]


def test_a_half_written_checkpoint_is_never_seen(new, tmp_path):
    run = new("run", max_steps=2)
    run.trainer.train()
    shutil.copytree(tmp_path / "run/checkpoint-2", tmp_path / "run/.partial/checkpoint-3")
    assert [step for step, _ in checkpoints.found(tmp_path / "run")] == [2, 1]
    checkpoints.clean(tmp_path / "run")
    assert not (tmp_path / "run/.partial").exists()
