"""Every architecture: its table against the assembler, and its kernels in the emulator."""

import functools
import itertools
import re
import tempfile
from collections import Counter

import cutlass.cute as cute
import pytest
import torch
from cutlass import Int32, Uint32
from cutlass._mlir.dialects import llvm
from cutlass.base_dsl.enums import Arch
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor
from cutlass.cutlass_dsl import SMEM_CAPACITY_MAP, T, dsl_user_op

from cute_quant import DEEP_GEMM, MXFP4, MXFP8, NVFP4, ROWWISE_FP8, quantize
from cute_quant.contract.rows import Indexed, Masked, PrefixSum
from cute_quant.dispatch import presets
from cute_quant.emulator.errors import EmulatorError
from cute_quant.jit import lookup
from cute_quant.kernels import architectures
from cute_quant.kernels.architectures import ARCHITECTURES, FAMILIES
from cute_quant.kernels.config import DequantizeSpec, QuantizeSpec
from tests.helpers import FLOAT32, INPUT_DTYPES, UE8M0
from tests.kernels import test_rms_norm, test_silu_mul
from tests.kernels.cases import (
    check,
    check_dequantize,
    check_fake,
    quantized,
    special_groups,
)
from tests.kernels.emulated_gpu import Gpu
from tests.kernels.prologues import check_rms_norm, check_silu_mul
from tests.kernels.test_quantize import MIXED, mixed_id

BF16, FP16, FP32 = INPUT_DTYPES
TARGETS = (*ARCHITECTURES, *FAMILIES)
NAMES = [architecture.name for architecture in ARCHITECTURES]
SAME_PTX = [target.name for target in TARGETS if target.capability[0] >= 10]
REDUCED = ("sm_89", "sm_120a")
"""Architectures that the emulator runs most of the kernels for, besides those of every case."""

every_target = pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
every_name = pytest.mark.parametrize("arch", NAMES)
every_reduced = [pytest.mark.slow, pytest.mark.parametrize("arch", REDUCED)]


# The table


@dsl_user_op
def emit(ptx: str, a: Uint32, *, loc=None, ip=None) -> Uint32:
    operand = [Uint32(a).ir_value(loc=loc, ip=ip)]
    word = llvm.inline_asm(T.i32(), operand, ptx, "=r,r", has_side_effects=True, loc=loc, ip=ip)
    return Uint32(word)


class Probe:
    """A kernel of some instructions from register $1 to register $0."""

    def __init__(self, ptx: str):
        self.ptx = ptx

    def signature(self) -> tuple:
        stream = make_fake_stream(use_tvm_ffi_env_stream=True)
        return make_fake_tensor(Uint32, (32,), stride=(1,)), stream

    @cute.jit
    def __call__(self, mX: cute.Tensor, stream):
        self.kernel(mX).launch(grid=[1, 1, 1], block=[32, 1, 1], stream=stream)

    @cute.kernel
    def kernel(self, mX: cute.Tensor):
        lane = Int32(cute.arch.lane_idx())
        mX[lane] = emit(self.ptx, mX[lane])


def assembles(ptx: str, arch: str) -> bool:
    """Return whether the assembler takes instructions that it knows."""
    try:
        lookup.build(Probe(ptx), arch)
    except Exception as error:
        assert re.search(
            r"requires\s+(ptxas\s+application.*\s+)?\.target|not\s+supported", str(error)
        )
        return False
    return True


PROBES = {
    "pdl": "griddepcontrol.wait; mov.b32 $0, $1;",
    "pair_arithmetic": "max.u16x2 $0, $1, $1; mul.rn.bf16x2 $0, $1, $0;",
    "packed_float32": "{ .reg .b64 a; mov.b64 a, {$1, $1}; fma.rn.f32x2 a, a, a, a;"
    " mov.b64 {$0, _}, a; }",
    "mixed_fma": "{ .reg .b16 h; .reg .f32 f; mov.b32 {h, _}, $1; mov.b32 f, $1;"
    " fma.rn.f32.bf16 f, h, h, f; mov.b32 $0, f; }",
    "e2m1": "{ .reg .b8 b; .reg .f32 f; mov.b32 f, $1; cvt.rn.satfinite.e2m1x2.f32 b, f, f;"
    " cvt.u32.u8 $0, b; }",
}
WIDE_LOAD = (
    "{ .reg .b64 p; .reg .b32 a<8>; cvt.u64.u32 p, $1;"
    " ld.global.v8.b32 {a0, a1, a2, a3, a4, a5, a6, a7}, [p]; mov.b32 $0, a0; }"
)


@pytest.mark.slow
@every_target
def test_instructions(target):
    """Those that the table names, and a load that is wider than 16 bytes, as ptxas has it."""
    assert assembles("mov.b32 $0, $1;", target.name)
    for field, ptx in PROBES.items():
        assert assembles(ptx, target.name) == getattr(target, field), field
    assert assembles(WIDE_LOAD, target.name) == (target.widest_load == 32)


