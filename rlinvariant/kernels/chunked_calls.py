"""The calls of the attention in chunked_attention.py: which tile for how many rows, and what a decode needs beside it.

`attention_tiles.json` has for each chip and head size what decides bits, the keys of a block and of a chunk, and apart from it
what decides none: for up to so many rows of a sequence a tile of so many.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from rlinvariant.kernels import attention, chunked_attention, chunked_decode
from rlinvariant.kernels.attention import chip
from rlinvariant.kernels.chunked_attention import LOG2E

_tiles: Any = chunked_attention._tiles  # Any: to a type checker these are functions, and nothing that is launched
_plan: Any = chunked_decode._plan
_parts: Any = chunked_decode._parts
_fold_parts: Any = chunked_decode._fold_parts
SLOTS = 1024  # chunks whose states a decode may hold: 66 KB each with 8 heads of 128
AT_ONCE = 8  # chunks that a fold reads ahead
PLAN_ITEM = 3


@dataclass(frozen=True)
class Order:
    """Holds what decides bits: keys of a block and of a chunk."""

    block: int
    chunk: int


@dataclass(frozen=True)
class Tile:
    """Holds what decides none: rows of a tile, its warps and stages, and whether whole blocks come by tensor descriptors."""

    rows: int
    warps: int
    stages: int
    descriptors: bool = False


@dataclass(frozen=True)
class Decode:
    """Holds what decides none of a decode: warps and stages of its tile, and programs a multiprocessor for its items."""

    warps: int
    stages: int
    programs: int


@dataclass(frozen=True)
class Backward:
    """Holds the tile of a backward: rows, keys of a block, warps and stages."""

    rows: int
    block: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Form:
    """Holds what is the same in all calls of a layer.

    Args:
        scale: multiplies the scores.
        window: how many keys a query attends to; None: all.
        softcap: bound of the scores; None: none.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None

    def numbers(self) -> tuple[float, float, int]:
        """Return what a score is multiplied by before tanh, and after it, in powers of two; and the window."""
        if self.softcap is None:
            return 1.0, self.scale * LOG2E.value, self.window or 0
        return self.scale / self.softcap, self.softcap * LOG2E.value, self.window or 0

    def flags(self) -> dict[str, bool]:
        return {"WINDOW": self.window is not None, "CAP": self.softcap is not None}


def padded(head_size: int) -> int:
    """Return the power of two that holds a head, at least 16: a matrix instruction's depth."""
    return max(16, triton.next_power_of_2(head_size))


@functools.cache
def table(chip: str) -> dict[int, dict]:
    """Return the rows of a chip, such as "sm_90", by padded head size.

    Each has "order", "decode", "backward", and {rows up to: Tile} as "tiles" and, for scores with a window or a cap, "rich".
    """
    chips = attention.table()["chips"]
    found = chips[chip]
    return {
        int(width): {
            "order": Order(*row["order"]),
            "decode": Decode(*row["decode"]),
            "backward": Backward(*row["backward"]),
            **{
                name: {int(rows): Tile(*tile) for rows, tile in row.get(name, row["tiles"]).items()}
                for name in ("tiles", "rich")
            },
        }
        for width, row in (chips[found] if isinstance(found, str) else found).items()
    }


def row(head_size: int) -> dict:
    """Return the row of this chip for a head size."""
    return table(chip())[max(64, padded(head_size))]


def tile_for(row: dict, form: Form, rows: int) -> Tile:
    """Return the tile for sequences of up to so many rows."""
    tiles = row["rich" if form.window or form.softcap else "tiles"]
    return next((tile for most, tile in tiles.items() if rows <= most), list(tiles.values())[-1])


def tiles(row: dict) -> set[Tile]:
    """Return every tile of a row."""
    return {*row["tiles"].values(), *row["rich"].values()}


def packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu: Tensor,
    longest: int,
    form: Form,
    sinks: Tensor | None = None,
    tile: Tile | None = None,
    order: Order | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend inside sequences laid end to end: q [T, H, D], k and v [T, H_kv, D]; return out like q, log-sum-exp [T, H] fp32.

    The logarithm counts the sink, if `sinks` [H] are given. `tile` and `order` take the place of the table's.
    """
    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
    (t, heads, d), kv_heads, d_ = q.shape, k.shape[1], padded(q.shape[2])
    group = heads // kv_heads
    if tile is None or order is None:
        tile, order = tile or tile_for(row(d), form, longest * group), order or row(d)["order"]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(t, heads, dtype=torch.float32, device=q.device)
    rows = (_descriptor(k, order.block, d_), _descriptor(v, order.block, d_)) if tile.descriptors else (None, None)
    inner, factor, window = form.numbers()
    _tiles[(triton.cdiv(longest * group, tile.rows), kv_heads, len(cu) - 1)](
        *(q, k, v, *rows, out, lse, sinks, cu, None, None, inner, factor, window),
        *(
            q.stride(0),
            q.stride(1),
            k.stride(0),
            k.stride(1),
            v.stride(0),
            v.stride(1),
            out.stride(0),
            out.stride(1),
            0,
            0,
            heads,
        ),
        **{"SKIP": 0, "G": group, "D": d, "D_": d_, "M": tile.rows, "N": order.block, "CHUNK": order.chunk, "PAGE": 0},
        **form.flags(),
        **{"SINKS": sinks is not None, "num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": False},
    )
    return out, lse


def _descriptor(x: Tensor, block: int, width: int):
    """Return a tensor descriptor of x [T, H_kv, D] by which a block of one head's rows is read at once."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(x, list(x.shape), list(x.stride()), [block, 1, width])


