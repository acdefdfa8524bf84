import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rlinvariant.errors import DISK_FULL, DiskError, UserError
from rlinvariant.machine import environment
from rlinvariant.report import html, study
from rlinvariant.report.rundir import RunDir, _append_lines, read_metrics
from tests.report.pages import text_of
from tests.report.runs import write_run

WRITER = """
import sys
from rlinvariant.report.rundir import RunDir
run = RunDir(sys.argv[1])
step = 0
while True:
    step += 1
    run.append_metrics({"step": step, "onpolicy/kl_k3": float("nan"), "note": "x" * 20_000})
    print(step, flush=True)  # only after the row is said to be on the disk
"""


def steps_of(run: RunDir) -> list[int]:
    return [row["step"] for row in read_metrics(run.path)]


def test_rows_come_back_as_they_were(tmp_path):
    run = RunDir.create(tmp_path / "runs" / "a", {"seed": 1})
    run.append_metrics(
        {
            "step": 1,
            "int": 312_004,
            "nan": math.nan,
            "inf": math.inf,
            "minus_inf": -math.inf,
            "numpy": np.float32(0.1),
            "torch": torch.tensor(3),
            "list": [np.int64(1), math.inf],
            "text": "é\u2028\ud800",
        }
    )
    text = run.metrics.read_text()
    assert text.count("\n") == 1 and text.isascii()

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    strict = json.loads(text, parse_constant=refuse)
    assert (strict["nan"], strict["inf"], strict["minus_inf"]) == ("NaN", "Infinity", "-Infinity")
    (row,) = read_metrics(run.metrics)
    assert math.isnan(row["nan"]) and row["inf"] == math.inf and row["minus_inf"] == -math.inf
    assert row["numpy"] == float(np.float32(0.1)) and row["torch"] == 3 and row["text"] == "é\u2028\ud800"
    assert type(row["int"]) is int and row["int"] == 312_004


def test_a_killed_run_keeps_every_row_it_appended(tmp_path):
    run = RunDir.create(tmp_path / "run", {})
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(run.path)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    for line in writer.stdout:
        if int(line) == 5:
            break
    time.sleep(0.05)  # into the midst of some later row
    writer.send_signal(signal.SIGKILL)
    said = [int(line) for line in writer.stdout.read().split()]
    assert writer.wait() == -signal.SIGKILL
    steps = steps_of(run)
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) >= max([5, *said])


def test_a_row_is_synced_to_the_disk_after_it_is_written(tmp_path, monkeypatch):
    run = RunDir.create(tmp_path / "run", {})
    synced: list[bytes] = []  # what the file held at each fsync; a killed process cannot show that one is missing
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(run.metrics.read_bytes()))
    run.append_metrics({"step": 1})
    assert synced == [b'{"step": 1}\n']


@pytest.mark.parametrize("torn", [b"{", b'{"step": 3, "x"', b'{"step": 3}', b"\xff\x00"])
def test_a_torn_last_line_is_left_out_and_cut_on_resume(tmp_path, torn):
    run = RunDir.create(tmp_path / "run", {})
    for step in (1, 2):
        run.append_metrics({"step": step})
    whole = run.metrics.read_bytes()
    run.metrics.write_bytes(whole + torn)
    assert steps_of(run) == [1, 2]
    resumed = RunDir.create(run.path, {}, resume=True)
    assert run.metrics.read_bytes() == whole
    resumed.append_metrics({"step": 3})
    assert steps_of(run) == [1, 2, 3]


