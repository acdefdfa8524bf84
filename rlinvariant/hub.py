"""Can the hub give a model or a data set? It is asked before anything is loaded, and once more where it does not answer.

transformers and datasets would find out too, but only after their imports, and where the hub does not answer they ask again for
half a minute, in silence, for each file. Of the processes of a launch, one asks: `launch.asks_the_hub`.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from rlinvariant.errors import one_line
from rlinvariant.text import shown

ANSWER_S = 5.0  # how long the hub is waited for
Kind = Literal["model", "dataset"]


def hub_problems(key: str, name: str, kind: Kind = "model") -> list[str]:
    """Say in at most one line why a name that is no file and no directory cannot be had from the hub either.

    Args:
        key: what the user wrote the name after; the line starts with `key=name`.
        name: ORG/NAME.
        kind: of what it is the name.
    """
    refusal = hub_refusal(name, kind)
    return [] if refusal is None else [f"{key}={shown(name)}: no such directory, and {refusal}, or mend the name"]


def hub_refusal(name: str, kind: Kind) -> str | None:
    """Say why a model or a data set cannot be had from the hub, and the fix; None if it can, or is in the hub's cache here."""
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import build_hf_headers, http_backoff

    file = "config.json" if kind == "model" else "README.md"
    try:
        if _is_cached(name, kind):
            return None
        if constants.HF_HUB_OFFLINE:
            return "HF_HUB_OFFLINE forbids to ask the hub, of which no copy is here; unset it"
        url = hf_hub_url(name, file, repo_type=kind)
        again = {"max_retries": 1, "retry_on_status_codes": ()}  # a hub that is busy is left to the client
        with _quiet():
            status = http_backoff("HEAD", url, headers=build_hf_headers(), timeout=ANSWER_S, **again).status_code
    except HFValidationError as error:
        return f"no hub id ({one_line(error)}); give another"
    except Exception as error:  # httpx's, httpx2's or requests', by the release of the hub's client
        return f"the hub, {constants.ENDPOINT}, does not answer ({one_line(error) or type(error).__name__}); go online"
    if kind == "model" and status in (401, 403, 404):
        return f"the hub shows you no such model (status {status}); log in with `hf auth login`"
    return None


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the hub's client from warning of each try: what came of them is said in one line."""
    from huggingface_hub import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _is_cached(name: str, kind: Kind) -> bool:
    """Tell whether this machine has a copy of what the hub has; `datasets` has a cache of its own."""
    if kind == "dataset":
        from datasets import config
        from datasets.naming import camelcase_to_snakecase

        owner, _, last = name.rpartition("/")
        directory = "___".join([*filter(None, [owner]), camelcase_to_snakecase(last)])  # as `datasets` names it
        return os.path.isdir(os.path.join(config.HF_DATASETS_CACHE, directory))
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(name, "config.json"), str)
