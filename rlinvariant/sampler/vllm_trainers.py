"""The routes by which a trainer draws from `rlinvariant serve`: prove, join, sync, checksum, generate.

`vllm_guard.Guard`, outside of `Trainers`, lets nobody in without the token. A trainer joins, and says which adapters it will
bring; it sends weights in parts, and has their checksums compared with its own: when all are equal the server holds a
*version*, the digest of those checksums, and draws requests that name it. Whatever changes the weights takes the version away
first, and waits for requests that still run: no completion is drawn by two versions, and each answer says which it was.
"""

import asyncio
import io
import json
import math
import os
import secrets
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from vllm.sampling_params import RequestOutputKind

from rlinvariant.checksums import digest
from rlinvariant.errors import UserError, one_line
from rlinvariant.models import lora
from rlinvariant.rollout import Completion
from rlinvariant.sampler import handover, wire
from rlinvariant.sampler.settings import sampling_params
from rlinvariant.sampler.vllm_guard import WITH_TOKEN
from rlinvariant.text import say, shown
from rlinvariant.types import JsonObject, Untyped

REFUSED, CONFLICT, FAILED, ANEW = 400, 409, 500, 503
NO_REQUEST = (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError)
"""The errors by which Python tells that a body is not what it should be."""
RESET_TRIES, RESET_PAUSE_S = 200, 0.05  # the engine frees the last request's pages a moment after its answer


