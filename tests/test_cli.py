"""What every command does with ctrl-C, with the name of a model that is not there, and with a hub that does not answer."""

import os
import signal
import socket
import subprocess
import sys

import pytest
from trl.trainer.grpo_config import GRPOConfig

from rlinvariant import cli, grpo_trainer
from rlinvariant.arguments import model_problems
from rlinvariant.config import parse
from rlinvariant.doctor import of_model
from rlinvariant.errors import UserError
from rlinvariant.run import run
from rlinvariant.sampler.engine import refuse


def test_ctrl_c_is_one_line(capsys, monkeypatch):
    def command() -> None:
        signal.raise_signal(signal.SIGINT)

    assert cli._call(command) == 130
    assert capsys.readouterr().err == "interrupted\n"
    monkeypatch.setenv("RANK", "1")
    assert cli._call(command) == 130
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["nosuch", "./nosuch", "/nosuch/model", "~/nosuch", "runs/x/checkpoint-3", "tests/nosuch"])
def test_a_directory_that_is_not_there_is_said_at_once(name, monkeypatch, tmp_path):
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", lambda *_: pytest.fail("the hub was asked"))
    args = GRPOConfig(str(tmp_path), bf16=False, logging_steps=1, report_to="none")
    for read in (lambda: refuse({}, name, "bfloat16"), lambda: grpo_trainer(name, None, args, None, invariance="off")):
        with pytest.raises(UserError) as error:
            read()
        assert any(line.startswith(f"model={name}: no such directory; ") for line in str(error.value).splitlines())
    (finding,) = of_model(name, cuda=False)
    assert finding.verdict == "problem" and finding.text.startswith(f"MODEL={name}: no such directory; ")
    assert model_problems("model", "Qwen/Qwen3-0.6B") == []


def test_a_hub_that_does_not_answer_is_one_line():
    """Retries are huggingface_hub's, here without waiting; what it logs of each is not shown."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}"
        code = (
            "import sys, time; time.sleep = lambda seconds: None\n"
            "from rlinvariant import cli\n"
            "sys.exit(cli._call(lambda: __import__('rlinvariant.sampler.engine').sampler.engine.refuse({}, 'a/b', 'bfloat16')))"
        )
        environment = os.environ | {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("error: model=a/b: cannot be loaded: ") and address in done.stderr


def test_a_recipes_model_is_made_without_bars(monkeypatch, tmp_path):
    from transformers.utils import logging

    seen = []

    def made(config):
        seen.append(logging.is_progress_bar_enabled())
        raise UserError("made")

    monkeypatch.chdir(tmp_path)
    logging.enable_progress_bar()
    config = parse(["recipe=arithmetic", "run=x"], {})
    recipe = type("Recipe", (), {"prepare_model": staticmethod(made)})
    monkeypatch.setattr(type(config), "load_recipe", lambda self: recipe)
    with pytest.raises(UserError, match="made"):
        run(config)
    assert seen == [False]