@every_target
def test_shared_memory(target):
    major, minor = target.capability
    assert target.shared_bytes == SMEM_CAPACITY_MAP[f"sm_{major}{minor}"]


def test_what_runs_where():
    """As CuTe DSL has it, of every GPU that it knows."""
    for target, gpu in itertools.product(TARGETS, Arch):
        gpu = Arch[gpu.name.rstrip("af") + "a"] if gpu.major >= 9 else gpu
        expected = gpu.can_run_binary_built_for(Arch[target.name])
        if target.name == gpu.name or target.is_family or gpu.major >= 9:
            assert target.runs_on((gpu.major, gpu.minor)) == expected, (target.name, gpu)


@pytest.mark.parametrize(
    ("arch", "expected"),
    [
        ("sm_89", ["sm_89"]),
        ("sm_90a", ["sm_90a"]),
        ("sm_100a", ["sm_100a", "sm_100f"]),
        ("sm_103a", ["sm_103a", "sm_100f"]),
        ("sm_107a", ["sm_107a", "sm_100f"]),
        ("sm_110a", ["sm_110a"]),
        ("sm_120a", ["sm_120a", "sm_120f"]),
        ("sm_121a", ["sm_121a", "sm_120f"]),
        ("sm_100f", ["sm_100f"]),
    ],
)
def test_the_closest_target_comes_first(arch, expected):
    assert architectures.targets(arch) == expected


def test_names():
    names = [target.name for target in TARGETS]
    assert len(set(names)) == len(names)
    assert all(architectures.named(name).name == name for name in names)
    for target in ARCHITECTURES:
        major, minor = target.capability
        assert re.fullmatch(rf"sm_{major}{minor}a?", target.name)
        assert architectures.find(target.capability) is target
        assert lookup.ARCHITECTURES[target.capability] == target.name
    assert architectures.find((8, 0)) is None
    with pytest.raises(ValueError, match=r"arch: expected one of sm_89, .*sm_120f, got 'sm_80'"):
        architectures.named("sm_80")


@pytest.mark.parametrize("arch", ["sm_89", "sm_90"])
def test_building_for_what_the_table_lacks(arch):
    spec = QuantizeSpec(BF16, UE8M0, pdl=False)
    if arch in NAMES:
        lookup.build(lookup.kernel(spec), arch, engine=False)
        return
    with pytest.raises(ValueError, match=rf"arch: expected one of sm_89, .*, got '{arch}'"):
        lookup.build(lookup.kernel(spec), arch, engine=False)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_members_of_a_family_take_the_same_kernels(family):
    """Or what is built for the family would not be what their calls ask for."""
    members = [a for a in ARCHITECTURES if family.runs_on(a.capability)]
    assert len(members) > 1
    for member in members:
        assert presets.of_each_kind(member.name) == presets.of_each_kind(family.name)
        assert member.warps == family.warps, "where a thread takes two rows"


# Code


@pytest.mark.slow
@pytest.mark.parametrize("spec", [QuantizeSpec(BF16, UE8M0), DequantizeSpec(UE8M0, BF16)], ids=str)
def test_what_an_architecture_lacks_does_not_assemble(spec):
    kernel = lookup.kernel(spec)
    with pytest.raises(Exception, match=r"'griddepcontrol'\s+requires"):
        lookup.build(kernel, "sm_89", engine=False)


@pytest.mark.slow
def test_code_of_another_target_is_refused(kernels, monkeypatch):
    build = lookup.build
    monkeypatch.setattr(
        lookup, "build", lambda kernel, arch, *options: build(kernel, "sm_100a", *options)
    )
    with pytest.raises(EmulatorError, match="compiled for sm_100a, expected sm_103a"):
        kernels.get(QuantizeSpec(BF16, UE8M0), "sm_103a")


@functools.cache
def ptx(spec, arch) -> tuple[str, str]:
    """Return target and code of a kernel."""
    with tempfile.TemporaryDirectory() as directory:
        options = ("--keep-ptx", f"--dump-dir {directory}")
        text = lookup.build(lookup.kernel(spec), arch, *options).__ptx__
    (target,) = re.findall(r"^\.target (\S+)", text, re.MULTILINE)
    return target, text.replace(f".target {target}", "")


def kinds(arch: str) -> list:
    """Return a kernel of each kind that the presets have, the last one."""
    return list({spec.kernel: spec for spec in presets.of_each_kind(arch)}.values())


REPEATED = {"quantize.Quantize": {"setp.ge.s32"}}
"""Instructions that the compiler has twice in a kernel for sm_100a, and once for sm_120a."""


def opcodes(code: str) -> Counter:
    """Count the instructions of a kernel, those in inline assembly too."""
    return Counter(re.findall(r"^\t(?:@!?%p\d+ )?([a-z][\w.]*)", code, re.MULTILINE))


