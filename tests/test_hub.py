"""A name that is no directory: the hub is asked before anything is loaded, and its silence or its no is one line."""

import os
import socketserver
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants, file_download
from trl.trainer.grpo_config import GRPOConfig

from rlinvariant import launch, replay
from rlinvariant.api import GRPOTrainer, PPOTrainer
from rlinvariant.config import PPOConfig
from rlinvariant.errors import UserError
from rlinvariant.hub import hub_refusal
from rlinvariant.model_source import source_problems
from rlinvariant.recipes import _rows
from rlinvariant.sampler.refusals import load_config
from tests import commands, forks
from tests.parity.device import cpu_only


class Hub:
    """Holds what it was asked, and its answer to all: a status, or none at all."""

    asked: list[str]
    status: int | None = None
    silent = 0  # how many requests have no answer, the first ones

    def __init__(self) -> None:
        self.asked = []


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Iterator[Hub]:
    """Start a hub that hangs up, and let huggingface_hub ask it, with an empty cache; nothing waits between two tries."""
    found = Hub()

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            line = self.rfile.readline().decode().strip()
            while self.rfile.readline().strip():
                pass
            if "/api/agent-harnesses" in line:  # huggingface_hub's own, once in a process
                return
            found.asked.append(line)
            if found.status is not None and len(found.asked) > found.silent:
                self.wfile.write(f"HTTP/1.1 {found.status} x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode())

    server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    for module in (constants, file_download):
        monkeypatch.setattr(
            module, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}", raising=False
        )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    yield found
    server.shutdown()
    server.server_close()


def script(trainer: type[GRPOTrainer], model: str, **options: object) -> None:
    args = GRPOConfig("out", bf16=False, logging_steps=1, report_to="none", use_cpu=True)
    trainer(model, None, args, None, **options)  # type: ignore[arg-type]


