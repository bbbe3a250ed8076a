"""Emulated kernels of groups along rows against the oracle: every byte of their results."""

import pytest
import torch

from cute_quant import DEEP_GEMM, DEEP_GEMM_32, DEEP_GEMM_SM90, MXFP8, PrefixSum
from cute_quant.contract.columns import ColumnCall, Output
from cute_quant.contract.prologues import make_silu_mul, make_silu_mul_backward
from cute_quant.kernels import architectures, heuristics
from cute_quant.kernels.config import BLOCK_TILE, BLOCK_WARPS, LANES, Access, ColumnsSpec, Gated
from tests.columns import (
    DTYPES,
    FORMATS,
    GATED,
    ROW_FORMATS,
    STATES,
    GatedCase,
    assert_columns,
    experts,
    special_weights,
    views,
)
from tests.helpers import (
    ARCHITECTURES,
    assert_quantized_within,
    assert_same_bits,
    poisoned_results,
)
from tests.kernels.columns import check
from tests.kernels.emulated_gpu import Gpu
from tests.kernels.prologues import halves
from tests.prologues import silu_backward_bounds, silu_bounds


def drawn(fast, names, values):
    """Parametrize by values and by the architecture: in turns, the first ones on each.

    All but the first ones, on the first architecture, are slow.
    """
    cases = []
    for i, value in enumerate(values):
        for arch in ARCHITECTURES if i < fast else [ARCHITECTURES[i % len(ARCHITECTURES)]]:
            marks = () if i < fast and arch == ARCHITECTURES[0] else pytest.mark.slow
            name = "-".join(map(str, (arch, *value)))
            cases.append(pytest.param(*value, arch, marks=marks, id=name))
    return pytest.mark.parametrize((*names, "arch"), cases)


