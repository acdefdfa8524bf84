# pyright: reportCallIssue=false
"""Log-probs of TRL's padded rows and their gradients, on a CPU: packed and exact against TRL's own path.

Each side is a process of its own, so that peak memory can be compared; they take turns. The stock side is TRL's
`GRPOTrainer` as it is: padded forward with TRL's chunked lm head, bf16 autocast over fp32 parameters, SDPA.
"""

import sys
import tempfile
import time
from collections.abc import Iterator
from statistics import median
from typing import TYPE_CHECKING, Any

from rlinvariant import bits
from rlinvariant.bench.measure import Link, Row, Worker, peak_memory, turns, used
from rlinvariant.conflicts import Invariance

if TYPE_CHECKING:
    from torch import Tensor

# name -> (model, rows, prompt tokens, completion tokens)
SIZES = {"tiny": ("tiny", 4, 5, 12), "recipe": ("recipe", 128, 9, 32), "512": ("512", 8, 32, 96)}
CASES = ("equal", "ragged")


def rows(tiny: bool) -> Iterator[Row]:
    for size in ("tiny",) if tiny else ("recipe", "512"):
        workers = {side: Worker(__name__, side, size) for side in ("exact", "off")}
        exact = {side: {case: worker.ask(case=case, what="bits") for case in CASES} for side, worker in workers.items()}
        start = {side: worker.ask(what="memory")["peak"] for side, worker in workers.items()}
        for case in CASES:
            bits = {"ours": exact["exact"][case]["same"], "stock": exact["off"][case]["same"]}
            assert bits["ours"], f"{size}, {case}: log-probs depend on the batch"
            model, count, prompt, completion = SIZES[size]
            lengths = f"{prompt}+{completion}" if case == "equal" else f"up to {prompt}+{completion}"
            name = f"{model}, {count} {case} rows of {lengths} tokens"
            for what, label in (("train", "forward + backward"), ("old", "the same, and TRL's old-logprob pass")):
                turns(workers, 0, case=case, what=what)  # warm up
                answers, others = turns(workers, 0 if tiny else 20, case=case, what=what)
                wall = [median(a[side]["wall"] for a in answers) * 1e3 for side in ("exact", "off")]
                cpu = [median(a[side]["cpu"] for a in answers) for side in ("exact", "off")]
                target = 1.0 if what == "train" else None
                yield Row(
                    bench="trainer",
                    case=f"{name}, {label}",
                    ours=round(wall[0], 2),
                    stock=round(wall[1], 2),
                    unit="ms",
                    ratio=round(wall[0] / wall[1], 3),
                    target=target,
                    bits_equal=bits,
                    samples=len(answers),
                    others=others,
                    cpu_ratio=used(*cpu),
                )
        peak = {side: worker.ask(what="memory")["peak"] for side, worker in workers.items()}
        for label, floor, target in (("the process", dict.fromkeys(peak, 0), 1.1), ("above the loaded model", start, None)):
            ours, stock = (peak[side] - floor[side] for side in ("exact", "off"))
            yield Row(
                bench="trainer",
                case=f"{size}, peak memory, {label}",
                ours=round(ours, 1),
                stock=round(stock, 1),
                unit="MiB",
                ratio=round(ours / max(stock, 0.1), 3),
                target=target,
                bits_equal={"ours": None, "stock": None},
                samples=1,
                others=0.0,
            )
        for worker in workers.values():
            worker.close()


def _model(name: str) -> tuple[Any, Any]:
    from rlinvariant.recipes.arithmetic import build_model

    model, tokenizer = build_model()
    if name != "512":
        return model, tokenizer
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=32000,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    return Qwen3ForCausalLM(config), tokenizer


def padded_batch(
    case: str, vocab: int, rows: int, prompt: int, completion: int, least: float = 0.5
) -> tuple["Tensor", "Tensor"]:
    """Return (ids, mask) of TRL's padded batch, both [rows, prompt + completion] int64.

    Prompts end and completions begin in the middle. Ragged ones are `least` to all of the longest length.
    """
    import torch

    mask = torch.ones(rows, prompt + completion, dtype=torch.int64)
    if case == "ragged":
        column = torch.arange(prompt + completion)
        left = torch.randint(0, int(prompt * (1 - least)) + 1, (rows, 1))
        right = torch.randint(0, int(completion * (1 - least)) + 1, (rows, 1))
        left[0] = right[0] = 0
        mask = ((column >= left) & (column < prompt + completion - right)).long()
    return torch.randint(4, vocab, mask.shape) * mask, mask


def _worker(side: Invariance, size: str) -> None:
    import torch
    from datasets import Dataset

    from rlinvariant.config import parse
    from rlinvariant.trainer.grpo import InvariantGRPOTrainer

    link = Link()
    torch.manual_seed(0)
    name, count, prompt, completion = SIZES[size]
    model, tokenizer = _model(name)
    config = parse(["recipe=arithmetic", f"invariance={side}", "trainer.temperature=0.7", "trainer.save_strategy=no"])
    with tempfile.TemporaryDirectory() as directory:
        args = config.grpo_config()
        args.output_dir = directory
        rows = Dataset.from_list([{"prompt": "1+1=", "answer": "2"}] * args.per_device_train_batch_size)
        none: Any = lambda: None  # noqa: E731 - nothing is sampled here
        trainer = InvariantGRPOTrainer(
            model,
            lambda completions, **_: [0.0] * len(completions),
            args,
            sampler=none,
            invariance=side,
            train_dataset=rows,
            processing_class=tokenizer,
        )
    model = trainer.accelerator.prepare(trainer.model)
    model.train()
    batches = {case: padded_batch(case, model.config.vocab_size, count, prompt, completion) for case in CASES}
    upstream = torch.randn(count, completion)

    def logprobs(ids: Any, mask: Any) -> Any:
        with trainer.compute_loss_context_manager():
            return trainer._get_per_token_logps_and_entropies(model, ids, mask, completion, compute_entropy=True)[0]

    for request in link.requests():
        ids, mask = batches[request.get("case", "equal")]
        if request["what"] == "memory":
            link.send(peak=peak_memory())
        elif request["what"] == "bits":  # every row with the others, and the first rows alone
            with torch.no_grad():
                full, few = logprobs(ids, mask), min(8, count)
                alone = torch.cat([logprobs(ids[i : i + 1], mask[i : i + 1]) for i in range(few)])
            keep = mask[:few, -completion:].bool()
            link.send(same=bool(bits.same(full[:few][keep], alone[keep])))
        else:
            model.zero_grad(set_to_none=True)
            cpu, wall = time.process_time(), time.perf_counter()
            if request["what"] == "old" and side == "off":
                with torch.no_grad():
                    logprobs(ids, mask)
            ((logprobs(ids, mask) * upstream) * mask[:, -completion:]).sum().backward()
            link.send(wall=time.perf_counter() - wall, cpu=time.process_time() - cpu)


if __name__ == "__main__":
    _worker(*sys.argv[1:])  # pyright: ignore[reportArgumentType]
