"""Headless Chromium: a page's document after its scripts have run, and what it looks like."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

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
DARK = ("--force-dark-mode", "--blink-settings=preferredColorScheme=0")


def chromium() -> str:
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


def open_page(page: Path, *arguments: str, width: int = 1400, height: int = 1000) -> tuple[str, str]:
    """(what Chromium prints, what it logs) for a page of this size."""
    with tempfile.TemporaryDirectory() as profile:
        command = [
            chromium(),
            *FLAGS,
            f"--user-data-dir={profile}",
            f"--window-size={width},{height}",
            *arguments,
            page.as_uri(),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, done.stderr


def document(page: Path, width: int = 1400) -> tuple[str, str]:
    """(the document after scripts have run, the log)."""
    return open_page(page, "--dump-dom", width=width)


def screenshot(page: Path, out: Path, *arguments: str, width: int = 1400):
    """[height, width, 3] uint8 of the page's first 1,000 pixels."""
    import numpy as np
    from PIL import Image

    open_page(page, f"--screenshot={out}", *arguments, width=width)
    return np.asarray(Image.open(out).convert("RGB"))
