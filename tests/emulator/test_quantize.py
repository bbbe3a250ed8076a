"""The quantizer's kernels against the reference, every byte, for both architectures."""

import pytest
import torch

from cute_quant import reference
from cute_quant.formats import VALUE_DTYPE, last_column_rows, scale_floor
from cute_quant.kernels.launch import MAX_GRID_Y
from tests.emulator.cases import (
    ARCHITECTURES,
    DTYPES,
    EVERY_FORMAT,
    check,
    poisoned_rows,
    special_groups,
    strided,
)
from tests.helpers import POISON, UE8M0, format_id, poisoned_scales, random_bits, storage_bits

every_arch = pytest.mark.parametrize("arch", ARCHITECTURES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_format = pytest.mark.parametrize("fmt", EVERY_FORMAT, ids=format_id)


@pytest.fixture(params=[1, 2], ids=["one row a thread", "two rows a thread"])
def kernel_of(request, kernel_of):
    return lambda *choices, tall=False: kernel_of(*choices, request.param, tall)


def kernel(function):
    return every_arch(every_dtype(every_format(function)))


@kernel
@pytest.mark.parametrize("mn", [1, 3, 4, 5, 31, 33])
def test_shapes(kernel_of, arch, dtype, fmt, mn):
    for groups in (1, 2, 3, 4, 5, 8, 9):
        x = special_groups(mn, 128 * groups, dtype, seed=groups)
        check(kernel_of(dtype, fmt, arch), x)


@kernel
def test_last_column_without_padding(kernel_of, arch, dtype, fmt):
    for mn in (1, 3, 4, 5, 31, 33):
        for groups in (1, 4, 5):
            x = special_groups(mn, 128 * groups, dtype, seed=mn)
            check(kernel_of(dtype, fmt, arch), x, last_padding=False)


@kernel
def test_more_rows_of_q(kernel_of, arch, dtype, fmt):
    for mn, extra in ((1, 1), (1, 3), (1, 4), (3, 1), (4, 1), (5, 2), (5, 3), (5, 32), (33, 7)):
        x = special_groups(mn, 640, dtype, seed=extra)
        check(kernel_of(dtype, fmt, arch), x, extra_rows=extra)
        check(kernel_of(dtype, fmt, arch), x, extra_rows=extra, last_padding=False)


@kernel
def test_strided_rows(kernel_of, arch, dtype, fmt):
    rows = special_groups(5, 640, dtype, seed=0)
    for x_stride, q_stride in ((656, 640), (640, 656), (1280, 1024), (704, 768)):
        check(kernel_of(dtype, fmt, arch), strided(rows, x_stride), q_stride=q_stride)


@kernel
@pytest.mark.parametrize("min_scale", [2.0**-126, 2.0**-40, 1.0, 2.0**100])
def test_min_scale(kernel_of, arch, dtype, fmt, min_scale):
    check(kernel_of(dtype, fmt, arch), special_groups(13, 512, dtype, 3), min_scale=min_scale)


@every_arch
@every_dtype
def test_no_min_scale(kernel_of, arch, dtype):
    check(kernel_of(dtype, UE8M0, arch), special_groups(13, 512, dtype, 3), min_scale=0.0)


@kernel
def test_every_pattern_as_amax(kernel_of, arch, dtype, fmt):
    magnitudes = torch.arange(2**15, dtype=torch.int32).to(torch.int16)
    x = torch.zeros(2**15, 128, dtype=torch.int16)
    lanes = torch.arange(128)
    # Neighbours below the amax, of all magnitudes and both signs; amax moves along the group.
    x[:] = magnitudes[:, None] * lanes // 128
    x[torch.arange(2**15), torch.arange(2**15) % 128] = magnitudes
    x[:, ::3] |= -(2**15)
    check(kernel_of(dtype, fmt, arch), x.view(dtype).view(-1, 1024))


@kernel
def test_random_bits(kernel_of, arch, dtype, fmt):
    check(kernel_of(dtype, fmt, arch), random_bits((130, 1536), dtype, seed=5))


@every_arch
@every_format
def test_more_rows_than_the_grid_counts_in_one_dimension(kernel_of, arch, fmt):
    """Run the blocks at the edges of the third dimension."""
    kernel = kernel_of(torch.bfloat16, fmt, arch, tall=True)
    rows_per_cta = 4 * kernel.rows_per_thread
    mn = MAX_GRID_Y * rows_per_cta + 5
    x = random_bits((mn, 128), torch.bfloat16, seed=2)
    q, expected_q = (poisoned_rows(mn, 128, 128) for _ in range(2))
    sf, expected_sf = (poisoned_scales(fmt, mn, 128, "cpu", False) for _ in range(2))
    edges = [(0, 0, 0), (0, 65534, 0), (0, 0, 1), (0, 1, 1), (0, 2, 1), (0, 65534, 1)]
    kernel(x, q, sf, scale_floor(fmt, 1e-10), only=edges)
    reference.quantize_into(x, expected_q, expected_sf, fmt, scale_floor(fmt, 1e-10))
    ran = torch.zeros(mn, dtype=torch.bool)
    for _, y, z in edges:
        first = rows_per_cta * (y + MAX_GRID_Y * z)
        ran[first : first + rows_per_cta] = True
    for actual, expected in ((q, expected_q), (sf, expected_sf)):
        actual, expected = (storage_bits(t).view(mn, -1) for t in (actual, expected))
        assert torch.equal(actual[ran], expected[ran])
        assert (actual[~ran] == POISON).all()


@every_arch
def test_offsets_past_32_bits(kernel_of, arch):
    """Rows gigabytes apart: offsets in elements do not fit 32 bits, with or without a sign."""
    stride = 2**30 - 16
    x = torch.empty(5 * stride + 128, dtype=torch.bfloat16).as_strided((6, 128), (stride, 1))
    x.copy_(special_groups(6, 128, torch.bfloat16, 1))
    q, expected_q = (torch.zeros(6, 128, dtype=VALUE_DTYPE) for _ in range(2))
    sf, expected_sf = (poisoned_scales(UE8M0, 6, 128, "cpu") for _ in range(2))
    assert last_column_rows(sf) == 8
    kernel_of(torch.bfloat16, UE8M0, arch)(x, q, sf, 94)
    reference.quantize_into(x.clone(), expected_q, expected_sf, UE8M0, 94)
    assert torch.equal(q.view(torch.uint8), expected_q.view(torch.uint8))
    assert torch.equal(sf, expected_sf)
