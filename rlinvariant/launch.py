"""Start a run through accelerate with a packaged machine file: what `accelerate launch train.py` does, without a checkout."""

import argparse
import ctypes
import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from rlinvariant import deadline
from rlinvariant.errors import OK, Stopped, UserError, one_line
from rlinvariant.text import shown
from rlinvariant.types import JsonRow

LAUNCHER = "RLINVARIANT_LAUNCHER"
"""The environment's name of the process that this one ends with; its own number if it ends with none."""
T = TypeVar("T")
MACHINE_FILES = Path(__file__).parent / "configs"
MACHINE = "RLINVARIANT_MACHINE_FILE"  # environment variable that tells a run the machine file it was launched with
KINDS = ("False", "NO", "MULTI_CPU", "MULTI_GPU", "FSDP")  # of distributed_type; YAML reads NO as False
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
    if os.path.isfile(path := os.path.expanduser(machine)):
        return Path(path).resolve()
    names = ", ".join(machines())
    raise UserError(f"machine={shown(machine)}: expected {names}, or the path of an accelerate file (.yaml); or remove it")


def size(machine: str | None) -> tuple[int, int]:
    """Return how many processes a machine has in all, and on how many hosts, by its file alone.

    Raises:
        UserError: there is no such machine.
    """
    content = _content(machine)
    try:
        return max(1, int(content["num_processes"])), max(1, int(content.get("num_machines", 1)))
    except (ValueError, KeyError, TypeError):
        return 1, 1


def variables(machine: str | None) -> dict[str, str]:
    """Return what a machine's file says of processes and shards, as the variables that its processes will see.

    Raises:
        UserError: there is no such machine.
    """
    processes, hosts = size(machine)
    found = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes // hosts)}
    return found | shard_variables(_content(machine))


def _content(machine: str | None) -> Mapping[str, Any]:
    """Return what a machine's file says; nothing where it is no mapping: accelerate finds what is wrong with it."""
    if machine is None:
        return {}
    import yaml

    try:
        content = yaml.safe_load(machine_file(machine).read_text())
    except (OSError, yaml.YAMLError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def shard_variables(content: JsonRow) -> dict[str, str]:
    """Return the variables that accelerate makes of what its file says of shards; none where it asks for none."""
    if content.get("distributed_type") != "FSDP":
        return {}
    said = content.get("fsdp_config")
    given = said if isinstance(said, dict) else {}
    own = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}  # its defaults
    own["ACCELERATE_USE_CPU"] = str(bool(content.get("use_cpu"))).lower()
    return own | {f"FSDP_{str(name).removeprefix('fsdp_').upper()}": str(value) for name, value in given.items()}


def is_launched(env: Mapping[str, str] = os.environ) -> bool:
    """Return whether this process was started by accelerate or torchrun, so that it must not launch again."""
    return "ACCELERATE_MIXED_PRECISION" in env or "LOCAL_RANK" in env


def join() -> None:
    """Join the processes of a launch, each with a GPU of its own where there are GPUs."""
    import torch
    from accelerate import PartialState

    PartialState(cpu=not torch.cuda.is_available())


def is_sharded(env: Mapping[str, str] = os.environ) -> bool:
    """Return whether accelerate's file says distributed_type: FSDP: each process keeps a shard of every weight."""
    return env.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def end_with_launcher() -> bool:
    """Have SIGTERM sent to this process when the one that launched it ends, and return whether one has launched it.

    A launcher that is killed would leave the processes of a run behind, which would train on. A shell is no launcher: a run
    under nohup outlives it.

    Raises:
        Stopped: the launcher has ended already.
    """
    launcher = os.environ.get(LAUNCHER) or (str(os.getppid()) if is_launched() else None)
    if launcher in (None, str(os.getpid())):
        return False
    if not end_with_parent(signal.SIGTERM):
        threading.Thread(target=_watch, args=(os.getpid(), os.getppid()), daemon=True).start()
    if str(os.getppid()) != launcher:
        raise Stopped(signal.SIGTERM)
    return True


