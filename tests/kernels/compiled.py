"""Compile kernels for a chip that is not here, and read off what its machine code is made of.

`python -m tests.kernels.compiled sm_90` prints a JSON row for every kernel in every form that a launch can ask for, and at
the end one that names the Triton, and the kernels that are in no row: there should be none.
"""

import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rlinvariant.checksums import MULTIPLIERS
from rlinvariant.kernels import (
    checksum,
    chunked_attention,
    chunked_backward,
    chunked_calls,
    chunked_decode,
    linear,
    moe_experts,
    moe_route,
    threshold,
)
from tests.kernels import launches

PRODUCT = re.compile(r"\b(?:wgmma\.mma_async\.sync\.aligned|mma\.sync\.aligned|tcgen05\.mma)\S+")
ATOMIC = re.compile(r"\b(?:atom|red)\.\S+")
FLOATS = ("inner", "factor", "scale")
SETTINGS = ("temperature_ptr", "top_p_ptr", "min_p_ptr", "theta_ptr")
FP32 = ("weights_ptr", "lse_ptr", "delta_ptr", "sums_ptr", "state_ptr", "sink_ptr", *SETTINGS)
INTEGERS = ("cu_ptr", "keys_ptr", "table_ptr", "plan_ptr", "groups_ptr", "summed_ptr")
WIDE = ("ids_ptr", "order_ptr", "starts_ptr", "tiles_ptr", "top_k_ptr", "pieces_ptr", "pairs_ptr")
GROUP = 4


@dataclass(frozen=True)
class Machine:
    """Holds what was found in the code of one kernel: `stack` is bytes of memory that registers spill to."""

    name: str
    function: str
    products: list[str]
    atomics: int
    shared: int
    stack: int


def compiled(name: str, kernel: Any, chip: int, warps: int, stages: int, **fixed: Any) -> Machine:
    """Compile a kernel whose constants are `fixed`; tensors are aligned, as are their strides."""
    types = {n: "constexpr" if n in fixed else _type(n) for n in kernel.arg_names}
    types |= {n: fixed.pop(n) for n in ("k_rows", "v_rows") if str(fixed.get(n)).startswith("tensordesc")}
    constants = {(kernel.arg_names.index(n),): value for n, value in fixed.items()}
    varying = types.keys() - fixed.keys()
    aligned = {n for n in varying if types[n].startswith("*") or n.endswith(("_row", "_head", "_stride", "_depth"))}
    attributes = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names) if n in aligned}
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": False}
    made = triton.compile(ASTSource(kernel, types, constants, attributes), target=GPUTarget("cuda", chip, 32), options=options)
    return _machine(name, f"{kernel.__module__.rpartition('.')[2]}.{kernel.__name__}", made)


def _machine(name: str, function: str, made: Any) -> Machine:
    ptx, stack = made.asm["ptx"], _stack(made.asm["cubin"])
    return Machine(name, function, sorted({*PRODUCT.findall(ptx)}), len(ATOMIC.findall(ptx)), made.metadata.shared, stack)


def _type(name: str) -> str:
    if name in FLOATS:
        return "fp32"
    pointer = "*fp32" if name in FP32 else "*i32" if name in INTEGERS else "*i64" if name in WIDE else "*bf16"
    return pointer if name.endswith("_ptr") else "i32"


def _stack(cubin: bytes) -> int:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return max(int(n) for n in re.findall(r"STACK:(\d+)", said))


