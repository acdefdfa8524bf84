"""Weights of a checkpoint: all that the model has, and no others, or an error."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers.utils import logging

from rlinvariant.errors import UserError, one_line
from rlinvariant.types import Untyped


def load(kind: Untyped, source: str | Path, key: str = "model", heads: tuple[str, ...] = (), **options: Untyped) -> Untyped:
    """Call `kind.from_pretrained(source, **options)`, and raise an error where that would fill missing weights at random.

    Args:
        kind: `AutoModelForCausalLM` or `AutoModel`.
        source: directory or hub id.
        key: of the setting that named it.
        heads: how names start of weights that the checkpoint may have beside the model's: `AutoModel` has no lm_head.
        options: dtype, device_map.

    Raises:
        UserError: it cannot be read, or its weights are not the model's by name and shape. A tied lm_head may be absent; one
            that is there must be the embedding.
    """
    where, before = f"{key}={source}", logging.get_verbosity()
    logging.set_verbosity_error()  # a table of what is raised here
    try:
        options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
        model, info = kind.from_pretrained(source, trust_remote_code=False, **options)
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, SafetensorError, RuntimeError) as error:
        raise UserError(f"{where}: cannot be loaded: {one_line(error)}") from error
    finally:
        logging.set_verbosity(before)
    fix = "is its config.json another model's, or a file damaged?"
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"{where}: {_weights(missing)} of the model, {missing[0]} first, missing from the checkpoint; {fix}")
    if extra := sorted(name for name in info["unexpected_keys"] if not name.startswith(heads)):
        raise UserError(f"{where}: {_weights(extra)} of the checkpoint, {extra[0]} first, not in the model; {fix}")
    if other := sorted(info["mismatched_keys"]):
        name, found, expected = other[0]
        shapes = f"{list(found)}, expected {list(expected)}"
        raise UserError(f"{where}: {_weights(other)} of the checkpoint of another shape, {name} first: {shapes}; {fix}")
    tied = getattr(model.config, "tie_word_embeddings", False) and model.get_output_embeddings()
    if tied and tied.weight is not model.get_input_embeddings().weight:
        fix = "set tie_word_embeddings to false in it"
        raise UserError(f"{where}: its lm_head is another than its embedding, which config.json ties; {fix}")
    return model


def _weights(names: list[Any]) -> str:
    return f"{len(names)} weight{'s' * (len(names) > 1)}"
