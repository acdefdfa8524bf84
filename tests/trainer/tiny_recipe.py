"""The arithmetic recipe at the smallest size, with faults on demand: what the tests launch."""

import json
import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import chz

from rlinvariant import deadline
from rlinvariant.config import Config
from rlinvariant.launch import is_launched
from rlinvariant.recipes import arithmetic

if is_launched():  # a loaded machine may need long for the step and the report that a signal leaves time for
    deadline.WITHIN_S.update(dict.fromkeys(deadline.WITHIN_S, 600.0))
    deadline.FORCE_AFTER_S = 600.0

DEFAULTS = arithmetic.DEFAULTS | {
    "steps": 2,
    "data.digits": 2,
    "data.train_size": 32,
    "data.eval_size": 8,
    "trainer.per_device_train_batch_size": 16,
    "trainer.num_generations": 4,
    "trainer.max_completion_length": 12,
    "trainer.warmup_steps": 0,
    "sampler.max_model_len": 64,
    "sampler.kv_cache_gib": 0.05,
    "sampler.enforce_eager": True,
}


@chz.chz
class Data(arithmetic.Data):
    fault: str = chz.field(
        default="",
        doc="no prompt, reward raises, ctrl-C, rank 1 raises, rank 1 is killed, rank 1 is stopped at the end, rank 1 differs, "
        "rank 1 has a flipped bit.",
    )
    uneven: bool = chz.field(default=False, doc="Two long prompts, and then two short ones, and so on; in this order.")
    api_key: str = chz.field(default="", doc="A secret, which nothing here uses.")
    source: str = chz.field(default="", doc="An address with a password in it, which nothing here uses.")


check = arithmetic.check


def datasets(config: Config, tokenizer: Any) -> Any:
    record_requests()
    train, evaluation = arithmetic.datasets(config, tokenizer)
    prompts = list(train["prompt"])
    if config.data.fault == "rank 1 is stopped at the end" and os.environ.get("RANK") == "1":
        stop_after_training()
    if config.data.fault == "rank 1 differs" and os.environ.get("RANK") == "1":
        differ_in_step_2()
    if config.data.fault == "rank 1 has a flipped bit" and os.environ.get("RANK") == "1":
        flip_before_the_second_sync()
    if config.data.fault == "no prompt":
        prompts[3] = ""
    if config.data.uneven:
        prompts = ["1+" * 20 + prompt if at % 4 < 2 else prompt for at, prompt in enumerate(prompts)]
    return train.remove_columns("prompt").add_column("prompt", prompts), evaluation


def variety(completions: list[str], trainer_state: Any, **_: Any) -> list[float]:
    """Varies in an untrained model. Kills what $KILLS says, STEP:PROCESS,...: a server that the run draws from."""
    for step, process in (pair.split(":") for pair in filter(None, os.environ.get("KILLS", "").split(","))):
        if trainer_state.global_step + 1 == int(step):
            with suppress(ProcessLookupError):
                os.killpg(int(process), signal.SIGKILL)
    return [len(set(text)) / 10 for text in completions]


def reward_funcs(config: Config) -> list[Any]:
    bad: list[str] = []

    def raises(completions: list[str], answer: list[str], **_: Any) -> list[float]:
        """Raises for the second group of the batch, samples 4 to 7: also when a sample comes alone."""
        bad.extend(answer[5:6])
        return [float("many") if right in bad else 0.0 for right in answer]

    def stops(completions: list[str], trainer_state: Any, **_: Any) -> list[float]:
        """Stops like ctrl-C, at the second step."""
        if trainer_state.global_step == 1:
            raise KeyboardInterrupt
        return variety(completions, trainer_state)

    def ends_rank_1(completions: list[str], trainer_state: Any, **_: Any) -> list[float]:
        """Fails in the second step, on the second process alone, while the first waits for it."""
        if trainer_state.global_step == 1 and os.environ.get("RANK") == "1":
            if config.data.fault == "rank 1 is killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("bad row")
        return variety(completions, trainer_state)

    faults = {"reward raises": raises, "ctrl-C": stops, "rank 1 raises": ends_rank_1, "rank 1 is killed": ends_rank_1}
    return [faults.get(config.data.fault, variety)]


def stop_after_training() -> None:
    """Send this process SIGTERM when it has trained, before it does anything else."""
    from rlinvariant.trainer.checkpointed import CheckpointedTrainer

    train = CheckpointedTrainer.train

    def then_stop(self, *args, **kwargs):
        result = train(self, *args, **kwargs)
        os.kill(os.getpid(), signal.SIGTERM)
        return result

    CheckpointedTrainer.train = then_stop


def differ_in_step_2() -> None:
    """Let the trainer's log-probs of this process be one ulp off in the second step."""
    import torch

    from rlinvariant.trainer import InvariantGRPOTrainer

    compare = InvariantGRPOTrainer._compare

    def off(self, logprobs, inputs):
        if self.state.global_step == 1:
            logprobs = torch.nextafter(logprobs, torch.zeros_like(logprobs) - 1e9)
        compare(self, logprobs, inputs)

    InvariantGRPOTrainer._compare = off


def flip_before_the_second_sync() -> None:
    """Let the last bit of one number of this process's own weights be another, before its sampler gets them."""
    from rlinvariant import bits
    from rlinvariant.trainer import InvariantGRPOTrainer

    sync = InvariantGRPOTrainer.sync

    def flipped(self, *args, **kwargs):
        if self.state.global_step == 1:
            bits.words(self.model.model.norm.weight.data).view(-1)[3] ^= 1
        return sync(self, *args, **kwargs)

    InvariantGRPOTrainer.sync = flipped


def record_requests() -> None:
    """Append what this rank asks of its sampler to $RECORD/RANK.jsonl."""
    if "RECORD" not in os.environ:
        return
    from rlinvariant.sampler.engine import Sampler

    generate, path = Sampler.generate, Path(os.environ["RECORD"], os.environ.get("RANK", "0") + ".jsonl")

    def recording(self, prompts, seeds, **kwargs):
        completions = generate(self, prompts, seeds, **kwargs)
        if kwargs["temperature"]:  # not the greedy evaluation
            ids = [c.token_ids for c in completions]
            with path.open("a") as file:
                file.write(json.dumps({"prompts": prompts, "seeds": list(seeds), "completions": ids}) + "\n")
        return completions

    Sampler.generate = recording