def end_with_parent(number: int) -> bool:
    """Ask Linux for a signal when the thread that started this process ends; False where the system has nothing like it."""
    set_parent_death_signal = 1
    try:
        return ctypes.CDLL(None).prctl(set_parent_death_signal, int(number), 0, 0, 0) == 0
    except AttributeError:
        return False


def _watch(process: int, parent: int) -> None:
    """Send SIGTERM to this process as soon as it has another parent."""
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(process, signal.SIGTERM)


def rank(env: Mapping[str, str] = os.environ) -> int:
    """Return this process's number among those of a launch, or 0. RANK alone, as in a user's shell, says nothing."""
    return int(env.get("RANK", 0)) if "LOCAL_RANK" in env else 0


def on_main_process(work: Callable[[], T]) -> T:
    """Do something on the main process, and return its result, or raise its UserError, on all. Every rank must call this."""
    from accelerate.utils import broadcast_object_list

    answer: list[Any] = [None]
    if rank() == 0:
        try:
            answer = [work()]
        except UserError as error:
            error.agreed = True
            answer = [error]
    (result,) = broadcast_object_list(answer)
    if isinstance(result, UserError):
        raise result
    return result


def asks_the_hub() -> bool:
    """Return whether this process asks the hub what a name is: of a launch, the one that launches, or else the main process."""
    return LAUNCHER not in os.environ and rank() == 0


@contextmanager
def main_process_fetches(name: str) -> Iterator[None]:
    """Let the main process of each host go first through a block that loads what the hub has; the others find it in the cache.

    Args:
        name: of what is loaded; a directory keeps nobody waiting. Every rank must call this.
    """
    if os.path.isdir(name) or not (is_launched() and int(os.environ.get("WORLD_SIZE", "1")) > 1):
        yield
        return
    from accelerate import PartialState

    state = PartialState()
    if not state.is_local_main_process:
        state.wait_for_everyone()
    try:
        yield
    finally:
        if state.is_local_main_process:
            state.wait_for_everyone()


def wait_for_all() -> None:
    """Wait until every process of a run is here."""
    from accelerate import PartialState

    PartialState().wait_for_everyone()


def largest(number: int) -> int:
    """Return the largest of the numbers that the processes of a run have. Every rank must call this."""
    from accelerate.utils import gather_object

    return max(gather_object([number]))


def raise_on_all(own: UserError | None) -> None:
    """Raise this rank's error or, if it has none, the first of the others'; return if there is none. Every rank must call this.

    Raises:
        UserError: a rank has one.
    """
    from accelerate.utils import gather_object

    errors = gather_object([None if own is None else str(own)])
    if own is not None:
        own.agreed = True  # so that this rank, too, waits for the others before it ends
        raise own
    if found := [(rank, error) for rank, error in enumerate(errors) if error is not None]:
        raise UserError(f"rank {found[0][0]}: {found[0][1]}", agreed=True)


def require_same(values: JsonRow) -> None:
    """Refuse what has different values in the processes of a run, by its name. Every rank must call this.

    Raises:
        UserError: another rank has another value than the main one; on all ranks, of the first such name.
    """
    first = on_main_process(lambda: dict(values))
    found = [name for name in {**first, **values} if values.get(name) != first.get(name)][:1]
    own = [f"{x}={values.get(x)}: the main process has {first.get(x)}; give all the same" for x in found]
    raise_on_all(UserError(own[0], agreed=True) if own else None)


def launch(argv: Sequence[str], machine: str | None = None) -> int:
    """Run `rlinvariant train` in the processes that a machine file describes.

    With one process this process becomes it, so that exit code and signals need no passing on, and nothing is returned.

    Args:
        argv: what follows `rlinvariant train`, without machine=.
        machine: one of `machines` or the path of an accelerate file; by default 1gpu where torch finds a GPU, else cpu.

    Returns:
        The exit code of the first process that failed; 0 if all ended well.

    Raises:
        UserError: there is no such machine, its file cannot be used, or this process is already launched.
    """
    if is_launched():
        given = f"machine={machine}" if machine else "rlinvariant train"
        raise UserError(f"{given}: already started by accelerate or torchrun, whose machine file holds; remove machine=")
    file = None if machine is None else machine_file(machine)
    end_with_launcher()  # as ablate is one
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin are 10 times slower as soon as cores are shared
    import torch  # not before: a wrong machine= is answered at once

    os.environ[MACHINE] = machine or ("1gpu" if torch.cuda.is_available() else "cpu")
    return _launch(file or machine_file(os.environ[MACHINE]), ["train", *argv])


