"""One server that a trainer draws from: requests over HTTP, and its failures in words."""

import io
import json
import socket
import ssl
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

import httpx

from rlinvariant.errors import UserError, one_line
from rlinvariant.sampler import handover, wire
from rlinvariant.trainer_token import Token
from rlinvariant.types import JsonObject

T = TypeVar("T")
P = ParamSpec("P")
CONNECT_S = 20.0
# A host that has gone without a word is noticed after a minute; an answer may take any time
KEEPALIVE = [
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    *(
        (socket.IPPROTO_TCP, getattr(socket, name), value)
        for name, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3))
        if hasattr(socket, name)
    ),
]


class Gone(Exception):
    """Tells that a server cannot be reached any more, or has failed: another one may do what it was asked for."""


class Server:
    """Stands for a server.

    Args:
        url: http://HOST:PORT or https://HOST:PORT.
        token: the trainer's.
    """

    def __init__(self, url: str, token: Token) -> None:
        self.url, self.session = url.rstrip("/"), ""
        self.memory: list[io.FileIO] = []  # of the server, into which this process can write weights; none of another host's
        self._sent = 0
        # No proxy of the environment gets the token. Each request has a connection of its own: a server closes one that is
        # idle, perhaps while the next request is on its way, which would look like a server that is gone
        transport = httpx.HTTPTransport(
            verify=ssl.create_default_context(),
            socket_options=KEEPALIVE,
            trust_env=False,
            limits=httpx.Limits(max_keepalive_connections=0),
        )
        timeout = httpx.Timeout(None, connect=CONNECT_S)
        self._client = httpx.Client(
            base_url=self.url, headers=token.header, timeout=timeout, transport=transport, trust_env=False
        )

    def error(self, what: str) -> UserError:
        """Return an error that names the server."""
        return UserError(f"sampler.servers={self.url}: {what}")

    def send(self, weights: Sequence[bytes | memoryview]) -> "Answer":
        """Send weights, as `wire.save` returns them, through the server's memory where that can be; raises as `ask`, and
        UserError where that memory has no room.

        There are `wire.PIECES` of it, used in turn: the answer to the part before the last must have come.
        """
        if not self.memory:
            return self.ask("sync", weights)
        number, self._sent = self._sent % len(self.memory), self._sent + 1
        try:
            handover.write(self.memory[number], weights)
        except OSError as error:  # of this host, as a limit on memory or on the size of files sets it
            why = f"no room in memory of this host for {sum(map(len, weights)):,} bytes of weights ({one_line(error)})"
            raise self.error(f"{why}; free some, or raise ulimit -f") from error
        return self.ask("sync", [], {wire.MEMORY: str(number)})

    def ask(
        self, route: str, body: JsonObject | Sequence[bytes | memoryview], headers: Mapping[str, str] | None = None
    ) -> "Answer":
        """Send a request, and return when the server has read it and begun to answer.

        Args:
            route: one of prove, join, sync, checksum, generate.
            body: JSON; or, of sync, weights as safetensors, in some buffers.
            headers: beside those of every request.

        Raises:
            Gone: the server cannot be reached, or has failed.
            UserError: it refuses.
        """
        content = [json.dumps(body).encode()] if isinstance(body, dict) else body
        size = str(sum(map(len, content)))
        always = {wire.SESSION: self.session, "content-type": "application/octet-stream", "content-length": size}
        parts: Any = iter(content)  # of buffers, which go to the socket as they are
        request = self._client.build_request(
            "POST", f"/rlinvariant/{route}", content=parts, headers=always | {**(headers or {})}
        )
        try:
            response = self._client.send(request, stream=True)
            answer = Answer(self, response)
            if response.status_code != 200:
                answer.content()
        except httpx.TransportError as error:
            raise self.gone(error) from error
        return answer

    def asked(self, route: str, body: JsonObject) -> JsonObject:
        """Send a request and return its answer; a server that is gone is an error here. Raises UserError."""
        try:
            return self.ask(route, body).content()
        except Gone as gone:
            raise UserError(f"{gone}; start it: rlinvariant serve MODEL --trainer-token-file FILE") from gone

    def understood(self, read: Callable[P, T], *answer: P.args, **how: P.kwargs) -> T:
        """Return what is read of an answer. Raises UserError where it is none."""
        try:
            return read(*answer, **how)
        except (ValueError, KeyError, TypeError) as error:
            raise self.error(f"its answer is not understood: {one_line(error)}") from error

    def gone(self, error: object) -> Gone:
        return Gone(f"sampler.servers={self.url}: not reached ({one_line(error, 120)})")

    def close(self) -> None:
        self._client.close()


class Answer:
    """Reads an answer that a server has begun."""

    def __init__(self, server: Server, response: httpx.Response) -> None:
        self._server, self._response = server, response

    def content(self) -> JsonObject:
        """Wait for the answer, and return it.

        Raises:
            Gone: the server has failed meanwhile.
            UserError: it refuses, or answers what is no JSON.
        """
        server, status = self._server, self._response.status_code
        try:
            text = self._response.read()
        except httpx.TransportError as error:
            raise server.gone(error) from error
        if status in (404, 405):
            raise server.error(f"no trainers are served there (status {status}); start it with --trainer-token-file FILE")
        if status == 401:
            raise server.error("it does not take this token; give both sides the same sampler.trainer_token_file")
        try:
            found = json.loads(text)
            said = found.get("error")
        except (ValueError, AttributeError) as error:
            if status >= 500:
                raise server.gone(f"status {status}") from error
            raise server.error(f"its answer is not understood (status {status}); is it rlinvariant serve?") from error
        if said is None and status == 200:
            return found
        said = one_line(said.get("message") if isinstance(said, dict) else said)
        if found.get("status", status) >= 500:
            raise server.gone(said)
        raise server.error(said)

    def close(self) -> None:
        """Leave the answer, whether it has come or not."""
        self._response.close()


def proven(server: Server) -> JsonObject:
    """Ask a server what it is. Raises UserError where it cannot be reached, or speaks another version of these requests."""
    about = server.asked("prove", {})
    if about.get("protocol") != wire.PROTOCOL:
        raise server.error(f"it speaks version {about.get('protocol')} of these requests, this trainer {wire.PROTOCOL}")
    return about
