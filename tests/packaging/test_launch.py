"""`rlinvariant train` starts a run as `accelerate launch train.py` does: which file, how often, what comes back."""

import ast
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rlinvariant import launch
from rlinvariant.errors import UserError
from tests.commands import interruptible

ROOT = Path(__file__).parents[2]
LAUNCHED = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_CPU")
# A recipe that says in which launched process it was imported, and does there what the test wants. The process that launches
# imports it too, to find mistakes.
RECIPE = """
import os, signal, sys
from rlinvariant.launch import is_launched

def datasets(config, tokenizer): ...
def reward_funcs(config): return []
def prepare_model(config): ...

def say(**facts):
    os.write(1, (repr(facts) + "\\n").encode())

if is_launched():
    say(pid=os.getpid(), rank=os.environ.get("RANK", "0"), cpu=os.environ.get("ACCELERATE_USE_CPU"),
        threads=os.environ["OMP_NUM_THREADS"], package=__import__("rlinvariant").__file__)
    {}
"""


def start(folder: Path, body: str, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    """Start `rlinvariant train` with a recipe of this body in an empty folder."""
    (folder / "mine.py").write_text(RECIPE.format(body))
    kept = {name: value for name, value in os.environ.items() if name not in (*LAUNCHED, "OMP_NUM_THREADS")}
    environment = kept | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""} | variables
    command = [sys.executable, "-m", "rlinvariant", "train", "recipe=./mine.py", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with interruptible():
        return subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True, **pipes)


def finish(process: subprocess.Popen[str]) -> tuple[int, list[dict], str]:
    out, err = process.communicate(timeout=550)
    return process.returncode, [eval(line) for line in out.splitlines() if line.startswith("{")], err


def test_the_packaged_machine_files_are_accelerates():
    from accelerate.commands.config.config_args import load_config_from_file

    processes = {name: load_config_from_file(str(launch.machine_file(name))).num_processes for name in launch.machines()}
    several = {f"{count}gpu{kind}": count for count in (2, 8) for kind in ("", "_fsdp2")}
    assert processes == {"1gpu": 1, "cpu": 1, "cpu2": 2, "cpu2_fsdp2": 2} | several
    for name in launch.machines():
        assert yaml.safe_load(launch.machine_file(name).read_text())["mixed_precision"] == "no"


def test_a_wrong_machine_is_refused_before_anything_is_loaded(monkeypatch):
    code = (
        "import sys\nfrom rlinvariant import launch\nfrom rlinvariant.errors import UserError\n"
        "try: launch.launch([], 'gpu')\nexcept UserError as error: print(error)\n"
        "print([x for x in ('torch', 'accelerate', 'transformers', 'trl', 'vllm') if x in sys.modules])"
    )
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHED} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    first, modules = done.stdout.splitlines()
    assert first.startswith("machine=gpu: expected 1gpu, 2gpu, ") and modules == "[]", done.stderr


@pytest.mark.parametrize("content", ["", "- a list", "{", "num_processes: 1\n", "distributed_type: 'NO'\nspeed: 11\n"])
def test_a_file_that_accelerate_cannot_use_is_refused(content, tmp_path, monkeypatch):
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    file = tmp_path / "machine.yaml"
    file.write_text(content)
    with pytest.raises(UserError, match=rf"^machine={file}: accelerate cannot use it: .*; mend the file, or remove machine=$"):
        launch.launch([], str(file))


@pytest.mark.parametrize("kind", ["DEEPSPEED", "MEGATRON_LM", "XLA", "MULTI_NPU"])
def test_a_way_to_distribute_that_is_not_ours_is_refused_before_accelerate_asks_for_it(kind, tmp_path, monkeypatch):
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    file = tmp_path / "machine.yaml"
    file.write_text(
        launch.machine_file("cpu2_fsdp2").read_text().replace("distributed_type: FSDP", f"distributed_type: {kind}")
    )
    with pytest.raises(UserError, match=f"^machine={file}: distributed_type: {kind}: expected NO, MULTI_CPU, MULTI_GPU, FSDP;"):
        launch.launch([], str(file))


@pytest.mark.parametrize(
    ("machine", "section"),
    [
        ("cpu", "dynamo_config:\n  dynamo_backend: INDUCTOR"),
        ("cpu2", "parallelism_config:\n  parallelism_config_tp_size: 2"),
        ("cpu2_fsdp2", "deepspeed_config:\n  zero_stage: 3"),
        ("cpu2", "fsdp_config:\n  fsdp_version: 2"),
    ],
)
def test_a_section_that_would_be_ignored_is_refused(machine, section, tmp_path, monkeypatch):
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    file = tmp_path / "machine.yaml"
    file.write_text(f"{launch.machine_file(machine).read_text()}\n{section}\n")
    with pytest.raises(
        UserError, match=f"^machine={file}: {section.partition(':')[0]}: expected none beside distributed_type: "
    ):
        launch.launch([], str(file))


