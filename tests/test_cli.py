"""Every command takes --help, a typing error, a closed pipe, ctrl-C, a model that is not there and a silent hub well."""

import os
import re
import signal
import socket
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from trl.trainer.grpo_config import GRPOConfig

from rlinvariant import __version__, cli, grpo_trainer
from rlinvariant.config import parse
from rlinvariant.errors import EXIT_CODES, MISUSED, PIPE_CLOSED, ConfigErrors, UserError
from rlinvariant.launch import size
from rlinvariant.model_source import model_problems
from rlinvariant.run import run
from rlinvariant.sampler.engine import refuse
from tests import commands
from tests.commands import interruptible

MACHINES = "1gpu, 2gpu, 2gpu_fsdp2, 8gpu, 8gpu_fsdp2, cpu, cpu2, cpu2_fsdp2"


@pytest.mark.parametrize("name", [c.name for c in cli.COMMANDS if hasattr(import_module(c.module), "add_arguments")])
@pytest.mark.parametrize("option", ["--help", "-h"])
def test_each_command_has_a_help_with_an_example(name, option, capsys):
    assert cli.main([name, option]) == 0
    shown, error = capsys.readouterr()
    assert f"usage: rlinvariant {name} " in shown and f"\n  rlinvariant {name} " in shown and not error
    assert cli.main(["help", name]) == 0 and capsys.readouterr().out == shown


def test_the_help_lists_all_commands_and_exit_codes(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for arguments in ([], ["--help"], ["-h"], ["help"]):
        assert cli.main(arguments) == 0
        shown = capsys.readouterr().out
        for command in cli.COMMANDS:
            assert f"    {command.name:<12} {command.summary}\n" in shown
        assert all(f"  {code}: " in shown for code in EXIT_CODES) and shown.count("\n  rlinvariant ") >= 2
        assert all(len(line) <= 80 for line in shown.splitlines())


@pytest.mark.parametrize("option", ["-V", "--version"])
def test_the_version(option, capsys):
    assert cli.main([option]) == 0 and capsys.readouterr().out == f"{__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["tran"], "tran: unknown command; did you mean train?; see rlinvariant --help"),
        (["dashbord", "push"], "dashbord: unknown command; did you mean dashboard?; see rlinvariant --help"),
        (["frobnicate"], "frobnicate: unknown command; see rlinvariant --help"),
        (["--frobnicate"], "rlinvariant: unrecognized arguments: --frobnicate; see rlinvariant --help"),
        (["report"], "report: the following arguments are required: RUN; see rlinvariant report --help"),
        (["serve"], "serve: the following arguments are required: MODEL; see rlinvariant serve --help"),
    ],
)
def test_a_wrong_command_is_one_line_on_stderr(arguments, line, capsys):
    assert cli.main(arguments) == 2
    assert capsys.readouterr() == ("", f"error: {line}\n")


@pytest.mark.parametrize(
    ("arguments", "lines"),
    [
        (["machine=cpu3"], [f"machine=cpu3: expected {MACHINES}, or the path of an accelerate file (.yaml); or remove it"]),
        (["machine=cpu", "machine=cpu2"], ["machine=cpu and machine=cpu2: both set the same value; keep one"]),
        (
            ["machine=gpu", "stps=3"],
            [
                f"machine=gpu: expected {MACHINES}, or the path of an accelerate file (.yaml); or remove it",
                "stps=3: unknown key; did you mean steps?",
            ],
        ),
        (
            ["machine=cpu2", "trainer.num_generations=512"],
            [
                "trainer.num_generations=512: expected a divisor of the 256 samples of a rollout "
                "(trainer.per_device_train_batch_size=128, 2 process(es)); change one of them"
            ],
        ),
    ],
)
def test_mistakes_are_said_before_any_process_starts(arguments, lines, capsys, monkeypatch):
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("rlinvariant.train.launch", lambda *_: pytest.fail("launched"))
    assert cli.main(["train", "recipe=arithmetic", *arguments]) == 2
    assert capsys.readouterr() == ("", "".join(f"error: {line}\n" for line in lines))


def test_the_machine_is_launched_with_the_other_arguments(monkeypatch, tmp_path):
    launched = []
    monkeypatch.setattr("rlinvariant.train.launch", lambda *arguments: launched.append(arguments))
    for name in ("LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "four.yaml").write_text("num_processes: 4\n")
    assert cli.main(["train", "recipe=arithmetic", f"machine={tmp_path}/four.yaml", "steps=3"]) == 0
    assert cli.main(["train", "recipe=arithmetic"]) == 0
    assert launched == [(["recipe=arithmetic", "steps=3"], f"{tmp_path}/four.yaml"), (["recipe=arithmetic"], None)]
    assert [size(m) for m in (f"{tmp_path}/four.yaml", "cpu2", "cpu", None)] == [(4, 1), (2, 1), (1, 1), (1, 1)]


def test_a_script_is_called_by_its_own_name(capsys):
    assert cli.main(["train", "--help"], script="train.py") == 0
    assert capsys.readouterr().out.startswith("usage: train.py ")


PRINTING = "import sys; from rlinvariant import cli; from rlinvariant.report.console import Console\n"
PRINTING += "sys.exit(cli.exit_code(lambda: Console().print('text')))"


@pytest.mark.parametrize(
    "arguments", [["-m", "rlinvariant", "--help"], ["-m", "rlinvariant", "train", "--help"], ["-c", PRINTING]]
)
def test_a_closed_pipe_ends_a_command_quietly(arguments):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, env=environment)
    os.close(writer)
    assert (done.returncode, done.stderr) == (PIPE_CLOSED, "")