@drawn(
    3,
    ("fmt", "dtype", "transposed"),
    [(fmt, DTYPES[i // 2 % 3], (i + i // 3) % 2 == 1) for i, fmt in enumerate(FORMATS)],
)
def test_every_format(fmt, dtype, transposed, gpu):
    x = special_weights((2, 133, 142), dtype, fmt.group_size, 1)
    check(gpu, x, fmt, transposed=transposed)


@drawn(
    1,
    ("row_fmt", "fmt", "dtype", "kind", "transposed"),
    [
        (row_fmt, FORMATS[(2 * i + 1) % len(FORMATS)], DTYPES[i % 3], (i + 1) % 6, i % 2 == 0)
        for i, row_fmt in enumerate(ROW_FORMATS)
    ],
)
def test_both(row_fmt, fmt, dtype, kind, transposed, gpu):
    x = special_weights((261, 142), dtype, 32, kind)
    check(gpu, x, fmt, experts(261, fmt, kind), transposed, row_fmt, last_padding=kind % 2 == 0)


GATED_CALLS = [
    # of each: shape, dtype, formats of rows and columns, experts, transposed, random numbers
    ("gradients", (70, 384), torch.bfloat16, DEEP_GEMM, DEEP_GEMM_32, 1, False, None),
    ("products", (261, 136), torch.bfloat16, DEEP_GEMM_SM90, DEEP_GEMM_SM90, 1, True, None),
    ("gradients", (70, 192), torch.float16, DEEP_GEMM_SM90, DEEP_GEMM_32, 0, False, None),
    ("interleaved gradients", (70, 36), torch.bfloat16, DEEP_GEMM, DEEP_GEMM_32, 0, False, 1),
    ("gradients", (2, 70, 35), torch.bfloat16, MXFP8, DEEP_GEMM_SM90, 0, True, 2),
    ("rounded products", (2, 133, 142), torch.float16, DEEP_GEMM_32, MXFP8, 0, True, None),
    ("interleaved products", (150, 74), torch.float16, MXFP8, DEEP_GEMM_32, 5, False, 0),
    ("gradients", (2, 130, 128), torch.bfloat16, MXFP8, MXFP8, 0, True, None),
    ("gradients", (261, 384), torch.bfloat16, DEEP_GEMM_SM90, DEEP_GEMM_SM90, 1, True, 2),
    ("gradients", (140, 128), torch.float32, DEEP_GEMM, DEEP_GEMM_32, 3, False, None),
    ("products", (131, 140), torch.float32, MXFP8, MXFP8, 0, True, 1),
    ("rounded products", (140, 64), torch.float32, DEEP_GEMM_SM90, DEEP_GEMM_SM90, 2, False, None),
    ("interleaved gradients", (140, 64), torch.float32, MXFP8, DEEP_GEMM_SM90, 4, True, None),
]


@drawn(2, ("name", "shape", "dtype", "row_fmt", "fmt", "kind", "transposed", "state"), GATED_CALLS)
def test_gated(name, shape, dtype, row_fmt, fmt, kind, transposed, state, gpu):
    case = GatedCase.make(shape, dtype, 3 + kind, **GATED[name])
    rows = experts(shape[-2], fmt, kind)
    rng_state = None if state is None else STATES[state]
    check(gpu, case.values, fmt, rows, transposed, row_fmt, kind % 2 == 0, case, rng_state)


@drawn(1, ("name", "k"), [("products", 40), ("gradients", 128), ("gradients", 40)])
def test_rows_of_both_are_those_of_the_kernel_of_rows(name, k, gpu):
    """Also of gates whose sigmoid is rounded; columns lie within the bounds of the arithmetic."""
    gate, up = halves(133, k, torch.bfloat16, seed=k)
    x, numbers = torch.cat((gate, up), 1), {"clamp": 2.5, "alpha": 1.702, "beta": 1.0}
    grad = torch.randn(133, k, generator=torch.Generator().manual_seed(k)).bfloat16()
    if name == "gradients":
        prologue = make_silu_mul_backward(grad, interleaved=False, **numbers)
        bounds = silu_backward_bounds(grad, x, **numbers)
    else:
        prologue = make_silu_mul(interleaved=False, rounding="fused", weight=None, **numbers)
        bounds = silu_bounds(x, None, **numbers)
    fmt, mn, columns = DEEP_GEMM_SM90, 133, bounds.values.shape[1]
    call = ColumnCall(x, Output(fmt), True, along_k=Output(fmt), prologue=prologue)
    results = gpu.quantize_columns(call)
    expected = poisoned_results(fmt, mn, columns, "cpu")
    gpu.quantize(x, *expected, fmt, prologue=prologue)
    for actual, wanted in zip(results.along_k, expected, strict=True):
        assert_same_bits(actual.contiguous(), wanted.contiguous())
    q, sf = poisoned_results(fmt, columns, mn, "cpu")
    for memory, result in ((q, results.columns[0]), (sf, results.columns[1].mT)):
        memory.untyped_storage().fill_(0)
        memory.copy_(result)
    assert_quantized_within(q, sf, fmt, *(t.mT.contiguous() for t in bounds))


@drawn(
    1,
    ("fmt", "dtype", "transposed", "row_fmt"),
    [
        (DEEP_GEMM_SM90, torch.bfloat16, True, None),
        (DEEP_GEMM_32, torch.float32, False, DEEP_GEMM),
        (MXFP8, torch.float16, True, MXFP8),
        (FORMATS[6], torch.float32, True, DEEP_GEMM_SM90),
        (FORMATS[7], torch.bfloat16, False, ROW_FORMATS[7]),
    ],
)
def test_stochastic(fmt, dtype, transposed, row_fmt, gpu):
    """Of values that are not finite too, and of rows that do not exist."""
    x = special_weights((2, 133, 40), dtype, fmt.group_size, 1)
    check(gpu, x, fmt, None, transposed, row_fmt, rng_state=STATES[1])
    x = special_weights((261, 38), dtype, fmt.group_size, 2)
    check(gpu, x, fmt, experts(261, fmt, 1), transposed, row_fmt, rng_state=STATES[2])


@drawn(1, ("kind", "transposed"), [(1, True), (2, False), (3, True), (4, False), (5, True)])
def test_experts(transposed, kind, gpu):
    fmt = FORMATS[kind % 5]
    x = special_weights((640 if transposed else 700, 72), torch.bfloat16, fmt.group_size, kind)
    check(gpu, x, fmt, experts(x.shape[0], fmt, kind), transposed)


@drawn(1, ("fmt", "transposed"), [(DEEP_GEMM_SM90, True), (DEEP_GEMM_32, False)])
def test_rows_that_do_not_exist_are_zeros_beside_what_is_not_finite(fmt, transposed, gpu):
    x = torch.ones(256, 136, dtype=torch.bfloat16)
    x[3, 5], x[130, 6], x[40:128] = float("nan"), float("inf"), float("nan")
    rows = PrefixSum(torch.tensor([40, 131], dtype=torch.int32))
    check(gpu, x, fmt, rows, transposed, DEEP_GEMM)


@drawn(1, ("name", "transposed"), [("apart", True), ("unaligned", False), ("whole", True)])
def test_every_stride(name, transposed, gpu):
    fmt = MXFP8 if transposed else DEEP_GEMM_SM90
    x = special_weights((3, 144, 152), torch.bfloat16, fmt.group_size, 3)
    check(gpu, views(x)[name], fmt, transposed=transposed, row_fmt=DEEP_GEMM_32)


SIZES = [(129, 641), (1, 144), (130, 1), (3, 513), (144, 30), (1, 1)]


@drawn(2, ("mn", "k"), SIZES)
def test_sizes_of_no_whole_tile(mn, k, gpu):
    x = special_weights((mn, k), torch.bfloat16, 32, mn + k)
    fmt = (DEEP_GEMM_SM90, DEEP_GEMM_32)[mn % 2]
    check(gpu, x, fmt, transposed=k % 2 == 0, row_fmt=MXFP8)
    check(gpu, x, MXFP8, transposed=k % 2 == 1, row_fmt=DEEP_GEMM)


@drawn(1, ("fmt",), [(DEEP_GEMM_SM90,), (DEEP_GEMM_32,)])
def test_each_value_counts_in_its_groups_alone(fmt, gpu):
    for i, place in enumerate([(0, 0), (15, 127), (16, 8), (31, 96), (71, 64), (127, 31)]):
        x = torch.ones(128, 256, dtype=torch.bfloat16)
        x[place] = -5.0
        check(gpu, x, fmt, None, i % 2 == 1, (DEEP_GEMM, DEEP_GEMM_32)[i // 2 % 2])


def test_views_into_larger_results(gpu):
    x = special_weights((2, 130, 96), torch.bfloat16, 32, 5)
    for transposed, shape in ((False, (2, 130, 112)), (True, (2, 96, 150))):
        wide = torch.full(shape, 0x5A, dtype=torch.uint8)
        columns = 130 if transposed else 96
        q = wide.view(torch.float8_e4m3fn)[..., :columns]
        call = ColumnCall(x, Output(DEEP_GEMM_32, q), transposed)
        _, sf = gpu.quantize_columns(call).columns
        assert_columns((q.contiguous(), sf), x, DEEP_GEMM_32, None, transposed)
        assert (wide[..., columns:] == 0x5A).all()


@pytest.mark.slow
def test_more_tiles_than_a_grid_counts(gpu, monkeypatch):
    monkeypatch.setattr(gpu.kernels, "_kernels", {})
    gpu.max_grid = 2
    x = special_weights((3, 5 * 128 - 3, 40), torch.bfloat16, 128, 7)
    with monkeypatch.context() as patch:
        patch.setattr(heuristics, "MAX_GRID_Y", 2)
        check(gpu, x, DEEP_GEMM_SM90, transposed=True)
        check(gpu, x, DEEP_GEMM_32, row_fmt=MXFP8)


def test_nothing_to_quantize_launches_nothing(gpu):
    for shape in ((0, 128), (128, 0), (0, 3, 8)):
        x = torch.empty(shape, dtype=torch.bfloat16)
        for fmt in (DEEP_GEMM_SM90, MXFP8):
            along_k = Output(DEEP_GEMM)
            for q, sf in gpu.quantize_columns(ColumnCall(x, Output(fmt), along_k=along_k)):
                assert q.numel() == 0 == sf.numel()
    assert not gpu.launched


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_89", "sm_120a"])
def test_other_architectures(arch, kernels):
    x = special_weights((261, 142), torch.bfloat16, 32, 5)
    for row_fmt, fmt, transposed in ((None, DEEP_GEMM_SM90, False), (MXFP8, MXFP8, True)):
        check(Gpu(kernels, arch), x, fmt, experts(261, fmt, 1), transposed, row_fmt)


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
@pytest.mark.parametrize(
    ("fmt", "row_fmt", "transposed", "kind", "most"),
    [
        (DEEP_GEMM_SM90, None, True, "dense", {"sm_90a": 494, "sm_100a": 588}),
        (DEEP_GEMM_32, None, False, "prefix_sum", {"sm_90a": 566, "sm_100a": 515}),
        (MXFP8, MXFP8, True, "dense", {"sm_90a": 956, "sm_100a": 863}),
    ],
    ids=str,
)
@pytest.mark.slow
def test_machine_code(fmt, row_fmt, transposed, kind, most, arch):
    """Vectors as wide as they can be, registers for four CTAs, no spills, room beside memory."""
    from bench.sass import machine_code

    values = heuristics.block_values(torch.bfloat16, fmt, arch, transposed=False)
    access = Access(2 * values, values)
    q_access = Access(store_bytes=16 if transposed else values)
    spec = ColumnsSpec(torch.bfloat16, fmt, values, access, q_access, transposed, row_fmt, kind)
    code = machine_code(spec, arch)
    assert code.count("LDL", "STL") == 0 == code.stack and code.registers <= 64
    assert len(code.opcodes) <= most[arch]
    results = 1 if row_fmt is None else 2
    bytes_of_warp = BLOCK_TILE**2 * (2 + results) / BLOCK_WARPS
    assert len(code.opcodes) <= 0.75 * architectures.named(arch).gpu.issue_budget(bytes_of_warp)
    load = "LDG.E.128" if arch == "sm_90a" else "LDG.E.ENL2.256"
    assert code.opcodes.count(load) == BLOCK_TILE**2 // (BLOCK_WARPS * LANES * values)
    narrow = [op for op in code.opcodes if op.startswith("STG.E.U8")]
    assert len(narrow) == (4 if row_fmt is not None else 0), "bytes of scales of rows alone"


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
@pytest.mark.parametrize(
    ("gated", "stochastic", "most"),
    [
        (Gated(), False, 128),
        (None, True, 128),
        (Gated(backward=True, paired=True), False, 128),
        (Gated(backward=True, paired=True), True, 255),
    ],
    ids=["products", "stochastic", "gradients", "stochastic gradients"],
)
def test_machine_code_of_gated_activations(gated, stochastic, most, arch):
    """No spills, registers for two CTAs where random numbers take none, one load of each input."""
    from bench.sass import machine_code

    fmt, dtype = DEEP_GEMM_SM90, torch.bfloat16
    values = heuristics.column_values(dtype, arch, stochastic=stochastic)
    access = Access(2 * values, values), Access(store_bytes=16)
    spec = ColumnsSpec(dtype, fmt, values, *access, True, fmt, gated=gated, stochastic=stochastic)
    code = machine_code(spec, arch)
    assert code.count("LDL", "STL") == 0 == code.stack and code.registers <= most
    inputs = 1 if gated is None else 3 if gated.backward else 2
    load = "LDG.E.128" if arch == "sm_90a" else "LDG.E.ENL2.256"
    of_each = BLOCK_TILE**2 // (BLOCK_WARPS * LANES * values)
    assert code.opcodes.count(load) == inputs * of_each
