"""`rlinvariant ablate recipe=NAME`: run what is left of an ablation, write its report, print its table."""

import argparse
import shlex

from rlinvariant.ablate.arms import DEFAULT_ARMS, IMPOSSIBLE_ARMS
from rlinvariant.ablate.plan import Plan, extended, read
from rlinvariant.arguments import definitions
from rlinvariant.errors import NOT_EXACT, OK, stop_code
from rlinvariant.files import require_writable
from rlinvariant.lock import locked
from rlinvariant.masking import masked_arguments
from rlinvariant.report.console import Console
from rlinvariant.report.rundir import SCHEMA
from rlinvariant.text import plural

DESCRIPTION = """Runs one recipe under several arms, exact and with drift, corrections and staleness, on the same seeds, data
and initial weights, and compares them in one report: a table, report.html and summary.json in runs/ablation-NAME. Each run is
a process of its own. The same command again goes on where it ended."""
EXAMPLE = """rlinvariant ablate recipe=arithmetic seeds=3
rlinvariant ablate recipe=arithmetic seeds=0,1 arms=exact,drift steps=50 run=short"""
SETTINGS = {
    "recipe=NAME": "a recipe's name or file; needed",
    "seeds=3": "a number of seeds, or a list: seeds=3 is seeds=0,1,2. They decide data order and sampling; the data and the "
    "initial weights are the recipe's, and the same in all runs",
    "arms=a,b": "a list of the names below, stale-K and stale-K-CORRECTION with any K, exact-top-p-P, drift-top-p-P and "
    "drift-top-p-P-CORRECTION with any P, for a recipe with adapters lora_merged, and, for a PPO recipe, grpo",
    "run=NAME": "the directory is runs/ablation-NAME; by default the recipe's name",
    "at_once=1": "how many runs at the same time, spread over the GPUs: on a host of eight, at_once=8",
    "launch=FILE": "an accelerate configuration, as configs/cpu2.yaml, for runs of several processes each",
    "key=value": "as for `rlinvariant train`, for all arms",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the settings of `ablate`."""
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings, see below")
    parser.add_argument_group("settings", definitions(SETTINGS, 11))
    parser.add_argument_group("arms (all by default)", definitions({a.name: a.description for a in DEFAULT_ARMS}, 23))


def run(options: argparse.Namespace) -> int:
    """Run what is left of the ablation, write its report, print its table, and return the exit code.

    Raises:
        UserError: what cannot run, or does not belong to what is there; before anything starts.
    """
    console = Console(heartbeat_s=60.0)
    wanted = read(options.settings)
    plan = extended(wanted)
    require_writable(plan.path, f"run={plan.name}", "choose another run=NAME", directory=True)
    from rlinvariant.ablate import results, runs
    from rlinvariant.ablate.check import checked, refuse_crowds, refuse_mixed

    configs = checked(plan)
    refuse_crowds(plan, configs)
    refuse_mixed(plan, configs)
    steps = configs[plan.arms[0].name].steps
    with locked(plan.path, "run") as lock:
        results.write_json(plan.path / "ablation.json", specification(plan, steps))
        left, jobs = plan.left(), len(plan.jobs())
        size = f"{plural(len(plan.arms), 'arm')} x {plural(len(plan.seeds), 'seed')} x {plural(steps, 'step')}"
        console.print(f"{plan.path}: {size}, {jobs - len(left)} of {plural(jobs, 'run')} done before")
        if more := [arm.name for arm in plan.arms if arm not in wanted.arms]:
            console.print(f"with the arms that it has already: {', '.join(more)}")
        if wanted.arms == DEFAULT_ARMS:
            for name, reason in IMPOSSIBLE_ARMS.items():
                console.print(f"without {name}: {reason}")
        try:
            failed = runs.run_all(plan, left, steps, console, lock)
        except KeyboardInterrupt as stop:
            console.print(f"stopped: {jobs - len(plan.left())} of {plural(jobs, 'run')} are done and kept; go on with")
            console.print(f"  {plan.command}")
            return stop_code(stop)
        if failed:
            console.print(f"failed: {', '.join(failed)}; the same command tries them again")
        if len(plan.left()) < jobs:
            results.report(plan.path, console)
    return NOT_EXACT if failed else OK


def specification(plan: Plan, steps: int) -> dict[str, object]:
    """Return what ablation.json says: all that was asked for."""
    arms = [{"name": arm.name, "description": arm.description, "overrides": list(arm.overrides)} for arm in plan.arms]
    command = shlex.join(masked_arguments(shlex.split(plan.command)))
    asked = {"schema": SCHEMA, "command": command, "recipe": plan.recipe, "steps": steps, "seeds": list(plan.seeds)}
    return {**asked, "settings": masked_arguments(plan.settings), "arms": arms}