def test_a_bad_line_elsewhere_is_an_error_that_names_it(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for line, message in (
        ('{"step": 2', "not a line of JSON"),
        ("[2]", 'expected a JSON object with an integer "step"'),
        ('{"a": 2}', "expected a JSON object"),
        ('{"step": true}', "expected a JSON object"),
    ):
        path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
        with pytest.raises(UserError, match=rf"metrics\.jsonl:2: {message}"):
            read_metrics(path)


def test_a_resumed_run_replaces_the_steps_it_went_back_over(tmp_path):
    run = RunDir.create(tmp_path / "run", {})
    for step in (1, 2, 3, 4, 5):
        run.append_metrics({"step": step, "try": 1})
    run = RunDir.create(run.path, {}, resume=True)  # from a checkpoint of step 2
    for step in (3, 4):  # and killed before step 5: the old step 5 is not of this trajectory
        run.append_metrics({"step": step, "try": 2})
    assert [(row["step"], row["try"]) for row in read_metrics(run.path)] == [(1, 1), (2, 1), (3, 2), (4, 2)]


def test_a_run_is_not_overwritten(tmp_path):
    run = RunDir.create(tmp_path / "run", {"seed": 1})
    run.append_metrics({"step": 1})
    before = {path.name: path.read_bytes() for path in run.path.iterdir()}
    with pytest.raises(UserError) as caught:
        RunDir.create(run.path, {"seed": 2})
    assert str(caught.value) == f"run: {run.path} already holds a run; choose another run=NAME, or set resume=true"
    assert {path.name: path.read_bytes() for path in run.path.iterdir()} == before


def test_a_run_that_was_killed_before_its_config_was_written_starts(tmp_path):
    (tmp_path / "run").mkdir()
    run = RunDir.create(tmp_path / "run", {"seed": 1}, resume=True)
    assert json.loads(run.config.read_text()) == {"seed": 1} and not list(run.path.glob("config.*.json"))


@pytest.mark.parametrize(("kept", "steps"), [(2, [1, 2]), (0, []), (3, [1, 2, 3])])
def test_logs_are_cut_back_to_what_a_checkpoint_builds_on(tmp_path, kept, steps):
    run = RunDir.create(tmp_path / "run", {})
    sizes = [0]
    for step in (1, 2, 3):
        run.append_metrics({"step": step})
        _append_lines(run.samples, [{"step": step}])
        sizes.append(run.metrics.stat().st_size)
    RunDir.create(run.path, {}, resume=True, logs={"metrics.jsonl": sizes[kept]})
    assert [row["step"] for row in read_metrics(run.path)] == steps
    assert run.samples.read_bytes() == b"", "a file that is not named is cut to nothing"
    whole = [{"step": 1}, {"step": 2}, {"step": 3}]
    assert read_metrics(run.path / "samples.1.jsonl") == whole, "and nothing is lost"
    assert kept or read_metrics(run.path / "metrics.1.jsonl") == whole


def test_a_path_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^run: .*file/run cannot be written \(Not a directory\); choose another run=NAME"):
        RunDir.create(tmp_path / "file" / "run", {})


def test_a_full_disk_is_no_misuse(tmp_path):
    """Every write of config.json goes to a device that is always full."""
    (tmp_path / "config.json.partial").symlink_to("/dev/full")
    with pytest.raises(DiskError, match=r"^run: .* cannot be written \(No space left on device\)") as error:
        RunDir.create(tmp_path, {})
    assert error.value.exit_code == DISK_FULL


def test_an_empty_directory_is_free(tmp_path):
    assert json.loads(RunDir.create(tmp_path, {"model": Path("a/b")}).config.read_text()) == {"model": "a/b"}


def test_a_config_that_changed_on_resume_is_kept(tmp_path):
    for seed, resume in ((1, False), (1, True), (2, True), (3, True)):
        RunDir.create(tmp_path / "run", {"seed": seed}, resume=resume)
    configs = {path.name: json.loads(path.read_text())["seed"] for path in (tmp_path / "run").glob("config*")}
    assert configs == {"config.1.json": 1, "config.2.json": 2, "config.json": 3}


def test_a_run_that_is_continued_is_no_longer_finished(tmp_path):
    run = RunDir.create(tmp_path / "run", {})
    for number in (1, 2):
        run.write_result({"finished": True, "heldout_reward_before": None, "heldout_reward_after": number / 2, "seconds": 3.5})
        assert json.loads(run.result.read_text())["heldout_reward_after"] == number / 2
        RunDir.create(run.path, {}, resume=True)
        assert not run.result.exists()
    assert [json.loads((run.path / f"result.{n}.json").read_text())["heldout_reward_after"] for n in (1, 2)] == [0.5, 1.0]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    run = RunDir.create(tmp_path / "run", {})
    run.write_environment({"kernels": "first"})

    def no_space(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space"):
        run.write_environment({"kernels": "second"})
    assert json.loads(run.environment.read_text())["kernels"] == "first"


def test_rows_without_a_step_and_values_without_a_form_are_refused(tmp_path):
    run = RunDir.create(tmp_path / "run", {})
    for row in ({}, {"step": 1.0}, {"step": True}):
        with pytest.raises(ValueError, match='needs an integer "step"'):
            run.append_metrics(row)
    with pytest.raises(TypeError, match="object has no JSON form"):
        run.append_metrics({"step": 1, "x": object()})
    assert run.metrics.read_bytes() == b""


@pytest.mark.gpu
def test_a_run_knows_its_gpu():
    known = environment()["gpu"]
    assert (known["name"], known["count"]) == (torch.cuda.get_device_name(), torch.cuda.device_count())


def test_a_run_without_a_gpu_has_none_and_the_page_names_one(tmp_path, monkeypatch):
    """A GPU is described here as torch describes one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "gpu" not in environment()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    about = SimpleNamespace(name="NVIDIA H200", total_memory=int(139.8 * 2**30), multi_processor_count=132, major=9, minor=0)
    for name, value in {"current_device": 0, "device_count": 2, "get_device_properties": about}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    run = write_run(tmp_path / "run", 0, steps=1, **environment())
    assert "NVIDIA H200, 139.8 GiB, compute 9.0, CUDA" in text_of(html.page(study.load(run.path)))


def test_environment_says_where_it_ran_and_imports_nothing_for_it(tmp_path):
    run = RunDir.create(tmp_path / "run", {})
    run.write_environment({"kernels": {"linear": "tiles"}, "threads": 3})
    written = json.loads(run.environment.read_text())
    assert written["kernels"] == {"linear": "tiles"} and written["threads"] == 3
    assert written["packages"]["torch"] == torch.__version__
    assert set(written["cpu"]["isa"]) >= {"avx512_bf16", "amx_bf16"} and written["cpu"]["model"]
    assert environment()["threads"]["torch"] == torch.get_num_threads()
    code = (
        "import sys, rlinvariant.machine as m; m.environment(); "
        "print([m for m in ('vllm', 'trl', 'transformers', 'accelerate', 'wandb') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
