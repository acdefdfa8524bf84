"""W&B and TensorBoard hold what metrics.jsonl holds; the W&B views are made of the panels."""

import importlib.util
import json
import math
import os
import struct
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlinvariant.errors import UserError
from rlinvariant.report import dashboard, html, wandb_log
from rlinvariant.report.panels import ALGORITHM, CORRECTION, PANELS
from rlinvariant.report.rundir import RunDir, read_metrics
from tests.report.runs import write_ablation, write_run


@pytest.fixture(autouse=True)
def no_login(monkeypatch, tmp_path):
    """Whatever the machine has: no key, no netrc."""
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))


def plots(view: dict, kind: str = "Run History Line Plot") -> list[dict]:
    """The configurations of all line plots in a view, or of another kind of panel."""
    if isinstance(view, list):
        return [plot for item in view for plot in plots(item, kind)]
    if not isinstance(view, dict):
        return []
    mine = [view["config"]] if view.get("viewType") == kind else []
    return mine + [plot for item in view.values() for plot in plots(item, kind)]


def history(run: Path) -> list[dict]:
    """The rows in a W&B run's own file."""
    rows = [found.history.item for found in records(run) if found.WhichOneof("record_type") == "history"]
    return [{item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items} for items in rows]


def records(run: Path) -> list[Any]:
    """All that is in a W&B run's own file: protocol buffers in LevelDB's log format, which wandb has no reader of in Python.

    Blocks of 32 KiB hold chunks, each with 7 bytes ahead: checksum, length, kind (1 whole, 2 first, 3 middle, 4 last part).
    """
    import wandb
    from wandb.proto import wandb_internal_pb2

    wandb.teardown()  # ends W&B's own process, which writes after `finish` has returned
    (file,) = run.glob("*.wandb")
    data, at, record, rows = file.read_bytes(), 7, b"", []  # 7 bytes: what the file is
    while at + 7 <= len(data):
        if (left := 2**15 - at % 2**15) < 7:
            at += left
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            found, record = wandb_internal_pb2.Record.FromString(record), b""  # pyright: ignore[reportAttributeAccessIssue]
            rows.append(found)
    return rows


def test_views_have_every_panel_of_the_page(tmp_path):
    """The panels of PPO and of the correction are there too, as some run has them."""
    corrected = ["invariance=off", f"{CORRECTION}=true"]
    arms = {"exact": ["invariance=exact"], "drift-token": corrected, "ppo": ["invariance=exact", f"{ALGORITHM}=ppo"]}
    path = write_ablation(tmp_path / "ablation-a", arms=arms)
    said = dashboard.push(path)
    assert said[-1] == "W&B: no login, so nothing was pushed; run `wandb login` and this again"
    for name in ("workspace", "report"):
        file = path / "dashboard" / f"{name}.json"
        view = json.loads(file.read_text())
        found = plots(view)
        assert [tuple(plot["metrics"]) for plot in found] == [panel.keys for panel in PANELS]
        logarithmic = {plot["metrics"][0] for plot in found if plot.get("yLogScale")}
        assert {"grad_norm", "onpolicy/is_ratio/max"} <= logarithmic
        assert not {"onpolicy/kl_k3", "onpolicy/logprob_absdiff/max"} & logarithmic, "a log axis shows no 0 of an exact arm"
        for plot, panel in zip(found, PANELS, strict=True):
            assert plot["chartTitle"].startswith(panel.title)
            assert plot.get("expressions", [None])[0] == (
                " / ".join("${" + key + "}" for key in panel.keys) if len(panel.keys) == 2 else None
            )
        assert [plot["chartTitle"] for plot in plots(view, "Scalar Chart")] == ["Mismatched tokens"]
        text = file.read_text()
        assert '"ablation-a"' in text and '"jobType"' in text
    assert "mismatched 0 / 3,840 tokens, coverage 1" in text


