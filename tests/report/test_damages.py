"""A damaged directory gives a page that says what is missing, or one line that names the file: never a traceback."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rlinvariant import cli, reading
from rlinvariant.ablate import plan
from rlinvariant.ablate.arms import setting
from rlinvariant.ablate.plan import extended
from rlinvariant.errors import UserError
from rlinvariant.report import rollouts
from rlinvariant.report.rundir import RunDir, _append_lines
from rlinvariant.rollout import Batch, Completion, Rollout
from tests.report.damages import in_the_values, on_the_file
from tests.report.runs import write_ablation, write_run

EVERY = pytest.mark.parametrize("every", [14, pytest.param(1, marks=pytest.mark.slow)])
"""One of how many damages is tried: `make test-slow` tries all."""
CONFIG = [(key, "value") for key in ("recipe", "seed", "steps", "run", "wandb.project", "algorithm")]
CONFIG += [("seed",), ("run", "source")]
ENVIRONMENT = [(key,) for key in ("schema", "python", "platform", "cpu", "packages", "git", "threads", "kernels")]
ENVIRONMENT += [("cpu", "model"), ("cpu", "isa"), ("packages", "torch"), ("git", "commit"), ("kernels", "linear")]
RESULT = [
    ("finished",),
    ("outcome",),
    ("error",),
    ("heldout_reward_before",),
    ("heldout_reward_after",),
    ("heldout_is_accuracy",),
    ("seconds",),
]
METRICS = [("step",), ("reward",), ("onpolicy/mismatched_tokens",), ("onpolicy/compared_tokens",), ("onpolicy/kl_k3",)]
SAMPLES = [("step",), ("prompt",), ("completion",), ("reward",)]
VALUES = {"config.json": CONFIG, "environment.json": ENVIRONMENT, "result.json": RESULT, "metrics.jsonl": METRICS}
VALUES["samples.jsonl"] = SAMPLES
ABLATION = [(key,) for key in ("schema", "command", "recipe", "steps", "seeds", "arms")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A finished run of two steps, with a recorded rollout."""
    run = write_run(tmp_path_factory.mktemp("runs") / "whole", 0, steps=3)
    _append_lines(run.samples, [{"step": step, "prompt": "2+2=", "completion": "4", "reward": 0.0} for step in (2, 3)])
    known = {"heldout_reward_before": 0.5, "heldout_reward_after": 0.9, "heldout_is_accuracy": True}
    run.write_result({"finished": True, "outcome": "finished", "error": None, **known, "seconds": 1})
    config = json.loads(run.config.read_text()) | {"algorithm": {"value": "grpo", "source": "default"}}
    run.config.write_text(json.dumps(config))
    rollouts.write(run.path, 1, rollout(), about())
    return run.path


def rollout() -> Rollout:
    batch = Batch([[1, 2], [3]], [7, 8], [Completion([4, 5], [-0.5, -1.5]), Completion([6], [-2.0])])
    return Rollout([batch], 1.0, 8, [0], "0" * 64)


def about() -> dict:
    options = {"max_num_seqs": 4, "enable_prefix_caching": True}
    subject = {"device": "cpu", "threads": 1, "packages": {}, "isa": {}, "sources": ""}
    sampler = {"max_model_len": None, "kv_cache_gib": None, "options": options}
    return {"weights": "checkpoint-0", "invariance": "exact", "dtype": "bfloat16", "sampler": sampler, "subject": subject}


def judge(arguments: list[str], path: Path, capsys) -> str:
    """Run a command; return what is wrong with how it ends, or "" where it gave a page, or one clean line that names a file."""
    page = path / "report.html"
    page.unlink(missing_ok=True)
    try:
        code = cli.main(arguments)
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    out, err = capsys.readouterr()
    if bad := {c for c in out + err if not c.isprintable() and c != "\n"}:
        return f"control characters: {bad}"
    if code == 0:
        text = page.read_text() if page.exists() else "no page"
        hostile = re.search(r"<script>\\?\x1b|\u202e|\x1b", text)
        return "" if text.endswith("</html>\n") and not hostile and not err else f"exit 0, {text[-60:]!r}, {err!r}"
    named = err.startswith("error: ") and str(path) in err and err.count("\n") == 1 and len(err) < 600
    return "" if code == 2 and named else f"exit {code}: {err[:600]}"


