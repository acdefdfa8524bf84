"""Who may ask a server for what: an ASGI application around vLLM's, and a check of the options that would open it.

vLLM's own key covers some prefixes of paths and leaves the rest open, and vLLM answers whatever Host a request names. `Guard`
stands before all of that: it answers to the bound host, serves the paths below and no other, and asks for the key.
"""

import ipaddress
import os
import re
import socket
from typing import Any

from starlette.responses import JSONResponse

from rlinvariant.trainer_token import Token
from rlinvariant.types import JsonRow, Untyped

WITHOUT_KEY = {"/health", "/ping"}
"""Paths that answer everyone who names the right host: they say whether the server is up, and nothing else."""
WITH_KEY = {
    "/v1/models",
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/tokenize",
    "/detokenize",
    "/metrics",
    "/load",
    "/version",
}
"""Paths that need the key, where there is one. Any other path, of this vLLM or of a newer one, gets status 404."""
WITH_TOKEN = {f"/rlinvariant/{name}" for name in ("prove", "join", "sync", "checksum", "generate")}
"""Paths that need the trainer's token; where there is one, they take the place of those with the key."""
REFUSED_ENVIRONMENT = {
    "VLLM_USE_RUST_FRONTEND": "that front end checks no request",
    "VLLM_SERVER_DEV_MODE": "its routes change the engine and its weights",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "with it a message between processes is a pickle, which can run code",
}
REFUSED_OPTIONS = {  # of vLLM's front end
    "tool_server": "its tools run what the model wrote",
    "trust_request_chat_template": "a client's template is a program",
    "trust_request_mm_kwargs": "a client would choose how its input is processed",
}
KEY = "set VLLM_API_KEY=..., or give --api-key KEY"
_HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^\s:@/\\\[\]]+))(?::\d+)?", re.I)  # [IPv6] or a name or IPv4, and a port


def problems(args: Untyped, given: JsonRow) -> list[str]:
    """Return a line for each option, and each variable of the environment, that would leave a door open.

    Args:
        args: vLLM's namespace of a command line, with `host` filled in.
        given: the options that differ from their defaults.
    """
    here = {k: v for k in REFUSED_ENVIRONMENT if (v := os.environ.get(k, "")) not in ("", "0")}
    found = [f"{k}={v}: expected unset: {REFUSED_ENVIRONMENT[k]}" for k, v in here.items()]
    found += [f"--{k.replace('_', '-')}: {why}; remove it" for k, why in REFUSED_OPTIONS.items() if k in given]
    if args.uds:  # vLLM would not read these
        found += [f"--{k} {given[k]}: expected none beside --uds; keep one of them" for k in ("host", "port") if k in given]
    if args.api_key is not None and not all(args.api_key):
        found.append(f"--api-key: empty; expected a key: {KEY}")
    if args.trainer_token is not None and args.api_key is not None:
        found.append("--api-key: expected none beside --trainer-token-file: only trainers are served then; remove one of them")
    if not (args.uds or is_loopback(args.host) or any(keys(args)) or args.trainer_token is not None):
        found.append(f"--host {args.host}: expected a key where other machines can reach the server; {KEY}, or remove --host")
    if "*" in args.allowed_origins and (args.allow_credentials or not keys(args)):
        found.append('--allowed-origins ["*"]: expected a list: any page that you open could ask this server; name the origins')
    return found


def keys(args: Untyped) -> list[str]:
    """Return the keys of which a request must have one, as vLLM reads them; none: no key is asked for."""
    return [key for key in (args.api_key or [os.environ.get("VLLM_API_KEY")]) if key]


def is_loopback(host: str) -> bool:
    """Tell whether an address is this machine's own, which no other machine can reach; a name but `localhost` is not."""
    address = _address(host)
    return host.lower() == "localhost" if address is None else address.is_loopback


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


class Guard:
    """Refuses, as the outermost ASGI middleware, what is not for the bound host, not served, or without the key.

    A page that a browser shows can name this server by a host of its own (DNS rebinding): so `Host` must be the bound address,
    one of the names of loopback where that is bound, or one of `--allowed-hosts`. Where every address is bound, any address
    and this machine's name will do: a rebound host is always a name.
    """

    def __init__(self, app: Untyped) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        refusal = refused(scope, scope["app"].state.args)
        if refusal is None:
            return await self.app(scope, receive, send)
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008})
        status, message = refusal
        await JSONResponse({"error": {"message": message, "code": status}}, status)(scope, receive, send)


def refused(scope: Untyped, args: Untyped) -> tuple[int, str] | None:
    """Return the status and the message with which a request is refused; None if it may pass.

    Args:
        scope: ASGI's, of a request.
        args: vLLM's namespace of the server's command line.
    """
    headers = [(name.lower(), value.decode("latin-1")) for name, value in scope["headers"]]
    hosts = [value for name, value in headers if name == b"host"]
    if len(hosts) != 1 or not _is_bound(hosts[0], args):
        return 400, "Host: expected the address that this server is bound to; see --allowed-hosts"
    path = scope["path"].removeprefix(scope.get("root_path") or "")
    token: Token | None = args.trainer_token
    served = WITHOUT_KEY | (WITH_KEY if token is None else WITH_TOKEN)
    if scope["type"] == "websocket" or path not in served:
        return 404, f"{path}: not served here; served: {', '.join(sorted(served))}"
    if path in WITHOUT_KEY:
        return None
    shown = next((value for name, value in headers if name == b"authorization"), "")
    if token is not None:
        expected = "the token of --trainer-token-file: Authorization: Bearer TOKEN"
        return None if token.is_shown_by(shown) else (401, f"Unauthorized: expected {expected}")
    if scope["method"] == "OPTIONS" or not (wanted := keys(args)):
        return None
    right = [Token(one).is_shown_by(shown) for one in wanted]  # each is compared: no time tells which
    return None if any(right) else (401, "Unauthorized: expected Authorization: Bearer KEY")


def _is_bound(host: str, args: Any) -> bool:
    """Tell whether a Host header names what the server is bound to."""
    match = _HOST.fullmatch(host)
    name = (match[1] or match[2]).lower() if match else ""
    names, bound = {args.host.lower(), *map(str.lower, args.allowed_hosts)}, _address(args.host)
    if args.uds or is_loopback(args.host):
        names |= {"localhost", "127.0.0.1", "::1"}
    elif bound is not None and bound.is_unspecified:
        names |= {"localhost", socket.gethostname().lower()}
        return name in names or _address(name) is not None
    return name in names