class Wandb(BaseHTTPRequestHandler):
    """Answers as a W&B server with one project does, as far as a login and the saving of views ask it; keeps what is saved."""

    saved: list[dict] = []
    project: dict | None = {"id": "1", "internalId": "1"}

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        request: dict[str, Any] = json.loads(body) if self.path == "/graphql" else {"query": ""}
        given: dict[str, Any] = request.get("variables", {})
        data: dict[str, Any] = {"project": self.project}
        data["viewer"] = {"id": "1", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}
        data["models"] = {"edges": [], "pageInfo": {"endCursor": "", "hasNextPage": False}}
        if "upsertView" in request["query"]:
            self.saved.append(given)
            named = {key: given.get(key) for key in ("name", "type", "displayName", "description", "spec")}
            where = {"id": "1", "name": given["projectName"], "entityName": given["entityName"]}
            data["upsertView"] = {"view": named | {"id": "VmlldzoxMjM=", "project": where}, "inserted": True}
        answer = json.dumps({"data": data}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: Any) -> None:
        """Nothing to the terminal."""


def test_with_a_login_both_views_are_saved_and_without_a_project_that_is_said(tmp_path, monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Wandb)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    path = write_ablation(tmp_path / "ablation-a", seeds=[0])
    login = {"WANDB_BASE_URL": f"http://127.0.0.1:{server.server_port}", "WANDB_API_KEY": "a" * 40}

    def push() -> subprocess.CompletedProcess[str]:  # a process of its own: wandb keeps a login for all of one
        command = [sys.executable, "-m", "rlinvariant.cli", "dashboard", "push", str(path)]
        return subprocess.run(command, env=os.environ | login, capture_output=True, text=True)

    done = push()
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert [line.split(":")[0] for line in said] == ["report", "workspace"] * 2
    assert all(f"http://127.0.0.1:{server.server_port}/me/rlinvariant" in line for line in said[2:])
    wanted = [panel.keys for panel in PANELS if panel.arms == "all"]
    for view in Wandb.saved:
        assert (view["entityName"], view["projectName"]) == ("me", "rlinvariant")
        assert [tuple(plot["metrics"]) for plot in plots(json.loads(view["spec"]))] == wanted
    assert len(Wandb.saved) == 2
    monkeypatch.setattr(Wandb, "project", None)
    done = push()
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and len(Wandb.saved) == 2
    assert "'me/rlinvariant' not found" in done.stderr and f"dashboard sync {path}` makes the project" in done.stderr
    server.shutdown()


def test_a_view_of_runs_without_a_correction_has_no_panel_of_it(tmp_path):
    write_run(tmp_path / "run", 0)
    dashboard.push(tmp_path / "run")
    view = json.loads((tmp_path / "run" / "dashboard" / "workspace.json").read_text())
    assert len(plots(view)) == len([panel for panel in PANELS if panel.arms == "all"]) < len(PANELS)


