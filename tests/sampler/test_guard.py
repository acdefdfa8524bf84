"""A server has no open door: who may ask `rlinvariant serve` for what, over the application that vLLM builds."""

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from rlinvariant.errors import ConfigErrors
from rlinvariant.sampler import vllm_guard, vllm_serve

KEY = "correct-horse-battery"
TOKEN = "0123456789abcdef" * 4
CLOSED = {
    "/docs",
    "/docs/oauth2-redirect",
    "/openapi.json",
    "/redoc",
    "/scale_elastic_ep",
    "/is_scaling_elastic_ep",
    "/invocations",
    "/generative_scoring",
    "/kv_event_sources",
    "/v1/chat/completions/batch",
    "/v1/chat/completions/render",
    "/v1/chat/completions/derender",
    "/v1/completions/render",
    "/v1/completions/derender",
    "/v1/messages/render",
    "/v1/responses/render",
    "/v1/responses/{response_id}",
    "/v1/responses/{response_id}/cancel",
    "/v1/systemone",
    "/inference/v1/generate",
    "/inference/v1/abort_requests",
}
"""Routes that vLLM 0.32 has and that are not served. A route that is in neither this list nor vllm_guard's is new: judge it."""
ADMIN = (
    "/sleep",
    "/wake_up",
    "/pause",
    "/resume",
    "/update_weights",
    "/init_weight_transfer_engine",
    "/collective_rpc",
    "/server_info",
    "/reset_prefix_cache",
    "/start_profile",
    "/stop_profile",
    "/v1/load_lora_adapter",
    "/abort_requests",
)


def app_of(model: str, *options: str) -> Any:
    """Return the application that vLLM makes of a command line of ours, without an engine behind it."""
    from vllm.entrypoints.openai.api_server import build_app

    _, args = vllm_serve.prepared([model, *options])
    return build_app(args, ("generate",), None)


def paths(routes: Any) -> Iterator[str]:
    """Yield every path of an application, those of routers in it too."""
    for route in routes:
        inner = getattr(route, "routes", None) or getattr(getattr(route, "original_router", None), "routes", None)
        if inner:
            yield from paths(inner)
        elif path := getattr(route, "path", None):
            yield path


def ask(app: Any, path: str, method: str = "GET", host: str = "127.0.0.1:8000", **headers: str) -> int:
    """Return the status of a request. An application without an engine raises where one is needed: that is 500."""

    async def status() -> int:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
            return (await client.request(method, path, headers={"host": host, **headers}, json={})).status_code

    return asyncio.run(status())


@pytest.fixture(scope="module")
def token_file(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("token") / "trainer.token"
    path.touch(0o600)
    path.write_text(TOKEN + "\n")
    return str(path)


@pytest.fixture(scope="module")
def trainers_app(arithmetic_dir, token_file):
    return app_of(arithmetic_dir, "--trainer-token-file", token_file)


@pytest.fixture(scope="module")
def open_app(arithmetic_dir):
    return app_of(arithmetic_dir)


@pytest.fixture(scope="module")
def keyed_app(arithmetic_dir):
    return app_of(arithmetic_dir, "--api-key", KEY)


def test_every_route_of_vllm_is_known_here(open_app):
    found = set(paths(open_app.routes))
    assert found == CLOSED | vllm_guard.WITH_KEY | vllm_guard.WITHOUT_KEY


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "HEAD"])
def test_without_the_key_nothing_answers_but_whether_the_server_is_up(method, keyed_app):
    found = {path: ask(keyed_app, path, method) for path in {*paths(keyed_app.routes), *ADMIN}}
    for path, status in found.items():
        if path in vllm_guard.WITHOUT_KEY:
            assert status not in (401, 404)
        else:
            assert status == (401 if path in vllm_guard.WITH_KEY else 404), (method, path, status)


