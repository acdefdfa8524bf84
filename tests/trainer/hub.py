"""A hub on this machine, as far as an upload needs one: huggingface_hub's own client talks HTTP to it."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest


class Hub:
    """Holds what was uploaded: repository -> file -> bytes, and the commits' messages."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.messages: list[str] = []
        self.url = ""

    def answer(self, method: str, path: str, body: bytes) -> Any:
        if path.endswith("/whoami-v2"):
            return {"name": "me", "type": "user"}
        if path.endswith("/validate-yaml"):
            return {"errors": [], "warnings": []}
        if path.endswith("/repos/create"):
            return {"url": f"{self.url}/me/{json.loads(body)['name']}"}
        repository = "/".join(path.split("/")[3:5])
        if "/preupload/" in path:
            files = json.loads(body)["files"]
            return {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
        if "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "header":
                    self.messages.append(line["value"]["summary"])
                elif line["key"] == "file":
                    kept = self.files.setdefault(repository, {})
                    kept[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return {"success": True, "commitUrl": f"{self.url}/{repository}/commit/0", "commitOid": "0"}
        return {"id": repository, "sha": "0", "siblings": []}


@contextmanager
def serving(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Start a hub, and point huggingface_hub to it."""
    from huggingface_hub import constants

    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            answer = json.dumps(hub.answer(self.command, self.path.partition("?")[0], body)).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        do_GET = do_POST

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("transformers.utils.hub._hf_api", None)  # made once, for the endpoint of then
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
