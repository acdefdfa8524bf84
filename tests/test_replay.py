"""`rlinvariant replay`: a recorded step comes back bit for bit, and what is not the same is seen.

The command itself, on a run that was resumed, and a run of two processes: tests/test_run.py.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlinvariant import replay
from rlinvariant.bits import digest
from rlinvariant.config import PPOConfig
from rlinvariant.errors import UserError
from rlinvariant.report import rollouts
from rlinvariant.rollout import Batch, Completion, Rollout
from rlinvariant.verification import certificate, load
from rlinvariant.verification.relation import Relation
from tests import commands
from tests.parity.harness import Run, assert_exact, new_trainer
from tests.trainer.tool_model import tool_trainer

SUBJECT = {"device": "cpu", "threads": 1, "packages": {}, "isa": None, "sources": ""}
ABOUT = {"invariance": "exact", "dtype": "bfloat16", "sampler": {}, "subject": SUBJECT}
SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 5}
DRAWN, ALONE, TRAINER, ULP = range(4)  # the order of what `relations` gives


@pytest.fixture(scope="module")
def record(arithmetic_dir, exact_engine) -> Callable[..., Path]:
    """Train and record into a directory, as `run` does, without the configuration's part."""

    def start(directory: Path, resume: str | None = None, make: Callable[..., Run] = new_trainer, **changes: Any) -> Path:
        def on_rollout(step: int, rollout: Rollout) -> None:
            at = arithmetic_dir if step == 1 else f"checkpoint-{step - 1}"
            rollouts.write(directory, step, rollout, ABOUT | {"weights": at})

        (directory / "config.json").write_text("{}")
        settings = SAVING | changes
        run = make(arithmetic_dir, exact_engine, directory / "checkpoints", on_rollout=on_rollout, **settings)
        run.trainer.train(resume_from_checkpoint=resume)
        if not changes.get("staleness"):
            assert_exact(run, 100)
        return directory

    return start


