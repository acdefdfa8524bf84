"""Gradients of one model on several ranks of gloo, by DDP and in shards, as the library adds them and in the tree's order.

torchrun ordered_on_ranks.py DIRECTORY    writes DIRECTORY/RANK.pt: kind -> the whole gradients
"""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, LlamaConfig

from rlinvariant.models import ordered, shards
from rlinvariant.trainer.memory import decoder_layers

SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def gradients(rank: int, kind: str, order: str, bucket_mb: float = 25) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES), dtype=torch.float32)
    run: nn.Module = model
    if kind == "shards":
        shards.shard(model, decoder_layers(model))
    else:
        run = DistributedDataParallel(model, bucket_cap_mb=bucket_mb)
    if order == "ordered":
        ordered.use(run)
    ids = torch.randint(97, (3, 40), generator=torch.Generator().manual_seed(rank))
    for _ in range(2):  # DDP makes its buckets anew after the first
        model.zero_grad()
        run(input_ids=ids, labels=ids).loss.backward()
    return {name: shards.whole(p.grad).clone() for name, p in model.named_parameters() if p.grad is not None}


def main(directory: str) -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    rank = dist.get_rank()
    found = {f"{kind} {order}": gradients(rank, kind, order) for kind in ("ddp", "shards") for order in ("stock", "ordered")}
    found |= {f"ddp {order}, small buckets": gradients(rank, "ddp", order, 0.01) for order in ("stock", "ordered")}
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(rank))
    found["mean"] = {"x": ordered.average(x)}
    every = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(every, x)
    found["tree"] = {"x": ordered.tree_sum(every) / len(every)}
    torch.save(found, f"{directory}/{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
