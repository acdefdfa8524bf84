"""Start a run through accelerate with a packaged machine file: what `accelerate launch train.py` does, without a checkout."""

import argparse
import logging
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from rlinvariant.errors import OK, UserError, one_line

MACHINE_FILES = Path(__file__).parent / "configs"
WORKER = Path(__file__).parent / "__main__.py"


def machines() -> list[str]:
    """Return the names of the packaged machine files."""
    return sorted(path.stem for path in MACHINE_FILES.glob("*.yaml"))


def machine_file(machine: str) -> Path:
    """Return the accelerate file of a machine's name, or the file that `machine` is the path of.

    Raises:
        UserError: there is no such name and no such file.
    """
    if machine in machines():
        return MACHINE_FILES / f"{machine}.yaml"
    if (path := Path(machine).expanduser()).is_file():
        return path.resolve()
    names = ", ".join(machines())
    raise UserError(f"machine={machine}: expected {names}, or the path of an accelerate file (.yaml); or remove it")


def size(machine: str | None) -> tuple[int, int]:
    """Return how many processes a machine has in all, and on how many hosts, by its file alone.

    What else is wrong with the file, accelerate finds.

    Raises:
        UserError: there is no such machine.
    """
    if machine is None:
        return 1, 1
    import yaml

    try:
        content = yaml.safe_load(Path(machine_file(machine)).read_text())
        return max(1, int(content["num_processes"])), max(1, int(content.get("num_machines", 1)))
    except (OSError, yaml.YAMLError, ValueError, KeyError, TypeError, AttributeError):
        return 1, 1


def is_launched(env: Mapping[str, str] = os.environ) -> bool:
    """Return whether this process was started by accelerate or torchrun, so that it must not launch again."""
    return "ACCELERATE_MIXED_PRECISION" in env or "LOCAL_RANK" in env


def rank(env: Mapping[str, str] = os.environ) -> int:
    """Return this process's number among those of a launch, or 0. RANK alone, as in a user's shell, says nothing."""
    return int(env.get("RANK", 0)) if "LOCAL_RANK" in env else 0


def launch(argv: Sequence[str], machine: str | None = None) -> int:
    """Run `rlinvariant train` in the processes that a machine file describes.

    With one process this process becomes it, so that exit code and signals need no passing on, and nothing is returned.

    Args:
        argv: what follows `rlinvariant train`, without machine=.
        machine: "cpu", "cpu2", "1gpu" or the path of an accelerate file; by default 1gpu where torch finds a GPU, else cpu.

    Returns:
        The exit code of the first process that failed; 0 if all ended well.

    Raises:
        UserError: there is no such machine, its file cannot be used, or this process is already launched.
    """
    if is_launched():
        given = f"machine={machine}" if machine else "rlinvariant train"
        raise UserError(f"{given}: already started by accelerate or torchrun, whose machine file holds; remove machine=")
    file = None if machine is None else machine_file(machine)
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin are 10 times slower as soon as cores are shared
    import torch  # not before: a wrong machine= is answered at once

    return _launch(file or machine_file("1gpu" if torch.cuda.is_available() else "cpu"), argv)


def _launch(file: Path, argv: Sequence[str]) -> int:
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_simple_launcher_cmd_env

    try:
        settings = load_config_from_file(str(file))
    except Exception as error:  # a file that is no YAML, no mapping, has unknown keys, ...: each raises a type of its own
        raise UserError(
            f"machine={file}: accelerate cannot use it: {one_line(error)}; mend the file, or remove machine="
        ) from error
    all_processes, hosts = size(str(file))
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, _cores() // max(1, all_processes // hosts)))
    settings_of_launch = ["--config_file", str(file), "--num_cpu_threads_per_process", threads]
    options = launch_command_parser().parse_args([*settings_of_launch, str(WORKER), "train", *argv])
    if all_processes > 1 or settings.distributed_type not in ("NO", False):
        return _launch_several(options)
    command, environment = prepare_simple_launcher_cmd_env(_validate_launch_command(options)[0])
    os.execve(command[0], command, environment)


def _launch_several(options: argparse.Namespace) -> int:
    from accelerate.commands.launch import launch_command
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.disable(logging.ERROR)  # from here on this process only waits, and the rank that failed says why
    try:
        launch_command(options)
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return code if code > 0 else 128 - code  # minus a signal's number
    except subprocess.CalledProcessError as error:
        return error.returncode
    except SignalException as error:
        return 128 + int(error.sigval)
    return OK


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