@pytest.fixture(scope="module")
def run(record, tmp_path_factory) -> Path:
    return record(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def replayed(exact_engine):
    """Return the relations of a recorded step; `change` is done first to what was recorded."""

    def again(run: Path, step: int, change: Callable[[Rollout], Rollout] = lambda r: r, exact: bool = True) -> list[Relation]:
        rollout, about, weights = replay.recorded(run, step)
        model = replay.load_model(weights, rollout, about, step) if exact else load.masters(weights)
        return list(replay.relations(change(rollout), model, exact_engine, "bfloat16", exact))

    return again


def assert_replayed(found: list[Relation], rollout: Rollout) -> None:
    tokens = sum(len(c.token_ids) for c in rollout.completions)
    assert [r.mismatched for r in found[:ULP]] == [0, 0, 0] and found[DRAWN].compared == found[TRAINER].compared == tokens > 100
    assert found[ULP].mismatched > 0, "the comparison is blind"
    assert replay.verdict(found, 3, "exact", False, 1.0)[0] == 0


@pytest.mark.parametrize("step", [1, 3])
def test_a_step_after_a_checkpoint_is_replayed_bit_for_bit(run, replayed, step):
    assert rollouts.steps(run) == [1, 3, 5]
    assert_replayed(replayed(run, step), rollouts.read(run, step)[0])


def test_a_run_of_ppo_is_replayed(record, replayed, tmp_path):
    record(tmp_path, ppo=PPOConfig(), max_steps=3)
    assert rollouts.steps(tmp_path) == [1, 3]
    assert_replayed(replayed(tmp_path, 3), rollouts.read(tmp_path, 3)[0])


def test_a_resumed_run_keeps_what_was_recorded_and_goes_on(run, record, replayed, tmp_path):
    def files() -> dict[int, bytes]:
        return {step: (tmp_path / f"rollouts/step-{step}.npz").read_bytes() for step in rollouts.steps(tmp_path)}

    record(tmp_path, max_steps=2)
    before = files()
    record(tmp_path, resume=str(tmp_path / "checkpoints/checkpoint-2"), max_steps=4)
    assert list(before) == [1] and files()[1] == before[1] and rollouts.steps(tmp_path) == [1, 3]
    resumed, straight = (rollouts.read(x, 3)[0] for x in (tmp_path, run))
    assert resumed.weights_sha256 != straight.weights_sha256  # another length has another schedule of learning rates
    assert_replayed(replayed(tmp_path, 3), resumed)


def test_every_rollout_of_a_step_is_recorded(record, replayed, tmp_path):
    record(tmp_path, gradient_accumulation_steps=2, steps_per_generation=1, per_device_train_batch_size=8, max_steps=3)
    rollout, _ = rollouts.read(tmp_path, 3)
    assert [len(batch.seeds) for batch in rollout.batches] == [8, 8] and len({*rollout.batches[0].seeds}) == 8
    assert not {*rollout.batches[0].seeds} & {*rollout.batches[1].seeds}
    assert_replayed(replayed(tmp_path, 3), rollout)


def test_weights_that_are_on_no_disk_are_not_recorded(record, tmp_path):
    record(tmp_path, staleness=1, max_steps=4)
    assert rollouts.steps(tmp_path) == [1]  # step 3 draws with the weights of before step 2


def with_completion(change: Callable[[Completion], Completion]) -> Callable[[Rollout], Rollout]:
    """Change the second completion of the first batch."""

    def changed(rollout: Rollout) -> Rollout:
        first, *rest = rollout.batches
        completions = [*first.completions]
        completions[1] = change(completions[1])
        return replace(rollout, batches=[replace(first, completions=completions), *rest])

    return changed


def next_float(x: float) -> float:
    return float(np.nextafter(np.float32(x), np.float32(-np.inf)))


def other_seed(rollout: Rollout) -> Rollout:
    first, *rest = rollout.batches
    return replace(rollout, batches=[replace(first, seeds=[first.seeds[0] + 1, *first.seeds[1:]]), *rest])


FAULTS: dict[str, tuple[Callable[[Rollout], Rollout], Callable[[int, int], bool]]] = {
    "a token": (
        with_completion(lambda c: Completion([(c.token_ids[0] + 1) % 99, *c.token_ids[1:]], c.sampler_logprobs)),
        lambda drawn, trainer: drawn > 0 and trainer > 0,
    ),
    "the last bit of a log-prob": (
        with_completion(lambda c: Completion(c.token_ids, [next_float(c.sampler_logprobs[0]), *c.sampler_logprobs[1:]])),
        lambda drawn, trainer: drawn == 1 == trainer,
    ),
    "a token less": (
        with_completion(lambda c: Completion(c.token_ids[:-1], c.sampler_logprobs[:-1])),
        lambda drawn, trainer: drawn == 1 and trainer == 0,
    ),
    "a seed": (other_seed, lambda drawn, trainer: drawn > 0 == trainer),
    "the temperature": (lambda r: replace(r, temperature=0.9), lambda drawn, trainer: drawn > 50 < trainer),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_not_the_same_is_seen(run, replayed, fault):
    change, seen = FAULTS[fault]
    found = replayed(run, 3, change)
    assert seen(found[DRAWN].mismatched, found[TRAINER].mismatched), found
    where = found[DRAWN].first
    assert where is not None and where.startswith("sequence 0" if fault in ("a seed", "the temperature") else "sequence 1")
    code, lines = replay.verdict(found, 3, "exact", False, 1.0)
    assert code == 1 and "NOT EXACT: step 3 was not replayed" in lines[-1]


def test_a_stock_trainer_is_seen_and_called_no_fault(run, replayed):
    found = replayed(run, 1, exact=False)
    assert found[DRAWN].mismatched == 0 == found[ALONE].mismatched and found[TRAINER].mismatched > 100
    code, lines = replay.verdict(found, 1, "sampler", False, 1.0)
    assert code == 1 and "invariance=sampler does not promise it" in lines[-1]


def test_a_blind_comparison_proves_nothing():
    held, control = Relation("trainer = recorded", compared=9), Relation("planted: an ulp", compared=9)
    code, lines = replay.verdict([held, control], 1, "exact", False, 1.0)
    assert code == 1 and "blind" in lines[-1]
    assert replay.verdict([], 1, "exact", False, 1.0)[0] == 1, "nothing was compared"


def test_moved_weights_are_refused(run, tmp_path):
    rollout, about, weights = replay.recorded(run, 3)
    model = load.masters(weights)
    assert digest(model.named_parameters()) == rollout.weights_sha256
    with torch.no_grad():
        next(model.parameters()).view(-1).view(torch.int32)[77] += 1
    model.save_pretrained(tmp_path / "moved")
    with pytest.raises(UserError, match="has other weights .* than the step began with .*--weights DIR names a copy"):
        replay.load_model(str(tmp_path / "moved"), rollout, about, 3)


def test_a_digest_is_of_names_dtypes_shapes_and_bytes():
    x = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    same = [("b", torch.zeros(0)), ("a", x.t().contiguous().t())]  # other order, other strides
    assert digest(same) == digest([("a", x), ("b", torch.zeros(0))])
    others = [("c", x), ("a", x.reshape(3, 2)), ("a", x.int()), ("a", -x), ("a", x.view(torch.int32))]
    assert len({digest([y]) for y in [("a", x), *others]}) == 6


def test_a_rollout_comes_back_as_it_was(tmp_path):
    batches = [
        Batch([[1, 2], [3]], [2**63 - 1, 0], [Completion([5], [next_float(-1.0)]), Completion([], [])], [2, 1]),
        Batch([[7]], [9], [Completion([6, 7], [-0.0, next_float(0.0)])], [2]),
    ]
    written = Rollout(batches, 0.7, 2, [2, 0], "ab")
    rollouts.write(tmp_path, 12, written, {"weights": "é"})
    read, about = rollouts.read(tmp_path, 12)
    assert read == written and about == {"weights": "é"} and str(read.batches[1].completions[0].sampler_logprobs[0]) == "-0.0"
    assert rollouts.steps(tmp_path) == [12]


def test_a_rollout_of_an_earlier_version_has_one_limit_for_all(tmp_path):
    file = rollouts.write(tmp_path, 12, Rollout([Batch([[1]], [5], [Completion([5], [-1.0])], [3])], 0.7, 2, [2, 0], "ab"), {})
    with np.load(file) as found:
        arrays = {name: found[name] for name in found.files if name != "max_tokens"}
    np.savez_compressed(file, **arrays)
    assert rollouts.read(tmp_path, 12)[0].requests == [([1], 5, 2)]


def test_turns_are_recorded_and_drawn_again(record, replayed, tmp_path):
    record(tmp_path, make=tool_trainer, max_steps=2)
    rollout, _ = rollouts.read(tmp_path, 1)
    assert len(rollout.batches) >= 3, "a batch for each turn"
    assert len({most for _, _, most in rollout.requests}) > 4
    assert_replayed(replayed(tmp_path, 1), rollout)


def damaged(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def damage(run: Path) -> None:
        file = run / "rollouts/step-3.npz"
        file.write_bytes(change(file.read_bytes()))

    return damage


def flipped(content: bytes) -> bytes:
    """Flip one bit in the middle of the second array's packed bytes."""
    at = content.index(b"prompt_lengths.npy") + 60
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def no_checkpoint(run: Path) -> None:
    (run / "checkpoints/checkpoint-2").rename(run / "away")


def no_model(run: Path) -> None:
    """Let step 1 have begun with a directory that is not there any more."""
    rollout, about = rollouts.read(run, 1)
    rollouts.write(run, 1, rollout, about | {"weights": str(run / "away")})


def nothing_whole(run: Path) -> None:
    no_model(run)
    (run / "checkpoints").rename(run / "gone")
    damaged(flipped)(run)


def no_rollouts(run: Path) -> None:
    (run / "rollouts").rename(run / "away")


def of_another_version(run: Path) -> None:
    with np.load(run / "rollouts/step-3.npz") as file:
        arrays = {name: file[name] for name in file.files}
    about = json.loads(str(arrays["about"])) | {"schema": 99}
    np.savez(run / "rollouts/step-3.npz", **arrays | {"about": np.asarray(json.dumps(about))})


MISTAKES: dict[str, tuple[Callable[[Path], None] | None, list[str], list[str]]] = {
    "no run": (None, ["nix", "--step", "3"], ["nix: no such run; expected a directory under", "or its name"]),
    "no step": (None, ["RUN"], ["--step: missing; 1, 3, 5 can be replayed"]),
    "no step, and no weights of one": (
        no_checkpoint,
        ["RUN"],
        ["missing; 1, 5 can be replayed, and not 3, whose weights are gone"],
    ),
    "no step, and no model": (no_model, ["RUN"], ["missing; 3, 5 can be replayed, and not 1, whose weights are gone"]),
    "no step, and a damaged one": (
        damaged(flipped),
        ["RUN"],
        ["missing; 1, 5 can be replayed, and not 3, which cannot be read"],
    ),
    "no step of which all is there": (
        nothing_whole,
        ["RUN"],
        ["none can be replayed, and not 1, 5, whose weights are", "not 3, which"],
    ),
    "not recorded": (None, ["RUN", "--step", "4"], ["step 4 was not recorded; 1, 3, 5 can be replayed"]),
    "not recorded, and no weights": (
        no_checkpoint,
        ["RUN", "--step", "4"],
        ["step 4 was not recorded; 1, 5 can", "not 3, whose"],
    ),
    "no number": (None, ["RUN", "--step", "x"], ["argument --step: x: expected a whole number of at least 1", "replay --help"]),
    "no weights": (no_checkpoint, ["RUN", "--step", "3"], ["weights are gone", "another step: 1, 5 can", "--weights DIR"]),
    "no weights, and no model": (
        nothing_whole,
        ["RUN", "--step", "5"],
        ["weights are gone", "another step: none can", "1, whose"],
    ),
    "weights of an empty variable": (None, ["RUN", "--step", "3", "--weights", ""], ["--weights: empty"]),
    "weights elsewhere": (None, ["RUN", "--step", "3", "--weights", "nix"], ["--weights nix: no such directory"]),
    "cut": (damaged(lambda x: x[:3000]), ["RUN", "--step", "3"], ["step-3.npz: damaged", "another step: 1, 5 can"]),
    "a bit": (damaged(flipped), ["RUN", "--step", "3"], ["step-3.npz: damaged", "another step: 1, 5 can"]),
    "empty": (damaged(lambda x: b""), ["RUN", "--step", "3"], ["step-3.npz: damaged"]),
    "another version": (of_another_version, ["RUN", "--step", "3"], ["expected schema 1, found 99"]),
    "no rollouts": (no_rollouts, ["RUN", "--step", "3"], ["no rollout is recorded"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gives_one_line(run, tmp_path, mistake):
    prepare, arguments, expected = MISTAKES[mistake]
    copy = tmp_path / "copy"
    (copy / "rollouts").mkdir(parents=True)
    (copy / "config.json").write_text("{}")
    for file in (run / "rollouts").iterdir():
        (copy / "rollouts" / file.name).write_bytes(file.read_bytes())
    for step in (2, 4):
        (copy / f"checkpoints/checkpoint-{step}").mkdir(parents=True)
    if prepare is not None:
        prepare(copy)
    with pytest.raises(UserError) as found:
        commands.run("replay", *(str(copy) if argument == "RUN" else argument for argument in arguments))
    assert "\n" not in str(found.value)
    for words in expected:
        assert words in str(found.value)


def test_a_run_is_found_by_its_name(tmp_path, monkeypatch):
    (tmp_path / "runs/first").mkdir(parents=True)
    (tmp_path / "runs/first/config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^runs/first: no rollout is recorded"):
        commands.run("replay", "first", "--step", "1")


def test_another_machine_is_named():
    then = {"device": "a", "threads": 2, "isa": {"amx_tile": True}, "packages": {"torch": "2.13"}, "sources": "1"}
    assert certificate.differences(then, then) == []
    now = {"device": "b", "threads": 2, "isa": {"amx_tile": False}, "packages": {"torch": "2.14", "vllm": "1"}, "sources": "2"}
    said = "; ".join(certificate.differences(then, now))
    for words in ("device a -> b", "torch 2.13 -> 2.14", "vllm None -> 1", "instructions", "own sources"):
        assert words in said


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sampler", {"options": {"trust_remote_code": True}}),
        ("sampler", {"options": {"worker_cls": "os.system"}}),
        ("sampler", {"options": {"max_num_seqs": "9"}}),
        ("sampler", {"options": []}),
        ("sampler", {"model": "x"}),
        ("sampler", None),
        ("invariance", "none"),
        ("invariance", []),
        ("dtype", "float16"),
        ("dtype", {}),
        ("weights", 3),
        ("weights", ""),
        ("weights", "--x"),
        ("subject", None),
        ("subject", {"threads": 1}),
        ("subject", SUBJECT | {"packages": 3}),
        ("subject", SUBJECT | {"attention": "fast"}),
        ("subject", SUBJECT | {"attention": []}),
    ],
)
def test_a_recording_that_no_run_writes_is_refused(field, value, tmp_path):
    """Data from elsewhere: an option of vLLM may name code. Control: what a run writes is taken."""
    rollout = Rollout([Batch([[1]], [7], [Completion([2], [-0.5])])], 1.0, 8, [0], "0" * 64)
    (tmp_path / "config.json").write_text("{}")
    rollouts.write(tmp_path, 1, rollout, ABOUT | {"weights": "org/name", field: value})
    with pytest.raises(UserError, match=f"the recording of step 1 has {field}=.*; replay another step"):
        replay.recorded(tmp_path, 1)
    options = {"max_num_seqs": 4, "enable_prefix_caching": True, "enforce_eager": False, "max_num_batched_tokens": 64}
    sampler = {"max_model_len": 64, "kv_cache_gib": 0.5, "options": options}
    rollouts.write(tmp_path, 1, rollout, ABOUT | {"weights": "org/name", "sampler": sampler})
    assert replay.recorded(tmp_path, 1)[2] == "org/name"