def _require_gpus(machine: str, found: int) -> None:
    """Refuse a machine whose file does not say `use_cpu: true` for more processes of a host than there are GPUs."""
    (processes, hosts), content = size(machine), _content(machine)
    if not content or content.get("use_cpu", False) or -(-processes // hosts) <= found:  # accelerate's default is false
        return
    if not found:  # accelerate would take the CPU, in as many processes
        on_cpus = ", ".join(name for name in machines() if name.startswith("cpu"))
        raise UserError(f"machine={machine}: use_cpu: false, and torch finds no GPU here; use one of {on_cpus}")
    expected = f"expected at most {found} a host, one for each GPU that torch finds here"
    raise UserError(f"machine={machine}: num_processes: {processes}: {expected}")


def launch_command(argv: Sequence[str], processes: int) -> int:
    """Run another command of `rlinvariant` in several processes of this host, each with a GPU where there are GPUs.

    Args:
        argv: the command and its arguments.
        processes: how many.

    Returns:
        The exit code of the first process that failed; 0 if all ended well.
    """
    import torch

    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    return _launch(machine_file("2gpu" if torch.cuda.is_available() else "cpu2"), argv, processes)


def _launch(file: Path, argv: Sequence[str], processes: int | None = None) -> int:
    import torch
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_simple_launcher_cmd_env

    try:
        settings = load_config_from_file(str(file))
    except Exception as error:  # a file that is no YAML, no mapping, has unknown keys, ...: each raises a type of its own
        raise UserError(
            f"machine={file}: accelerate cannot use it: {one_line(error)}; mend the file, or remove machine="
        ) from error
    kind = str(getattr(settings.distributed_type, "value", settings.distributed_type))
    if kind not in KINDS:  # accelerate would ask for DeepSpeed or Megatron-LM, in a traceback
        expected = f"expected {', '.join(KINDS[1:])}; choose one of configs/, as 8gpu_fsdp2.yaml"
        raise UserError(f"machine={file}: distributed_type: {kind}: {expected}")
    for name in ("deepspeed_config", "megatron_lm_config", "parallelism_config", "fp8_config", "dynamo_config", "fsdp_config"):
        if getattr(settings, name, None) and (name, kind) != ("fsdp_config", "FSDP"):  # accelerate might ignore it, or compile
            raise UserError(f"machine={file}: {name}: expected none beside distributed_type: {kind}; remove it")
    if processes is None:
        _require_gpus(os.environ[MACHINE], torch.cuda.device_count())
    all_processes, hosts = size(str(file)) if processes is None else (processes, 1)
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, _cores() // max(1, all_processes // hosts)))
    settings_of_launch = ["--config_file", str(file), "--num_cpu_threads_per_process", threads]
    settings_of_launch += [] if processes is None else ["--num_processes", str(processes)]
    options = launch_command_parser().parse_args([*settings_of_launch, str(WORKER), *argv])
    if all_processes > 1 or settings.distributed_type not in ("NO", False):
        if hosts == 1:  # torchrun's store takes a port that is free: no other start can take it in between
            options.standalone, options.main_process_port = True, 0
        return _launch_several(options)
    command, environment = prepare_simple_launcher_cmd_env(_validate_launch_command(options)[0])
    environment.setdefault(LAUNCHER, str(os.getpid()))
    os.execve(command[0], command, environment)


def _launch_several(options: argparse.Namespace) -> int:
    from accelerate.commands.launch import launch_command
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ[LAUNCHER] = str(os.getpid())
    passed_on = ["SIGTERM", "SIGINT", "SIGQUIT", "SIGUSR1"]
    passed_on += ["SIGHUP"] if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN else []  # ignored under nohup
    options.signals_to_handle = ",".join(passed_on)
    options.shutdown_timeout = int(max(deadline.WITHIN_S.values()) + 10)  # then torchrun kills: they end themselves before
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
