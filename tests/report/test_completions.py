"""The files of completions: whole, bounded, cut back, and read by what others read parquet with."""

import json
import math
import shutil
from contextlib import suppress

import numpy as np
import pytest

from rlinvariant.errors import UserError
from rlinvariant.report import completions
from rlinvariant.report.rundir import RunDir
from tests.report.damages import HOSTILE, on_the_file
from tests.report.said import said


@pytest.fixture
def run(tmp_path):
    """A run of five steps, of which the fourth used the third's rollout again."""
    directory = RunDir.create(tmp_path / "run", {})
    for step in (1, 2, 3, 5):
        completions.write(directory.path, said(step, mismatched=step == 5))
    return directory.path


def plain(row: dict) -> dict:
    """A row as JSON has it, to be compared."""
    return json.loads(json.dumps(row, default=lambda x: x.tolist()))


def test_what_is_written_is_read(run):
    found = dict(completions.Completions(run))
    assert list(found) == [1, 2, 3, 5]
    for step, rows in found.items():
        for row, expected in zip(rows, said(step, mismatched=step == 5), strict=True):
            assert plain(row) == plain(expected)  # an fp32 number is the same in a file, as float64 and in JSON
    assert [row["trainer_logprobs"] is not None for row in found[5]] == [True] + [False] * 7


def test_pandas_and_datasets_read_the_files_as_they_are(run, tmp_path):
    import datasets
    import pandas

    wanted = {"step", "prompt_id", "sample_id", "prompt", "completion", "token_ids", "rewards/exact", "rewards/format"}
    wanted |= {"reward", "advantage", "length", "truncated", "sampler_logprobs", "trainer_logprobs", "mismatched_tokens"}
    frame = pandas.read_parquet(run / "completions")
    assert wanted <= set(frame.columns) and len(frame) == 32 and frame.mismatched_tokens.sum() == 1
    assert frame.groupby("step").reward.mean().tolist() == [0.375] * 4
    files = str(run / "completions" / "*.parquet")
    loaded = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert wanted <= set(loaded.column_names) and loaded["completion"] == frame.completion.tolist()
    assert loaded.filter(lambda row: row["trainer_logprobs"] is not None)["step"] == [5]


def test_texts_that_utf_8_cannot_hold_and_hostile_ones_are_kept(tmp_path):
    completions.write(RunDir.create(tmp_path / "run", {}).path, said(1, completion=HOSTILE + "\x00", prompt=""))
    ((_, rows),) = completions.Completions(tmp_path / "run")
    assert rows[0]["completion"] == HOSTILE.replace("\ud800", r"\ud800") + "\x00" and rows[0]["prompt"] == ""


def test_a_reward_that_does_not_apply_is_none_and_infinity_is_kept(tmp_path):
    rows = said(1, reward=None, advantage=math.inf)
    completions.write(RunDir.create(tmp_path / "run", {}).path, rows)
    ((_, found),) = completions.Completions(tmp_path / "run")
    assert found[0]["reward"] is None and found[0]["rewards"]["format"] is None and found[0]["advantage"] == math.inf


@pytest.mark.parametrize("limit", [None, 10, 5])
def test_older_steps_are_thinned_out_and_named(tmp_path, limit):
    """The first and the last stay, gaps grow with age; None, the control, keeps all."""
    path = RunDir.create(tmp_path / "run", {}).path
    size = completions.write(path, said(1)).stat().st_size
    room = None if limit is None else (limit + 0.9) * 1.1 * size / completions.GIB
    for step in range(1, 41):
        completions.write(path, said(step), room)
    kept, gone = list(completions.files(path)), completions.dropped(path)
    assert sorted([*kept, *gone]) == list(range(1, 41)) and kept[0] == 1 and kept[-1] == 40
    assert bool(gone) == (limit is not None)
    if limit is not None:
        total = sum(file.stat().st_size for file in completions.files(path).values())
        assert total <= room * completions.GIB and len(kept) >= limit  # type: ignore[operator]
        gaps = np.diff(kept)
        assert gaps[0] > gaps[-1] and gaps[-1] <= 2