class Refused(Exception):
    """Tells a trainer, with a status, why its request is not answered."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Trainers:
    """Answers, as ASGI middleware, the paths of `vllm_guard.WITH_TOKEN`; all others are the application's."""

    def __init__(self, app: Untyped) -> None:
        self.app = app
        self.session = self.version = self.trainer = None  # of the trainer that has joined last; what it has synced
        self.memory: list[io.FileIO] = []  # of this session's trainer, if it is on this host
        self.running = 0  # requests of `generate`
        self.idle = asyncio.Condition()
        self.writing = asyncio.Lock()
        self.calls = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        path = scope["path"].removeprefix(scope.get("root_path") or "") if scope["type"] == "http" else ""
        if path not in WITH_TOKEN:
            return await self.app(scope, receive, send)
        if scope["method"] != "POST":
            refusal = {"error": f"{scope['method']}: expected POST"}
            return await JSONResponse(refusal, 405, {"Allow": "POST"})(scope, receive, send)
        self.engine, self.facts = scope["app"].state.engine_client, scope["app"].state.args.trainer_facts
        request = Request(scope, receive)
        work: Callable[[Request], Awaitable[Callable[[], Awaitable[JsonObject]]]] = getattr(self, path.rpartition("/")[2])
        try:
            answer = await work(request)
        except ClientDisconnect:  # in the middle of its body, which nothing has been done with
            return None
        except Refused as refused:
            return await JSONResponse({"error": str(refused)}, refused.status)(scope, receive, send)
        except (UserError, *NO_REQUEST) as error:
            return await JSONResponse({"error": f"{path}: {one_line(error)}"}, REFUSED)(scope, receive, send)
        await _answered(answer(), receive, send)

    async def _rpc(self, method: str, *args: Any) -> Any:
        """Call a method of `vllm_serve.Worker` in the engine's process."""
        (result,) = await self.engine.collective_rpc(method, args=args)
        return result

    def _require_session(self, session: Any) -> None:
        if self.session is None:  # to a trainer that had joined it, this server is as good as gone
            raise Refused(ANEW, "no trainer has joined this server since it was started")
        if session != self.session:
            raise Refused(CONFLICT, f"{self.trainer} has since joined this server; one trainer has it at a time")

    # ---- the routes: each reads and checks its request, and returns what makes the answer

    async def prove(self, request: Request) -> Callable[[], Awaitable[JsonObject]]:
        await _body(request, "prove")

        async def answer() -> JsonObject:
            proof, config = await self._rpc("prove"), self.engine.model_config
            own = {"max_model_len": config.max_model_len, "dtype": str(config.dtype).removeprefix("torch.")}
            return {"protocol": wire.PROTOCOL, "proof": proof, "trainer": self.trainer, **own, **self.facts}

        return answer

    async def join(self, request: Request) -> Callable[[], Awaitable[JsonObject]]:
        body = await _body(request, "join")
        trainer, ranks, mark = shown(body["trainer"]), dict(body["ranks"]), str(body["mark"])
        if unfit := await self._rpc("unfit", ranks):  # while whoever has joined it before still has it
            raise Refused(REFUSED, unfit)

        async def answer() -> JsonObject:
            async with self.writing:
                before, self.trainer = self.trainer, trainer
                self.session, self.version = secrets.token_hex(16), None
                await self._until_idle()  # what the one before has asked for comes to its end, or ends with it
                await self._rpc("make_room", ranks)
                await self._rpc("keep_drawn")
                self.memory = [handover.made(mark) for _ in range(wire.PIECES)]  # whoever had it before writes into its own
            instead = f", in place of {before}" if before else ""
            say(f"joined by {trainer}{instead}" + (f"; room for {lora.in_words(ranks)}" if ranks else ""))
            return {"session": self.session, "before": before, "memory": [*map(handover.place_of, self.memory)]}

        return answer

    async def sync(self, request: Request) -> Callable[[], Awaitable[JsonObject]]:
        session, number = request.headers.get(wire.SESSION), request.headers.get(wire.MEMORY)
        self._require_session(session)
        part = handover.made() if number is None else self.memory[int(number)]
        async for some in request.stream():
            part.write(some)
        names = _names(part)

        async def answer() -> JsonObject:
            async with self.writing:
                self._require_session(session)
                self.version = None  # nothing is admitted from here on
                await self._until_idle()
                if refused := await self._rpc("take_weights", handover.path_of(part)):
                    raise Refused(REFUSED, refused)
            return {"taken": names}

        return answer

    async def checksum(self, request: Request) -> Callable[[], Awaitable[JsonObject]]:
        body = await _body(request, "checksum")
        self._require_session(body["session"])
        weights = wire.checksums_of(body["weights"])
        version = digest(weights.items())

        async def answer() -> JsonObject:
            async with self.writing:
                self._require_session(body["session"])
                differing = await self._rpc("differing", wire.checksums_to_json(weights.items()))
                if differing:
                    self.version = None
                elif self.version != version:
                    await self._until_idle()
                    await self._forget_prefixes()
                    self.version = version
            return {"differing": differing, "version": self.version}

        return answer

    async def generate(self, request: Request) -> Callable[[], Awaitable[JsonObject]]:
        body = await _body(request, "generate")
        self._require_session(body["session"])
        if self.version is None or body["version"] != self.version:
            held = "none" if self.version is None else self.version[:12]
            raise Refused(CONFLICT, f"weights {shown(body['version'])[:12]} were asked for, and the server holds {held}")
        prompts, params = body["prompts"], _params(body, self.engine.model_config.get_vocab_size())
        self.running += 1  # before anything is awaited: a sync waits for this request from now on

        async def answer() -> JsonObject:
            try:
                drawn = await self._draw(prompts, params)
            finally:
                self.running -= 1
                async with self.idle:
                    self.idle.notify_all()
            return {"version": self.version, **wire.completions_to_json(drawn)}

        return answer

    # ---- the engine

    async def _draw(self, prompts: Sequence[Sequence[int]], params: Sequence[Any]) -> list[Completion]:
        """Draw requests, all at once, and join vLLM's tokens with the log-probs that our sampler has kept of each."""
        self.calls += 1
        ids = [f"trainer:{self.calls}:{i}" for i in range(len(prompts))]
        asked = [self._one(*each) for each in zip(prompts, params, ids, strict=True)]
        tasks = [asyncio.ensure_future(one) for one in asked]
        try:
            outputs = await asyncio.gather(*tasks)
        except BaseException:  # of one, or the trainer is gone: vLLM aborts what is cancelled
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            raise
        drawn = await self._rpc("take_drawn", ids, self.running > 1)
        completions = []
        for name, output in zip(ids, outputs, strict=True):
            tokens, logprobs = (np.frombuffer(x, kind).tolist() for x, kind in zip(drawn[name], ("<i4", "<f4"), strict=True))
            own = list(output.outputs[0].token_ids)
            if tokens[: len(own)] != own:
                raise RuntimeError(f"request {name}: vLLM's tokens are not those that were drawn for it")
            completions.append(Completion(own, logprobs[: len(own)], output.num_cached_tokens or 0))
        return completions

    async def _one(self, prompt: Sequence[int], params: Any, name: str) -> Any:
        outputs = [output async for output in self.engine.generate({"prompt_token_ids": prompt}, params, name)]
        return outputs[-1]

    async def _until_idle(self) -> None:
        async with self.idle:
            await self.idle.wait_for(lambda: self.running == 0)

    async def _forget_prefixes(self) -> None:
        for _ in range(RESET_TRIES):
            if await self.engine.reset_prefix_cache() is not False:
                return
            await asyncio.sleep(RESET_PAUSE_S)
        raise RuntimeError("vLLM did not reset its prefix cache: a request is still running")


