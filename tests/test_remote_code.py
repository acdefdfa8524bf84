"""A model from elsewhere is data: no command runs code of its repository, whatever a user answers when asked."""

import builtins
import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoTokenizer

from rlinvariant import cli
from rlinvariant.errors import UserError
from rlinvariant.sampler.refusals import load_config

CODE = """
from pathlib import Path
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
Path(__file__).resolve()
Path({canary!r}).write_text("ran")
class C(PreTrainedConfig):
    model_type = "foreign"
class M(PreTrainedModel):
    config_class = C
class T(PreTrainedTokenizerFast):
    pass
"""
COMMANDS = {
    "verify": ["{}"],
    "bisect": ["{}"],
    "doctor": ["{}"],
    "serve": ["{}"],
    "demo": ["{}", "run=y"],
}


@pytest.fixture
def canary(tmp_path) -> Path:
    return tmp_path / "canary"


@pytest.fixture
def foreign(arithmetic_dir, tmp_path, canary, monkeypatch) -> str:
    """A checkpoint whose configuration, model and tokenizer name code beside it; whoever is asked says yes."""
    path = Path(shutil.copytree(arithmetic_dir, tmp_path / "foreign"))
    (path / "code_of_theirs.py").write_text(CODE.format(canary=str(canary)))
    names = {"AutoConfig": "code_of_theirs.C", "AutoModelForCausalLM": "code_of_theirs.M", "AutoModel": "code_of_theirs.M"}
    for file, changes in (
        ("config.json", {"model_type": "foreign", "architectures": ["M"], "auto_map": names}),
        ("tokenizer_config.json", {"tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["code_of_theirs.T"] * 2}}),
    ):
        (path / file).write_text(json.dumps(json.loads((path / file).read_text()) | changes))
    monkeypatch.setattr(builtins, "input", lambda *_: "y")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.chdir(tmp_path)
    return str(path)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_runs_no_code_of_a_model(command, foreign, canary, capsys):
    code = cli.main([command, *(argument.format(foreign) for argument in COMMANDS[command])])
    err = capsys.readouterr().err
    assert code in (1, 2) and not canary.exists()
    assert code == 1 or (err.startswith("error: ") and err.strip().count("\n") == 0), err


def test_a_training_run_starts_no_code_of_a_model(foreign, canary):
    """`train` loads a configuration by this function, and nothing before it; its command would replace this process."""
    with pytest.raises(UserError, match="cannot be loaded"):
        load_config(foreign)
    assert not canary.exists()


def test_transformers_alone_would_ask_and_run_it(foreign, canary):
    """Control: without our trust_remote_code=False, a "y" at its question runs the code."""
    AutoConfig.from_pretrained(foreign)
    assert canary.exists()
    canary.unlink()
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoConfig.from_pretrained(foreign, trust_remote_code=False)
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoTokenizer.from_pretrained(foreign, trust_remote_code=False)
