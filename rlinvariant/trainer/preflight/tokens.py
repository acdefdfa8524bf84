"""Do tokenizer, model and generation settings go together, and can a checkpoint of them be written?"""

import copy
import tempfile
from typing import TYPE_CHECKING, Any

from rlinvariant.errors import UserError, one_line

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase


def token_problems(tokenizer: "PreTrainedTokenizerBase", vocabulary: int | None, name: str) -> list[str]:
    """List what is wrong with a tokenizer's end and padding tokens.

    Args:
        tokenizer: the run's.
        vocabulary: rows of the model's embedding; None: not known.
        name: directory or hub id of the model, for the lines.
    """
    if tokenizer.eos_token_id is None:
        return [f"model={name}: its tokenizer has no eos_token, so that no completion could end; save it with one"]
    found = []
    for token in ("eos_token", "pad_token"):
        index = getattr(tokenizer, f"{token}_id")
        if vocabulary is not None and index is not None and index >= vocabulary:
            has = f"{token} {getattr(tokenizer, token)!r} is token {index}, and the model has embeddings for {vocabulary:,}"
            found.append(f"model={name}: its tokenizer's {has}; save the tokenizer that belongs to the model")
    pad = tokenizer.pad_token_id
    if pad is not None and tokenizer.pad_token not in tokenizer.all_special_tokens:
        fix = "save the tokenizer with a special one"
        found.append(f"model={name}: its tokenizer's pad_token {tokenizer.pad_token!r} is an ordinary token; {fix}")
    return found


def load_generation(name: str, config: "PreTrainedConfig") -> "GenerationConfig":
    """Load a model's generation settings, as transformers does with its weights.

    Args:
        name: directory or hub id of the model.
        config: its configuration, which stands in where there are none.

    Raises:
        UserError: they cannot be read.
    """
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(name)
    except OSError:
        return GenerationConfig.from_model_config(copy.deepcopy(config))
    except (ValueError, TypeError) as error:
        why = f"generation_config.json cannot be read: {one_line(error)}; mend or delete it"
        raise UserError(f"model={name}: {why}") from error


def end_tokens(generation: "GenerationConfig", tokenizer: Any) -> list[int]:
    """Return the tokens that end a completion, as TRL finds them: the tokenizer's, and those of the generation settings."""
    ends, own = model_ends(generation), tokenizer.eos_token_id
    return ends if own in ends else [own, *ends]


def model_ends(generation: "GenerationConfig") -> list[int]:
    """Return the end tokens of a model's generation settings alone, which an engine takes from the model's directory."""
    found = generation.eos_token_id
    return [] if found is None else [found] if isinstance(found, int) else list(found)


def generation_problems(name: str, generation: "GenerationConfig") -> list[str]:
    """List why a model's generation settings could not be saved: transformers refuses that with each checkpoint.

    Args:
        name: directory or hub id of the model.
        generation: its generation settings.
    """
    with tempfile.TemporaryDirectory() as directory:  # what transformers refuses to save is another set in each version
        try:
            generation.save_pretrained(directory)
        except ValueError as error:
            fix = "transformers would refuse to save it with every checkpoint; mend it in a copy of the model"
            why = str(error).removesuffix("\n\nFix these issues to save the configuration.")
            return [f"model={name}: generation_config.json: {one_line(why)}; {fix}"]
    return []