def test_one_step_is_kept_whatever_the_limit(tmp_path):
    path = RunDir.create(tmp_path / "run", {}).path
    for step in (1, 2, 3):
        completions.write(path, said(step), 1e-12)
    assert list(completions.files(path)) == [1, 3] and completions.dropped(path) == [2]


@pytest.mark.parametrize("after", [0, 2, 5])
def test_files_are_cut_back_to_the_checkpoint(run, after):
    completions.forget(run, after)
    assert list(completions.files(run)) == [step for step in (1, 2, 3, 5) if step <= after]
    aside = run / "completions.1"
    assert aside.is_dir() == (after == 0), "what no checkpoint builds on is set aside"
    assert after or len(list(aside.iterdir())) == 4


def test_what_was_dropped_of_steps_that_come_again_is_forgotten(tmp_path):
    path = RunDir.create(tmp_path / "run", {}).path
    for step in range(1, 8):
        completions.write(path, said(step), 1e-12)
    completions.forget(path, 4)
    assert completions.dropped(path) == [2, 3, 4]


def test_shown_samples_are_of_different_prompts_best_worst_and_median():
    rows = said(1, groups=4)
    rows[5]["reward"], rows[9]["reward"] = 9.0, -9.0
    best, worst, median = completions.telling(rows)
    assert (best["reward"], worst["reward"]) == (9.0, -9.0) and median["reward"] in (0.25, 0.5)
    assert len({row["group"] for row in (best, worst, median)}) == 3
    assert len({row["group"] for row in rows[:3]}) == 1, "control: the first three, as before, are of one prompt"
    one = completions.telling(said(1, groups=1))
    assert [row["reward"] for row in one] == [0.75, 0.0, 0.25] and completions.telling([]) == []
    assert completions.telling(said(1, reward=None)) == []


def test_a_run_of_an_earlier_version_is_read(tmp_path):
    path = RunDir.create(tmp_path / "run", {}).path
    line = {"prompt": "1+1=", "completion": "2", "reward": 1.0, "rewards": {"exact": 1.0}}
    (path / "samples.jsonl").write_text("".join(json.dumps({"step": step, **line}) + "\n" for step in (1, 1, 10)))
    found = dict(completions.Completions(path))
    assert [(step, len(rows)) for step, rows in found.items()] == [(1, 2), (10, 1)]
    assert found[1][1] == {"step": 1, **line, "sample_id": 1}
    completions.write(path, said(10))  # it was resumed by this version
    assert [(step, len(rows)) for step, rows in completions.Completions(path)] == [(1, 2), (10, 8)]


@pytest.mark.parametrize("every", [97, pytest.param(1, marks=pytest.mark.slow)])
def test_a_damaged_file_is_read_or_one_line(every, run, tmp_path):
    """A byte of the file in turn, and every damage to it as a whole. Without checksums, the control, more is taken for true."""
    import pyarrow.parquet

    file = completions.files(run)[1]
    good, expected = file.read_bytes(), completions.read(file)
    table = pyarrow.parquet.read_table(file)
    seen = wrong = wrong_without = 0
    for at in range(0, len(good), every):
        file.write_bytes(good[:at] + bytes([good[at] ^ (1 << at % 8)]) + good[at + 1 :])
        try:
            wrong += completions.read(file) != expected
        except UserError as error:
            seen += 1
            assert str(file) in str(error) and "\n" not in str(error)
        with suppress(Exception):
            wrong_without += pyarrow.parquet.read_table(file) != table
    assert seen > len(good) / every / 3 and wrong < wrong_without, (seen, wrong, wrong_without)
    file.write_bytes(good)
    for name, damage in on_the_file(file):
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(run, tmp_path / "copy", symlinks=True)
        damage()
        try:
            assert completions.read(file) == expected, name  # twice: the second copy is complete
        except UserError as error:
            assert "step-000001" in str(error) and "\n" not in str(error)
        shutil.rmtree(run)
        shutil.copytree(tmp_path / "copy", run, symlinks=True)
        assert completions.read(file) == expected, name
