"""Emulated kernels of groups along rows against the oracle: every byte of their results."""

import pytest
import torch

from cute_quant import DEEP_GEMM, DEEP_GEMM_32, DEEP_GEMM_SM90, MXFP8, PrefixSum
from cute_quant.contract.columns import ColumnCall, Output
from cute_quant.kernels import heuristics
from tests.columns import (
    DTYPES,
    FORMATS,
    ROW_FORMATS,
    assert_columns,
    assert_rows,
    experts,
    poisoned_columns,
    special_weights,
    views,
)
from tests.helpers import poisoned_results


def check(gpu, x, fmt, rows=None, transposed=False, row_fmt=None):
    """Quantize on the emulated GPU into poisoned memory; every byte must be the oracle's."""
    *leading, mn, k = x.shape
    columns = poisoned_columns(fmt, tuple(x.shape), transposed)
    along_k, of_rows = None, None
    if row_fmt is not None:
        of_rows = poisoned_results(row_fmt, mn, k, "cpu", batch_shape=tuple(leading))
        along_k = Output(row_fmt, *of_rows)
    gpu.quantize_columns(ColumnCall(x, Output(fmt, *columns), transposed, rows, along_k))
    assert_columns(columns, x, fmt, rows, transposed)
    if row_fmt is not None:
        assert_rows(of_rows, x, row_fmt, rows)


def formats_and_dtypes():
    """Every format with one dtype, and with the others where there is time."""
    for i, fmt in enumerate(FORMATS):
        for j, dtype in enumerate(DTYPES):
            marks = () if (i + j) % 3 == 0 else pytest.mark.slow
            yield pytest.param(fmt, dtype, marks=marks, id=f"{fmt}-{dtype}")


@pytest.mark.parametrize(("fmt", "dtype"), list(formats_and_dtypes()))
def test_every_format(fmt, dtype, gpu):
    x = special_weights((2, 133, 142), dtype, fmt.group_size, 1)
    check(gpu, x, fmt)
    check(gpu, x, fmt, transposed=True)


def calls_of_both():
    """Formats of both directions, each once, and what else a call may vary in."""
    for i, row_fmt in enumerate(ROW_FORMATS):
        fmt, dtype = FORMATS[(2 * i + 1) % len(FORMATS)], DTYPES[i % 3]
        marks = () if i % 3 == 0 else pytest.mark.slow
        yield pytest.param(
            row_fmt, fmt, dtype, i % 6, i % 2 == 0, marks=marks, id=f"{row_fmt}-{fmt}"
        )


@pytest.mark.parametrize(("row_fmt", "fmt", "dtype", "kind", "transposed"), list(calls_of_both()))
def test_both(row_fmt, fmt, dtype, kind, transposed, gpu):
    for shape in ((260, 142), (130, 256)):
        x = special_weights(shape, dtype, 32, kind)
        check(gpu, x, fmt, None, transposed, row_fmt)
        check(gpu, x, fmt, experts(shape[0], fmt, 1 + kind % 5), transposed, row_fmt)


@pytest.mark.parametrize("kind", range(1, 6))
@pytest.mark.parametrize("transposed", [False, True])
def test_experts(transposed, kind, gpu):
    fmt = FORMATS[(kind + 2 * transposed) % 5]
    x = special_weights((640 if transposed else 700, 72), torch.bfloat16, fmt.group_size, kind)
    check(gpu, x, fmt, experts(x.shape[0], fmt, kind), transposed)


@pytest.mark.parametrize("transposed", [False, True])
def test_rows_that_do_not_exist_are_zeros_beside_what_is_not_finite(transposed, gpu):
    x = torch.ones(256, 136, dtype=torch.bfloat16)
    x[3, 5], x[130, 6], x[40:128] = float("nan"), float("inf"), float("nan")
    rows = PrefixSum(torch.tensor([40, 131], dtype=torch.int32))
    for fmt in (DEEP_GEMM_SM90, DEEP_GEMM_32):
        check(gpu, x, fmt, rows, transposed, DEEP_GEMM)


STRIDES = [name for name in views(torch.zeros(1, 1)) if "along" not in name]


@pytest.mark.parametrize("name", STRIDES)
@pytest.mark.parametrize("transposed", [False, True])
def test_every_stride(transposed, name, gpu):
    fmt = MXFP8 if transposed else DEEP_GEMM_SM90
    x = special_weights((3, 144, 152), torch.bfloat16, fmt.group_size, 3)
    check(gpu, views(x)[name], fmt, transposed=transposed, row_fmt=DEEP_GEMM_32)


@pytest.mark.parametrize(("mn", "k"), [(1, 1), (1, 130), (130, 1), (3, 513), (144, 30), (129, 641)])
def test_sizes_of_no_whole_tile(mn, k, gpu):
    for fmt, transposed in ((DEEP_GEMM_SM90, True), (MXFP8, False), (DEEP_GEMM_32, True)):
        x = special_weights((mn, k), torch.bfloat16, fmt.group_size, mn + k)
        check(gpu, x, fmt, transposed=transposed)
    check(gpu, x, MXFP8, transposed=True, row_fmt=DEEP_GEMM)


@pytest.mark.parametrize("fmt", [DEEP_GEMM_SM90, DEEP_GEMM_32], ids=str)
def test_each_value_counts_in_its_groups_alone(fmt, gpu):
    for place in ((0, 0), (15, 127), (16, 8), (31, 96), (32, 31), (127, 127), (71, 64)):
        x = torch.ones(128, 256, dtype=torch.bfloat16)
        x[place] = -5.0
        check(gpu, x, fmt, None, False, DEEP_GEMM)
        check(gpu, x, fmt, None, True, DEEP_GEMM_32)


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