def test_the_key_opens_what_is_served_and_nothing_else(keyed_app, open_app):
    right = {"authorization": f"Bearer {KEY}"}
    for path in vllm_guard.WITH_KEY:
        assert ask(keyed_app, path, **right) not in (401, 404) and ask(open_app, path) not in (401, 404)
        for wrong in (f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", "Bearer ", f"Basic {KEY}", KEY):
            assert ask(keyed_app, path, authorization=wrong) == 401
    for path in (*CLOSED, *ADMIN, "/health/", "//health", "/v1/models/", "/health/../docs", "/metrics/x"):
        assert ask(keyed_app, path, **right) == 404 == ask(open_app, path), path


def test_a_host_that_is_not_bound_is_refused(open_app, keyed_app, arithmetic_dir):
    """DNS rebinding: a page of evil.example whose name points to 127.0.0.1 by now. Nor does the key help."""
    names = "evil.example evil.example:8000 127.0.0.1.evil.example localhost@evil.example evil.example#127.0.0.1 127.0.0.1/x"
    for host in (*names.split(), "192.168.0.7:8000", "[::2]:8000", "localhost.", "LOCALHOST:99x", ""):
        for path in ("/health", "/v1/models", "/docs"):
            assert ask(open_app, path, host=host) == 400 == ask(keyed_app, path, host=host, authorization=f"Bearer {KEY}"), host
    for host in ("127.0.0.1", "127.0.0.1:8000", "localhost:8000", "LocalHost", "[::1]:8000"):
        assert ask(open_app, "/version", host=host) == 200
    named = app_of(arithmetic_dir, "--host", "192.168.0.7", "--api-key", KEY, "--allowed-hosts", "gpu.example", "proxy.example")
    wild = app_of(arithmetic_dir, "--host", "0.0.0.0", "--api-key", KEY)
    for app, bound in (
        (named, {"192.168.0.7:80", "GPU.example", "proxy.example"}),
        (wild, {"192.168.0.7:80", "10.0.0.1", "localhost"}),
    ):
        for host in ("192.168.0.7:80", "GPU.example", "proxy.example", "10.0.0.1", "localhost", "evil.example"):
            assert (ask(app, "/version", host=host, authorization=f"Bearer {KEY}") == 200) is (host in bound), host


def test_a_websocket_is_closed_before_it_opens(open_app):
    from starlette.testclient import TestClient
    from starlette.websockets import WebSocketDisconnect

    client = TestClient(open_app, base_url="http://127.0.0.1:8000")
    with pytest.raises(WebSocketDisconnect), client.websocket_connect("/v1/realtime"):
        pass


def test_another_pages_request_is_not_allowed_by_cors(open_app, arithmetic_dir):
    """A form can post text/plain anywhere without asking; vLLM takes JSON alone, for which a browser asks first."""
    assert ask(open_app, "/v1/completions", "POST", **{"content-type": "text/plain"}) in (400, 415)
    preflight = {"origin": "http://evil.example", "access-control-request-method": "POST"}
    assert ask(open_app, "/v1/completions", "OPTIONS", **preflight) == 400
    friend = app_of(arithmetic_dir, "--api-key", KEY, "--allowed-origins", '["http://friend.example"]')
    assert ask(friend, "/v1/completions", "OPTIONS", **preflight) == 400
    assert ask(friend, "/v1/completions", "OPTIONS", **preflight | {"origin": "http://friend.example"}) == 200


def test_vllm_alone_has_these_doors_open(arithmetic_dir, monkeypatch):
    """Control: what the tests above look for is there without the guard."""
    monkeypatch.setattr(vllm_guard, "refused", lambda scope, args: None)
    stock = app_of(arithmetic_dir, "--api-key", KEY)
    assert ask(stock, "/version", host="evil.example") == 200
    assert [ask(stock, path) for path in ("/docs", "/openapi.json", "/version", "/metrics")] == [200] * 4
    assert ask(stock, "/invocations", "POST") not in (401, 404)


@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS", "DELETE"])
def test_with_a_trainers_token_nobody_else_is_served(method, trainers_app, open_app):
    """The control: the same routes of vLLM are open, on loopback, where no token is given, and ours are not there."""
    wrong = (None, f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", "Bearer ", f"Basic {TOKEN}", TOKEN, f"Bearer {KEY}")
    for path in vllm_guard.WITH_TOKEN:
        shown = [ask(trainers_app, path, method, **({} if w is None else {"authorization": w})) for w in wrong]
        assert shown == [401] * len(wrong), path
        assert ask(trainers_app, path, method, authorization=f"Bearer {TOKEN}") not in (401, 404)
        assert ask(trainers_app, path, method, host="evil.example", authorization=f"Bearer {TOKEN}") == 400
        assert ask(open_app, path, method, authorization=f"Bearer {TOKEN}") == 404
    for path in {*paths(trainers_app.routes), *ADMIN} - vllm_guard.WITHOUT_KEY:
        assert ask(trainers_app, path, method, authorization=f"Bearer {TOKEN}") == 404, path
        assert path not in vllm_guard.WITH_KEY or ask(open_app, path, method) != 404


def test_a_token_in_a_log_is_stars(arithmetic_dir, token_file):
    _, args = vllm_serve.prepared([arithmetic_dir, "--trainer-token-file", token_file])
    assert TOKEN not in str(args) and "trainer_token=***" in str(args)


@pytest.mark.parametrize(
    ("options", "environment", "named"),
    [
        (["--trainer-token-file", "TOKEN", "--api-key", KEY], {}, "--api-key"),
        (["--trainer-token-file", "TOKEN", "--allowed-origins", '["*"]'], {}, "--allowed-origins"),
        (["--host", "0.0.0.0"], {}, "--host 0.0.0.0"),
        (["--host", "::"], {}, "--host ::"),
        (["--host", "gpu.example"], {}, "--host gpu.example"),
        (["--host", "0.0.0.0", "--api-key", ""], {}, "--api-key"),
        (["--host", "0.0.0.0"], {"VLLM_API_KEY": ""}, "--host 0.0.0.0"),
        (["--allowed-origins", '["*"]'], {}, "--allowed-origins"),
        (["--allowed-origins", '["*"]', "--allow-credentials", "--api-key", KEY], {}, "--allowed-origins"),
        (["--tool-server", "demo"], {}, "--tool-server"),
        (["--trust-request-chat-template"], {}, "--trust-request-chat-template"),
        (["--trust-remote-code"], {}, "--trust-remote-code"),
        (["--enable-prompt-embeds"], {}, "--enable-prompt-embeds"),
        (["--profiler-config", '{"profiler": "torch", "torch_profiler_dir": "/x"}'], {}, "--profiler-config"),
        ([], {"VLLM_SERVER_DEV_MODE": "1"}, "VLLM_SERVER_DEV_MODE=1"),
        ([], {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}, "VLLM_ALLOW_INSECURE_SERIALIZATION=1"),
        ([], {"VLLM_USE_RUST_FRONTEND": "1"}, "VLLM_USE_RUST_FRONTEND=1"),
    ],
)
def test_an_option_that_opens_a_door_is_refused_in_one_line(
    options, environment, named, arithmetic_dir, token_file, monkeypatch
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigErrors) as caught:
        vllm_serve.prepared([arithmetic_dir, *(token_file if x == "TOKEN" else x for x in options)])
    assert any(line.startswith(named) and "\n" not in line for line in caught.value.errors), caught.value.errors
    assert KEY not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "environment"),
    [
        ([], {}),
        (["--host", "::1"], {}),
        (["--host", "127.0.0.2"], {}),
        (["--host", "localhost"], {}),
        (["--uds", "/x"], {}),
        (["--host", "0.0.0.0"], {"VLLM_API_KEY": KEY}),
        (["--host", "0.0.0.0", "--api-key", KEY], {}),
        (["--host", "0.0.0.0", "--trainer-token-file", "TOKEN"], {}),
    ],
)
def test_loopback_needs_no_key_and_other_addresses_have_one(options, environment, arithmetic_dir, token_file, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    _, args = vllm_serve.prepared([arithmetic_dir, *(token_file if x == "TOKEN" else x for x in options)])
    assert args.host == (options[1] if "--host" in options else "127.0.0.1") and args.allowed_origins == []


def test_a_host_in_a_configuration_file_is_seen(arithmetic_dir, tmp_path):
    (tmp_path / "serve.yaml").write_text("host: 0.0.0.0\n")
    with pytest.raises(ConfigErrors, match=r"--host 0\.0\.0\.0: expected a key"):
        vllm_serve.prepared([arithmetic_dir, "--config", str(tmp_path / "serve.yaml")])
