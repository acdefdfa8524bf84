"""A trainer's side of samplers that stand apart: `ServedSampler` is what `engine.Sampler` is, with engines behind HTTP.

Several processes of a trainer share the servers. The main one joins them, sends the weights, and has their checksums compared;
each process draws its own requests, from all servers at once. A completion's bits depend neither on the server nor on what
else it draws, so that whatever a lost server was to draw is drawn by another.
"""

import os
import secrets
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from rlinvariant.checksums import Checksum, digest, wholes
from rlinvariant.errors import ParityError, ServersLost, UserError
from rlinvariant.launch import on_main_process, rank, wait_for_all
from rlinvariant.rollout import Completion
from rlinvariant.sampler import handover, wire
from rlinvariant.sampler.drive import Request
from rlinvariant.sampler.server import Answer, Gone, Server
from rlinvariant.sampler.settings import require_room
from rlinvariant.sampler.wire import save
from rlinvariant.text import plural, say
from rlinvariant.types import JsonObject, Untyped


class ServedSampler:
    """Draws rollouts by `rlinvariant serve`s, with the weights that `sync` gave them last. All ranks make one together.

    Args:
        servers: which have been found to be of this model, version and kernels.
        dtype: of activations and of the servers' weights, "bfloat16" or "float32".
        max_model_len: longest prompt plus completion, in tokens.
        eager: whether the servers run without CUDA graphs.
        ends: the model's own end tokens, which an engine knows by the model's directory; servers are told.
        ranks: as for `engine.Sampler`; servers make room for these adapters.

    Raises:
        UserError: a server cannot be joined.
    """

    invariant = True

    def __init__(
        self,
        servers: Sequence[Server],
        *,
        dtype: str,
        max_model_len: int,
        eager: bool,
        ends: Sequence[int] = (),
        ranks: Mapping[str, int] | None = None,
    ) -> None:
        self.max_model_len, self.dtype = max_model_len, getattr(torch, dtype)
        self._alive, self._ends, self._ranks = list(servers), list(ends), dict(ranks or {})
        self._version: str | None = None
        config = SimpleNamespace(max_model_len=max_model_len, enforce_eager=eager)
        self.llm: Any = SimpleNamespace(llm_engine=SimpleNamespace(model_config=config))  # what TRL reads of an engine
        sessions = on_main_process(self._join)
        for server, session in zip(self._alive, sessions, strict=True):
            server.session = session

    def _join(self) -> list[str]:
        found, mark = [], secrets.token_hex(16)
        about = {"trainer": f"process {os.getpid()} on {socket.gethostname()}", "ranks": self._ranks, "mark": mark}
        for server in self._alive:
            answer = server.asked("join", about)
            found.append(answer["session"])
            memory = [handover.opened(place, mark) for place in answer["memory"]]
            server.memory = [file for file in memory if file is not None] if all(memory) else []
            how = "memory of this host" if server.memory else "HTTP"
            before = f"; {answer['before']} had it, and cannot draw from it any more" if answer["before"] else ""
            say(f"sampler {server.url} joined: weights go through {how}{before}")
        return found

    def close(self) -> None:
        """Leave the servers; the sampler cannot be used any more."""
        for server in self._alive:
            server.close()

    def forget_prefixes(self) -> None:
        """Do nothing: servers forget what is cached of a prompt when they get other weights."""

    # ---- drawing

    def finish(self) -> None:
        """Do nothing: no process waits for what another asks a server for."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        *,
        temperature: float,
        max_tokens: int | Sequence[int],
        stop_token_ids: Sequence[int] = (),
        **sampling: Untyped,
    ) -> list[Completion]:
        """Draw one completion for each prompt, in the order of the prompts; arguments are those of `engine.Sampler.generate`.

        Raises:
            ServersLost, UserError: as there; a setting that servers do not take; no server is left, or one refuses.
        """
        how = {"temperature": temperature, "stop_token_ids": [*stop_token_ids, *self._ends], **sampling}
        if unknown := sorted(how.keys() - set(wire.TAKEN)):
            raise UserError(f"{', '.join(unknown)}: expected none but {', '.join(wire.TAKEN)} with sampler.servers; remove it")
        most = require_room(prompts, max_tokens, self.max_model_len)
        requests = [{"prompts": list(p), "seeds": s, "max_tokens": n} for p, s, n in zip(prompts, seeds, most, strict=True)]
        found: dict[int, Completion] = {}
        while left := [i for i in range(len(requests)) if i not in found]:
            self._require_alive()
            found |= self._draw(requests, how, self._shares(left))
        return [found[i] for i in range(len(requests))]

    def _shares(self, rows: Sequence[int]) -> list[tuple[Server, Sequence[int]]]:
        """Cut requests into as many runs of neighbours as there are servers: samples of one prompt share its cached prefix."""
        count, first = len(self._alive), rank() % len(self._alive)
        servers = [*self._alive[first:], *self._alive[:first]]  # each rank's first is another
        cuts = [len(rows) * i // count for i in range(count + 1)]
        return [(server, rows[a:b]) for server, (a, b) in zip(servers, pairwise(cuts), strict=True) if b > a]

    def _draw(
        self, requests: Sequence[JsonObject], how: JsonObject, shares: Sequence[tuple[Server, Sequence[int]]]
    ) -> dict[int, Completion]:
        """Draw shares of the requests, all at once; those of a server that is lost are not in what is returned."""
        asked: list[tuple[Server, Sequence[int], Answer]] = []
        found: dict[int, Completion] = {}
        others = lambda rows: f"; others draw its {plural(len(rows), 'request')}"  # noqa: E731
        try:
            for server, rows in shares:
                body: JsonObject = {key: [requests[i][key] for i in rows] for key in ("prompts", "seeds", "max_tokens")}
                body |= {"session": server.session, "version": self._version, "sampling": how}
                with self._losing(server, others(rows)):
                    asked.append((server, rows, server.ask("generate", body)))
            for server, rows, answer in asked:
                with self._losing(server, others(rows)):
                    drawn = answer.content()
                    if drawn["version"] != self._version:
                        raise server.error("it got other weights while it drew; is another trainer using it?")
                    found |= zip(rows, server.understood(wire.completions_of, drawn, len(rows)), strict=True)
        finally:
            for _, _, answer in asked:
                answer.close()  # one that is not needed any more is not drawn to its end
        return found

    def drawn_by_each(self, requests: Sequence[Request]) -> list[Completion]:
        """Draw the same requests by every server, each to its last token, and return what all have drawn alike.

        Raises:
            ParityError: two servers have drawn different bits.
        """
        rows: dict[int, JsonObject] = {
            i: {"prompts": list(r.prompt), "seeds": r.seed, "max_tokens": r.max_tokens} for i, r in enumerate(requests)
        }
        kinds = dict.fromkeys((r.temperature, r.truncation) for r in requests)
        first: list[Completion] = []
        for server in list(self._alive):
            found: dict[int, Completion] = {}
            for temperature, kept in kinds:
                own = [i for i, r in enumerate(requests) if (r.temperature, r.truncation) == (temperature, kept)]
                how = {"temperature": temperature, "stop_token_ids": [], **vars(kept)}
                found |= self._draw([rows[i] for i in range(len(requests))], how, [(server, own)])
            if server not in self._alive:
                continue
            drawn = [found[i] for i in range(len(requests))]
            if first and drawn != first:
                raise ParityError(f"before the first step: {server.url} draws other bits than {self._alive[0].url}")
            first = first or drawn
        self._require_alive()
        return first

    # ---- the weights that draw

    def sync(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Send the trainer's parameters to all servers, in parts. All ranks call this.

        A part is whole on every rank before it is sent: none waits for the network in the middle of a gather.

        Args:
            weights: as for `engine.Sampler.sync`.

        Raises:
            ServersLost, UserError: no server is left, or one refuses.
        """
        self._version, error, main = None, None, rank() == 0
        asked: list[tuple[Server, Answer]] = []
        for part in wire.buckets(weights, self.dtype, keep=main):
            wait_for_all()
            if main and error is None:
                try:
                    asked = self._send(part, asked)
                except UserError as found:  # the other ranks are in the middle of the next part
                    error = found
        if main and error is None:
            try:
                self._taken(asked)
            except UserError as found:
                error = found
        self._settle(error)

    def _send(self, part: Mapping[str, Tensor], before: Sequence[tuple[Server, Answer]]) -> list[tuple[Server, Answer]]:
        """Send a part to all servers; they load the one before meanwhile. Return what they have not answered yet."""
        asked, buffers = list[tuple[Server, Answer]](), save(part)
        for server in list(self._alive):
            with self._losing(server):
                asked.append((server, server.send(buffers)))
        self._taken(before)
        return asked

    def _taken(self, asked: Sequence[tuple[Server, Answer]]) -> None:
        """Wait until servers have loaded a part."""
        for server, answer in asked:
            with self._losing(server):
                answer.content()
        self._require_alive()

    def _settle(self, error: UserError | None) -> None:
        """Raise the main rank's error on all ranks, or go on with the servers that are left there."""

        def left() -> list[str]:
            if error is not None:
                raise error
            return [server.url for server in self._alive]

        kept = on_main_process(left)
        self._alive = [server for server in self._alive if server.url in kept]

    def differing_weights(self, weights: Iterable[tuple[str, Tensor]]) -> list[str]:
        """Name the servers' parameters whose bytes are not the main rank's `weights`, cast. All ranks call this."""
        own = wholes((name, w.detach().to(self.dtype)) for name, w in weights) if rank() == 0 else {}
        return self.differing_checksums(own)

    def memory_of(self, weights: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Return nothing: the servers' memory is not this process's."""
        return {}

    def differing_checksums(self, weights: Mapping[str, Checksum]) -> list[str]:
        """Do what `differing_weights` does, by sums over all words. Empty, and the servers may draw, when all are equal.

        Args:
            weights: the checksum of each, cast to `dtype`, by its Hugging Face name. Those of the main rank count, which has
                sent the weights; whether other ranks have the same is the trainer's to compare.

        Raises:
            ServersLost, UserError: no server is left, or one refuses.
        """
        version, differing = on_main_process(lambda: (digest(weights.items()), self._compared(weights)))
        self._settle(None)
        self._version = None if differing else version
        return differing

    def _compared(self, weights: Mapping[str, Checksum]) -> list[str]:
        differing, asked = [], []
        for server in list(self._alive):
            body: JsonObject = {"session": server.session, "weights": wire.checksums_to_json(weights.items())}
            with self._losing(server):
                asked.append((server, server.ask("checksum", body)))
        for server, answer in asked:
            with self._losing(server):
                differing += [f"{name} (of {server.url})" for name in answer.content()["differing"]]
        self._require_alive()
        return differing

    # ---- servers that are lost

    @contextmanager
    def _losing(self, server: Server, then: str = "") -> Iterator[None]:
        """Go on without a server that is gone, and say so."""
        try:
            yield
        except Gone as gone:
            if server in self._alive:
                self._alive.remove(server)
                left = f"{plural(len(self._alive), 'server')} left{then if self._alive else ''}"
                say(f"note: {gone}; {left}", error=True)

    def _require_alive(self) -> None:
        if not self._alive:
            raise ServersLost("sampler.servers: none is left (see above); start one again, and resume the run")
