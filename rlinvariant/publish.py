"""The end of a run: RUN/model, which others load, and the facts that its card tells."""

import os
import shlex
from collections.abc import Mapping, Sized
from pathlib import Path
from typing import TYPE_CHECKING

from rlinvariant.config import Config
from rlinvariant.config.parse import COMMAND_LINE
from rlinvariant.config.tree import leaves, plain
from rlinvariant.errors import UserError, one_line
from rlinvariant.masking import masked
from rlinvariant.report.console import Console
from rlinvariant.report.study import argument
from rlinvariant.text import shown

if TYPE_CHECKING:
    from rlinvariant.trainer.grpo import InvariantGRPOTrainer


def publish(config: Config, trainer: "InvariantGRPOTrainer", console: Console) -> None:
    """Write the trained model where others load it from, and upload that if the run is to be pushed to the hub.

    Raises:
        UserError: the hub does not take it; the directory is there.
    """
    with console.stage("writing the model"):
        path = trainer.publish()
    dtype = str(trainer.save_dtype).removeprefix("torch.")
    console.print(f"model: {path}, {dtype}, for transformers and vLLM; README.md there is its card")
    if not trainer.args.push_to_hub:
        return
    try:
        trainer.upload()
    except Exception as error:  # of the network, of HTTP, of the hub
        fix = f"run `hf upload {trainer.hub_model_id} {path}`"
        raise UserError(f"trainer.push_to_hub=True: the hub does not take it: {one_line(error)}; {fix}") from error


def card_facts(config: Config, train: Sized, held_out: Sized | None, rewards: Mapping[str, float]) -> dict[str, str]:
    """Return what a run knows for the model's card: its data, its command, its held-out rewards.

    Args:
        config: the run's.
        train, held_out: rows.
        rewards: mean held-out reward, greedy: "before" and, at the end, "after".
    """
    data = [("script " if config.sources.get("run") == "script" else "recipe ") + Path(config.recipe).name]
    data += [f"{len(train):,} prompts"]
    data += [
        f"{key}={_shared(masked(key, plain(key, leaf.value)))}"
        for key, leaf in leaves(config).items()
        if key.startswith("data.")
    ]
    facts = {"data": ", ".join(data), "seed": str(config.seed), "command": command(config)}
    if rewards and held_out is not None:
        values = ", ".join(f"{value:.3f} {when}" for when, value in rewards.items())
        facts["held-out reward, greedy"] = f"{values}; {len(held_out):,} prompts"
    return facts


def command(config: Config) -> str:
    """Return the command that starts a run, without secrets, and of a file of this machine only the name."""
    if config.sources.get("run") == "script":
        return shlex.join(["python", config.recipe])
    own = [key for key, source in config.sources.items() if source == COMMAND_LINE and key not in ("recipe", "resume")]
    found = leaves(config)
    arguments = [f"{key}={_shared(masked(key, plain(key, found[key].value)))}" for key in ("recipe", *own)]
    return shlex.join(["rlinvariant", "train", *arguments])


def _shared(value: object) -> str:
    """Write a value for others: of an absolute path its last part, as the rest says where somebody's files are."""
    text = shown(argument(value))
    return Path(text).name if os.path.isabs(text) else text