def test_a_killed_run_is_replayed_whole(tmp_path):
    """W&B and TensorBoard get every row, NaN too, with the step it has; a second time TensorBoard has it once."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def odd(of: dict) -> dict:
        return of | ({"entropy": math.nan, "grad_norm": math.inf} if of["step"] == 3 else {})

    run = write_run(tmp_path / "run", 0, steps=5, drift=0.01, finished=False, change=odd)
    with run.metrics.open("a") as file:
        file.write('{"step": 6, "reward/me')
    said, again = (dashboard.sync(run.path) for _ in range(2))
    (logged,) = run.path.rglob("offline-run-*")  # the second takes the place of the first, under the same id
    assert said[0].partition(";")[0] == again[0].partition(";")[0] and again[0].endswith(f"wandb sync {logged}")
    assert f"5 steps to W&B, offline, run {logged.name[-12:]}; send it" in said[0] and "5 steps to TensorBoard" in said[1]
    rows = read_metrics(run.path)
    found = history(logged)
    assert [row["_step"] for row in found] == [1, 2, 3, 4, 5]
    for row, mine in zip(rows, found, strict=True):
        assert {k: v for k, v in row.items() if math.isfinite(v)} == {k: mine[k] for k, v in row.items() if math.isfinite(v)}
    assert repr(found[2]["entropy"]) in ("nan", "'NaN'")
    assert [row["_step"] for row in found if "completions/path" in row] == [1], "the step whose completions are there"
    table = json.loads((logged / "files" / found[0]["completions/path"]).read_text())
    assert dict(zip(table["columns"], table["data"][0], strict=True)) == {
        **{"step": 1, "prompt_id": "000001000000", "sample_id": 3, "prompt": "1+0=", "completion": "sample 3", "reward": 0.75},
        **{"advantage": 0.25, "length": 4, "truncated": False, "mismatched_tokens": 0},
        **{"rewards/exact": 0.75, "rewards/format": None},
    }
    assert len(table["data"]) == 8 and table["data"][-1][5] == 0.0
    events = EventAccumulator(str(run.path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == set(rows[0]) - {"step"}
    assert [(e.step, e.value) for e in events.Scalars("onpolicy/mismatched_tokens")] == [
        (row["step"], row["onpolicy/mismatched_tokens"]) for row in rows
    ]


def test_a_replay_has_the_id_under_which_the_run_logged_itself_and_leaves_that_log_alone(tmp_path):
    """Whoever sends every offline run to W&B gets one."""
    import wandb

    run = write_run(tmp_path / "run", 0, steps=3)
    config = json.loads(run.config.read_text())
    settings = SimpleNamespace(mode="offline", project="rlinvariant", entity=None, group=None, tags=[])
    _, log, finish = wandb_log.start(settings, run.path, config)
    assert log is not None
    for logged in read_metrics(run.path):
        log(logged, logged["step"])
    finish()
    (live,) = (run.path / "wandb").glob("offline-run-*")
    file = live / f"run-{live.name.rpartition('-')[2]}.wandb"
    wandb.teardown()  # ends W&B's own process, which writes after `finish` has returned
    before = file.read_bytes()
    said = [dashboard.sync(run.path)[0] for _ in range(2)][-1]
    name = live.name.rpartition("-")[2]
    assert f"run {name}, the id under which the run logged itself; send it with" in said
    assert file.read_bytes() == before
    (replayed,) = (run.path / "dashboard" / "wandb").glob("offline-run-*")
    assert [file.name for at in (live, replayed) for file in at.glob("*.wandb")] == [f"run-{name}.wandb"] * 2
    assert [row["_step"] for row in history(replayed)] == [1, 2, 3] == [row["_step"] for row in history(live)]


def test_a_resumed_run_has_the_id_that_it_had(tmp_path, monkeypatch):
    """Recorded by the run, or known by W&B's files, as of a run that an earlier version began; else a new one."""
    run = RunDir.create(tmp_path, {})
    assert wandb_log.id_of(run.path) != wandb_log.id_of(run.path), "nothing is known"
    (run.path / "wandb/offline-run-20260101_000000-first").mkdir(parents=True)
    (run.path / "wandb/run-20260102_000000-second").mkdir()
    assert wandb_log.id_of(run.path) == "second"
    run.write_environment({"wandb_id": "recorded"})
    assert wandb_log.id_of(run.path) == "recorded", "`wandb clean` removes W&B's files"
    monkeypatch.setenv("WANDB_RUN_ID", "mine")  # as W&B's sweeps set it
    assert wandb_log.id_of(run.path) == "mine"


def test_the_report_is_an_artifact_of_the_run(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "staged"))
    run = write_run(tmp_path / "run", 0, steps=2).path
    for expected in ([], ["report.html"]):  # the first time there is none
        dashboard.sync(run)
        (made,) = (run / "dashboard" / "wandb").glob("offline-run-*")
        kinds = [found for found in records(made) if found.WhichOneof("record_type") == "request"]
        artifacts = [x.request.log_artifact.artifact for x in kinds if x.request.WhichOneof("request_type") == "log_artifact"]
        artifacts += [x.artifact for x in records(made) if x.WhichOneof("record_type") == "artifact"]
        paths = [entry.path for artifact in artifacts for entry in artifact.manifest.contents]
        assert [path for path in paths if not path.endswith("table.json")] == expected
        html.write(run)


