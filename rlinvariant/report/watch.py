"""A live page of runs, served to this machine alone: report.html kept up to date, with all completions that there are."""

import json
import os
import secrets
import threading
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

from rlinvariant.errors import UserError, one_line
from rlinvariant.report import html, html_samples
from rlinvariant.report.study import Study
from rlinvariant.text import escaped

HOST = "127.0.0.1"
WATCHED = ("config.json", "environment.json", "metrics.jsonl", "result.json", "samples.jsonl", "ablation.json", "completions")


class Page:
    """Makes the page anew when a file of its runs has changed, and once for all who ask."""

    def __init__(self, load: Callable[[], Study], paths: Sequence[Path]) -> None:
        """Prepare a page of what `load` returns; `paths` are the directories, at any depth of two, whose files are watched."""
        self._load, self._paths, self._lock = load, paths, threading.Lock()
        self._made: tuple[str, str] | None = None
        self._study: Study | None = None

    def version(self) -> str:
        """Return what changes whenever a file does."""
        found = []
        for path in self._paths:
            for directory in (path, *path.glob("*/seed-*")):
                for name in WATCHED:
                    try:
                        state = (directory / name).stat()
                    except OSError:
                        continue
                    found.append(f"{name}{state.st_mtime_ns}.{state.st_size}")
        return f"{hash(tuple(found)) & 0xFFFFFFFFFFFF:012x}"

    def html(self) -> str:
        """Return the page; where the runs cannot be read yet, one that says why and goes on asking."""
        with self._lock:
            version = self.version()
            if self._made is None or self._made[0] != version:
                try:
                    self._study = self._load()
                    text = html.page(self._study, version)
                except UserError as error:
                    waits = f'<div id="outcome"><p>{escaped(str(error))}</p></div><p id="live-status" role="status"></p>'
                    text = html.document("nothing to show yet", waits, version)
                self._made = version, text
            return self._made[1]

    def completions(self, asked: dict[str, str]) -> dict[str, object]:
        """Return the completions that are asked for. Raises UserError as `html_samples.answer`."""
        study = self._study
        return html_samples.answer(self._load() if study is None else study, asked)


def server(page: Page, port: int) -> tuple[ThreadingHTTPServer, str]:
    """Return a server on the loopback address, not yet serving, and the page's address, whose key others cannot guess.

    Raises:
        UserError: the port cannot be had.
    """
    key = secrets.token_urlsafe(12)

    class Handler(BaseHTTPRequestHandler):
        """Answers for one page: itself, its version, its completions."""

        def do_GET(self) -> None:
            where, host = urlsplit(self.path), self.headers.get("Host", "")
            if host not in (f"{HOST}:{made.server_port}", f"localhost:{made.server_port}"):
                self._answer(403, "text/plain", "asked under another name")  # a page elsewhere, whose name leads here
                return
            name = where.path.removeprefix(f"/{key}/")
            if where.path.startswith(f"/{key}/") and name in ("", "version", "completions"):
                self._give(name, dict(parse_qsl(where.query)))
            else:
                self._answer(404, "text/plain", "no such page: take the whole address that the command printed")

        def _give(self, name: str, asked: dict[str, str]) -> None:
            try:
                if name == "completions":
                    self._answer(200, "application/json", json.dumps(page.completions(asked)))
                else:
                    self._answer(200, "text/html" if not name else "text/plain", page.version() if name else page.html())
            except (UserError, OSError) as error:
                self._answer(400, "application/json", json.dumps({"error": one_line(error)}))

        def _answer(self, status: int, kind: str, text: str) -> None:
            body = text.encode("utf-8", "backslashreplace")
            self.send_response(status)
            for header, value in (
                ("Content-Type", f"{kind}; charset=utf-8"),
                ("Content-Length", str(len(body))),
                ("Cache-Control", "no-store"),
                ("X-Content-Type-Options", "nosniff"),
                ("Referrer-Policy", "no-referrer"),
            ):
                self.send_header(header, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing of each request."""

        def handle(self) -> None:
            """Answer one connection; who went away in the middle is no news."""
            try:
                super().handle()
            except ConnectionError:
                return

    try:
        made = ThreadingHTTPServer((HOST, port), Handler)
    except (OSError, OverflowError) as error:
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else error
        raise UserError(f"--port {port}: cannot be had ({reason}); give another, or 0 for any") from error
    made.daemon_threads = True
    return made, f"http://{HOST}:{made.server_port}/{key}/"
