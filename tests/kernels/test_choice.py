"""The attention of a GPU is chosen once in a process, for all layers, and every file that speaks of bits says which it was."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlinvariant import plan, replay, support
from rlinvariant.config import parse
from rlinvariant.doctor import kernels as doctors_kernels
from rlinvariant.doctor import machine
from rlinvariant.errors import ConfigErrors, UserError
from rlinvariant.evaluation.subject import TAKEN
from rlinvariant.kernels import attention, choice
from rlinvariant.kernels.routes import attention_routes
from rlinvariant.launch import require_same
from rlinvariant.models import make_invariant, two_layers
from rlinvariant.models.families import FAMILIES
from rlinvariant.models.limits import attention_forms, attention_of, flash_problems
from rlinvariant.sampler.refusals import engine_problems, refuse
from rlinvariant.sampler.server import Server
from rlinvariant.sampler.vllm_serve import ATTENTION_KEY, Worker
from rlinvariant.trainer_token import Token
from rlinvariant.verification import certificate, servers

ROOT = Path(__file__).parents[2]
TRAIN = ("recipe=arithmetic", "run=x", "wandb.mode=disabled")


@pytest.fixture
def begin(monkeypatch):
    """Makes this process one that has not chosen yet, with a variable or without."""

    def begun(value: str | None) -> None:
        monkeypatch.setattr(choice, "_decided", [])
        monkeypatch.setenv(choice.VARIABLE, value or "")

    begun(None)
    return begun


# ---- one choice in a process


def test_it_is_auto_unless_the_environment_says_otherwise(begin):
    assert choice.chosen() == "auto"
    for value in choice.ATTENTIONS:
        begin(value)
        assert choice.chosen() == value
    begin("fast")
    with pytest.raises(UserError, match=r"^RLINVARIANT_ATTENTION=fast: expected auto, flash or chunked; unset it$"):
        choice.chosen()


def test_the_first_that_asks_decides(begin, monkeypatch):
    assert choice.chosen() == "auto"
    monkeypatch.setenv(choice.VARIABLE, "chunked")
    for _ in range(2):
        with pytest.raises(UserError, match=r"^attention=chunked: this process has begun with attention=auto; start another"):
            attention.own(128, None, None)
    monkeypatch.setenv(choice.VARIABLE, "")
    with pytest.raises(UserError, match=r"^attention=chunked: this process has begun with attention=auto"):
        choice.choose("chunked")
    assert not os.environ[choice.VARIABLE] and choice.chosen() == "auto", "a choice that is refused leaves nothing"


def test_what_a_configuration_chooses_is_in_the_environment_of_processes_that_it_starts(begin):
    choice.choose("chunked")
    assert os.environ[choice.VARIABLE] == "chunked" == choice.chosen()
    choice.choose("chunked")
    with pytest.raises(UserError, match=r"^attention=auto: the environment has RLINVARIANT_ATTENTION=chunked; unset it"):
        choice.choose("auto")


ON_RANKS = """
import os
import torch
from rlinvariant import plan
from rlinvariant.errors import UserError
from rlinvariant.launch import join, rank, require_same
join()
require_same(plan._software())
for name in ("attention", "package torch", "rlinvariant's sources", "OF_ONE"):
    try:
        require_same(plan._software() | ({name: "other"} if rank() else {}))
    except UserError as error:
        with open(f"said{rank()}", "a") as said:
            print(error, file=said)
