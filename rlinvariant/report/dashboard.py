"""W&B and TensorBoard as views of what is on the disk.

`push` makes a W&B workspace and a W&B report of the panels that the HTML page has; `sync` replays metrics.jsonl into a W&B run
and into TensorBoard event files. Both can be repeated. Without a login, and without the packages, what is possible is done,
and the rest is said.
"""

import hashlib
import importlib.util
import json
import math
import shlex
import shutil
import unicodedata
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rlinvariant.errors import UserError, one_line
from rlinvariant.files import require_writable, write_atomically
from rlinvariant.install import install_hint
from rlinvariant.report import tables, wandb_log
from rlinvariant.report.completions import Completions
from rlinvariant.report.panels import ON_POLICY, Panel
from rlinvariant.report.rundir import quoted
from rlinvariant.report.study import Run, Study, load
from rlinvariant.text import plural
from rlinvariant.types import Untyped

FIX = "`wandb login --relogin`, or unset WANDB_API_KEY to stay offline"
INSTALL = install_hint("dashboard")
TABLES = 100  # of completions that a replay logs at most, each of another step
HEADLINE, HEADLINE_KEY = "Mismatched tokens", "onpolicy/mismatched_tokens_total"
MAKE_ROOM = "make room for it there"


def push(path: str | Path) -> list[str]:
    """Write PATH/dashboard/workspace.json and report.json, and with a W&B login save both in the project of the runs.

    Returns:
        What was done, a line each.

    Raises:
        UserError: wandb-workspaces is not installed; no run is there; PATH/dashboard cannot be written; W&B was not reached
            with the login that there is.
    """
    if importlib.util.find_spec("wandb_workspaces") is None:
        raise UserError(f"dashboard push: wandb-workspaces is not installed; {INSTALL}")
    study = load(path)
    _refuse_names(study)
    run = next((run for _, run in study.runs), None)
    if run is None:
        raise UserError(f"{study.path}: no run has started, so there is nothing to show")
    directory, said = study.path / "dashboard", []
    require_writable(directory, "dashboard push", MAKE_ROOM, directory=True)
    import wandb
    from wandb.errors import Error

    entity, project = run.setting("wandb.entity"), run.setting("wandb.project") or "rlinvariant"
    directory.mkdir(exist_ok=True)
    for make in (report, workspace):
        file = directory / f"{make.__name__}.json"
        model = make(study, "", project)._to_model()  # with an entity, W&B would be asked whether the project is there
        write_atomically(file, json.dumps(model.model_dump(mode="json", by_alias=True, exclude_none=True), indent=1) + "\n")
        said.append(f"{make.__name__}: written to {file}")
    if not wandb_log.login(f"dashboard push, after writing {directory}", FIX):
        return [*said, "W&B: no login, so nothing was pushed; run `wandb login` and this again"]
    try:
        entity = entity or wandb.Api().default_entity or ""
        for make in (report, workspace):
            view = make(study, entity, project)
            view.save()
            said.append(f"{make.__name__}: {view.url}")
    except (Error, OSError, ValueError) as error:  # ValueError: there is no such project
        fix = f"it is in {directory}; `rlinvariant dashboard sync {study.path}` makes the project"
        raise UserError(f"dashboard push: W&B did not take it ({one_line(error)}); {fix}") from error
    return said


def workspace(study: Study, entity: str, project: str) -> Untyped:
    """Return a wandb_workspaces Workspace: line plots in the sections of the panels, runs of one arm drawn together."""
    import wandb_workspaces.workspaces as ws

    sections = [ws.Section(name=name, panels=_plots(study, panels), is_open=True) for name, panels in _sections(study)]
    by: list[Any] = [ws.Metric("JobType")] if study.kind == "ablation" else []
    runs = ws.RunsetSettings(filters=_filter(study), groupby=by)
    return ws.Workspace(entity=entity, project=project, name=_name(study), sections=sections, runset_settings=runs)


