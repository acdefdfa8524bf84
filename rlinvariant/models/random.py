"""A checkpoint with random weights, of a configuration alone: bits need no others, and the hub need not be reached."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from rlinvariant.errors import UserError, one_line
from rlinvariant.runtime import random_state_kept

GAIN = 1.6  # of a matrix: logits then spread over several nats, where transformers' 0.02 makes every token almost as likely
NOISE = 0.3  # added to what is 0 or 1 at first


def save_random(config: PreTrainedConfig, directory: str | Path, seed: int = 0) -> str:
    """Save a causal LM of this configuration with random weights, and return the directory.

        matrix ~ N(0, (GAIN / sqrt(columns))^2);  vector = initial value + NOISE N(0, 1)

    Biases and the weights of norms are random too, or a comparison of bits would not see them. There is no tokenizer.

    Args:
        config: of any causal LM; its `dtype` is the checkpoint's, fp32 if it has none.
        directory: made if it is not there; a checkpoint in it is replaced.
        seed: of the weights: one seed gives one checkpoint on one kind of device. They are drawn on the GPU if there is one.

    Raises:
        UserError: transformers has no causal LM of this configuration, or cannot build it.
    """
    cuda = torch.cuda.is_available()
    with random_state_kept(), torch.device("cuda" if cuda else "cpu"), torch.no_grad():
        torch.manual_seed(seed)
        try:
            model: Any = AutoModelForCausalLM.from_config(config, dtype=getattr(config, "dtype", None) or torch.float32)
        except (ValueError, TypeError, RuntimeError, ImportError) as error:  # the first: no causal LM has this configuration
            raise UserError(f"{type(config).__name__}: no random causal LM: {one_line(error, 160)}") from error
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=NOISE)
            else:
                parameter.normal_(0.0, GAIN * parameter.shape[-1] ** -0.5)
    model.save_pretrained(directory)
    del model
    if cuda:
        torch.cuda.empty_cache()
    return str(directory)
