import ctypes
import functools
import importlib
import math
import multiprocessing
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rlinvariant import ops
from rlinvariant.bits import assert_bits_equal, compare
from rlinvariant.checksums import partial
from rlinvariant.errors import UserError
from rlinvariant.kernels import cpu
from tests.ladders import DTYPES, dtype_name, gradients, randn

COMMON = ("-ffp-contract=off", "-fno-math-errno", "-fopenmp", "-fPIC", "-shared")
BUILDS = {
    "generic": ("-O1", "-Wno-psabi", *COMMON),  # SSE2 and libm's fmaf
    "haswell": ("-O2", "-march=haswell", "-Wno-psabi", *COMMON),  # AVX2 and FMA
    "twice rounded": ("-O1", "-Wno-psabi", "-D__builtin_fmaf(a,b,c)=((a)*(b)+(c))", *COMMON),  # planted: no fused multiply-add
    # what -ffast-math allows, without its start-up code, which would flush denormals in the whole process
    "fast": (
        "-O1",
        "-march=native",
        "-ffp-contract=fast",
        "-fassociative-math",
        "-freciprocal-math",
        "-fno-signed-zeros",
        "-fno-trapping-math",
        "-fno-math-errno",
        "-fopenmp",
        "-fPIC",
        "-shared",
    ),
}
HASWELL = {"avx2", "fma"} <= set(Path("/proc/cpuinfo").read_text().split())  # whether such a build runs here
INF, NAN = float("inf"), float("nan")


@pytest.fixture(scope="module")
def builds(tmp_path_factory) -> dict[str, ctypes.CDLL]:
    where = tmp_path_factory.mktemp("builds")
    for name, flags in BUILDS.items():
        cpu.compile_library(where / f"{name}.so", flags)
    return {name: cpu.load_library(where / f"{name}.so") for name in BUILDS}


