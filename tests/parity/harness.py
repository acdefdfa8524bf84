"""Drive engines and trainers as the tests need them, and compare what they give, bit for bit."""

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig
from trl import GRPOConfig

from rlinvariant.bits import assert_bits_equal
from rlinvariant.errors import ParityError
from rlinvariant.rollout import Completion
from rlinvariant.sampler import vllm_linear
from rlinvariant.sampler.drive import Request, Trace, counting, drive
from rlinvariant.sampler.engine import Sampler
from rlinvariant.trainer import InvariantGRPOTrainer, InvariantPPOTrainer
from rlinvariant.trainer.score import Layout, padded, score
from tests.parity.device import BLOCK, CUDA, DEVICE

__all__ = ["Layout", "Request", "Trace", "counting", "drive", "padded", "score"]  # which have their place in the package


def save_model(config: PreTrainedConfig, path: Path, seed: int = 0) -> str:
    """A random checkpoint whose logits spread: transformers' own 0.02 makes every token almost equally likely."""
    config.initializer_range = 0.1
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return str(path)


def load(path: str, dtype: torch.dtype = torch.float32) -> Any:
    """The checkpoint in transformers, on the device."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(DEVICE)


def start_engine(
    path: str,
    *,
    invariant: bool = True,
    dtype: str = "bfloat16",
    kv_bytes: int = 64 << 20,
    longest: int = 192,
    ranks: Any = None,
    kind: type[Sampler] = Sampler,
    **options: Any,
) -> Sampler:
    """Start an engine without compilation, which takes a minute, unless `enforce_eager=False` asks for it."""
    options = {"max_num_seqs": 64, "max_num_batched_tokens": 2048, "block_size": BLOCK, "enforce_eager": True} | options
    gib = kv_bytes / 2**30
    room = {"max_model_len": longest, "kv_cache_gib": gib}
    engine = kind(path, invariant=invariant, dtype=dtype, **room, options=options, ranks=ranks)
    engine._end.atexit = False  # the process ends as it is: taking an engine apart takes seconds
    return engine


# ---- requests, and an engine stepped by hand


@dataclass
class Pair:
    """A trained side and a sampling side of one checkpoint, and prompts, of which each temperature is drawn once."""

    path: str
    engine: Sampler
    model: Any
    prompts: list[list[int]]
    max_tokens: int = 24
    drawn: dict[float, list[Completion]] = field(default_factory=dict)

    def completions(self, temperature: float) -> list[Completion]:
        if temperature not in self.drawn:
            seeds = range(len(self.prompts))
            self.drawn[temperature] = self.engine.generate(
                self.prompts, seeds, temperature=temperature, max_tokens=self.max_tokens
            )
        return self.drawn[temperature]


def generate(engine: Sampler, requests: Sequence[Request], **sampling: Any) -> list[Completion]:
    """Through `Sampler.generate`, from a cold prefix cache; all must share temperature and length."""
    (temperature,), (max_tokens,) = {r.temperature for r in requests}, {r.max_tokens for r in requests}
    assert engine.llm.reset_prefix_cache()
    how = {"temperature": temperature, "max_tokens": max_tokens, **sampling}
    return engine.generate([r.prompt for r in requests], [r.seed for r in requests], **how)


def assert_same_completions(a: Sequence[Completion | None], b: Sequence[Completion | None], what: str) -> int:
    """Equal token ids and bit-equal log-probs; returns how many tokens were compared."""
    compared = 0
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        assert x is not None and y is not None, f"{what}: request {i} has no completion"
        assert x.token_ids == y.token_ids, f"{what}: request {i}: {x.token_ids} != {y.token_ids}"
        assert_bits_equal(fp32(x.sampler_logprobs), fp32(y.sampler_logprobs), f"{what}: request {i}")
        compared += len(x.token_ids)
    return compared


def fp32(values: Sequence[float]) -> torch.Tensor:
    """Sampler log-probs as the trainer takes them. They are fp32 in Python floats: nothing is rounded here."""
    exact = torch.tensor(values, dtype=torch.float64)
    assert_bits_equal(exact.float().double(), exact, "a log-prob is no fp32 number")
    return exact.float()


# ---- training


def questions(count: int = 32) -> Dataset:
    """Sums of one to three digits, so that prompts are ragged and rows are padded."""
    rng = random.Random(5)
    pairs = [(rng.randrange(10 ** rng.randint(1, 3)), rng.randrange(10 ** rng.randint(1, 3))) for _ in range(count)]
    return Dataset.from_list([{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a, b in pairs])


def variety(completions: Iterable[str], **_: Any) -> list[float]:
    """A reward that an untrained model varies in, so that advantages and gradients are not zero."""
    return [len(set(text)) / 10 for text in completions]


@dataclass
class Run:
    trainer: InvariantGRPOTrainer
    rows: list[dict[str, Any]]
    mismatches: list[Any]

    def total(self, key: str) -> int:
        return sum(int(row[f"onpolicy/{key}"]) for row in self.rows)


def small_config(output_dir: Path | str, **changes: Any) -> GRPOConfig:
    """Two steps of two prompts, four samples of each, without checkpoints; `changes` are settings of GRPOConfig."""
    settings: dict[str, Any] = {
        "bf16": False,
        "use_cpu": not CUDA,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "max_steps": 2,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 12,
        "learning_rate": 1e-3,  # a step must move bf16 weights, or a stale engine would go unseen
    }
    return GRPOConfig(str(output_dir), **settings | changes)


def new_trainer(path: str, engine: Any, output_dir: Path | str, *, invariance: str = "exact", **changes: Any) -> Run:
    """A trainer on an engine that runs already, and where its rows will be."""
    names = (
        "reward_funcs",
        "train_dataset",
        "dtype",
        "staleness",
        "gradients",
        "tokens_per_microbatch",
        "recompute",
        "on_evaluation",
        "on_samples",
        "on_rollout",
        "eval_dataset",
        "peft_config",
        "model",
        "callbacks",
        "ppo",
        "tools",
        "environment_factory",
        "rollout_func",
        "tool_errors",
        "tool_timeout",
        "reward_cage",
        "processing_class",
    )
    owned = {key: changes.pop(key) for key in names if key in changes}
    arguments: dict[str, Any] = {
        "per_device_train_batch_size": 16,  # 4 prompts x 4 samples
        "vllm_importance_sampling_correction": False,
        "gradient_checkpointing": False,
        "seed": 0,
    } | changes
    run = Run(None, [], [])  # type: ignore[arg-type]

    def on_row(row: Mapping[str, Any], first_mismatch: Any) -> None:
        run.rows.append(dict(row))
        run.mismatches.append(first_mismatch)

    model = owned.pop("model", None) or AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    run.trainer = (InvariantPPOTrainer if "ppo" in owned else InvariantGRPOTrainer)(
        model,
        owned.pop("reward_funcs", variety),
        small_config(output_dir, **arguments),
        processing_class=owned.pop("processing_class", None) or AutoTokenizer.from_pretrained(path),
        train_dataset=owned.pop("train_dataset", None) or questions(),
        sampler=lambda: engine,
        invariance=invariance,
        on_row=on_row,
        **owned,
    )
    return run


def train(*args: Any, **changes: Any) -> Run:
    run = new_trainer(*args, **changes)
    run.trainer.train()
    return run


def assert_exact(run: Run, floor: int) -> None:
    """Every sampled token compared, none different, and enough of them for the zero to mean something."""
    assert run.rows and run.total("mismatched_tokens") == 0 and not any(run.mismatches)
    assert run.total("unscored_tokens") == 0
    assert run.total("compared_tokens") >= floor, f"{run.total('compared_tokens')} tokens compared, expected {floor}"


def assert_stops(run: Run, message: str = "mismatched") -> None:
    """ParityError, before the optimizer step that the fault would have reached, with the count in the row."""
    with pytest.raises(ParityError, match=message):
        run.trainer.train()
    if message == "mismatched":
        assert run.rows[-1]["onpolicy/mismatched_tokens"] > 0 and run.mismatches[-1] is not None


def off_by_an_ulp(row: int) -> Callable[..., torch.Tensor]:
    """A sampler's lm_head with a fault: one bf16 ulp more in each weight of one row."""
    apply = vllm_linear._Head.apply

    def faulty(self: Any, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        weight = layer.weight.detach().clone()
        weight[row].view(torch.int16).add_(1)
        head: Any = torch.nn.Module()
        head.weight, head.org_vocab_size, head.packed = weight, layer.org_vocab_size, {}
        return apply(self, head, x, bias)

    return faulty


def weights(run: Run) -> dict[str, torch.Tensor]:
    return {name: p.detach().cpu().clone() for name, p in run.trainer.model.named_parameters()}


def critic_weights(run: Run) -> dict[str, torch.Tensor]:
    return {name: p.detach().cpu().clone() for name, p in run.trainer.critic.named_parameters()}


def assert_same_weights(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor], what: str) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert_bits_equal(a[name], b[name], f"{what}: {name}")
