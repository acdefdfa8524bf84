"""A short supervised stage that gives a small model something for RL to improve."""

import hashlib
import inspect
import json
import random
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlinvariant.cache import CACHE, made_once

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def warm_start(
    name: str,
    build: Callable[[], tuple["PreTrainedModel", "PreTrainedTokenizerBase"]],
    example: Callable[[random.Random], tuple[str, str]],
    *,
    key: Mapping[str, object],
    stop_at: float,
    max_steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
) -> str:
    """Return the directory of a warm-started model in Hugging Face format, training it unless it is cached.

    The cache, `cache.made_once`, is keyed by `key`, the hyperparameters, and the source of this file and of the one that
    defines `build`.

    Args:
        build: makes the untrained model (fp32, on the CPU) and its tokenizer.
        example: draws one (prompt, completion) pair; the end of sequence is added.
        key: what else `build` and `example` depend on; JSON.
        stop_at, max_steps, batch_size, learning_rate, seed: see `supervised`.
    """
    hyper = {"stop_at": stop_at, "max_steps": max_steps, "batch_size": batch_size}
    hyper |= {"learning_rate": learning_rate, "seed": seed}
    sources = [Path(__file__).read_text(), Path(inspect.getfile(build)).read_text()]
    digest = hashlib.blake2b(json.dumps([dict(key), hyper, sources], sort_keys=True).encode(), digest_size=8).hexdigest()

    def make(directory: Path) -> None:
        import torch

        # The caller's random state must not depend on whether the cache was warm.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model, tokenizer = build()
            supervised(model, tokenizer, example, **hyper)
        save_here(model, directory)
        tokenizer.save_pretrained(directory)

    return made_once(CACHE / f"{name}-{digest}", make)


def save_here(model: "PreTrainedModel", directory: Path | str) -> None:
    """Save a model from this process, whichever it is: transformers saves nothing on others than the first of those joined."""
    own = vars(model)
    own["should_save_on_this_rank"] = lambda is_main_process: True
    try:
        model.save_pretrained(directory)
    finally:
        del own["should_save_on_this_rank"]


def supervised(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    example: Callable[[random.Random], tuple[str, str]],
    *,
    stop_at: float,
    max_steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
) -> float:
    """Train on fresh examples until the model would sample a whole target completion with probability `stop_at`.

        p = mean over examples of exp(sum of the completion's log-probs), smoothed over about 10 steps

    p is read off the training batch before it is learned from, and no example is drawn on purpose twice, so p estimates
    accuracy on new prompts at temperature 1. Returns the last p; stops after `max_steps` at the latest.
    """
    import torch
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    generator = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 20))
    console, started, probability, step = Console(), time.monotonic(), 0.0, 0
    console.print(f"warm start: supervised, at most {max_steps} steps, until {stop_at:.0%} of samples are right")
    text = TextColumn("warm start  step {task.completed}/{task.total}  loss {task.fields[loss]}  p {task.fields[p]}")
    model.train()
    with Progress(text, BarColumn(), TimeElapsedColumn(), console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=max_steps, loss="", p="")
        for step in range(1, max_steps + 1):
            ids, targets = _batch(tokenizer, [example(generator) for _ in range(batch_size)])
            logits = model(input_ids=ids[:, :-1]).logits.float()
            losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets[:, 1:], reduction="none")
            loss = losses.sum() / (targets[:, 1:] != -100).sum()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            probability += 0.1 * ((-losses.detach().sum(1)).exp().mean().item() - probability)
            bar.update(task, completed=step, loss=f"{loss.item():.3f}", p=f"{probability:.2f}")
            if not console.is_terminal and step % 100 == 0:
                console.print(f"warm start: step {step}/{max_steps}  loss {loss.item():.3f}  p {probability:.2f}")
            if probability >= stop_at:
                break
    console.print(f"warm start: done, {step} steps, {time.monotonic() - started:.0f} s, p {probability:.2f}")
    model.eval()
    return probability


def _batch(tokenizer: Any, examples: list[tuple[str, str]]) -> Any:
    """Return right-padded ids and targets, [B, L]: targets are the completion and its end, and -100 (no loss) elsewhere."""
    import torch

    rows, labels = [], []
    for prompt, completion in examples:
        prompt_ids = tokenizer(prompt)["input_ids"]
        completion_ids = tokenizer(completion, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        rows.append(prompt_ids + completion_ids)
        labels.append([-100] * len(prompt_ids) + completion_ids)
    length = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (length - len(row)) for row in rows])
    return ids, torch.tensor([row + [-100] * (length - len(row)) for row in labels])
