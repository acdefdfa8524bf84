"""Name the operands of kernels on whose alignment the order of a sum of floats depends, as Triton lays it out.

Triton spreads a row over threads by how many bytes it may read at once, and a sum follows. `python -m tests.kernels.layouts`
compiles each kernel that sums a row, for sm_90, without the alignment of one operand after the other, and prints as JSON those
without which a sum has another layout. Who calls the kernel has to align them. Not tried: sizes, which are the row's own.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rlinvariant.kernels import moe_route, qk_norm_rope, rms_norm, token_logprobs

ALIGNED = (  # kernel, operand: what callers align, as tests/kernels/interpreted.py sees
    ("moe_route._route", "logits_ptr"),
    ("token_logprobs._blocks", "logits_ptr"),
    ("token_logprobs._draw", "logits_ptr"),
)
FLOATS = "eps", "offset"
TYPES = dict.fromkeys(FLOATS, "fp32") | dict.fromkeys(("ids_ptr", "seeds_ptr", "positions_ptr", "token_ptr"), "*i64")
TYPES |= dict.fromkeys(("cos_ptr", "sin_ptr", "t_ptr", "theta_ptr", "max_ptr", "sum_ptr", "weighted_ptr"), "*fp32")
TYPES |= dict.fromkeys(("logprob_ptr", "entropy_ptr", "weights_ptr"), "*fp32") | {"stats_ptr": "*fp64"}
HEADS, ROW = rms_norm.tile(128), rms_norm.tile(2048)
FORMS: list[tuple[Any, int, dict[str, Any]]] = [  # kernel, warps, constants
    (rms_norm._forward, ROW[2], {"ADD": False, "ONCE": False, "R": ROW[0], "D": ROW[1]}),
    (rms_norm._forward, ROW[2], {"ADD": True, "ONCE": False, "R": ROW[0], "D": ROW[1]}),
    (rms_norm._forward, HEADS[2], {"ADD": False, "ONCE": True, "R": HEADS[0], "D": HEADS[1]}),
    (qk_norm_rope._kernel, HEADS[2], {"NORM": True, "ONCE": False, "R": HEADS[0], "D": HEADS[1], "HALF": 64, "REST": 0}),
    (token_logprobs._blocks, 8, {"TRUNCATED": True, "BLOCK": token_logprobs.BLOCK}),
    (token_logprobs._logprobs, 1, {"TRUNCATED": True, "PICK": True, "NB": 64}),
    (token_logprobs._draw, 8, {"TRUNCATED": True, "NB": 64, "BLOCK": token_logprobs.BLOCK}),
    (moe_route._route, 1, {"RENORMALISE": True, "E": 128, "S": 8}),
]


def name_of(kernel: Any) -> str:
    """The kernel's name with its module's; kernel: of Triton's compiler or of its interpreter."""
    return f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.fn.__name__}"


def sums(kernel: Any, warps: int, constants: dict[str, Any], unaligned: str | None) -> list[str]:
    """The types, with layouts, of what a kernel's sums of floats add up; one operand is not aligned."""
    names = kernel.arg_names
    types = {n: "constexpr" if n in constants else TYPES.get(n, "*bf16" if n.endswith("_ptr") else "i32") for n in names}
    fixed = {(names.index(n),): value for n, value in constants.items()}
    others = {*constants, *FLOATS, unaligned}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n not in others}
    made = triton.compile(ASTSource(kernel, types, fixed, aligned), GPUTarget("cuda", 90, 32), {"num_warps": warps})
    code = made.asm["ttgir"]
    layouts = dict(re.findall(r"^(#\w+) = (.*)$", code, re.M))
    found = re.findall(r'"tt\.(?:reduce|scan)".*?addf.*?\}\) (?:\{.*?\} )?: \((.*?)\) ->', code, re.S)
    return [re.sub(r"#\w+", lambda name: layouts[name[0]], kind) for kind in found]


def moving() -> Iterator[tuple[str, str]]:
    """Yield kernel and operand where a sum has another layout without the operand's alignment."""
    for kernel, warps, constants in FORMS:
        expected = sums(kernel, warps, constants, None)
        assert expected, f"{name_of(kernel)}: no sum was found"
        for operand in kernel.arg_names:
            if operand.endswith("_ptr") and sums(kernel, warps, constants, operand) != expected:
                yield name_of(kernel), operand


if __name__ == "__main__":
    print(json.dumps(sorted(set(moving()))))