def attention(chip: str) -> Iterator[Machine]:
    """Yield each kernel of each row of a chip's table: plain, and with all that a kernel can do."""
    number = int(chip.removeprefix("sm_"))
    for d, row in chunked_calls.table(chip).items():
        order, decode, backward = row["order"], row["decode"], row["backward"]
        shared = {"G": GROUP, "D": d, "D_": d}
        form = shared | {"N": order.block, "CHUNK": order.chunk}
        plain, rich = {"WINDOW": False, "CAP": False, "SINKS": False}, {"WINDOW": True, "CAP": True, "SINKS": True}
        none, unpaged = {"k_rows": None, "v_rows": None}, {"keys_ptr": None, "table_ptr": None, "PAGE": 0, "SKIP": 0}
        tiles = [(tile, {**plain, "sink_ptr": None}) for tile in row["tiles"].values()]
        for tile, flags in [*tiles, *((tile, rich) for tile in row["rich"].values())]:
            how = chunked_attention._tiles, number, tile.warps, tile.stages
            name = f"tile of {tile.rows} rows, heads of {d}, {'all' if flags['CAP'] else 'plain'}"
            yield compiled(name, *how, M=tile.rows, **form, **flags, **unpaged, **_descriptors(tile, order, d))
            paged = {"lse_ptr": None, "PAGE": 16, "SKIP": 16}
            yield compiled(f"{name}, paged", *how, M=tile.rows, **form, **flags, **paged, **none)
        how = number, decode.warps, decode.stages
        yield compiled(f"decode, heads of {d}", chunked_decode._parts, *how, M=16, PAGE=16, **form, **rich)
        fixed = {"M": 16, "SINKS": True, "AT_ONCE": chunked_calls.AT_ONCE}
        yield compiled(f"fold, heads of {d}", chunked_decode._fold_parts, number, 1, 3, **shared, **fixed)
        form = shared | {"M": backward.rows, "N": backward.block, "WINDOW": True, "CAP": True}
        for kernel in (chunked_backward._of_queries, chunked_backward._of_keys):
            yield compiled(f"{kernel.__name__}, heads of {d}", kernel, number, backward.warps, backward.stages, **form)
    fixed = {"ROWS": 16, "G": GROUP, "B": 256, "N": 64, "CHUNK": 512, "WINDOW": True}
    yield compiled("plan", chunked_decode._plan, number, 1, 3, slots=1024, **fixed)


def _descriptors(tile: Any, order: Any, d: int) -> dict[str, Any]:
    one = f"tensordesc<bf16[{order.block},1,{d}]>" if tile.descriptors else None
    return {"k_rows": one, "v_rows": one}


def mixtures(chip: str) -> Iterator[Machine]:
    """Yield the kernels of a mixture of 128 experts, 8 for each token."""
    number = int(chip.removeprefix("sm_"))
    for n, m, k, warps, stages in linear.SAFE_TILES.values():
        for from_rows, whole, step in itertools.product((True, False), (True, False), ("w_depth", "w_row")):
            form = {"FROM_ROWS": from_rows, "WHOLE": whole, step: 1, "N": n, "M": m, "K": k}  # w_row: a transposed weight
            yield compiled(f"grouped, {m} rows, {form}", moe_experts._grouped, number, warps, stages, **form)
        yield compiled(f"plan of tiles of {m}", moe_experts._tiles, number, 4, 3, M=m, E=128, B=moe_experts.TABLE_BLOCK)
    bn, bk, bx, warps, stages = moe_experts.SUMMED
    for from_rows in (True, False):
        form = {"FROM_ROWS": from_rows, "N": bn, "K": bk, "X": bx}
        yield compiled(f"summed over slots, {from_rows}", moe_experts._summed, number, warps, stages, **form)
    yield compiled("fold of slots", moe_experts._combine, number, 4, 3, BLOCK=moe_experts.BLOCK)
    for renormalise in (True, False):
        form = {"RENORMALISE": renormalise, "E": 128, "S": 8}
        yield compiled("plan of a row", moe_route._route, number, 1, 3, **form)


def truncation(chip: str) -> Iterator[Machine]:
    """Yield the kernels that find a row's threshold."""
    for kernel, warps, fixed in ((threshold._tops, 8, {}), (threshold._chosen, 4, {"SHIFT": 16})):
        yield compiled(f"plan of what is kept: {kernel.__name__}", kernel, int(chip.removeprefix("sm_")), warps, 3, **fixed)


def sums(chip: str) -> Iterator[Machine]:
    """Yield the kernels that sum the words of weights."""
    fixed = {f"M{i}": value for i, value in enumerate(MULTIPLIERS, 1)} | {"BLOCK": checksum.BLOCK}
    for size, word in checksum.TYPES.items():
        yield compiled(f"plan of sums, {size} bytes", checksum._sums, int(chip.removeprefix("sm_")), 4, 3, WORD=word, **fixed)


def others(chip: str) -> Iterator[Machine]:
    """Yield the kernels whose calls can be made without a GPU."""
    for function, made in launches.launched(int(chip.removeprefix("sm_"))):
        names, metadata = made.src.fn.arg_names, made.metadata
        fixed = {names[i]: value for (i,), value in made.src.constants.items()}
        yield _machine(f"{function}, {fixed}, {metadata.num_warps} warps, {metadata.num_stages} stages", function, made)


def main(chip: str) -> None:
    seen = set()
    for kernels in (attention, mixtures, truncation, sums, others):
        for row in kernels(chip):
            seen.add(row.function)
            print(json.dumps(asdict(row)), flush=True)
    print(json.dumps({"triton": triton.__version__, "left_out": sorted(launches.kernels() - seen)}))


if __name__ == "__main__":
    main(sys.argv[1])
