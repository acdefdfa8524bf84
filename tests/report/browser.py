"""A page in Chromium as a person uses it: a mouse that moves, keys, a width, a theme; over the browser's own debugging pipe."""

import base64
import io
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--hide-scrollbars",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
)
KEYS = {"ArrowRight": 39, "ArrowLeft": 37, "Home": 36, "End": 35, "Escape": 27, "Tab": 9, "Enter": 13, "+": 187, "-": 189}


def executable() -> str:
    """The browser's path. Without one: fails in CI and where RLINVARIANT_BROWSER asks for it, else skips, and says why."""
    wanted = os.environ.get("RLINVARIANT_BROWSER", "")
    names = [*([wanted] if "/" in wanted else []), "chromium", "chromium-browser", "google-chrome"]
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is not None:
        return found
    message = "no Chromium: apt-get install -y chromium, or RLINVARIANT_BROWSER=/path/to/chrome"
    if wanted or os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)


class Browser:
    """Drives one page of one browser; every call waits for the answer."""

    def __init__(self, send: int, receive: int) -> None:
        self._send, self._receive, self._left, self._count = send, receive, b"", 0
        self.log: list[str] = []
        target = self.call("Target.createTarget", session="", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", session="", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Send one command and return its result. RuntimeError if the browser says that it failed."""
        self._count += 1
        message: dict[str, Any] = {"id": self._count, "method": method, "params": parameters}
        if session is None:
            message["sessionId"] = self._session
        os.write(self._send, json.dumps(message).encode() + b"\0")
        while True:
            found = self._next()
            if found.get("id") == self._count:
                if "error" in found:
                    raise RuntimeError(f"{method}: {found['error']}")
                return found["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._left:
            read = os.read(self._receive, 1 << 20)
            if not read:
                raise RuntimeError("the browser has ended")
            self._left += read
        line, self._left = self._left.split(b"\0", 1)
        found = json.loads(line)
        if found.get("method") in ("Log.entryAdded", "Runtime.exceptionThrown"):
            self.log.append(json.dumps(found["params"])[:2000])
        self._events.append(found.get("method", ""))
        return found

    @property
    def _events(self) -> list[str]:
        return self.__dict__.setdefault("_seen", [])

    def open(self, where: Path | str, width: int = 1280, height: int = 900, dark: bool = False, reduced: bool = False) -> None:
        """Load a file or an address into a window of this size and wait until it has loaded."""
        self.log.clear()
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        scheme += [{"name": "prefers-reduced-motion", "value": "reduce" if reduced else "no-preference"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)
        self.resize(width, height)
        self._events.clear()
        self.call("Page.navigate", url=where if isinstance(where, str) else where.as_uri())
        while "Page.loadEventFired" not in self._events:
            self._next()
        self.settle()

    def resize(self, width: int, height: int = 900) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)

    def settle(self) -> None:
        """Wait until the page has been painted twice, so that what was asked for is there."""
        self.run("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done, 0))))")

    def run(self, script: str) -> Any:
        """Return what an expression of the page gives, awaited. RuntimeError with what it throws."""
        found = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in found:
            raise RuntimeError(json.dumps(found["exceptionDetails"])[:2000])
        return found["result"].get("value")

    def mouse(self, kind: str, x: float, y: float, clicks: int = 0) -> None:
        button = "none" if kind == "mouseMoved" and not clicks else "left"
        pressed = {"buttons": 1} if clicks else {}
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button=button, clickCount=clicks, **pressed)

    def click(self, x: float, y: float) -> None:
        self.mouse("mouseMoved", x, y)
        self.mouse("mousePressed", x, y, 1)
        self.mouse("mouseReleased", x, y, 1)
        self.settle()

    def drag(self, x0: float, x1: float, y: float) -> None:
        self.mouse("mouseMoved", x0, y)
        self.mouse("mousePressed", x0, y, 1)
        for i in range(1, 6):
            self.mouse("mouseMoved", x0 + (x1 - x0) * i / 5, y, 1)
        self.mouse("mouseReleased", x1, y, 1)
        self.settle()

    def key(self, name: str) -> None:
        text = {"text": name} if len(name) == 1 else {"text": "\r"} if name == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            more = text if kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=name, windowsVirtualKeyCode=KEYS.get(name, 0), **more)
        self.settle()

    def picture(self, whole: bool = False) -> np.ndarray:
        """Return [height, width, 3] uint8 of the window, or of the whole page."""
        from PIL import Image

        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))


@contextmanager
def browser() -> Iterator[Browser]:
    """Start a browser and end it, and what it has started, with the block."""
    to_browser, send = os.pipe()
    receive, from_browser = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        shell = f'exec "$0" "$@" 3<&{to_browser} 4>&{from_browser}'
        command = [executable(), *FLAGS, "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"]
        process = subprocess.Popen(
            ["bash", "-c", shell, *command], pass_fds=(to_browser, from_browser), stderr=subprocess.DEVNULL
        )
        os.close(to_browser)
        os.close(from_browser)
        try:
            yield (driver := Browser(send, receive))
            driver.call("Browser.close", session="")
            process.wait(500)
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
            os.close(send)
            os.close(receive)