def damaged(
    whole: Path, place: Path, damages: Callable[[Path], Iterator], file: str, command: list[str], capsys, every: int = 1
) -> list[str]:
    """Try each damage, or one of `every` so many, on a copy; return those after which the command does not end as it should."""
    found = []
    for number, (name, damage) in enumerate(damages(place / file)):
        if number % every:
            continue
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(whole, place, symlinks=True)
        damage()
        if wrong := judge([*command, str(place)], place, capsys):
            found.append(f"{file}, {name}: {wrong}")
    return found


@pytest.mark.parametrize("file", VALUES)
@EVERY
def test_report_of_a_damaged_run_is_a_page_or_one_line(every, file, whole, tmp_path, capsys):
    found = damaged(whole, tmp_path / "run", on_the_file, file, ["report"], capsys)
    found += damaged(whole, tmp_path / "run", lambda path: in_the_values(path, VALUES[file]), file, ["report"], capsys, every)
    assert not found, "\n".join(found)


def test_a_page_of_a_damaged_run_says_what_is_missing(whole, tmp_path, capsys):
    for file, said in (
        ("environment.json", "environment.json is missing or empty"),
        ("result.json", "has not ended by itself"),
        ("metrics.jsonl", "has no step"),
    ):
        shutil.copytree(whole, tmp_path / file)
        (tmp_path / file / file).unlink()
        assert cli.main(["report", str(tmp_path / file)]) == 0
        assert f"note: this run: {said}" in (out := capsys.readouterr().out) or f"note: this run {said}" in out
    run = RunDir(shutil.copytree(whole, tmp_path / "gap"))
    first, _, last = run.metrics.read_bytes().splitlines(keepends=True)
    run.metrics.write_bytes(first + last)
    assert cli.main(["report", str(run.path)]) == 0
    assert "note: this run: metrics.jsonl has no row of step 2" in capsys.readouterr().out


def test_a_report_without_the_reader_ends_in_a_traceback(whole, tmp_path, capsys, monkeypatch):
    """Control: with json.loads in place of our reader, the same damages are seen to fail."""
    monkeypatch.setattr(reading, "parse", json.loads)
    found = damaged(whole, tmp_path / "run", on_the_file, "config.json", ["report"], capsys)
    assert any("RecursionError" in line for line in found)


@pytest.fixture(scope="module")
def ablation(tmp_path_factory) -> Path:
    arms = {"exact": setting("exact"), "drift": setting("off")}
    return write_ablation(tmp_path_factory.mktemp("runs") / "ablation-a", seeds=[0, 1], arms=arms, steps=2)


@EVERY
def test_report_of_a_damaged_ablation_is_a_page_or_one_line(every, ablation, tmp_path, capsys):
    place = tmp_path / "ablation-a"
    found = damaged(ablation, place, on_the_file, "ablation.json", ["report"], capsys, every)
    found += damaged(ablation, place, lambda path: in_the_values(path, ABLATION), "ablation.json", ["report"], capsys, every)
    for file in VALUES.keys() - {"samples.jsonl"}:
        found += damaged(ablation, place, on_the_file, f"drift/seed-1/{file}", ["report"], capsys, every)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("file", ["metrics.jsonl", "samples.jsonl"])
def test_a_resumed_run_repairs_its_logs_or_names_the_line_and_changes_nothing(file, whole, tmp_path):
    """Whatever is done to a log, a resume leaves whole lines alone, or refuses before anything of the run is changed."""
    refused = repaired = 0
    for name, damage in on_the_file(tmp_path / "run" / file):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(whole, tmp_path / "run")
        damage()
        run = RunDir(tmp_path / "run")
        config = json.loads(run.config.read_text())
        before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
        try:
            RunDir.create(run.path, config, resume=True)
        except UserError as error:
            refused += 1
            assert re.search(rf"{file}(:\d+)?: ", str(error)) or "cannot be written" in str(error), f"{name}: {error}"
            assert "\n" not in str(error)
            assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before, name
        else:
            repaired += 1
            if not (run.path / file).exists():  # samples.jsonl, of an earlier version
                continue
            lines = (run.path / file).read_bytes().splitlines(keepends=True)
            assert all(line.endswith(b"\n") and isinstance(json.loads(line), dict) for line in lines), name
    assert refused >= 12 and repaired >= 5


