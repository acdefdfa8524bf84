"""A rollout of 512 completions drawn by a server on loopback, against the same by an engine in the trainer's process.

Each side is a process of its own with its engine, and they take turns. Both hold the same weights, and what they draw must be
the same bytes. Processor time is that of all processes of a side, and of a sync that of the trainer's side too. Weights go to
the server twice: through memory, and over HTTP, as to a server of another host.
"""

import hashlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from rlinvariant.bench.measure import Answer, Link, Others, Row, Worker, quietest, used

SIDES = ("served", "engine")
COMPLETIONS, PROMPT, SEQUENCES, IN_STEP, LONGEST, TARGET = 512, 24, 128, 4096, 256, 1.02
TOKENS = {"tiny": 32, "smollm2-135m": 16}  # shapes, with random weights -> tokens of a completion


def rows(tiny: bool) -> Iterator[Row]:
    for model in list(TOKENS)[: 1 if tiny else None]:
        yield from _rows(model, 32 if tiny else COMPLETIONS, TOKENS[model], 0 if tiny else 150)


def _rows(model: str, completions: int, tokens: int, seconds: float) -> Iterator[Row]:
    workers = {side: Worker(__name__, side, model) for side in SIDES}
    try:
        ask: dict[str, Any] = {"completions": completions, "tokens": tokens}
        pids = [pid for side in SIDES for pid in workers[side].ask(**ask)["pids"]]  # warm, and all processes are there
        others, windows, end = Others(pids), [], time.perf_counter() + seconds
        while time.perf_counter() < end or len(windows) < 3:
            order = SIDES if len(windows) % 2 else SIDES[::-1]
            found = {side: workers[side].ask(**ask) for side in order}
            windows.append((others.share(), found))
    finally:
        for worker in workers.values():
            worker.close()
    kept, share = quietest(windows)
    same = {answers[side]["sha256"] for _, answers in windows for side in SIDES}
    case = f"{model}, {completions} completions of {tokens} tokens: "
    yield _row(kept, share, case + "rollout", "draw", TARGET, same)
    for how in ("memory", "HTTP"):
        gb = kept[0]["served"]["gb"]
        yield _row(kept, share, f"{case}sync of {gb:.2f} GB and comparison, through {how}", f"sync, {how}", None, same)


def _row(kept: list[dict[str, Answer]], share: float, case: str, part: str, target: float | None, same: set[str]) -> Row:
    ours, stock = ([answers[side][part] for answers in kept] for side in SIDES)
    wall = [median(seconds for seconds, _ in x) * 1e3 for x in (ours, stock)]
    cpu = [median(seconds for _, seconds in x) for x in (ours, stock)]
    return Row(
        bench="served",
        case=case,
        ours=round(wall[0], 1),
        stock=round(wall[1], 1),
        unit="ms",
        ratio=round(wall[0] / wall[1], 3),
        target=target,
        bits_equal={"ours": len(same) == 1, "stock": len(same) == 1},
        samples=len(kept),
        others=share,
        cpu_ratio=used(*cpu),
    )


