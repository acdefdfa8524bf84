"""Models fit to be published: dtype, configuration and tokenizer as the model came, and a model card.

Methods of TRL's trainer, and of transformers' below it, that are overridden:

    _save                   saves with the dtype asked for; a checkpoint's weights stay float32, since a run goes on from them
    create_model_card       writes our card
    push_to_hub             uploads what `publish` has written, and nothing else
    _push_from_checkpoint   does so at a checkpoint
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.trainer_utils import HubStrategy
from transformers.utils.hub import PushInProgress

from rlinvariant.errors import UserError
from rlinvariant.files import sync_directory, write_atomically
from rlinvariant.models.shards import unwrapped
from rlinvariant.trainer.card import Card
from rlinvariant.trainer.distributed import DistributedTrainer
from rlinvariant.types import Untyped

SETTINGS = "training_args.bin"  # a pickle, of settings that the run has elsewhere, and of tokens
CARD = "README.md"
REFERENCE = "ref"  # TRL's copy of an adapter, made anew at each start; where it lies, transformers resumes with it alone
MARK = "rlinvariant.json"  # in each directory that `publish` has written: no other is replaced


class PublishedTrainer(DistributedTrainer):
    """Saves and publishes as the module says; everything else is `DistributedTrainer`'s and TRL's."""

    processing_class: Any
    save_dtype: torch.dtype | None = None  # of published weights; None: the parameters' own, float32
    model_directory: Path | None = None  # what `publish` writes; None: `model` in args.output_dir
    about_run: Callable[[], Mapping[str, str]] | None = None  # called for the card: further rows, "command" among them
    computed: str = "float32 parameters"  # how the model is trained, for the card
    _saving_to: str | None = None  # the hidden directory of a checkpoint that is being written
    _kind = "GRPO"

    def __init__(self, model: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        self._came_with_cache = getattr(model.config, "use_cache", None)  # transformers' trainer sets it to its own use_cache
        self._base = str(model.config._name_or_path)
        # TRL gives it a padding token, and calls leave padding and truncation in what a fast tokenizer saves
        self._tokenizer_as_given = files_of(kwargs.get("processing_class"))
        self._card_options: dict[str, Any] = {}
        super().__init__(model, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        self._write(Path(output_dir or self.args.output_dir), state_dict, resumable=self._saving_to is not None)

    def _write(self, directory: Path, state_dict: dict[str, Any] | None = None, resumable: bool = False) -> None:
        """Write model, tokenizer and card; `resumable` keeps the parameters as they are trained, as a run goes on from them."""
        model, dtype = unwrapped(self.model), None if resumable else self.save_dtype
        plain = isinstance(model, PreTrainedModel)  # an adapter of PEFT's has no configuration of a model's
        if plain and dtype is not None:
            state_dict = cast(model.state_dict() if state_dict is None else state_dict, dtype)
        super()._save(str(directory), state_dict)
        if not self.args.should_save:
            return
        shutil.rmtree(directory / REFERENCE, ignore_errors=True)
        (directory / SETTINGS).unlink()
        for name, content in self._tokenizer_as_given.items():
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_bytes(content)
        if plain:
            self._restore_config(directory / "config.json", dtype)
        write_atomically(directory / CARD, self.model_card(resumable))

    def _restore_config(self, path: Path, dtype: torch.dtype | None) -> None:
        """Put back what transformers' trainer has changed in a saved configuration, and name the dtype that was saved."""
        config = json.loads(path.read_text())
        if self._came_with_cache is not None:
            config["use_cache"] = self._came_with_cache
        if dtype is not None:
            parts = [config, *(part for part in config.values() if isinstance(part, dict) and "dtype" in part)]
            for part in parts:
                part["dtype"] = str(dtype).removeprefix("torch.")
        write_atomically(path, json.dumps(config, indent=2, sort_keys=True) + "\n")

    def model_card(self, resumable: bool = False) -> str:
        """Return the card of the weights as they are now; `resumable`: of a checkpoint's, which stay as they are trained."""
        facts = {} if self.about_run is None else dict(self.about_run())
        best = self.args.load_best_model_at_end and not resumable and self.state.best_global_step
        directory = Path(self.args.output_dir) if self.model_directory is None else self.model_directory.parent
        trained = next(iter(unwrapped(self.model).parameters())).dtype
        dtype = str(trained if resumable or self.save_dtype is None else self.save_dtype).removeprefix("torch.")
        return Card(
            name=(self.args.hub_model_id or directory.resolve().name).split("/")[-1],
            base=self._base,
            algorithm=self._kind,
            step=int(best or self.state.global_step),
            weights=f"{dtype}, as they are trained: a run goes on from them" if resumable else dtype,
            computed=self.computed,
            log=[row for row in self.state.log_history if "loss" in row],
            command=facts.pop("command", ""),
            facts=facts,
            library="peft" if hasattr(self.model, "peft_config") else "transformers",
            **self._card_options,
        ).text()

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write the card into `args.output_dir`; within a checkpoint `_save` has written one. Arguments are TRL's."""
        self._note(dataset_name, tags)
        if self.is_world_process_zero() and not self._saving_to:
            Path(self.args.output_dir).mkdir(parents=True, exist_ok=True)
            write_atomically(Path(self.args.output_dir, CARD), self.model_card())

    def _note(self, dataset_name: str | None = None, tags: str | list[str] | None = None, **_: Any) -> None:
        """Keep what a script says for the card."""
        self._card_options |= {"dataset": dataset_name} if dataset_name else {}
        self._card_options |= {"tags": [tags] if isinstance(tags, str) else list(tags)} if tags else {}

    def publish(self) -> Path:
        """Write model, tokenizer and card into `model_directory`, whole or not at all, and return it. All ranks call this.

        Raises:
            UserError: what is there was not written by this, or is the base model.
        """
        state = self.gathered()
        path = self._publish(state) if self.args.should_save else self._published_to
        self.accelerator.wait_for_everyone()
        return path

    @property
    def _published_to(self) -> Path:
        return self.model_directory or Path(self.args.output_dir, "model")

    def _publish(self, state: dict[str, Tensor] | None) -> Path:
        """Write what `publish` does; `state` is what `gathered` has returned."""
        if self.is_world_process_zero():
            self._finish_current_push()  # it reads the files that are written now
        path = self._published_to
        self._require_place()
        partial, replaced = (path.with_name(f".{path.name}.{name}") for name in ("partial", "replaced"))
        for left in (partial, replaced):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        try:
            self._write(partial, state)
            write_atomically(partial / MARK, json.dumps({"published_by": "rlinvariant", "step": self.state.global_step}) + "\n")
            for file in partial.iterdir():
                file.chmod(0o666 & ~_umask())  # safetensors makes a file for its owner alone
                with file.open("rb") as written:
                    os.fsync(written.fileno())
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        if path.is_dir():
            os.rename(path, replaced)
        os.rename(partial, path)
        sync_directory(path.parent)
        shutil.rmtree(replaced, ignore_errors=True)
        return path

    def _require_place(self) -> None:
        if problems := place_problems(self._published_to, self._base):
            raise UserError(problems[0])

    def init_hf_repo(self, token: str | None = None) -> None:
        """Make the repository; a run that gives it no name gives it its own, not that of its directory of checkpoints."""
        output = Path(self.args.output_dir).absolute()
        if self.args.hub_model_id is None and output.name == "checkpoints":
            self.args.hub_model_id = output.parent.name
        self._require_place()
        super().init_hf_repo(token)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        **card: Any,
    ) -> Any:
        """Write the model as `publish` does, and upload exactly that. Arguments and result are transformers'."""
        if self.hub_model_id is None:
            self.init_hf_repo(token=token)
        self._note(**card)
        self.publish()
        return self.upload(commit_message, blocking, token, revision)

    def upload(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
    ) -> Any:
        """Send the hub what `publish` has written, from the main process. Arguments and result are those of `push_to_hub`."""
        if not self.is_world_process_zero():
            return None
        from huggingface_hub import HfApi

        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        return HfApi().upload_folder(
            repo_id=self.hub_model_id or "",
            folder_path=self._published_to,
            commit_message=commit_message,
            token=token or self.args.hub_token,
            revision=revision or self.args.hub_revision,
            run_as_future=not blocking,
        )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Write and upload the model, while training goes on, at each checkpoint, as hub_strategy=every_save says."""
        state = None if self.args.hub_strategy == HubStrategy.END else self.gathered()
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        if not self.args.hub_always_push and self.push_in_progress is not None and not self.push_in_progress.is_done():
            return
        self._publish(state)
        job = self.upload(f"Training in progress, step {self.state.global_step}", blocking=False)
        self.push_in_progress = PushInProgress([job])  # type: ignore[arg-type]  # typed as one future, used as a list


def place_problems(path: Path, base: str) -> list[str]:
    """Say in at most one line why a model must not be published into a directory, whose content it would replace.

    Args:
        path: the directory.
        base: directory or hub id of the model that training begins from.
    """
    fix = "move it, or choose another run or output_dir"
    if os.path.isdir(base) and path.resolve() in (at := Path(base).resolve(), *at.parents):
        return [f"{path}: the base model is there, and the trained one would replace it; {fix}"]
    if path.is_symlink() or (os.path.lexists(path) and not _replaceable(path)):
        return [f"{path}: not written by rlinvariant (it has no {MARK}), and the trained model would replace it; {fix}"]
    return []


def _replaceable(path: Path) -> bool:
    return path.is_dir() and ((path / MARK).is_file() or not any(path.iterdir()))


def cast(state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return weights in a dtype, on the CPU; those that share memory still do, and what is no float stays as it is."""
    done: dict[tuple[int, tuple[int, ...]], Tensor] = {}
    for weight in state.values():
        place = (weight.data_ptr(), tuple(weight.shape))
        if place not in done:
            done[place] = weight.detach().to("cpu", dtype if weight.is_floating_point() else weight.dtype)
    return {name: done[weight.data_ptr(), tuple(weight.shape)] for name, weight in state.items()}


def files_of(tokenizer: Untyped) -> dict[str, bytes]:
    """Return what a tokenizer saves as it is now, by the files' names: a copy of it would take ten times as long to make."""
    if tokenizer is None:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = [path for path in Path(folder).rglob("*") if path.is_file()]
        return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def _umask() -> int:
    """Return the bits of a file's mode that this process leaves out; the system tells them only when they are set."""
    os.umask(mask := os.umask(0o077))
    return mask