def test_torn_anywhere_a_log_keeps_every_whole_line(whole, tmp_path):
    run = RunDir(shutil.copytree(whole, tmp_path / "run"))
    log = run.samples.read_bytes()
    for size in range(0, len(log), 3):
        run.samples.write_bytes(log[:size])
        RunDir.create(run.path, {}, resume=True)
        assert run.samples.read_bytes() == log[: log[:size].rfind(b"\n") + 1]


@pytest.mark.parametrize("action", ["push", "sync"])
@EVERY
def test_a_dashboard_of_a_damaged_run_is_made_or_one_line(action, every, whole, tmp_path, capsys, monkeypatch):
    pytest.importorskip("wandb_workspaces" if action == "push" else "wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    found = []
    for file in ("config.json", "metrics.jsonl"):
        place = tmp_path / "run"
        damages = [*on_the_file(place / file), *in_the_values(place / file, VALUES[file])]
        for name, damage in damages[:: 2 * every if action == "push" else 5 * every]:
            shutil.rmtree(place, ignore_errors=True)
            shutil.copytree(whole, place, symlinks=True)
            damage()
            try:
                code = cli.main(["dashboard", action, str(place)])
            except BaseException as error:
                code = f"{type(error).__name__}: {str(error)[:200]}"
            out, err = capsys.readouterr()
            if code != 0 and not (code == 2 and err.startswith("error: ") and err.count("\n") == 1 and str(place) in err):
                found.append(f"{file}, {name}: {code}: {err[:300]}")
            if bad := {c for c in out + err if not c.isprintable() and c != "\n"}:
                found.append(f"{file}, {name}: control characters {bad}")
    assert not found, "\n".join(found)


@EVERY
def test_a_damaged_rollout_is_the_same_or_one_line(every, whole, tmp_path):
    """Every byte of the recording in turn, and every damage to the file."""
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    file = run / "rollouts" / "step-1.npz"
    good, seen = file.read_bytes(), 0
    expected = rollouts.read(run, 1)
    for at in range(0, len(good), every):
        file.write_bytes(good[:at] + bytes([good[at] ^ (1 << at % 8)]) + good[at + 1 :])
        try:
            assert rollouts.read(run, 1) == expected
        except UserError as error:
            seen += 1
            assert str(file) in str(error) and "\n" not in str(error)
    assert seen > len(good) / every / 2
    file.write_bytes(good)
    for name, damage in on_the_file(file):
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(whole, run, symlinks=True)
        damage()
        try:
            assert rollouts.read(run, 1) == expected, name
        except UserError as error:
            assert "step" in str(error) and "\n" not in str(error), name


def test_ablate_goes_on_in_a_damaged_directory_or_refuses_in_one_line(ablation, tmp_path, monkeypatch):
    """Ablate reads the files that an earlier command has left before anything starts."""
    monkeypatch.chdir(tmp_path)
    place, found, went_on = tmp_path / "runs" / "ablation-a", [], 0
    damages = [*on_the_file(place / "ablation.json"), *in_the_values(place / "ablation.json", ABLATION)]
    damages += on_the_file(place / "drift" / "seed-1" / "result.json")
    for name, damage in damages:
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(ablation, place)
        damage()
        try:
            extended(plan.read(["recipe=arithmetic", "run=a", "seeds=0,1", "arms=exact,drift"])).left()
            went_on += 1
        except UserError as error:
            found += [f"{name}: {error}"] if "\n" in str(error) or "ablation-a" not in str(error) else []
    assert not found and went_on, "\n".join(found)