def report(study: Study, entity: str, project: str) -> Untyped:
    """Return a wandb_workspaces Report: the outcome in words, the tables as text, and the same panels."""
    import wandb_workspaces.reports.v2.interface as wr

    by = ["JobType"] if study.kind == "ablation" else []
    runs = wr.Runset(entity=entity, project=project, name=_name(study), filters=_filter(study), groupby=by)
    blocks: list[Any] = [wr.UnorderedList([f"{who}: {what}" for who, what in tables.sentences(study)])]
    if study.notes:
        blocks.append(wr.UnorderedList(list(study.notes)))
    for table in tables.every(study):
        blocks += [wr.P(table.caption), wr.CodeBlock("\n".join(table.lines()), language="markdown")]
    for name, panels in _sections(study):
        blocks += [wr.H2(name), wr.PanelGrid(panels=_plots(study, panels), runsets=[runs])]
    blocks += [wr.H2("Reproduce"), wr.CodeBlock(study.command, language="markdown")]
    said = tables.contract((study.reference or study.arms[0]).rows)
    return wr.Report(entity=entity, project=project, title=_name(study)[:128], description=said, blocks=blocks)


def sync(path: str | Path) -> list[str]:
    """Replay metrics.jsonl of a run, or of every run of an ablation, into W&B and into RUN/tensorboard/.

    W&B: online with a login, where the steps that an earlier log of the run lacks are added to it; else a whole run in
    RUN/dashboard/wandb/, to be sent later by `wandb sync`. The id is the one under which the run logged itself, if it did,
    so that W&B has one run of both. Earlier files of this command are replaced; RUN/wandb/, the run's own, is left alone.

    Returns:
        What was done, a line each.

    Raises:
        UserError: as `study.load`; neither package is installed; a directory cannot be written, before anything is; W&B was not
            reached with the login that there is.
    """
    study = load(path)
    _refuse_names(study)
    has = {name: importlib.util.find_spec(name) is not None for name in ("wandb", "tensorboard")}
    if not any(has.values()):
        raise UserError(f"dashboard sync: neither wandb nor tensorboard is installed; {INSTALL}")
    for _, run in study.runs:
        for name, used in (("dashboard", has["wandb"]), ("tensorboard", has["tensorboard"])):
            if used and run.rows:
                require_writable(run.path / name, "dashboard sync", MAKE_ROOM, directory=True)
    online = has["wandb"] and wandb_log.login("dashboard sync", FIX)
    said = []
    for _, run in study.runs:
        if not run.rows:
            said.append(f"{run.path}: no step yet, nothing to replay")
            continue
        if has["wandb"]:
            said.append(f"{run.path}: {plural(len(run.rows), 'step')} to W&B, {_to_wandb(study, run, online)}")
        if has["tensorboard"]:
            said.append(f"{run.path}: {plural(len(run.rows), 'step')} to TensorBoard, {_to_tensorboard(run)}")
    said += [f"{name} is not installed; {INSTALL}" for name, there in has.items() if not there]
    return said


def _refuse_names(study: Study) -> None:
    """Raise UserError where a name that W&B is to use is no text: config.json is damaged."""
    for _, run in study.runs:
        for key in ("run", "wandb.project", "wandb.entity", "wandb.group"):
            if not isinstance(value := run.setting(key), str | None):
                raise UserError(f"{run.path / 'config.json'}: {key} is {quoted(value)}, expected a text or null; restore it")
        tags = run.setting("wandb.tags") or []
        if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
            raise UserError(f"{run.path / 'config.json'}: wandb.tags is {quoted(tags)}, expected a list of texts; restore it")