def test_a_launched_process_does_not_launch_again(monkeypatch):
    for name in ("LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"):
        assert launch.is_launched({name: "0"})
    assert not launch.is_launched({"RANK": "0"})
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(UserError, match="^machine=cpu: already started by accelerate or torchrun"):
        launch.launch([], "cpu")


def test_one_process_is_the_one_that_was_started(tmp_path):
    process = start(tmp_path, "sys.stdout.flush(); os._exit(7)", OMP_NUM_THREADS="3")
    code, said, err = finish(process)
    package = str(ROOT / "rlinvariant" / "__init__.py")
    assert said == [{"pid": process.pid, "rank": "0", "cpu": "True", "threads": "3", "package": package}], err
    assert code == 7 and err == ""


def test_two_processes_each_have_their_share_of_the_cores_and_two_runs_start_at_once(tmp_path):
    """Whatever port the machine file names, a run's processes meet at one that was free when it was taken."""
    file = tmp_path / "machine.yaml"
    file.write_text(launch.machine_file("cpu2").read_text().replace("main_process_port: 0", "main_process_port: 29517"))
    body = "open('both', 'r' if os.environ['RANK'] == '0' else 'w'); say(port=os.environ['MASTER_PORT']); os._exit(3)"
    runs = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        os.mkfifo(tmp_path / name / "both")  # opens when both of its processes are there
        runs.append(start(tmp_path / name, body, f"machine={file}"))
    ports = set()
    for process in runs:
        code, said, err = finish(process)
        assert sorted(line["rank"] for line in said if "rank" in line) == ["0", "1"] and code == 3 and err == "", err
        assert {line["threads"] for line in said if "rank" in line} == {str(max(1, len(os.sched_getaffinity(0)) // 2))}
        ports |= {line["port"] for line in said if "port" in line}
    assert len(ports) == 2 and "29517" not in ports


def test_a_mistake_is_found_before_any_process_starts(tmp_path):
    code, said, err = finish(start(tmp_path, "pass", "machine=cpu2", "stpes=3"))
    assert (code, said, err) == (2, [], "error: stpes=3: unknown key; did you mean steps?\n")


@pytest.mark.parametrize(
    ("said", "instead", "error"),
    [  # accelerate would start one process on a CPU, which would know nothing of shards
        ("num_processes: 2", "num_processes: 1", "num_processes=1: expected 2 or more with weights in shards on a CPU; "),
        ("fsdp_version: 2", "fsdp_version: 1", "FSDP_VERSION=1: expected fsdp_version: 2; "),
        ("\n  fsdp_version: 2", "", "FSDP_VERSION=1: expected fsdp_version: 2; "),
        ("", "", "trainer.optim=adafactor: expected adamw_torch_fused or adamw_torch or sgd with weights in shards "),
    ],
)
def test_what_cannot_stand_beside_shards_is_found_before_any_process_starts(said, instead, error, tmp_path):
    file = tmp_path / "machine.yaml"
    file.write_text(launch.machine_file("cpu2_fsdp2").read_text().replace(said, instead, 1))
    setting = [] if said else ["trainer.optim=adafactor"]
    code, launched, err = finish(start(tmp_path, "os._exit(3)", f"machine={file}", *setting))
    assert (code, launched) == (2, []) and err.startswith(f"error: {error}") and err.count("\n") == 1, err


def test_a_machine_without_a_mistake_starts_its_shards(tmp_path):
    """The control of the refusals."""
    process = start(tmp_path, "signal.pause()", "machine=cpu2_fsdp2")  # the first to end would end the other before it says so
    assert process.stdout is not None
    said = [ast.literal_eval(process.stdout.readline()) for _ in range(2)]
    os.killpg(process.pid, signal.SIGINT)
    process.communicate()
    assert sorted(line["rank"] for line in said) == ["0", "1"]


@pytest.mark.parametrize("machine", ["cpu", "cpu2"])
def test_a_mistake_that_the_processes_find_is_printed_once(machine, tmp_path):
    code, said, err = finish(start(tmp_path, "check = lambda config: ['data.size=1: too small']", f"machine={machine}"))
    assert code == 2 and said and err == "error: data.size=1: too small\n"


@pytest.mark.parametrize("machine", ["cpu", "cpu2"])
def test_ctrl_c_ends_every_process(machine, tmp_path):
    process = start(tmp_path, "signal.pause()", f"machine={machine}")
    assert process.stdout is not None
    for _ in range(2 if machine == "cpu2" else 1):
        assert "pid" in process.stdout.readline()  # all are there and wait
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    code, _, err = finish(process)
    assert code == 130 and err.splitlines() == ["interrupted"], err


# ---- a run ends with what launched it

LAUNCHES = """
import os, subprocess, sys
environment = os.environ | {name: value.format(os.getpid()) for name, value in VARIABLES.items()}
subprocess.Popen([sys.executable, "-c", CHILD], env=environment).wait()
"""
CHILD = """
import sys
from rlinvariant import launch
BEFORE
print(launch.end_with_launcher(), flush=True)
for line in sys.stdin:
    print("alive", flush=True)
"""
LAUNCHERS = {  # variables of the process that is launched, {} being its launcher; what it does first; whether it has a launcher
    "torchrun": ({"LOCAL_RANK": "0"}, "", True),
    "accelerate": ({"ACCELERATE_MIXED_PRECISION": "no"}, "", True),
    "rlinvariant": ({launch.LAUNCHER: "{}"}, "", True),
    "no prctl": ({"LOCAL_RANK": "0"}, "launch.end_with_parent = lambda number: False", True),
    "shell": ({}, "", False),
    "itself": ({"ACCELERATE_MIXED_PRECISION": "no"}, "import os; os.environ[launch.LAUNCHER] = str(os.getpid())", False),
}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_run_ends_with_its_launcher_and_outlives_a_shell(name, number):
    """The two that outlive it are the control."""
    variables, before, launched = LAUNCHERS[name]
    code = f"VARIABLES, CHILD = {variables!r}, {CHILD.replace('BEFORE', before)!r}\n{LAUNCHES}"
    kept = {name: value for name, value in os.environ.items() if name not in LAUNCHED} | {"PYTHONPATH": str(ROOT)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], env=kept, **pipes) as launcher:
        assert launcher.stdin is not None and launcher.stdout is not None
        assert launcher.stdout.readline() == f"{launched}\n"
        launcher.send_signal(number)
        launcher.wait()
        if launched:
            assert launcher.stdout.read() == "", "nobody has the pipe any more"
        else:
            launcher.stdin.write("\n")
            launcher.stdin.flush()
            assert launcher.stdout.readline() == "alive\n"


def test_a_run_whose_launcher_is_gone_does_not_start(monkeypatch):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    monkeypatch.setenv(launch.LAUNCHER, str(gone.pid))
    code = "from rlinvariant import cli, launch; cli.main = lambda *_: cli.exit_code(launch.end_with_launcher); cli.end()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (143, "stopped by SIGTERM\n")


def test_a_launcher_passes_a_signal_on_and_waits(tmp_path):
    """The launcher of two processes; one alone is the one that was started. SIGUSR1 would kill torchrun."""
    os.mkfifo(tmp_path / "both")  # opens when both have it: the first to end would end the other before it says so
    got = "say(got=1) or open('both', 'r' if os.environ['RANK'] == '0' else 'w') and os._exit(7)"
    body = f"signal.signal(signal.SIGUSR1, lambda *_: {got}); say(waits=1); signal.pause()"
    process = start(tmp_path, body, "machine=cpu2")
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(4)]
    assert sum("waits" in line for line in lines) == 2
    process.send_signal(signal.SIGUSR1)
    assert finish(process) == (138, [{"got": 1}] * 2, "")


def test_a_machine_of_gpus_that_are_not_here_is_refused(tmp_path, monkeypatch):
    """Accelerate would start as many processes on the CPU."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")  # which a launch sets
    with pytest.raises(UserError, match=r"^machine=8gpu: use_cpu: false, and torch finds no GPU here"):
        launch.launch([], "8gpu")
    for machine in ("1gpu", "8gpu", "2gpu_fsdp2"):
        with pytest.raises(UserError, match=rf"^machine={machine}: use_cpu: false, .*; use one of cpu, cpu2, cpu2_fsdp2$"):
            launch._require_gpus(machine, 0)
    with pytest.raises(UserError, match=r"^machine=8gpu: num_processes: 8: expected at most 2 a host"):
        launch._require_gpus("8gpu", 2)
    hosts = tmp_path / "hosts.yaml"
    hosts.write_text((launch.MACHINE_FILES / "8gpu.yaml").read_text().replace("num_machines: 1", "num_machines: 4"))
    for machine, found in (("cpu2", 0), ("8gpu", 8), (str(hosts), 2)):
        launch._require_gpus(machine, found)