def _worker(side: str, model: str) -> None:
    import torch

    from rlinvariant import runtime
    from rlinvariant.models.load import load
    from rlinvariant.models.shapes import build

    link = Link()
    runtime.configure()
    from transformers import AutoModelForCausalLM

    directory = build(model, tempfile.mkdtemp())
    weights = list(load(AutoModelForCausalLM, directory, dtype=torch.float32).named_parameters())
    sampler: Any = _served(directory) if side == "served" else _engine(directory)
    generator = torch.Generator().manual_seed(0)
    for request in link.requests():
        count, tokens = request["completions"], request["tokens"]
        groups = torch.randint(3, 90, (count // 8, PROMPT), generator=generator.manual_seed(0)).tolist()
        prompts = [prompt for prompt in groups for _ in range(8)]
        synced = {}
        for how in ("HTTP", "memory"):
            began = _clock()
            _sync(sampler, weights, how)
            synced[f"sync, {how}"] = _since(began)
        began = _clock()
        drawn = sampler.generate(prompts, range(count), temperature=1.0, max_tokens=tokens)
        found = hashlib.sha256(repr([(c.token_ids, c.sampler_logprobs) for c in drawn]).encode()).hexdigest()
        gb = sum(w.numel() for _, w in weights) * 2 / 1e9
        link.send(draw=_since(began), **synced, gb=gb, sha256=found, pids=[p.pid for p in _processes()])
    _stop_children()


def _sync(sampler: Any, weights: Any, how: str) -> None:
    """Give a sampler the weights, and have them compared; a server of this host gets them over HTTP, too, if it is told so."""
    servers = getattr(sampler, "_alive", [])
    memory = [server.memory for server in servers]
    assert all(memory), "the server's memory is not to be had"
    for server in servers if how == "HTTP" else ():
        server.memory = []
    sampler.sync(weights)
    assert not sampler.differing_weights(weights)
    for server, files in zip(servers, memory, strict=True):
        server.memory = files


def _processes() -> list[psutil.Process]:
    own = psutil.Process()
    return [own, *own.children(recursive=True)]


def _clock() -> tuple[float, float]:
    """Return the time, and the processor time of all processes of this side, in seconds."""
    times = [p.cpu_times() for p in _processes()]
    return time.perf_counter(), sum(t.user + t.system for t in times)


def _since(began: tuple[float, float]) -> tuple[float, float]:
    return tuple(now - then for now, then in zip(_clock(), began, strict=True))  # type: ignore[return-value]


def _engine(directory: str) -> Any:
    from rlinvariant.sampler.engine import Sampler

    options = {"max_num_seqs": SEQUENCES, "max_num_batched_tokens": IN_STEP, "enforce_eager": True}
    return Sampler(directory, invariant=True, max_model_len=LONGEST, kv_cache_gib=0.5, options=options)


def kept_port() -> socket.socket:
    """Return a socket with a port of 127.0.0.1 that nobody else is given until it is closed; one who names it may have it.

    A port that was only asked for could be another's when the server that is told of it has started.
    """
    kept = socket.socket()
    kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # of both sides, and we do not listen: Linux shares it
    kept.bind(("127.0.0.1", 0))
    return kept


def _served(directory: str) -> Any:
    import httpx

    from rlinvariant.sampler.served import ServedSampler
    from rlinvariant.sampler.server import Server
    from rlinvariant.trainer.preflight.tokens import load_generation, model_ends
    from rlinvariant.trainer_token import read

    token = Path(directory) / "trainer.token"
    token.touch(0o600)
    token.write_text("0123456789abcdef" * 4)
    kept = kept_port()
    port = kept.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    options = ["--port", str(port), "--trainer-token-file", str(token), "--max-model-len", str(LONGEST)]
    options += ["--max-num-seqs", str(SEQUENCES), "--kv-cache-memory-bytes", str(2**29), "--disable-uvicorn-access-log"]
    options += ["--max-num-batched-tokens", str(IN_STEP)]  # by itself vLLM chooses fewer for a server
    subprocess.Popen([sys.executable, "-m", "rlinvariant", "serve", directory, *options], stdin=subprocess.DEVNULL)
    while True:
        try:
            httpx.get(f"{url}/health", trust_env=False)
            break
        except httpx.TransportError:
            time.sleep(0.5)
    kept.close()
    ends = model_ends(load_generation(directory, None))  # type: ignore[arg-type]  # it has a generation_config.json
    server = Server(url, read(str(token), ""))
    return ServedSampler([server], dtype="bfloat16", max_model_len=LONGEST, eager=True, ends=ends)


def _stop_children() -> None:
    for process in psutil.Process().children():
        process.terminate()
    psutil.wait_procs(psutil.Process().children(), 20)
    os._exit(0)


if __name__ == "__main__":
    _worker(*sys.argv[1:])
