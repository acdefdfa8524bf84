"""The bytes between a trainer and the servers it draws from: plain JSON, and weights as safetensors. Nothing is a pickle.

Tokens go as int32, log-probs as the four bytes of their float32, both little-endian in base64: no digit of a number is lost.
"""

import base64
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from rlinvariant.checksums import Checksum
from rlinvariant.rollout import Completion
from rlinvariant.types import Json, JsonObject, JsonRow

PROTOCOL = 4
"""The version of these requests; a server and a trainer of different versions do not talk to each other."""
COMPILED = (
    "it was compiled without room for the trainer's adapters; start it with --lora and the trainer's lora.*, as --lora r=16"
)
BUCKET_BYTES = 64 << 20  # of weights that are sent together
PIECES = 2  # of a server's memory for a trainer on its host: one is filled while the weights in the other are loaded
DTYPES = {torch.bfloat16: "BF16", torch.float32: "F32"}  # of weights, as safetensors calls them
SESSION, MEMORY = "rlinvariant-session", "rlinvariant-memory"
"""Headers of a request: the session that joining gave; of sync, which piece of the server's memory holds the weights."""
KEYS = {
    "prove": (),
    "join": ("trainer", "ranks", "mark"),
    "checksum": ("session", "weights"),
    "generate": ("session", "version", "prompts", "seeds", "max_tokens", "sampling"),
}
"""The keys of the JSON that a route takes; all others are refused by name. The body of sync is weights."""
TAKEN = ("temperature", "stop_token_ids", "top_k", "top_p", "min_p")
"""Settings of sampling that a request to a server may have; all others are refused by name."""


def pack(values: Sequence[float], dtype: str) -> str:
    """Return numbers as base64 of a NumPy dtype, "<i4" or "<f4"."""
    return base64.b64encode(np.array(values, dtype).tobytes()).decode("ascii")


def unpack(text: str, dtype: str) -> list[Json]:
    """Return the numbers of `pack`. Raises ValueError where the text is not of whole numbers."""
    return np.frombuffer(base64.b64decode(text, validate=True), dtype).tolist()


def completions_to_json(completions: Sequence[Completion]) -> JsonObject:
    """Return completions as an answer has them."""
    return {
        "lengths": [len(c.token_ids) for c in completions],
        "tokens": pack([t for c in completions for t in c.token_ids], "<i4"),
        "logprobs": pack([x for c in completions for x in c.sampler_logprobs], "<f4"),
        "cached": [c.cached_tokens for c in completions],
    }


def completions_of(answer: JsonRow, count: int) -> list[Completion]:
    """Return the completions of an answer.

    Raises:
        ValueError: there are not `count` of them, or their tokens and log-probs are not as many as it says.
    """
    lengths, cached = answer["lengths"], answer["cached"]
    tokens, logprobs = unpack(answer["tokens"], "<i4"), unpack(answer["logprobs"], "<f4")
    if not (len(lengths) == len(cached) == count and sum(lengths) == len(tokens) == len(logprobs)):
        counts = f"{len(lengths)} completions of {sum(lengths)} tokens"
        raise ValueError(f"an answer of {counts} has {len(tokens)} tokens and {len(logprobs)} log-probs for {count} requests")
    found, at = [], 0
    for length, prefix in zip(lengths, cached, strict=True):
        found.append(Completion(tokens[at : at + length], logprobs[at : at + length], prefix))
        at += length
    return found


def checksums_to_json(weights: Iterable[tuple[str, Checksum]]) -> JsonObject:
    """Return named checksums as a request has them."""
    return {name: [str(x.dtype).removeprefix("torch."), list(x.shape), list(x.sums)] for name, x in weights}


def checksums_of(given: JsonRow) -> dict[str, Checksum]:
    """Return the checksums of `checksums_to_json`. Raises ValueError for what is none."""
    found = {}
    for name, (dtype, shape, (one, other)) in given.items():
        if not isinstance(kind := getattr(torch, dtype, None), torch.dtype):
            raise ValueError(f"{name}: {dtype} is no dtype")
        found[name] = Checksum(kind, tuple(map(int, shape)), (int(one), int(other)))
    return found


def buckets(weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype, keep: bool) -> Iterator[dict[str, Tensor]]:
    """Yield weights, rounded to `dtype`, on the host, in parts of `BUCKET_BYTES`; a larger one is a part by itself.

    Args:
        weights: names and whole tensors; taking one may be a call that all ranks make.
        dtype: what the servers compute in.
        keep: whether the parts are wanted here; else they are empty, and as many.
    """
    part, size = dict[str, Tensor](), 0
    for name, weight in weights:
        own = weight.numel() * dtype.itemsize
        if size and size + own > BUCKET_BYTES:
            yield part
            part, size = {}, 0
        if keep:
            part[name] = weight.detach().to("cpu", dtype).contiguous()
        size += own
    yield part


def save(part: Mapping[str, Tensor]) -> list[bytes | memoryview]:
    """Return weights on the host as safetensors: buffers that are the weights' own memory, after one for the header.

    Nothing is copied here; whoever sends the buffers need not join them.
    """
    header, buffers, end = dict[str, Json](), list[bytes | memoryview](), 0
    for name, weight in part.items():
        words = weight.detach().contiguous().view(-1).view(torch.uint8).numpy().data
        header[name] = {"dtype": DTYPES[weight.dtype], "shape": [*weight.shape], "data_offsets": [end, end := end + len(words)]}
        buffers.append(words)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the weights begin at a multiple of eight bytes, as the format wants it
    return [len(text).to_bytes(8, "little") + text, *buffers]