@pytest.mark.slow
@pytest.mark.parametrize("arch", [name for name in SAME_PTX if name != "sm_100a"])
def test_code_of_blackwell_is_one(arch):
    """The emulator runs every case for sm_100a, and so for those whose PTX is the same."""
    for spec in kinds(arch):
        target, code = ptx(spec, arch)
        assert target == arch
        expected = ptx(spec, "sm_100a")[1]
        if spec.kernel in REPEATED:
            more, fewer = (opcodes(a) - opcodes(b) for a, b in ((expected, code), (code, expected)))
            assert set(more) <= REPEATED[spec.kernel] and not fewer, spec
        else:
            assert code == expected, spec


# The emulator: a few kernels of each architecture


@pytest.fixture(scope="module")
def inputs():
    x = special_groups(5, 640, BF16, 1)
    return x, quantize(x, UE8M0)


@pytest.mark.slow
@every_name
def test_smoke(kernels, arch, inputs):
    gpu = Gpu(kernels, arch)
    x, results = inputs
    check(gpu, x, UE8M0, extra_rows=1)
    check(gpu, x.view(1, 5, 640), FLOAT32, rows=Masked(torch.tensor([3], dtype=torch.int32)))
    check_silu_mul(gpu, 3, 128, UE8M0)
    check_rms_norm(gpu, 3, 128, UE8M0)
    check_dequantize(gpu, *results, UE8M0, BF16)
    pdl = {kernel.kernel.spec.pdl for kernel in gpu.launched if hasattr(kernel.kernel, "spec")}
    assert pdl == {architectures.named(arch).pdl}
    assert all(kernel.program.kernel.target == arch for kernel in gpu.launched)


# The emulator: most kernels of a few architectures


def reduced(function):
    for mark in every_reduced:
        function = mark(function)
    return function


@reduced
@pytest.mark.parametrize("mixed", MIXED, ids=mixed_id)
def test_quantize(kernels, arch, mixed):
    dtype, fmt, k = mixed
    two_rows = k % 32 == 0 and fmt.group_size in (32, 64, 128, 256)
    counts = torch.tensor([9, -1, 1, 2**31 - 1, 0], dtype=torch.int32)
    index = torch.tensor([4, -1, 0, 12, 11, 10, 3], dtype=torch.int32)
    x = special_groups(45, k, dtype, 1, fmt)
    for rows_per_thread in (1, 2) if two_rows else (1,):
        gpu = Gpu(kernels, arch, rows_per_thread)
        check(gpu, x[:12], fmt, extra_rows=2, last_padding=False)
        check(gpu, x.view(5, 9, k), fmt, rows=Masked(counts))
        check(gpu, x[:12], fmt, index=index, extra_rows=1)
        check(gpu, x[:21], fmt, rows=PrefixSum(torch.tensor([3, 3, 14], dtype=torch.int32), 4))
        check(gpu, x[:7], fmt, rows=Indexed(index))
        check(Gpu(kernels, arch, rows_per_thread, max_grid=2), x.view(5, 9, k), fmt)


@reduced
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("fmt", [UE8M0, FLOAT32], ids=str)
def test_every_pattern_as_amax(kernels, arch, dtype, fmt):
    magnitudes = torch.arange(2**15, dtype=torch.int32).to(torch.int16)
    x = magnitudes[:, None].repeat(1, 128) // 2
    x[torch.arange(2**15), torch.arange(2**15) % 128] = magnitudes
    x[:, ::3] |= -(2**15)
    check(Gpu(kernels, arch), x.view(dtype).view(-1, 1024), fmt)


@reduced
@pytest.mark.parametrize("variant", test_silu_mul.VARIANTS.values(), ids=test_silu_mul.VARIANTS)
def test_gates_and_ups(kernels, arch, variant):
    for mn, k in ((3, 128), (5, 520), (33, 640)):
        check_silu_mul(Gpu(kernels, arch), mn, k, UE8M0, extra_rows=mn % 3, **variant)


@reduced
@pytest.mark.parametrize("variant", test_rms_norm.VARIANTS.values(), ids=test_rms_norm.VARIANTS)
def test_norms(kernels, arch, variant):
    for mn, k in ((3, 128), (5, 520), (33, 640), (5, 7168)):
        check_rms_norm(Gpu(kernels, arch), mn, k, UE8M0, extra_rows=mn % 3, **variant)


@reduced
@pytest.mark.parametrize(
    ("dtype", "fmt", "k"),
    [
        (BF16, DEEP_GEMM, 640),
        (FP32, MXFP8, 416),
        (FP16, ROWWISE_FP8, 520),
        (BF16, FLOAT32.replace(group_size=16, values=torch.int8), 130),
        (BF16, NVFP4, 130),
        (FP32, MXFP4, 416),
        (FP16, NVFP4.replace(row_scale=True), 520),
    ],
    ids=str,
)
def test_there_and_back(kernels, arch, dtype, fmt, k):
    gpu, x = Gpu(kernels, arch), special_groups(9, k, dtype, 1, fmt)
    check_fake(gpu, x, fmt)
    (q, sf), upper = quantized(x, fmt)
    check_dequantize(gpu, q, sf, fmt, dtype, upper)
