"""The end of a run: RUN/model, which others load, and the facts that its card tells."""

from collections.abc import Mapping, Sized
from pathlib import Path
from typing import TYPE_CHECKING

from rlinvariant.arguments import SCRIPT
from rlinvariant.config import Config
from rlinvariant.errors import UserError, one_line
from rlinvariant.report.console import Console
from rlinvariant.report.study import argument, command

if TYPE_CHECKING:
    from rlinvariant.trainer.grpo import InvariantGRPOTrainer


def publish(config: Config, trainer: "InvariantGRPOTrainer", console: Console) -> None:
    """Write the trained model where others load it from, and upload that if the run is to be pushed to the hub.

    Raises:
        UserError: the hub does not take it; the directory was not written by rlinvariant, or is the base model's.
    """
    with console.stage("writing the model"):
        path = trainer.publish()
    dtype = str(trainer.save_dtype).removeprefix("torch.")
    form = f"{dtype}, for transformers and vLLM"
    if hasattr(trainer.model, "peft_config"):
        form = "a LoRA adapter in float32, for peft and vLLM's --enable-lora, which round its products otherwise"
    console.print(f"model: {path}, {form}; README.md there is its card")
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
    kind, resolved = SCRIPT if config.sources.get("run") == SCRIPT else "recipe", config.resolved()
    data = [f"{kind} {Path(config.recipe).name}"] if config.recipe else []
    data += [f"{len(train):,} prompts"]
    data += [f"{key}={argument(entry['value'], shared=True)}" for key, entry in resolved.items() if key.startswith("data.")]
    facts = {"data": ", ".join(data), "seed": str(config.seed), "command": command(resolved, shared=True)}
    if rewards and held_out is not None:
        values = ", ".join(f"{value:.3f} {when}" for when, value in rewards.items())
        facts["held-out reward, greedy"] = f"{values}; {len(held_out):,} prompts"
    return facts
