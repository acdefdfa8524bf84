"""The traces of a run: lines on the console, its directory, W&B; and in every outcome a result and a report."""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlinvariant import checkpoints, held_out, keys, peers, runtime, stopping
from rlinvariant.config import Config
from rlinvariant.errors import one_line, outcome
from rlinvariant.held_out import HeldOut
from rlinvariant.launch import MACHINE, rank, wait_for_all
from rlinvariant.models.shards import unwrapped
from rlinvariant.report import completions, wandb_log
from rlinvariant.report.console import Console
from rlinvariant.report.rundir import RunDir, read_metrics
from rlinvariant.resumption import Resumption, settings
from rlinvariant.rewards.watchdog import watchdog
from rlinvariant.rollout import Rollout
from rlinvariant.types import JsonObject, JsonRow

if TYPE_CHECKING:
    from rlinvariant.metrics import FirstMismatch
    from rlinvariant.trainer.grpo import InvariantGRPOTrainer


SHOWN_EVERY = 10  # steps after which completions are shown again, on the console and in W&B


class Journal:
    """Writes down a run, on the main process; on the others it does nothing.

    Args:
        config: the run's configuration.
        model: directory or hub id of the model that the run starts from.
        sampler_options: what the engine is started with.
        console: where lines go.
        main: whether this is the main process.
        data: `resumption.dataset_digest` of the training data.
        resumption: what the run goes on from.
    """

    def __init__(
        self,
        config: Config,
        model: str,
        sampler_options: JsonRow,
        console: Console,
        main: bool,
        data: str,
        resumption: Resumption,
    ) -> None:
        self.config, self.model, self.console, self.main = config, model, console, main
        self.sampler_options = sampler_options
        self.directory = RunDir(config.run_dir)
        self.held_out: dict[str, HeldOut] = {}  # "before" and "after"
        self._data, self._resumption = data, resumption
        if resumption.checkpoint is not None:
            self.held_out |= {when: HeldOut.read(x) for when, x in resumption.checkpoint.about["held_out"].items()}
        self._latest: list[dict[str, Any]] = []  # completions of the step that has no row yet
        self._show_from = 1  # the step from which completions are shown again
        self._began = time.monotonic()
        self._log_to_wandb: Any = None
        self._finish_wandb: Any = None
        self._environment: dict[str, Any] = {}
        self._kernels: dict[str, str] = {}
        self._subject: dict[str, Any] = {}
        self._micro_batches: Callable[[], JsonObject | None] = lambda: None

    # ---- what the trainer calls

    def on_row(self, row: JsonObject, first_mismatch: "FirstMismatch | None") -> None:
        self.directory.append_metrics(row)
        self.console.step(row, self.config.steps, first_mismatch)
        if not self._kernels:  # only now are they known: a step has run through all of them
            self._write_environment()
            self.console.print("kernels: " + ", ".join(f"{name}: {value}" for name, value in self._kernels.items()))
        rows, self._latest = self._latest, []
        shows = bool(rows) and row["step"] >= self._show_from
        if shows:
            self._show_from = row["step"] // SHOWN_EVERY * SHOWN_EVERY + SHOWN_EVERY
            self.console.samples(completions.telling(rows))
        if self._log_to_wandb is not None:
            self._log_to_wandb({**row, wandb_log.TABLE: wandb_log.table(rows)} if shows else row, row["step"])

    def on_evaluation(self, row: JsonObject) -> None:
        """Record the numbers of an evaluation between two steps, which `keys.EVALUATION` lists."""
        self._append_evaluation(row)
        self.console.evaluation(row)

    def on_held_out(self, when: str, value: HeldOut, step: int) -> None:
        """Record the held-out reward, `when` being before or after; `step` is how many steps were trained."""
        self.held_out[when] = value
        if self.main:
            self._append_evaluation({"kind": keys.EVALUATED, "step": step, "heldout/reward": value.reward})

    def _append_evaluation(self, row: dict[str, Any]) -> None:
        self.directory.append_metrics(row)
        if self._log_to_wandb is not None:
            self._log_to_wandb(row, row["step"])

    def on_samples(self, rows: list[JsonObject]) -> None:
        """Keep what a step has drawn; `on_row`, which follows, shows some of it."""
        self._latest = rows
        if self.config.completions_gib != 0:
            completions.write(self.directory.path, rows, self.config.completions_gib)

    def on_rollout(self, step: int, rollout: Rollout) -> None:
        """Record a rollout for `rlinvariant replay`, with all that decides its bits: a resumed run may have other settings."""
        from rlinvariant.report import rollouts

        initial = os.path.abspath(self.model) if os.path.isdir(self.model) else self.model
        if self.directory.first_adapter.is_dir():
            initial = self.directory.first_adapter.name
        about = {
            "weights": initial if step == 1 else f"checkpoint-{step - 1}",
            "invariance": self.config.invariance,
            "dtype": self.config.dtype,
            "sampler": _in_one_process(self.sampler_options),
            "subject": self._subject,
        }
        rollouts.write(self.directory.path, step, rollout, about)

    def on_save(self) -> JsonObject:
        """Return what a checkpoint's manifest says of the run: what a resumed one must have, and how long its logs were."""
        logs = (self.directory.metrics, self.directory.samples)
        return {
            "settings": settings(self.config),
            "data": self._data,
            "logs": {path.name: path.stat().st_size for path in logs if path.exists()},
            "held_out": {when: value._asdict() for when, value in self.held_out.items() if when == "before"},
            "subject": self._subject,
            "forced": list(self._resumption.changed),
        }

    # ---- from the start to the end

    def start(self, trainer: "InvariantGRPOTrainer") -> None:
        """Make the run directory, or resume it, and open the run at W&B: nothing is written before a run can start.

        Raises:
            UserError: the directory cannot be written, or W&B cannot be used as the configuration says.
        """
        from rlinvariant.ops.linear import forget_routes
        from rlinvariant.verification import certificate

        forget_routes()  # what was computed to check the model is not part of the run
        model = unwrapped(trainer.model)
        starts = hasattr(model, "peft_config") and not self._resumption.step
        adapter = trainer.gathered() if starts else None
        if not self.main:
            wait_for_all()
            return
        self._subject = certificate.subject(model.config, self.config.dtype)
        resolved = self.config.resolved()
        self.directory.path.mkdir(parents=True, exist_ok=True)
        wandb_id = wandb_log.id_of(self.directory.path)
        files = [self.directory.path / "report.html", *(certificate.path_of(self._subject, form) for form in certificate.FORMS)]
        started = wandb_log.start(self.config.wandb, self.directory.path, resolved, wandb_id, files)
        mode, self._log_to_wandb, self._finish_wandb = started
        try:
            self._go_on(resolved)
            if starts:  # what step 1 begins with, for `replay`
                model.save_pretrained(self.directory.first_adapter, selected_adapters=["default"], state_dict=adapter)
            self._environment = {"vllm_environment": runtime.VLLM, "proof": trainer.proof, "wandb": mode}
            self._environment["wandb_id"] = wandb_id
            self._micro_batches = lambda: trainer.said_of_parts
            self._environment["micro_batches"] = trainer.said_of_parts
            self._environment["machine_file"] = os.environ.get(MACHINE)
            self.directory.write_environment(self._environment)
        except BaseException:
            self._finish_wandb()
            raise
        wait_for_all()  # an earlier run's result is out of the way: what any process writes there is of this one

    def _go_on(self, resolved: Mapping[str, Any]) -> None:
        """Make the directory, or cut what it holds back to what the checkpoint builds on."""
        if not self.config.resume:
            RunDir.create(self.directory.path, resolved)
            return
        from rlinvariant.report import rollouts
        from rlinvariant.verification.certificate import differences

        checkpoint = self._resumption.checkpoint
        RunDir.create(self.directory.path, resolved, True, {} if checkpoint is None else checkpoint.about["logs"])
        rollouts.forget(self.directory.path, self._resumption.step)
        completions.forget(self.directory.path, self._resumption.step)
        checkpoints.set_aside(self.directory.checkpoints, self._resumption.step)
        if checkpoint is not None and (changed := differences(checkpoint.about["subject"], self._subject)):
            self.console.print(
                f"note: bits are promised on one machine, and since {checkpoint.path.name}: {'; '.join(changed)}"
            )

    @contextmanager
    def finishing(self) -> Iterator[None]:
        """Write result.json and the report, and finish W&B, when the block ends, however it ends."""
        watchdog().leave(self.directory.result, peers.failed(None))  # where a reward function takes this process with it
        try:
            with peers.first_failure(self.directory.result, rank()):
                yield
        except BaseException as error:
            with stopping.ending():
                self._finish(error)
            if peers.on_all(error):
                wait_for_all()  # torchrun ends all processes with the first
            raise
        with stopping.ending():
            self._finish(None)

    def _finish(self, error: BaseException | None) -> None:
        """Leave what a run leaves, the result first. What fails here is said; it hides neither the rest nor the run's error."""
        if not self.main:
            return
        seconds, failures = time.monotonic() - self._began, []
        if isinstance(error, KeyboardInterrupt):
            error.args = (self._said_of(error),)
        parts: dict[str, Callable[[], None]] = {
            "result.json": lambda: self._write_result(error, seconds),
            "environment.json": self._write_environment,
            "summary": lambda: self._summarise(error, seconds),
            "report": self._write_report,
            "W&B": self._finish_wandb,
        }
        for name, leave in parts.items():
            try:
                leave()
            except Exception as failure:
                self.console.print(f"{name}: not written: {one_line(failure)}")
                failures.append(failure)
        if error is None and failures:
            raise failures[0]

    def _said_of(self, stop: KeyboardInterrupt) -> str:
        """Say what ends the run, what is saved, and how to go on."""
        saved: list[tuple[int, Path]] = []
        with suppress(OSError):
            saved = checkpoints.found(self.directory.checkpoints)
        left = f"step {saved[0][0]} is the last that is saved" if saved else "no step is saved, it begins again at the first"
        return f"{outcome(stop)}: {left}; go on with: {self.config.again}"

    def _write_result(self, error: BaseException | None, seconds: float) -> None:
        result = {
            "finished": error is None,
            "outcome": "finished" if error is None else outcome(error),
            "error": None if error is None else one_line(error),
        }
        self.directory.write_result(result | held_out.result(self.held_out) | {"seconds": seconds})

    def _summarise(self, error: BaseException | None, seconds: float) -> None:
        if error is not None:
            self.console.print(
                f"{outcome(error)}, after {seconds:.0f} s; the files of the run so far are in {self.directory.path}"
            )
            return
        if memory := _gpu_memory():
            self.console.print(memory)
        self.console.summary(read_metrics(self.directory.path), self.held_out, self.directory.path, seconds)

    def _write_report(self) -> None:
        from rlinvariant.report import html

        self.console.print(f"report      {html.write(self.directory.path)[0]}")

    def _write_environment(self) -> None:
        self._kernels = kernels(self.config.invariance)
        self._environment["micro_batches"] = self._micro_batches()  # fewer tokens, where memory was too small
        self.directory.write_environment({"kernels": self._kernels, **self._environment})