def _to_wandb(study: Study, run: Run, online: bool) -> str:
    """Log every row, under the id that the run gave itself, or one that stays the same from one sync to the next."""
    names = ("project", "entity", "group", "tags")
    settings = SimpleNamespace(mode="online" if online else "offline", **{n: run.setting(f"wandb.{n}") for n in names})
    settings.project, settings.tags = settings.project or "rlinvariant", settings.tags or []
    settings.group = settings.group or (study.path.name if study.kind == "ablation" else None)
    live = wandb_log.live_ids(run.path)
    recorded = wandb_log.recorded_id(run.path) or hashlib.sha256(str(run.path.resolve()).encode()).hexdigest()[:12]
    name = live[-1] if live else recorded
    directory = run.path / "dashboard"
    directory.mkdir(exist_ok=True)
    if (directory / "wandb").is_dir():
        shutil.rmtree(directory / "wandb")
    try:
        _, log, finish = wandb_log.start(settings, directory, run.config, name, [run.path / "report.html"])
    except UserError as error:
        raise UserError(f"{run.path}: {error}") from error
    assert log is not None
    kept = Completions(run.path)
    shown = kept.steps[:: 1 + len(kept.steps) // TABLES]
    for row in sorted([*run.rows, *run.evaluations], key=lambda row: row["step"]):
        has = "kind" not in row and row["step"] in shown
        log({**row, wandb_log.TABLE: wandb_log.table(kept.read(row["step"]))} if has else row, row["step"])
    finish()
    said = f"run {name}" + (", the id under which the run logged itself" if live else "")
    if len(live) > 1:
        said += f" (last; parts of it are also in {', '.join(live[:-1])})"
    if online:
        return f"online, {said}"
    (made,) = (directory / "wandb").glob("offline-run-*")
    return f"offline, {said}; send it with: wandb sync {shlex.quote(str(made))}"


def _to_tensorboard(run: Run) -> Path:
    from torch.utils.tensorboard import SummaryWriter

    directory = run.path / "tensorboard"
    for earlier in directory.glob("events.out.tfevents.*"):
        earlier.unlink()
    with SummaryWriter(str(directory)) as writer:
        for row in [*run.rows, *run.evaluations]:
            for key, value in row.items():
                if key != "step" and isinstance(value, int | float):
                    writer.add_scalar(key, value, row["step"])
    return directory


def _sections(study: Study) -> list[tuple[str, list[Panel]]]:
    """Return the panels that these runs have the keys of, by section."""
    shown = [panel for panel in study.panels if any(panel.shown_for(run.config) for _, run in study.runs)]
    return [(name, list(panels)) for name, panels in groupby(shown, key=lambda panel: panel.section)]


def _plots(study: Study, panels: Sequence[Panel]) -> list[Any]:
    """Return W&B's plots of a section; before those of the contract, the run's mismatched tokens as one number.

    W&B has no axis that shows an exact 0 beside small numbers, and draws nothing of 0 on a logarithmic one: an axis is
    logarithmic where the page's is, and every number of every run is above 0.
    """
    import wandb_workspaces.reports.v2.interface as wr

    places = ((12 * (i % 2), 8 * (i // 2)) for i in range(len(panels) + 1))
    plots: list[Any] = []
    if panels[0].section == ON_POLICY:
        x, y = next(places)
        layout = wr.Layout(x=x, y=y, w=12, h=8)
        plots.append(
            wr.ScalarChart(title=HEADLINE, metric=wr.SummaryMetric(HEADLINE_KEY), groupby_aggfunc="max", layout=layout)
        )
    for panel, (x, y) in zip(panels, places, strict=False):
        quotient = panel.kind == "curve" and len(panel.keys) > 1
        plots.append(
            wr.LinePlot(
                title=f"{panel.title}, {panel.unit}",
                x="Step",
                y=list(panel.keys),
                custom_expressions=[" / ".join(f"${{{key}}}" for key in panel.keys)] if quotient else None,
                log_y=True if panel.scale.startswith("log") and _is_positive(study, panel) else None,
                plot_type="stacked-area" if panel.kind == "stack" else None,
                groupby_aggfunc="mean",
                groupby_rangefunc="stderr",
                point_visualization_method="bucketing-gorilla",  # keeps spikes
                layout=wr.Layout(x=x, y=y, w=12, h=8),
            )
        )
    return plots


def _is_positive(study: Study, panel: Panel) -> bool:
    values = [x for _, run in study.runs for x in panel.values(run.rows_of(panel)).tolist() if not math.isnan(x)]
    return bool(values) and min(values) > 0


def _name(study: Study) -> str:
    """Return recipe and run; a symbol (+ = < > | ~ $ ^, emoji), which wandb-workspaces refuses in a name, becomes _."""
    name = f"{study.recipe}: {study.path.name}"
    return "".join("_" if unicodedata.category(c)[0] == "S" or unicodedata.category(c) == "Cs" else c for c in name)


def _filter(study: Study) -> str:
    """Return what selects the runs: an ablation's carry its directory's name as group, a single run its own name."""
    if study.kind == "ablation":
        run = next(run for _, run in study.runs)
        return f"Metric('Group') = {_quoted(run.setting('wandb.group') or study.path.name)}"
    return f"Metric('Name') = {_quoted(study.arms[0].runs[0].setting('run'))}"


def _quoted(value: Any) -> str:
    """Return a literal for a filter. wandb-workspaces takes < and = for operators even in strings, so symbols are escaped."""
    return "'" + "".join(c if c.isalnum() or c in "-_./" else f"\\U{ord(c):08x}" for c in str(value)) + "'"