torch.distributed.destroy_process_group()  # gloo's threads abort a process that ends with its peer's connection open
"""


@pytest.mark.slow
def test_processes_of_a_run_must_agree(tmp_path):
    """Two hosts may have different environments. Control: processes that agree go on."""
    require_same({"attention": choice.chosen()})
    (tmp_path / "ranks.py").write_text(ON_RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(tmp_path / "ranks.py")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    about = plan._software()
    said = [f"{name}=other: the main process has {about.get(name)}; give all the same" for name in (*NAMES, "OF_ONE")]
    assert (tmp_path / "said0").read_text().splitlines() == [f"rank 1: {line}" for line in said]
    assert (tmp_path / "said1").read_text().splitlines() == said
    assert all(about[name] for name in NAMES)


NAMES = ("attention", "package torch", "rlinvariant's sources")


# ---- what a layer takes

FORMS = {(128, None, None): [], (64, None, None): [], (96, None, None): ["head_dim=96"]}
FORMS |= {(128, 40, None): ["sliding_window=40"], (80, 40, 2.0): ["head_dim=80", "sliding_window=40"]}
FORMS[80, 40, 2.0] += ["attn_logit_softcapping=2.0"]


@pytest.mark.parametrize("form", FORMS)
def test_what_a_form_takes(begin, form):
    reasons = FORMS[form]
    assert attention.not_flash(*form) == reasons and attention.own(*form) == bool(reasons)
    begin("chunked")
    assert attention.own(*form)
    begin("flash")
    if not reasons:
        assert not attention.own(*form)
        return
    with pytest.raises(
        UserError, match=rf"^{reasons[0]}: attention=flash cannot take it, .*; write attention=auto or chunked$"
    ):
        attention.own(*form)


def test_a_chip_without_flash_attention_3_has_none(begin, monkeypatch):
    monkeypatch.setenv(attention.PORTABLE, "sm_80")
    begin("flash")
    with pytest.raises(UserError, match=r"^device=sm_80: attention=flash cannot take it"):
        attention.own(128, None, None)


def test_the_kernels_of_a_form_are_those_of_the_choice(begin):
    pytest.importorskip("triton")
    attention._calls.cache_clear()
    for value, name in {"auto": attention.FLASH, "chunked": "our own, 128 keys a block, 1024 a chunk"}.items():
        begin(value)
        assert attention._calls(128, 1.0, None, None).name == name
        assert (attention.schedule_size(3, 128) == attention.flash.schedule_size(3)) == (value == "auto")
        attention._calls.cache_clear()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_configuration_tells_the_forms_that_its_model_has(family):
    config = FAMILIES[family]()
    model = make_invariant(AutoModelForCausalLM.from_config(two_layers(config), dtype=torch.bfloat16))
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "softcap")]
    assert layers and {(x.head_dim, x.window, x.softcap) for x in layers} == set(attention_forms(config))


def test_what_is_said_of_a_model(begin):
    """Heads of the families are 64 wide, unless the hidden size says otherwise."""
    said = {name: attention_of(FAMILIES[name]()) for name in ("llama", "mistral-window", "gemma2", "gemma3")}
    one = "FlashAttention-3, one split"
    assert said["llama"] == f"{one} for all layers; attention=auto"
    assert said["mistral-window"] == "our own for all layers, sliding_window=40 (sliding_window=40); attention=auto"
    assert said["gemma2"].startswith("our own for full layers (attn_logit_softcapping=2.0); our own for layers with sliding_w")
    assert said["gemma3"] == (
        f"{one} for full layers; our own for layers with sliding_window=40 (sliding_window=40); attention=auto"
    )
    begin("chunked")
    assert attention_of(FAMILIES["llama"]()) == "our own for all layers; attention=chunked"


# ---- refusals


def test_a_model_that_flash_attention_3_cannot_take_is_refused_by_its_key(begin):
    begin("flash")
    problems = {name: flash_problems("M", FAMILIES[name](), "cuda") for name in ("llama", "gemma2", "gemma3", "olmo2")}
    fix = "attention=flash cannot take it, FlashAttention-3 is not exact there; write attention=auto or chunked"
    assert problems["llama"] == []
    assert problems["gemma2"] == [f"model=M: attn_logit_softcapping=2.0: {fix}"]
    assert problems["gemma3"] == [f"model=M: sliding_window=40: {fix}"]
    assert engine_problems({}, "M", FAMILIES["gemma3"](), None, "use invariance=off", "cuda") == problems["gemma3"]
    assert flash_problems("M", FAMILIES["gemma3"](), "cpu") == []
    begin("chunked")
    assert flash_problems("M", FAMILIES["gemma3"](), "cuda") == []


def test_a_process_whose_choice_was_refused_goes_on_without_it(begin, monkeypatch, arithmetic_dir):
    """A notebook that had set the variable had to start another kernel, though the line says to unset it."""
    begin("chunked")
    args: Any = SimpleNamespace(device=torch.device("cpu"))
    assert support.device_problems(args, "exact", torch.bfloat16)
    with pytest.raises(ConfigErrors):
        refuse({}, str(arithmetic_dir), "bfloat16")
    assert any(x.verdict == "problem" for x in machine.variables({}, cuda=False))
    monkeypatch.delenv(choice.VARIABLE)
    assert support.device_problems(args, "exact", torch.bfloat16) == []
    refuse({}, str(arithmetic_dir), "bfloat16")
    assert choice.chosen() == "auto"


@pytest.mark.parametrize("value", ["flash", "chunked"])
def test_a_cpu_and_a_stock_run_refuse_it(begin, value, arithmetic_dir):
    """Every command asks one of these two."""
    begin(value)
    args: Any = SimpleNamespace(device=torch.device("cpu"))
    fix = "write attention=auto (of commands without settings: unset RLINVARIANT_ATTENTION)"
    cpu = f"attention={value}: expected auto on a CPU, which has one attention, kernels/attention.c; {fix}"
    assert support.device_problems(args, "exact", torch.bfloat16) == [cpu]
    with pytest.raises(ConfigErrors) as caught:
        refuse({}, str(arithmetic_dir), "bfloat16")
    assert caught.value.errors == [cpu]
    off = f"attention={value}: expected auto with invariance=off, both of whose sides are stock; {fix}"
    for kind in ("cpu", "cuda"):
        args.device = torch.device(kind)
        assert support.device_problems(args, "off", torch.bfloat16) == [off]
    found = [x.text for x in machine.variables({}, cuda=False) if x.verdict == "problem"]
    assert found == [cpu] and not any(x.verdict == "problem" for x in machine.variables({}, cuda=True))


def test_a_configuration_is_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse([*TRAIN, "attention=chunked"], {choice.VARIABLE: "chunked"}).attention == "chunked"
    assert parse(TRAIN, {choice.VARIABLE: ""}).attention == "auto"
    refused = {
        ("attention=fast",): "attention=fast: expected one of auto, flash, chunked",
        ("attention=flash", "invariance=off"): "attention=flash: expected auto with invariance=off, both of whose sides",
        ("attention=flash", f"{choice.VARIABLE}=chunked"): "attention=flash: the environment has RLINVARIANT_ATTENTION=chunked",
        (f"{choice.VARIABLE}=chunked",): "attention=auto: the environment has RLINVARIANT_ATTENTION=chunked; unset it",
    }
    for given, line in refused.items():
        env = dict(x.split("=") for x in given if x.startswith(choice.VARIABLE))
        with pytest.raises(ConfigErrors) as caught:
            parse([*TRAIN, *(x for x in given if not x.startswith(choice.VARIABLE))], env)
        assert len(caught.value.errors) == 1 and caught.value.errors[0].startswith(line)
    assert "attention" in TAKEN, "an evaluation of a run takes the run's own"


# ---- what says of itself how it computes


def test_a_certificate_is_of_one_attention(begin, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    subjects = {}
    for value in choice.ATTENTIONS:
        begin(value)
        subjects[value] = certificate.subject(FAMILIES["llama"](), "bfloat16")
    assert {key: subject["attention"] for key, subject in subjects.items()} == {key: key for key in choice.ATTENTIONS}
    assert len({certificate.path_of(x, "full") for x in subjects.values()}) == 3
    assert certificate.differences(subjects["auto"], subjects["chunked"]) == ["attention auto -> chunked"]
    before = {key: value for key, value in subjects["auto"].items() if key != "attention"}  # of an earlier version
    assert certificate.differences(before, subjects["auto"]) == []
    assert certificate.differences(before, subjects["flash"]) == ["attention auto -> flash"]


def test_the_process_of_a_servers_engine_must_have_the_servers_choice(begin):
    """Something may start it with another environment."""
    config: Any = SimpleNamespace(model_config=SimpleNamespace(hf_config=None))
    said = "attention=auto in the engine's process, attention={} in the one that started it; give both the same RLINV"
    for asked in ("chunked", None):
        config.vllm_config = SimpleNamespace(additional_config={} if asked is None else {ATTENTION_KEY: asked})
        with pytest.raises(UserError, match=f"^{said.format(asked)}"):
            Worker.load_model(config)


def test_a_server_with_another_attention_is_refused_by_both_values(begin):
    begin("chunked")
    config, at = FAMILIES["llama"](), Server("http://127.0.0.1:9", Token("0" * 64))
    own = certificate.subject(config, "bfloat16")
    about = {"model": "M", "max_model_len": 64, "subject": own}
    assert servers._problems(at, about, own, "M", None) == []
    fix = "start it with RLINVARIANT_ATTENTION=chunked"
    for theirs, said in ((own | {"attention": "flash"}, "flash"), ({k: own[k] for k in own if k != "attention"}, "auto")):
        assert servers._problems(at, about | {"subject": theirs}, own, "M", None) == [
            f"sampler.servers=http://127.0.0.1:9: it runs attention={said}, the trainer attention=chunked; {fix}"
        ]


def test_a_replay_takes_the_runs_own(begin, monkeypatch):
    then = {"threads": None, "attention": "chunked"}
    replay.compute_as(then)
    assert choice.chosen() == "auto", "a CPU has one"
    begin(None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    replay.compute_as(then)
    assert choice.chosen() == "chunked"
    begin("flash")
    with pytest.raises(UserError, match=r"^attention=chunked: the environment has RLINVARIANT_ATTENTION=flash; unset it"):
        replay.compute_as(then)
    begin(None)
    replay.compute_as({"threads": None})  # of an earlier version
    assert choice.chosen() == "auto"


def test_the_doctor_says_which_attention_a_model_gets(begin):
    say = lambda config=None: next(x.text for x in doctors_kernels.kernels_cuda(config) if x.name == "attention")  # noqa: E731
    assert say(FAMILIES["llama"]()) == attention_of(FAMILIES["llama"]())
    with_heads = "FlashAttention-3, one split for heads of 64, 128, 256 without window and cap"
    assert say() == f"{with_heads}, our own for others; attention=auto"
    begin("flash")
    assert say() == f"{with_heads}, others are refused; attention=flash"
    begin("chunked")
    assert say() == "our own; attention=chunked"


def test_a_run_records_what_each_form_took(monkeypatch):
    found = {"16/8 heads of 128": "our own, 128 keys", "16/8 heads of 64": "FlashAttention-3, one split"}
    found["16/8 heads of 128, window 40"] = "our own, 128 keys"
    monkeypatch.setattr("rlinvariant.kernels.routes.ATTENTION_ROUTES", found)
    assert attention_routes() == (
        "our own, 128 keys, for 16/8 heads of 128 and 16/8 heads of 128, window 40; "
        "FlashAttention-3, one split, for 16/8 heads of 64"
    )