def test_symbols_in_a_name_do_not_stop_the_views(tmp_path):
    """They are replaced in the title alone: the filter names the run as it is."""
    name = "a+b=c<d>e|f~g$h^i`j'k l\\m"
    run = write_run(tmp_path / name, 0, steps=1)
    dashboard.push(run.path)
    for view in ("workspace", "report"):
        text = (run.path / "dashboard" / f"{view}.json").read_text()
        assert "a_b_c_d_e_f_g_h_i_j'k l" in text
        assert json.dumps(json.loads(run.config.read_text())["run"]["value"]) in text


def test_every_run_of_an_ablation_is_replayed_and_what_has_no_step_is_named(tmp_path):
    path = write_ablation(tmp_path / "ablation-a", seeds=[0])
    write_run(path / "none", 0, steps=0, finished=False)
    write_run(path / "drift" / "seed-1", 1, steps=0, finished=False)
    spec = json.loads((path / "ablation.json").read_text())
    (path / "ablation.json").write_text(json.dumps(spec | {"seeds": [0, 1]}))
    said = dashboard.sync(path)
    assert sum("steps to W&B" in line for line in said) == 2 == sum("steps to TensorBoard" in line for line in said)
    assert f"{path / 'drift' / 'seed-1'}: no step yet, nothing to replay" in said


def test_what_is_missing_is_said_with_the_way_to_get_it(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run", 0, steps=2).path
    find_spec, absent = importlib.util.find_spec, set[str]()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in absent else find_spec(name))
    absent.add("wandb")
    assert dashboard.sync(run)[-1] == f"wandb is not installed; {dashboard.INSTALL}"
    absent.update({"tensorboard", "wandb_workspaces"})
    for command in (dashboard.sync, dashboard.push):
        with pytest.raises(UserError, match=r"install"):
            command(run)


@pytest.mark.parametrize("wanted", [False, True])
def test_wandb_advertises_nothing(tmp_path, wanted):
    """W&B would advertise Weave where a client library of its list is imported, as vLLM does; control: no switch is on."""
    run = write_run(tmp_path / "run", 0, steps=1)
    code = (
        "import json, sys, types; from pathlib import Path; from rlinvariant.report import wandb_log\n"
        "sys.modules['openai'] = types.ModuleType('openai')\n"
        "settings = types.SimpleNamespace(mode='offline', project='p', entity=None, group=None, tags=[])\n"
        f"wandb_log.start(settings, Path({str(tmp_path)!r}), json.loads(Path({str(run.config)!r}).read_text()))[2]()"
    )
    switches = ("WANDB_SILENT", "WANDB_DISABLE_WEAVE")
    environment = {name: value for name, value in os.environ.items() if name not in switches}
    environment |= dict.fromkeys(switches, "false") if wanted else {}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert ("Weave" in done.stdout + done.stderr) is wanted


def test_a_login_that_does_not_work_is_one_line_and_loses_nothing(tmp_path, monkeypatch):
    import wandb
    from wandb.errors import AuthenticationError

    def refused(**_):
        raise AuthenticationError("Failed to authenticate with http://127.0.0.1:9:\nno route")

    monkeypatch.setattr(wandb, "login", refused)  # the real one waits ten seconds for a server that is not there
    run = write_run(tmp_path / "run", 0, steps=2).path
    for command in (dashboard.push, dashboard.sync):
        with pytest.raises(UserError, match="there is a W&B login, but it does not work") as raised:
            command(run)
        assert "\n" not in str(raised.value)
    assert (run / "dashboard" / "report.json").is_file()
    with pytest.raises(UserError, match="wandb.mode=offline"):
        wandb_log.login("wandb.mode=auto", "wandb.mode=offline")
