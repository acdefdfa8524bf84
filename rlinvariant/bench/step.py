# pyright: reportCallIssue=false
"""Whole steps of the recipes arithmetic and words: rollout, sync, log-probs, optimizer; GRPO against stock, PPO against GRPO.

Each mode is a process of its own, and they take turns, a step each. The learning rate is 0, so that every step of every mode
samples from the same policy; the prompts are the same; completions have a fixed length (the end token is ignored), or the
length they come with. vLLM runs eagerly on both sides, but for the mode `compiled`.
"""

import functools
import sys
import tempfile
from collections.abc import Iterator, Mapping
from statistics import mean, median
from typing import Any

from rlinvariant.bench.measure import Link, Row, Worker, peak_memory, turns

OFF = ["invariance=off"]
MODES = {
    "exact": ["invariance=exact"],
    "off": OFF,
    "correction": [*OFF, "trainer.vllm_importance_sampling_correction=true"],
    "compiled": [*OFF, "sampler.enforce_eager=false"],
    "ppo": ["invariance=exact", "algorithm=ppo"],
}
LABELS = {
    "off": "stock vLLM, stock TRL",
    "correction": "the same with TRL's importance-sampling correction, its default",
    "compiled": "the same with vLLM's default compilation in place of eager",
    "exact": "PPO in place of GRPO, both exact",
}
TARGETS = {("exact", "off"): 1.3, ("ppo", "exact"): 1.6}  # ratios of a step's time
WORDS_TARGET = {("exact", "correction"): 0.55}  # against TRL as it comes
PARTS = {"step_time": "step", "time/rollout": "rollout", "time/train": "train", "time/sync": "sync"}
FIXED_LENGTH = 32


def rows(tiny: bool) -> Iterator[Row]:
    seconds, size = (0, ["trainer.per_device_train_batch_size=8"]) if tiny else (100, [])
    modes = ("exact", "off", "ppo") if tiny else tuple(MODES)
    yield from _steps(["recipe=arithmetic", *size], modes, (FIXED_LENGTH, None), seconds, TARGETS)
    if not tiny:
        yield from _steps(["recipe=words"], ("exact", "off", "correction"), (None,), 3 * seconds, WORDS_TARGET)


def _steps(
    recipe: list[str],
    modes: tuple[str, ...],
    lengths: tuple[int | None, ...],
    seconds: float,
    targets: Mapping[tuple[str, str], float],
) -> Iterator[Row]:
    """Let a recipe's modes take turns, each a step, for `seconds` with completions of each of `lengths`."""
    pairs = [("ppo", "exact") if mode == "ppo" else ("exact", mode) for mode in modes[1:]]
    workers = {mode: Worker(__name__, mode, *recipe, *MODES[mode]) for mode in modes}
    name = "" if recipe[0] == "recipe=arithmetic" else f"{recipe[0].removeprefix('recipe=')}, "
    for length in lengths:
        turns(workers, 0, length=length)  # warm up
        answers, others = turns(workers, seconds, length=length)
        equal = {mode: sum(a[mode]["onpolicy/mismatched_tokens"] for a in answers) == 0 for mode in modes}
        assert equal["exact"] and equal.get("ppo", True), "exact mode is not exact"
        for pair in pairs:
            ours, stock = pair
            tokens = [mean(a[m]["onpolicy/compared_tokens"] for a in answers) for m in pair]
            long = f"all of {length} tokens" if length else f"natural ({tokens[0]:,.0f} and {tokens[1]:,.0f} tokens a step)"
            for key, part in PARTS.items():
                values = [median(a[m][key] for a in answers) * 1e3 for m in pair]
                target = targets.get(pair) if part == "step" else None
                yield Row(
                    bench="step",
                    case=f"{name}{part}: {LABELS[stock]}; completions {long}",
                    ours=round(values[0], 1),
                    stock=round(values[1], 1),
                    unit="ms",
                    ratio=round(values[0] / values[1], 3),
                    target=target,
                    bits_equal={"ours": equal[ours], "stock": equal[stock]},
                    samples=len(answers),
                    others=others,
                )
    for pair in pairs:
        peak = [workers[m].ask(memory=True)["peak"] for m in pair]
        yield Row(
            bench="step",
            case=f"{name}peak memory of the process: {LABELS[pair[1]]}",
            ours=round(peak[0]),
            stock=round(peak[1]),
            unit="MiB",
            ratio=round(peak[0] / peak[1], 3),
            target=1.1 if pair[1] == "off" and not name else None,
            bits_equal={"ours": None, "stock": None},
            samples=1,
            others=0.0,
        )
    for worker in workers.values():
        worker.close()


def _worker(mode: str, *settings: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rlinvariant import api, run, runtime
    from rlinvariant.config import parse
    from rlinvariant.model_source import local_model

    link = Link()
    runtime.configure()
    config = parse(["steps=1000000", "trainer.learning_rate=0", "trainer.save_strategy=no", *settings])
    args, recipe = config.grpo_config(), config.load_recipe()
    args.output_dir = tempfile.mkdtemp()
    prepare: Any = recipe.prepare_model
    path = local_model(config.model) if config.model is not None else prepare(config)
    tokenizer = AutoTokenizer.from_pretrained(path)
    requests, length = link.requests(), None

    def next_step() -> None:
        """Wait for the next turn; exit after the last one."""
        nonlocal length
        for request in requests:
            if "memory" not in request:
                length = request["length"]
                return
            link.send(peak=peak_memory())
        sys.exit(0)

    def on_row(row: dict[str, Any], _: Any) -> None:
        keys = (*PARTS, "onpolicy/mismatched_tokens", "onpolicy/compared_tokens")
        link.send(**{key: float(row[key]) for key in keys})
        next_step()

    made = functools.partial(api.ppo_trainer, ppo=config.ppo) if config.algorithm == "ppo" else api.grpo_trainer
    trainer = made(
        AutoModelForCausalLM.from_pretrained(path, dtype="float32"),
        recipe.reward_funcs(config),
        args,
        recipe.datasets(config, tokenizer)[0],
        processing_class=tokenizer,
        invariance=config.invariance,
        dtype=config.dtype,
        sampler_model=path,
        sampler_options=run.sampler_options(config),
        on_row=on_row,
    )
    generate = trainer.sampler.generate

    def of_length(*arguments: Any, **options: Any) -> Any:
        if length is not None:
            options |= {"max_tokens": length, "stop_token_ids": (), "ignore_eos": True}
        return generate(*arguments, **options)

    trainer.sampler.generate = of_length
    next_step()
    trainer.train()


if __name__ == "__main__":
    _worker(*sys.argv[1:])