def kernels(invariance: str) -> dict[str, str]:
    """Say what has computed a run so far, and which linear shapes the self-check let the vendor GEMM have."""
    if invariance == "off":
        return {"sampler": "stock vLLM", "trainer": "stock transformers"}
    import torch

    from rlinvariant.kernels import cpu
    from rlinvariant.kernels.routes import attention_routes, in_words
    from rlinvariant.ops.linear import routes

    linear = in_words(routes(), "{route} for {them}", " ")
    if torch.cuda.is_available():
        return {"linear": linear, "attention": attention_routes(), "other ops": "kernels/*.py, Triton"}
    return {"linear": linear, "other ops": f"kernels/*.c, gcc {' '.join(cpu.FLAGS[:3])}"}


@contextmanager
def nothing_left(directory: Path) -> Iterator[None]:
    """Remove a directory and those above it, if the block fails: those that were not there before, and hold no file."""
    new = [path for path in (directory, *directory.parents) if not path.exists()]
    try:
        yield
    except BaseException:
        for path in new:
            with suppress(OSError):  # somebody has put a file there
                path.rmdir()
        raise


def _gpu_memory() -> str:
    """Say how much of the GPU's memory PyTorch has taken at most, in GiB; "" without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return ""
    total = torch.cuda.get_device_properties().total_memory / 2**30
    peak = torch.cuda.max_memory_reserved() / 2**30
    return f"GPU memory  {peak:.1f} GiB at PyTorch's peak, trainer and sampler together, of {total:.1f}"


def _in_one_process(sampler_options: JsonRow) -> JsonObject:
    """Return what a sampler is started with in one process: over how many it is spread changes no bit."""
    options = {k: v for k, v in (sampler_options.get("options") or {}).items() if k != "tensor_parallel_size"}
    return {**sampler_options, "options": options}