def outputs(library: ctypes.CDLL, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Return the outputs of every function of the library for sizes with tails, on wide exponents; one name per output."""
    monkeypatch.setattr(cpu, "library", lambda: library)
    monkeypatch.setattr(importlib.import_module("rlinvariant.ops.linear"), "is_exact", lambda *_: False)
    found: dict[str, Tensor] = {}

    def keep(name: str, *tensors: Tensor) -> None:
        found.update({f"{name} {i}": t for i, t in enumerate(tensors)})

    x, w, b = (randn(*shape, dtype=dtype, wide=True, seed=i) for i, shape in enumerate(((13, 333), (70, 333), (70,))))
    keep("linear", ops.linear(x, w, b), ops.linear(x[:, :7], w[:, :7]))
    keep("rms_norm", ops.rms_norm(x, w[0], 1e-6), *gradients(lambda x, w: ops.rms_norm(x, w, 1e-6), (x, w[0])))
    keep("rms_norm+1", ops.rms_norm(x, w[0], 1e-6, 1.0), *gradients(lambda x, w: ops.rms_norm(x, w, 1e-6, 1.0), (x, w[0])))
    keep("swiglu", ops.swiglu(x, 2 * x), *gradients(ops.swiglu, (x, 2 * x)))
    gelu = functools.partial(ops.swiglu, activation="gelu_tanh")
    keep("gelu", gelu(x, 2 * x), *gradients(gelu, (x, 2 * x)))
    cap = functools.partial(ops.scale_logits, scale=0.3, softcap=5.0)
    keep("scale_logits", cap(x), *gradients(cap, (x,)))
    q, k, v = (randn(61, heads, 80, dtype=dtype, seed=heads) for heads in (4, 2, 2))
    angles = randn(61, 20, wide=True)
    keep("rope", ops.rope(q, angles.cos(), angles.sin()), *gradients(lambda q: ops.rope(q, angles.cos(), angles.sin()), (q,)))
    cu = torch.tensor([0, 40, 61], dtype=torch.int32)
    keep("attention", ops.attention(q, k, v, cu, 0.3), *gradients(lambda *x: ops.attention(*x, cu, 0.3), (q, k, v)))
    for name, form in (("window", (7, None)), ("softcap", (None, 2.0)), ("both", (7, 2.0))):
        capped = lambda *x, form=form: ops.attention(*x, cu, 0.3, 40, *form)  # noqa: E731
        keep(f"attention:{name}", capped(q, k, v), *gradients(capped, (q, k, v)))
    cache = torch.cat([k, v], -1)[:60].view(6, 10, 2, 160).transpose(1, 2)
    table = torch.tensor([[3, 0, 5], [1, 2, 4]], dtype=torch.int32)
    cu = torch.tensor([0, 7, 8], dtype=torch.int32)
    keep("paged", ops.paged_attention(q[:8], cache, table, cu, torch.tensor([30, 21], dtype=torch.int32), 0.3))
    lens = torch.tensor([30, 21], dtype=torch.int32)
    keep("paged:both", ops.paged_attention(q[:8], cache, table, cu, lens, 0.3, window=5, softcap=2.0))
    weights, experts = ops.moe_route(x[:, :12], 3, True)
    keep("moe_route", weights, experts, *ops.moe_route(x[:, :12], 2, False))
    up, down = randn(12, 18, 333, dtype=dtype, seed=3), randn(12, 333, 9, dtype=dtype, seed=4)
    keep("moe_experts", ops.moe_experts(x, experts, weights, up, down))
    hidden, head, ids = randn(9, 17, dtype=dtype), randn(4101, 17, dtype=dtype, seed=1), torch.arange(9) * 455
    keep("token_logprobs", *ops.token_logprobs(hidden, head, ids, 0.7))
    logits, t = ops.linear(hidden, head), torch.full((9,), 0.7)
    keep("log_softmax", ops.log_softmax(logits, t))
    keep("checksum", *(partial(logits[:, :columns], 3) for columns in (1, 2, 4)))
    keep("sample", *ops.sample(logits, t, ids, ids))
    theta = ops.threshold(logits, t, torch.full((9,), 300), torch.full((9,), 0.95), torch.full((9,), 1e-4))
    keep("truncated", theta, *ops.sample(logits, t, ids, ids, theta), ops.log_softmax(logits, t, theta))
    keep("truncated token_logprobs", *ops.token_logprobs(hidden, head, ids, 0.7, None, None, 300, 0.95, 1e-4))
    dlogits, g = torch.empty_like(logits), randn(9)
    cpu.call("token_logprobs_backward", logits, ids, t, None, g, g, dlogits, *logits.shape, cpu.is_bf16(logits))
    keep("token_logprobs_backward", dlogits)
    return found


def exp(x: Tensor, library: ctypes.CDLL | None = None, name: str = "exp_f32") -> Tensor:
    y = torch.full_like(x, NAN)
    getattr(library or cpu.library(), name)(x.data_ptr(), y.data_ptr(), x.numel())
    return y


def tanh(x: Tensor, library: ctypes.CDLL | None = None) -> Tensor:
    return exp(x, library, "tanh_f32")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("build", ["generic", "haswell"])
def test_any_vector_width_and_optimisation_gives_the_same_bits(build, dtype, builds, monkeypatch):
    if build == "haswell" and not HASWELL:
        pytest.skip("needs a processor with AVX2 and FMA")
    native, other = (outputs(library, dtype, monkeypatch) for library in (cpu.library(), builds[build]))
    for name in native:
        assert_bits_equal(other[name], native[name], f"{name}: {build} build")


def test_a_build_that_rounds_otherwise_differs(builds, monkeypatch):
    """Control: the same comparison fails, in every function, without fused multiply-adds, and with what -ffast-math allows."""
    native, *others = (outputs(x, torch.float32, monkeypatch) for x in (cpu.library(), builds["twice rounded"], builds["fast"]))
    planted, fast = ({name.split()[0] for name in native if compare(native[name], other[name])} for other in others)
    assert planted >= {name.split()[0] for name in native} - {"sample"} and fast


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_every_element_of_every_output_is_written(dtype, monkeypatch):
    """New memory is filled with NaN, as PyTorch does in deterministic mode."""
    plain = outputs(cpu.library(), dtype, monkeypatch)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        poisoned = outputs(cpu.library(), dtype, monkeypatch)
    finally:
        torch.use_deterministic_algorithms(False)
    for name in plain:
        assert_bits_equal(poisoned[name], plain[name], name)


def test_every_function_is_compared(builds, monkeypatch):
    """Each function of the library is called by `outputs`; exp_f32 and tanh_f32 have their own tests."""
    called, native = set(), cpu.library()

    class Recorder:
        def __getattr__(self, name: str):
            called.add(name)
            return getattr(native, name)

    outputs(Recorder(), torch.float32, monkeypatch)
    assert called == set(cpu._SIGNATURES) - {"exp_f32", "tanh_f32"}


def test_exp_is_within_one_ulp_and_monotonic_over_its_range():
    x = torch.cat([torch.linspace(-86.6, 88.7, 1_000_003), randn(200_000) * 1e-3, torch.tensor([0.0, -0.0, 1e-30, -1e-30])])
    y, exact = exp(x), x.double().exp()
    ulp = torch.exp2(torch.frexp(exact.float()).exponent.double() - 24)
    assert ((y.double() - exact).abs() / ulp).max() <= 1.0
    ordered = exp(x.sort().values)
    assert (ordered[1:] >= ordered[:-1]).all()
    assert (exp(torch.zeros(3)) == 1).all()


def test_exp_at_and_beyond_the_ends_of_its_range():
    x = torch.tensor([-INF, -1e30, -200.0, -86.61, 88.71, 100.0, 3e38, INF, NAN])
    expected = torch.tensor([0.0, 0.0, 0.0, 0.0, INF, INF, INF, INF, NAN])
    assert torch.equal(exp(x).nan_to_num(7.0, 9.0), expected.nan_to_num(7.0, 9.0))
    assert math.copysign(1, exp(torch.tensor([-INF]))) == 1


@pytest.mark.parametrize("f", [exp, tanh])
def test_an_element_does_not_depend_on_its_place(f, builds):
    """A vector body and a scalar tail give the same bits; every build too."""
    x = randn(2049) * torch.linspace(0, 20, 2049)
    y = f(x)
    for n in (1, 7, 15, 16, 17, 33, 2049):
        for at in (0, 1, 13):
            part = x[at : at + n].clone()
            assert_bits_equal(f(part), y[at : at + n], f"{n} elements from {at}")
    for build in ("generic", "haswell") if HASWELL else ("generic",):
        assert_bits_equal(f(x, builds[build]), y, build)


def test_tanh_is_within_two_ulp_odd_monotonic_and_bounded():
    x = torch.cat([torch.linspace(0, 10, 1_000_003), torch.logspace(-30, 1, 100_003), torch.tensor([0.0, 88.0, 1e30, INF])])
    y, exact = tanh(x), x.double().tanh()
    ulp = torch.exp2(torch.frexp(exact.float()).exponent.double() - 24)
    assert ((y.double() - exact).abs() / ulp).max() <= 2.0
    assert_bits_equal(tanh(-x), -y, "an odd function")
    ordered = tanh(x.sort().values)
    assert (ordered[1:] >= ordered[:-1]).all() and y.max() == 1 and tanh(torch.tensor([NAN])).isnan()


def test_bf16_rounds_to_nearest_even_as_torch_does():
    """Through rms_norm of ones: y = round(weight), for words around ties, infinities and NaN."""
    words = torch.arange(0x3F7F0000, 0x3F7F0000 + 70000, 7, dtype=torch.int64)
    special = torch.tensor([0x7F7FFFFF, 0x7F7F8000, 0x7F800000, 0x00000001, 0x00008000, 0x00018000], dtype=torch.int64)
    x = torch.cat([words, special]).int().view(torch.float32)
    x = torch.cat([x, -x])
    w = torch.eye(1).bfloat16()
    y = ops.linear(torch.ones(1, 1).bfloat16(), w)  # the op runs in bf16 at all
    assert y.dtype is torch.bfloat16
    ones = torch.ones(x.numel(), 1, 2)  # rope: x cos - 0: the product in fp32, then one rounding
    out = ops.rope(ones.bfloat16(), x[:, None].contiguous(), torch.zeros(x.numel(), 1))
    assert_bits_equal(out[:, 0, 0], x.bfloat16(), "round(x)")


def test_a_missing_compiler_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("CC", "/nonexistent/cc")
    monkeypatch.setenv("RLINVARIANT_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="install gcc, or set CC"):
        cpu.compile_library(tmp_path / "cpu.so")
    with pytest.raises(UserError, match="install gcc, or set CC"):
        cpu.library.__wrapped__()
    assert not list(tmp_path.iterdir())


def test_a_failing_compiler_is_quoted(monkeypatch, tmp_path):
    with pytest.raises(RuntimeError, match="-fno-such-flag"):
        cpu.compile_library(tmp_path / "cpu.so", ("-fno-such-flag",))
    assert not list(tmp_path.iterdir())


def test_a_library_is_built_once_and_again_when_its_source_or_flags_change(monkeypatch, tmp_path):
    monkeypatch.setenv("RLINVARIANT_CACHE", str(tmp_path / "cache"))
    built: list[Path] = []

    def compile_library(target: Path) -> None:
        built.append(target)
        target.parent.mkdir(exist_ok=True)
        target.touch()

    monkeypatch.setattr(cpu, "compile_library", compile_library)
    monkeypatch.setattr(cpu, "load_library", lambda path: path)
    assert cpu.library.__wrapped__() == cpu.library.__wrapped__() == built[0]
    monkeypatch.setattr(cpu, "FLAGS", (*cpu.FLAGS, "-DX"))
    cpu.library.__wrapped__()
    for i, source in enumerate(cpu.SOURCES):
        changed = tmp_path / source.name
        changed.write_text(source.read_text() + "\n")
        with monkeypatch.context() as m:
            m.setattr(cpu, "SOURCES", (*cpu.SOURCES[:i], changed, *cpu.SOURCES[i + 1 :]))
            cpu.library.__wrapped__()
    assert len(built) == len(set(built)) == 2 + len(cpu.SOURCES) and {p.parent for p in built} == {tmp_path / "cache"}


@pytest.mark.slow
def test_two_processes_may_build_at_once(monkeypatch, tmp_path):
    monkeypatch.setenv("RLINVARIANT_CACHE", str(tmp_path))
    monkeypatch.setattr(cpu, "FLAGS", ("-O0", "-Wno-psabi", *COMMON))
    expected = exp(torch.ones(3))

    def build() -> None:
        assert_bits_equal(exp(torch.ones(3), cpu.library.__wrapped__()), expected, "built beside another process")

    both = [multiprocessing.get_context("fork").Process(target=build) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
        assert process.exitcode == 0
    assert [p.suffix for p in tmp_path.iterdir()] == [".so"]  # one library, no half-written file beside it


def test_other_dtypes_are_refused():
    assert cpu.is_bf16(torch.zeros(1, dtype=torch.bfloat16)) == 1 and cpu.is_bf16(torch.zeros(1)) == 0
    with pytest.raises(TypeError, match="float16"):
        cpu.is_bf16(torch.zeros(1, dtype=torch.float16))


def test_signatures_are_those_of_the_source():
    """Each exported function is declared, with as many arguments as its definition has."""
    text = "".join(x.read_text() for x in cpu.SOURCES)
    for name, arguments in cpu._SIGNATURES.items():
        definition = text.split(f"\nvoid {name}(", 1)[1].split(")", 1)[0]
        kinds = [
            ctypes.c_void_p if "*" in a else {"i64": ctypes.c_int64, "float": ctypes.c_float, "int": ctypes.c_int}[a.split()[0]]
            for a in definition.split(",")
        ]
        assert kinds == list(arguments), name
    assert text.count("\nvoid ") == len(cpu._SIGNATURES)