def test_a_broken_pipe_that_is_not_the_output_is_not_hidden():
    def command() -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        cli.exit_code(command)


def test_ctrl_c_is_one_line(capsys, monkeypatch):
    def command() -> None:
        signal.raise_signal(signal.SIGINT)

    with interruptible():
        assert cli.exit_code(command) == 130
        assert capsys.readouterr().err == "interrupted\n"
        monkeypatch.setenv("RANK", "1")  # a shell's, of no launch
        assert cli.exit_code(command) == 130
        assert capsys.readouterr().err == "interrupted\n"
        monkeypatch.setenv("LOCAL_RANK", "1")
        assert cli.exit_code(command) == 130
        assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["nosuch", "./nosuch", "/nosuch/model", "~/nosuch", "runs/x/checkpoint-3", "tests/nosuch"])
def test_a_directory_that_is_not_there_is_said_at_once(name, monkeypatch, tmp_path):
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", lambda *_, **__: pytest.fail("the hub was asked"))
    args = GRPOConfig(str(tmp_path), bf16=False, logging_steps=1, report_to="none")
    for read in (lambda: refuse({}, name, "bfloat16"), lambda: grpo_trainer(name, None, args, None, invariance="off")):
        with pytest.raises(UserError) as error:
            read()
        assert any(line.startswith(f"model={name}: no such directory; ") for line in str(error.value).splitlines())
    with pytest.raises(UserError, match=re.escape(f"doctor: MODEL={name}: no such directory; ")):
        commands.run("doctor", name)
    assert model_problems("model", "Qwen/Qwen3-0.6B") == []


@pytest.mark.slow
def test_a_hub_that_does_not_answer_is_one_line():
    """Lines that huggingface_hub logs are not shown; `tests/test_hub.py` counts how often it is asked."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}"
        code = (
            "import sys\n"
            "from rlinvariant import cli\n"
            "from rlinvariant.sampler.engine import refuse\n"
            "sys.exit(cli.exit_code(lambda: refuse({}, 'a/b', 'bfloat16')))"
        )
        environment = os.environ | {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("error: model=a/b: no such directory, and the hub, ") and address in done.stderr


def test_what_one_process_alone_finds_wrong_is_said_if_the_main_one_does_not_end_it(monkeypatch, capfd):
    """Control: the main process waits for nobody."""
    waited = []

    def wrong() -> int:
        raise ConfigErrors(["steps=0: wrong"])

    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setattr("time.sleep", waited.append)
    for number, said in ((0, "error: steps=0: wrong\n"), (1, "error: rank 1: steps=0: wrong\n")):
        monkeypatch.setattr("rlinvariant.cli.rank", lambda number=number: number)
        assert cli._reported(wrong) == MISUSED
        assert capfd.readouterr().err == said and len(waited) == number


def test_a_recipes_model_is_made_without_bars(monkeypatch, tmp_path):
    from transformers.utils import logging

    seen = []

    def made(config):
        seen.append(logging.is_progress_bar_enabled())
        raise UserError("made")

    monkeypatch.chdir(tmp_path)
    logging.enable_progress_bar()
    config = parse(["recipe=arithmetic", "run=x"], {})
    recipe = type("Recipe", (), {"prepare_model": staticmethod(made), "untrained": None})
    monkeypatch.setattr(type(config), "load_recipe", lambda self: recipe)
    with pytest.raises(UserError, match="made"):
        run(config)
    assert seen == [False]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("lora.r=129", "at most 128"),
        ("lora.r=4 lora.target_modules=w1", "lora.target_modules: .*w1.* not found in the base model"),
        ("tools=tests.trainer.tool_model:reversed_text", "recipe=arithmetic, whose own model it trains: its chat"),
        (
            "sampler.servers=http://127.0.0.1:9 sampler.trainer_token_file=token",
            "^sampler.servers=http://127.0.0.1:9: not reached",
        ),
        ("seed=1", "warm start"),
    ],
)
def test_a_recipes_model_is_looked_at_before_its_warm_start(given, said, monkeypatch, tmp_path):
    """Control: what nothing speaks against gets as far as the warm start."""

    def begun(*_, **__):
        raise UserError("warm start")

    monkeypatch.chdir(tmp_path)
    Path("token").write_text("x" * 64)
    Path("token").chmod(0o600)
    monkeypatch.setattr("rlinvariant.warmstart.supervised", begun)
    with pytest.raises(UserError, match=said):
        run(parse(["recipe=arithmetic", "run=x", *given.split()], {}))


def test_processes_of_a_launch_are_compared_before_a_warm_start(monkeypatch, tmp_path):
    """Control: alone there is nothing to compare with, and the warm start begins."""

    def told(what):
        def refuse(*_, **__):
            raise UserError(what)

        return refuse

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rlinvariant.warmstart.supervised", told("warm start"))
    monkeypatch.setattr("rlinvariant.plan.require_same", told("compared"))
    for launched, said in ((True, "compared"), (False, "warm start")):
        monkeypatch.setattr("rlinvariant.plan.is_launched", lambda launched=launched: launched)
        with pytest.raises(UserError, match=said):
            run(parse(["recipe=arithmetic", "run=x"], {}))