def decode_rows(group: int) -> int:
    """Return the rows of a decode's tile: those of one query at least."""
    return max(16, triton.next_power_of_2(group))


def plan(cu: Tensor, lens: Tensor, group: int, order: Order, window: int | None, slots: int = SLOTS) -> Tensor:
    """Return the plan of a decode, int32: see chunked_decode.py. cu: [sequences + 1]; lens: [sequences], both int32."""
    sequences = len(lens)
    made = torch.empty(plan_size(sequences, slots), dtype=torch.int32, device=cu.device)
    fixed = {"ROWS": decode_rows(group), "G": group, "B": triton.next_power_of_2(sequences), "N": order.block}
    fixed |= {"CHUNK": order.chunk, "WINDOW": window is not None, "num_warps": 1}
    _plan[(sequences,)](made, cu, lens, sequences, window or 0, slots, **fixed)
    return made


def plan_size(sequences: int, slots: int = SLOTS) -> int:
    """Return how many numbers a plan of so many sequences has at most."""
    return 1 + 2 * sequences + PLAN_ITEM * (slots + sequences)


def paged(
    q: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    cu: Tensor,
    lens: Tensor,
    longest_q: int,
    longest_k: int,
    form: Form,
    out: Tensor,
    sinks: Tensor | None = None,
    made: Tensor | None = None,
    tile: Tile | None = None,
    order: Order | None = None,
    decode: Decode | None = None,
    slots: int = SLOTS,
) -> None:
    """Attend from q [T, H, D] to kv_cache [pages, H_kv, page, 2 D], into `out` like q.

    Sequences of few rows are decoded by chunks, the others by tiles, whatever is in the batch beside them.

    Args:
        made: `plan` of this batch, for this window and group; made here if None.
        tile, order, decode: take the place of the table's.
        slots: how many chunks' states are held; a plan that was made knows of as many.
    """
    q = q if q.stride(2) == 1 else q.contiguous()
    (_, heads, d), (_, kv_heads, page, _), d_ = q.shape, kv_cache.shape, padded(q.shape[2])
    group, sequences, k, v = heads // kv_heads, len(lens), kv_cache, kv_cache[..., d:]
    order, decode = order or row(d)["order"], decode or row(d)["decode"]
    few = decode_rows(group)
    inner, factor, window = form.numbers()
    strides = q.stride(0), q.stride(1), k.stride(2), k.stride(1), v.stride(2), v.stride(1), out.stride(0), out.stride(1)
    strides = *strides, k.stride(0), block_table.stride(0)
    fixed = {"G": group, "D": d, "D_": d_, "N": order.block, "CHUNK": order.chunk, "PAGE": page, **form.flags()}
    fixed |= {"SINKS": sinks is not None, "enable_fp_fusion": False}
    if longest_q * group > few:
        tile = tile or tile_for(row(d), form, longest_q * group)
        _tiles[(triton.cdiv(longest_q * group, tile.rows), kv_heads, sequences)](
            *(q, k, v, None, None, out, None, sinks, cu, lens, block_table, inner, factor, window, *strides, heads),
            **{"SKIP": few, "M": tile.rows, "num_warps": tile.warps, "num_stages": tile.stages, **fixed},
        )
    most = min(slots, sequences * triton.cdiv(longest_k, order.chunk))
    sums = torch.empty(most, kv_heads, few, d_, dtype=torch.float32, device=q.device)
    state = torch.empty(most, kv_heads, 2, few, dtype=torch.float32, device=q.device)
    made = plan(cu, lens, group, order, form.window, slots) if made is None else made
    _parts[(min(most + sequences, triton.cdiv(decode.programs * _processors(q.device), kv_heads)), kv_heads)](
        *(q, k, v, out, sinks, sums, state, made, cu, lens, block_table, sequences, inner, factor, window, *strides),
        **{"M": few, "num_warps": decode.warps, "num_stages": decode.stages, **fixed},
    )
    _fold_parts[(min(few, longest_q * group), kv_heads, sequences)](
        *(sums, state, out, sinks, made, cu, out.stride(0), out.stride(1)),
        **{"G": group, "D": d, "D_": d_, "M": few, "SINKS": sinks is not None, "AT_ONCE": AT_ONCE},
        **{"num_warps": 1, "enable_fp_fusion": False},
    )


@functools.cache
def _processors(device: torch.device) -> int:
    """Return how many multiprocessors a GPU has; 2 of a CPU, on which Triton's interpreter runs."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