WAYS = {
    "train": lambda: commands.run("train", "recipe=arithmetic", "model=nosuch/dir"),
    "train, rows": lambda: commands.run("train", "model=nosuch/dir", "data.path=nosuch/rows", "reward=of_silence.py:right"),
    "eval": lambda: commands.run("eval", "nosuch/dir", "recipe=arithmetic"),
    "verify": lambda: commands.run("verify", "nosuch/dir"),
    "bisect": lambda: commands.run("bisect", "nosuch/dir"),
    "serve": lambda: commands.run("serve", "nosuch/dir"),
    "demo": lambda: commands.run("demo", "nosuch/dir"),
    "ablate": lambda: commands.run("ablate", "recipe=arithmetic", "model=nosuch/dir"),
    "script": lambda: script(GRPOTrainer, "nosuch/dir"),
    "script, sampler's": lambda: script(GRPOTrainer, ".", sampler_model="nosuch/dir"),
    "script, critic": lambda: script(PPOTrainer, ".", ppo=PPOConfig(critic="nosuch/dir")),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_silent_hub_is_asked_twice_for_a_model(way, hub, tmp_path, monkeypatch):
    for name in ("transformers.AutoConfig.from_pretrained", "datasets.load_dataset"):
        monkeypatch.setattr(name, lambda *_, **__: pytest.fail("something is loaded"))
    (tmp_path / "of_silence.py").write_text("def right(completions, **_):\n    return [0.0 for _ in completions]\n")
    with pytest.raises(UserError) as raised:
        WAYS[way]()
    lines = [line for line in str(raised.value).splitlines() if "nosuch/dir" in line]
    assert len(lines) == 1 and "nosuch/dir: no such directory, and the hub, http://127.0.0.1:" in lines[0]
    assert "does not answer" in lines[0] and lines[0].endswith("; go online, or mend the name")
    assert hub.asked[0].startswith("HEAD /nosuch/dir/resolve/main/config.json")
    assert len(hub.asked) == 2 * (1 + (way == "train, rows")), "twice for each name"
    assert not (tmp_path / "runs").exists()


def test_a_silent_hub_is_asked_twice_for_rows(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"^org/rows: cannot be had from the hub: the hub, .* go online, or give data\.path"):
        _rows.of_hub("org/rows", None, "train", "give data.path=FILE")
    assert len(hub.asked) == 2
    for name, directory in {"org/rows": "org___rows", "Org/MATH-500": "Org___math-500"}.items():  # as `datasets` names them
        (tmp_path / directory).mkdir()
        assert hub_refusal(name, "dataset") is None and len(hub.asked) == 2, "what is in the cache needs no hub"


def test_the_control_asks_again_and_again(hub):
    with pytest.raises(UserError, match="cannot be loaded"):
        load_config("nosuch/dir")
    assert len(hub.asked) > 2


def test_a_hub_that_answers_at_the_second_try_has_the_model(hub):
    hub.silent, hub.status = 1, 200
    assert source_problems("model", "org/there") == [] and len(hub.asked) == 2


PROCESSES = {
    "alone": ({}, True),
    "the main process": ({"LOCAL_RANK": "0", "RANK": "0"}, True),
    "another": ({"LOCAL_RANK": "1", "RANK": "1"}, False),
    "one whose launcher has asked": ({"LOCAL_RANK": "0", "RANK": "0", launch.LAUNCHER: "7"}, False),
}


@pytest.mark.parametrize("process", PROCESSES)
def test_one_process_of_a_launch_asks(process, hub, monkeypatch):
    variables, asks = PROCESSES[process]
    for name in ("LOCAL_RANK", "RANK", launch.LAUNCHER):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    hub.status = 404
    assert len(source_problems("model", "nosuch/dir")) == asks == len(hub.asked)


FETCHING = """
import sys
from accelerate import PartialState
from rlinvariant.launch import main_process_fetches, rank
PartialState(cpu=True)
for name in ("org/model", "org/refused"):
    try:
        with main_process_fetches(name):
            print(rank(), file=open(name.replace("/", "-"), "a"), flush=True)
            if name == "org/refused":
                raise ValueError
    except ValueError:
        pass
"""


@cpu_only("two processes are joined by gloo")
def test_the_main_process_fetches_first(tmp_path):
    """Also where that fails: nobody waits for ever."""
    (tmp_path / "fetching.py").write_text(FETCHING)
    for done in forks.run_ranks(2, [str(tmp_path / "fetching.py")], cwd=tmp_path, env=os.environ):
        assert done.returncode == 0, done.stderr
    assert [(tmp_path / f"org-{name}").read_text().split() for name in ("model", "refused")] == 2 * [["0", "1"]]


@pytest.mark.parametrize(("status", "words"), [(401, "log in"), (404, "log in"), (200, None), (307, None), (503, None)])
def test_the_hubs_answer_decides(status, words, hub):
    """It answers 401 for a name that it does not have; what is only busy is left to the client, which asks again."""
    hub.status = status
    found = source_problems("model", "nosuch/dir")
    assert len(hub.asked) == 1 and len(found) == (words is not None)
    assert words is None or (f"(status {status})" in found[0] and words in found[0])


def test_what_is_in_the_cache_needs_no_hub_and_without_it_offline_is_said(hub, tmp_path, monkeypatch):
    def find(name: str) -> list[str]:
        return source_problems("model", name)

    snapshot = tmp_path / "cache/models--org--kept/snapshots/0"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (tmp_path / "cache/models--org--kept/refs").mkdir()
    (tmp_path / "cache/models--org--kept/refs/main").write_text("0")
    assert find("org/kept") == [] and find("org/" + "x" * 120)[0].count("no hub id") == 1
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert find("org/kept") == [] and "HF_HUB_OFFLINE forbids to ask" in find("org/other")[0]
    assert hub.asked == []


def test_a_recordings_weights_are_asked_for_before_torch(hub, monkeypatch):
    Path("runs/x/completions").mkdir(parents=True)
    monkeypatch.setattr(replay, "recorded", lambda *_: (None, {}, "nosuch/dir"))
    with pytest.raises(UserError, match="weights=nosuch/dir: no such directory, and the hub"):
        commands.run("replay", "runs/x", "--step", "1")
