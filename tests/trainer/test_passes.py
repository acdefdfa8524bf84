"""No part of a step waits for the device: a host that asks it for a number starts none of the work that follows.

A CPU has nothing to wait for, so what is looked at are the calls: those that hand a tensor's numbers to Python or Python's to a
tensor, and those whose result has as many elements as the tensor's numbers say. On a GPU the driver is asked, too.
"""

import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import rlinvariant
from rlinvariant.config import PPOConfig
from rlinvariant.models.random import save_random
from rlinvariant.recipes._tiny import build_tokenizer
from rlinvariant.trainer.measured import MeasuredTrainer
from rlinvariant.trainer.passes import PassingTrainer, nanmax, nanmin
from tests.parity.device import CUDA
from tests.parity.harness import new_trainer, questions, small_config, variety
from tests.trainer.test_pairs import LORA, small
from tests.trainer.test_training import LOSSES

aten = torch.ops.aten
READ = {"item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__"}
GIVEN = {"tensor", "as_tensor", "from_numpy"}
SIZED = {aten.nonzero, aten.masked_select, aten._local_scalar_dense, aten.equal, aten._unique2}


class Asked(TorchDispatchMode):
    """Keeps where a block asks the device for numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        masks = args[1] if func.overloadpacket in (aten.index, aten.index_put, aten.index_put_) else ()
        by_mask = any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in masks)
        counted = func is aten.repeat_interleave.Tensor and (kwargs or {}).get("output_size") is None
        if func.overloadpacket in SIZED or by_mask or counted:
            self.note(str(func))
        return func(*args, **(kwargs or {}))

    def note(self, what: str) -> None:
        frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and f.filename != __file__]
        self.places.append(f"{what} at {frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}")


class Read(TorchFunctionMode):
    """Keeps where a block hands a tensor's numbers to Python."""

    def __init__(self, asked: Asked) -> None:
        super().__init__()
        self.asked = asked

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in GIVEN or (name in READ and isinstance(args[0], Tensor)):
            self.asked.note(name)
        return func(*args, **(kwargs or {}))


STEPS = 4 if CUDA else 2  # the last two are looked at, of a reused rollout both passes; before them graphs are recorded
KINDS: dict[str, dict[str, Any]] = {
    **{loss: {"loss_type": loss} for loss in LOSSES if loss != "luspo"},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    "a reference": {"beta": 0.5, "use_bias_correction_kl": True},
    "an entropy bonus": {"entropy_coef": 0.3},
    "off-policy sequences masked": {"off_policy_mask_threshold": 0.0},
    "top-p": {"top_p": 0.8, "temperature": 0.7},
    "later passes": {"num_iterations": 2},
    "two batches": {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "steps_per_generation": 1},
    "a leaf for each sample": {"gradients": "invariant"},
    "PPO": {"ppo": PPOConfig()},
}


def asking(trainer: Any, asked: Asked, method: Callable) -> Callable:
    def looked_at(*args: Any, **kwargs: Any) -> Any:
        if trainer.state.global_step < STEPS - 2:
            return method(*args, **kwargs)
        with Read(asked), asked:
            if CUDA:
                torch.cuda.set_sync_debug_mode("error")
            try:
                return method(*args, **kwargs)
            finally:
                if CUDA:
                    torch.cuda.set_sync_debug_mode("default")

    return looked_at


def places(trainer: Any) -> list[str]:
    """Train, and return where parts have asked the device for a number."""
    asked, losses = Asked(), []
    inner = super(PassingTrainer, trainer).compute_loss  # of one part

    def compute_loss(*args: Any, **kwargs: Any) -> Tensor:
        losses.append(trainer.state.global_step)
        return asking(trainer, asked, inner)(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            PassingTrainer, "compute_loss", lambda self, *args, **kwargs: compute_loss(*args, **kwargs), raising=False
        )
        trainer.accelerator.backward = asking(trainer, asked, trainer.accelerator.backward)
        trainer.train()
    assert min(losses.count(step) for step in (STEPS - 2, STEPS - 1)) >= 3, "blind: a step had fewer parts"
    return sorted(set(asked.places))


@pytest.mark.parametrize("kind", KINDS)
def test_no_part_of_a_step_asks_for_a_number(kind, arithmetic_dir, exact_engine, tmp_path):
    tokens = {} if "gradients" in KINDS[kind] else {"tokens_per_microbatch": 100}
    run = new_trainer(arithmetic_dir, exact_engine, tmp_path, max_steps=STEPS, **tokens, **KINDS[kind])
    assert places(run.trainer) == []


@pytest.mark.parametrize(("family", "settings"), [("qwen3", LORA), ("mistral-window", {}), ("qwen3-moe", {})])
def test_no_part_of_a_model_of_another_form_asks_either(family, settings, tmp_path):
    path = save_random(small(family), tmp_path / "model")
    build_tokenizer().save_pretrained(path)
    rows: list[Any] = []
    trainer = rlinvariant.grpo_trainer(
        str(path),
        variety,
        small_config(tmp_path / "out", max_steps=STEPS),
        questions(),
        tokens_per_microbatch=40,
        sampler_options={"max_model_len": 64, "kv_cache_gib": 0.02, "options": {"enforce_eager": True}},
        on_row=lambda row, mismatch: rows.append(row),
        **settings,
    )
    assert places(trainer) == []
    assert [row["onpolicy/mismatched_tokens"] for row in rows] == [0] * STEPS


def test_a_number_that_is_asked_for_is_seen(arithmetic_dir, exact_engine, tmp_path, monkeypatch):
    trained_of = MeasuredTrainer._trained_of

    def curious(self: MeasuredTrainer, inputs: Any) -> Any:
        assert float(self._trainer_logprobs.sum()) < 0
        self._trainer_logprobs[self._trainer_logprobs < 0].cpu()
        return trained_of(self, inputs)

    monkeypatch.setattr(MeasuredTrainer, "_trained_of", curious)
    run = new_trainer(arithmetic_dir, exact_engine, tmp_path, max_steps=STEPS, tokens_per_microbatch=100)
    if CUDA:  # the driver itself stops at the first
        with pytest.raises(RuntimeError, match="synchronizing CUDA operation"):
            places(run.trainer)
        return
    seen = {place.split(" at ")[0] for place in places(run.trainer)}
    assert {"aten._local_scalar_dense.default", "aten.index.Tensor", "cpu"} <= seen


@pytest.mark.parametrize("values", [[3.0, -1.0, 2.0], [float("nan"), 5.0, -2.5], [float("nan")] * 2, [float("-inf"), 1.0]])
def test_least_and_greatest_are_trls(values):
    from trl.trainer.utils import nanmax as trls_max
    from trl.trainer.utils import nanmin as trls_min

    x = torch.tensor(values)
    assert torch.equal(nanmin(x).nan_to_num(99), trls_min(x).nan_to_num(99))
    assert torch.equal(nanmax(x).nan_to_num(99), trls_max(x).nan_to_num(99))
