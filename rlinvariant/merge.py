"""`rlinvariant merge RUN|ADAPTER --out DIR`: an adapter merged into its base, as one whole model, and how much that loses."""

import argparse
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from rlinvariant.errors import ConfigErrors, UserError
from rlinvariant.files import RUNS, unwritable
from rlinvariant.model_source import ADAPTER, adapter_base, local_model, source_problems
from rlinvariant.report.console import Console
from rlinvariant.report.rundir import RunDir
from rlinvariant.text import shown

if TYPE_CHECKING:
    from rlinvariant.types import Untyped

DESCRIPTION = """Writes W + B A in place of each weight W that has an adapter, rounded to the base's dtype: a whole model, for
those who take no adapters. It is another function than the one that was trained, in which nothing is rounded between W and B A:
how much of the adapter is left is said here, and `rlinvariant verify ADAPTER` says how far apart the log-probs are."""
EXAMPLE = "rlinvariant merge runs/words_lora --out words-merged"
TOKENIZER = ("tokenizer*", "special_tokens_map.json", "vocab*", "merges.txt", "chat_template*", "generation_config.json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `merge`."""
    parser.add_argument("adapter", metavar="RUN|ADAPTER", help="a run that trained adapters, or a PEFT adapter's directory")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="the new model's directory; it must not be there"
    )


def run(options: argparse.Namespace) -> None:
    """Write the merged model, and say what is left of the adapter. Raises UserError for what the user can mend."""
    adapter = located(options.adapter)
    if options.out.exists():
        raise UserError(f"merge: --out {options.out}: is there already; name another directory")
    if problems := source_problems("ADAPTER", str(adapter), adapters=True):
        raise ConfigErrors(problems)
    base, console = local_model(str(adapter_base(str(adapter)))), Console()
    with console.stage("loading the base and the adapter"):
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        from rlinvariant.models import adapter_files, lora
        from rlinvariant.models.load import load

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        model = adapter_files.loaded(load(AutoModelForCausalLM, base, dtype="auto"), adapter)
    with console.stage("merging"):
        left = merge(model)
    dtype, ranks = str(model.dtype).removeprefix("torch."), lora.ranks(model)
    said = f"{left:.1%} of what the adapter adds is left after rounding to {dtype}"
    try:
        model.unload().save_pretrained(options.out)
        for source in (base, adapter):  # what lies beside the adapter is laid over what the base has
            for pattern in TOKENIZER:
                for file in Path(source).glob(pattern):
                    shutil.copy(file, options.out)
        (options.out / "README.md").write_text(card(base, str(adapter), said))
    except OSError as error:
        raise unwritable(options.out, error.strerror, "merge: --out", "name another directory", error.errno) from error
    console.print(f"model: {options.out}, {dtype}; {lora.in_words(ranks)}, merged: {said}")
    if not any(options.out.glob("tokenizer*")):
        console.print(f"note: no tokenizer was found beside the adapter or in a directory of the base; {base} has one")
    console.print(f"not bit-equal to what was trained: rlinvariant verify {adapter} says how far apart log-probs are")


def located(given: str) -> Path:
    """Return the adapter's directory that a run's name or directory, or its own, stands for. Raises UserError if none."""
    path = Path(given) if Path(given).is_dir() else RUNS / given
    found = next((at for at in (path, RunDir(path).model) if (at / ADAPTER).is_file()), None)
    if found is None:
        expected = "expected a run that trained adapters (lora.r), or a PEFT adapter's directory"
        raise UserError(f"merge: {shown(given)}: {expected}; found no {ADAPTER}")
    return found


def merge(model: "Untyped") -> float:
    """Put W + B A in the place of each W of a model of PEFT's, and return how much of B A that has kept."""
    import torch

    from rlinvariant.models import lora

    left, parameters = lora.share_merged(model), dict(lora.base(model))
    with torch.no_grad():
        for name, weight in lora.merged(model):
            parameters[name].copy_(weight)
    return left


def card(base: str, adapter: str, said: str) -> str:
    """Return the README of a merged model."""
    return f"""---
base_model: {base}
---

The LoRA adapter {adapter}, merged into {base} by `rlinvariant merge`: {said}. It is not bit-equal to the model that was
trained, in which the adapter is part of the product, and nothing is rounded in between.
"""
