"""An engine that is spread over the ranks of gloo, against a trainer's whole model in each of them.

torchrun columns_on_ranks.py DIRECTORY FAMILY    writes DIRECTORY/RANK.json: what was counted
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from rlinvariant import bits, checksums, runtime
from rlinvariant.models import make_invariant
from rlinvariant.models.families import FAMILIES, VOCABULARY
from rlinvariant.models.random import save_random
from rlinvariant.rollout import Completion
from rlinvariant.sampler.engine import Sampler
from rlinvariant.sampler.group import GroupSampler
from rlinvariant.trainer.score import Layout, score

TEMPERATURE = 0.9
HOW: dict[str, Any] = {"temperature": TEMPERATURE, "ignore_eos": True}


def trained(path: str) -> Any:
    return make_invariant(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32))


def prompts(seed: int, count: int = 8) -> list[list[int]]:
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 60, (count,), generator=random).tolist()
    return [torch.randint(VOCABULARY, (n,), generator=random).tolist() for n in lengths]


def differing(model: Any, asked: list[list[int]], drawn: list[Completion]) -> tuple[int, int]:
    """Return how many log-probs differ from the trainer's, and how many there are."""
    scored = torch.cat(score(model, asked, drawn, TEMPERATURE, Layout(4)))
    own = torch.tensor([x for c in drawn for x in c.sampler_logprobs], dtype=torch.float64).float()
    return int((bits.words(own) != bits.words(scored)).sum()), len(own)


def tokens(drawn: list[Completion]) -> list[list[int]]:
    return [c.token_ids for c in drawn]


def main(directory: str, family: str) -> None:
    from rlinvariant.sampler.vllm_columns import vllms_plan

    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    runtime.configure()
    rank, ranks = dist.get_rank(), dist.get_world_size()
    path = f"{directory}/model"
    if rank == 0:
        save_random(FAMILIES[family](), path, 0)
    dist.barrier()
    model = trained(path)
    size: dict[str, Any] = {"max_model_len": 96, "kv_cache_gib": 0.02, "options": {"tensor_parallel_size": ranks}}
    engine = GroupSampler(path, invariant=True, **size)
    together, found = prompts(0), dict[str, Any]()

    def draw(sampler: Any = engine) -> list[Completion]:
        return Sampler.generate(sampler, together, list(range(8)), max_tokens=12, **HOW)

    drawn = draw()
    found["start"], found["tokens"] = differing(model, together, drawn), tokens(drawn)
    # Each rank asks for other things, and the first has one turn more
    apart, seeds = prompts(1 + rank, 3 + rank), [100 * rank + i for i in range(3 + rank)]
    mine = engine.generate(apart, seeds, max_tokens=8, **HOW)
    found["apart"] = differing(model, apart, mine)
    if rank == 0:
        after = [[*p, *c.token_ids] for p, c in zip(apart, mine, strict=True)]
        found["one more turn"] = differing(model, after, engine.generate(after, seeds, max_tokens=5, **HOW))
    engine.finish()
    own = list(model.named_parameters())
    sums = lambda: {name: checksums.whole(p.detach().to(engine.dtype)) for name, p in own}  # noqa: E731
    found["equal"] = engine.differing_weights(own), engine.differing_checksums(sums())
    with torch.no_grad():
        for i, (_, p) in enumerate(own):
            p += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
    found["moved"] = engine.differing_weights(own), engine.differing_checksums(sums())
    engine.sync(own)
    found["synced"] = engine.differing_weights(own), engine.differing_checksums(sums())
    found["after"], found["parameters"] = differing(model, together, draw()), len(list(engine.model.named_parameters()))
    held: Any = dict(engine.model.named_parameters())["model.norm.weight"]
    if rank == ranks - 1:
        held.data.view(torch.int16)[0] ^= 1  # the last process alone has another word, of a weight that all have
    found["one word"] = engine.differing_weights(own), engine.differing_checksums(sums())
    with vllms_plan():
        control = Sampler(path, invariant=True, **size)
    found["rows"] = differing(trained(path), together, draw(control))
    Path(directory, f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