async def _answered(work: Awaitable[JsonObject], receive: Any, send: Any) -> None:
    """Send the head of an answer at once, so that a trainer can go on to ask other servers, and then the rest.

    A trainer that goes away meanwhile takes its request with it.
    """
    head = [(b"content-type", b"application/json")]
    task = asyncio.ensure_future(work)
    await asyncio.sleep(0)  # the work has begun before it can be cancelled: what it does at its end is done
    await send({"type": "http.response.start", "status": 200, "headers": head})
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            task.cancel()
        try:
            content = await task
        except asyncio.CancelledError:
            return
        except Refused as refused:
            content = {"error": str(refused), "status": refused.status}
        except (UserError, ValueError) as error:
            content = {"error": one_line(error), "status": REFUSED}
        except Exception as error:
            say(f"error: {one_line(error)}", error=True)
            content = {"error": f"{type(error).__name__}: {one_line(error)}", "status": FAILED}
        await send({"type": "http.response.body", "body": json.dumps(content).encode()})
    finally:
        gone.cancel()


async def _disconnected(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _body(request: Request, route: str) -> JsonObject:
    """Return the JSON object that a request brings; no body is one without keys. An unknown key is refused by name."""
    body = json.loads(await request.body() or b"{}")
    if unknown := sorted(body.keys() - {*wire.KEYS[route]}):
        keys = ", ".join(wire.KEYS[route])
        raise Refused(REFUSED, f"{shown(', '.join(unknown))}: expected {f'none but {keys}' if keys else 'no key'}")
    return body


def _params(body: JsonObject, vocabulary: int) -> list[Any]:
    """Return vLLM's settings of each request; what is not of a trainer's is refused by name."""
    prompts, how = body["prompts"], body["sampling"]
    if unknown := sorted(how.keys() - set(wire.TAKEN)):
        raise Refused(REFUSED, f"{', '.join(unknown)}: expected none but {', '.join(wire.TAKEN)}")
    if not all(prompt and all(type(token) is int and 0 <= token < vocabulary for token in prompt) for prompt in prompts):
        raise Refused(REFUSED, f"prompts: expected token ids below {vocabulary}, one or more in each")
    if not all(type(seed) is int and 0 <= seed < 2**63 for seed in body["seeds"]):  # another would end the engine
        raise Refused(REFUSED, "seeds: expected whole numbers in [0, 2**63)")
    if not all(_is_whole(most, 1) for most in body["max_tokens"]):  # nor would the engine hear of anything after these
        raise Refused(REFUSED, "max_tokens: expected whole numbers, 1 or more")
    if not all(_is_whole(token, 0) for token in how.get("stop_token_ids", ())):
        raise Refused(REFUSED, "stop_token_ids: expected token ids")
    for name in how.keys() - {"stop_token_ids"}:
        if not (how[name] is None or (type(how[name]) in (int, float) and math.isfinite(how[name]))):
            raise Refused(REFUSED, f"{name}: expected a number")
    # A trainer names all tokens that end a completion: no others of the server's tokenizer
    shared = {"invariant": True, "ignore_eos": True, "output_kind": RequestOutputKind.FINAL_ONLY, **how}
    rows = zip(prompts, body["seeds"], body["max_tokens"], strict=True)
    return [sampling_params(seed, max_tokens=most, **shared) for _, seed, most in rows]


def _is_whole(value: Any, least: int) -> bool:
    return type(value) is int and least <= value < 2**31


def _names(part: io.FileIO) -> list[str]:
    """Return the names of the weights in a part, by the header of its safetensors. Raises ValueError where it has none."""
    length = part.seek(0, io.SEEK_END)
    size = int.from_bytes(os.pread(part.fileno(), 8, 0), "little")
    if not 2 <= size <= length - 8:
        raise ValueError(f"{length:,} bytes are no safetensors")
    return sorted(name for name in json.loads(os.pread(part.fileno(), size, 8)) if name != "__metadata__")
