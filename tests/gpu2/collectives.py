"""Times of all-gather and all-reduce between all processes, by size: `torchrun -m tests.gpu2.collectives`."""

import os
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

SIZES = [2**n for n in range(12, 31, 2)]  # bytes of the result
ROUNDS = 20


def timed(call: Callable[[], object], synchronize: Callable[[], object]) -> float:
    """Return the seconds of one call, the mean of some, after as many to warm up."""
    for _ in range(ROUNDS // 4):
        call()
    synchronize()
    dist.barrier()
    began = time.perf_counter()
    for _ in range(ROUNDS):
        call()
    synchronize()
    return (time.perf_counter() - began) / ROUNDS


def main() -> None:
    cuda, rank = torch.cuda.is_available(), int(os.environ["LOCAL_RANK"])
    if cuda:
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if cuda else "gloo")
    device, world = torch.device(f"cuda:{rank}" if cuda else "cpu"), dist.get_world_size()
    synchronize = torch.cuda.synchronize if cuda else lambda: None
    dtype = torch.bfloat16 if cuda else torch.float32
    for size in SIZES if cuda else SIZES[:4]:
        whole = torch.ones(size // dtype.itemsize, dtype=dtype, device=device)
        part = whole[: len(whole) // world].clone()
        seconds = {
            "all-gather": timed(lambda a=whole, b=part: dist.all_gather_into_tensor(a, b), synchronize),
            "all-reduce": timed(lambda a=whole: dist.all_reduce(a), synchronize),
        }
        if rank == 0:
            words = ", ".join(f"{name} {s * 1e6:.1f} us {size / s / 1e9:.1f} GB/s" for name, s in seconds.items())
            print(f"row collective {size} bytes: {words}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
