"""The comparison within bounds accepts values within them and finds every planted error."""

import pytest
import torch

from cute_quant import DEEP_GEMM, DEEP_GEMM_SM90, NVFP4, Indexed, Masked, quantize
from cute_quant.contract.upper_scales import UpperScale
from tests.exact import E2M1
from tests.helpers import (
    NVFP4_FORMATS,
    all_formats,
    as_arguments,
    assert_quantized_within,
    poisoned_results,
)

# Each layout with every other dtype and group size.
FORMATS = [*all_formats(group_sizes=(32, -1))[::2], *NVFP4_FORMATS[::3]]
every_format = pytest.mark.parametrize("fmt", FORMATS, ids=str)


def relative(fmt):
    """Return noise that changes some values, and not many."""
    return 2.0**-6 if fmt.values is E2M1 else 2.0**-10


def values(*shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[..., 0, 0] = torch.nan
    x[..., 1, 1] = 2e38 * 2.0  # beyond float32
    return x


def upper_scale_of(fmt):
    needed = fmt.upper_scale and not fmt.row_scale
    return UpperScale("amax", torch.tensor(4.0)) if needed else None


def quantized(x, fmt, rows=None, extra_rows=3, last_padding=True):
    *batch_shape, mn, k = x.shape
    out = poisoned_results(fmt, mn, k, "cpu", extra_rows, last_padding, tuple(batch_shape))
    return quantize(x.float(), fmt, rows=rows, out=out, **as_arguments(upper_scale_of(fmt)))


def within(results, fmt, x, noise=None, rows=None):
    error = x.abs() * (relative(fmt) if noise is None else noise)
    bounds = x - error, x + error
    q, sf, *row_scales = results
    row_scales = row_scales[0] if row_scales else None
    upper = upper_scale_of(fmt)
    return assert_quantized_within(q, sf, fmt, x, *bounds, rows, upper=upper, row_scales=row_scales)


@every_format
@pytest.mark.parametrize("last_padding", [True, False])
def test_what_is_within(fmt, last_padding):
    x = values(2, 5, 290)
    assert within(quantized(x, fmt, last_padding=last_padding), fmt, x, 0.0) == 0
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype) * 2 - 1
    count = within(quantized(x * (1 + noise * relative(fmt)), fmt), fmt, x)
    assert 0 < count < 400
    rows = Masked(torch.tensor([5, 2], dtype=torch.int32))
    results = quantized(x * (1 + noise * relative(fmt)), fmt, rows, extra_rows=0)
    assert 0 < within(results, fmt, x, rows=rows) < 400


@every_format
def test_what_is_not(fmt):
    x = values(2, 5, 70)
    noisy = x * (1 + 8 * relative(fmt))
    with pytest.raises(AssertionError, match=r"scales: .* of the storage|q: "):
        within(quantized(noisy, fmt), fmt, x)


@every_format
def test_every_wrong_value_is_seen(fmt):
    """Flip bits of live rows, dead rows, rows with NaN, and rows past the last."""
    x = values(2, 5, 70)
    for place in ((0, 2, 5), (1, 4, 69), (0, 0, 0), (1, 5, 0), (1, 7, 69)):
        matrix, row, column = place
        results = quantized(x, fmt)
        content = results[0].view(torch.uint8)
        content[matrix, row, column * content.shape[-1] // 70] ^= (
            0x44 if fmt.values is E2M1 else 0x11
        )
        with pytest.raises(AssertionError, match="q: "):
            within(results, fmt, x)
    rows = Masked(torch.tensor([5, 2], dtype=torch.int32))
    results = quantized(x, fmt, rows, extra_rows=0)
    results[0].view(torch.uint8)[1, 2, 0] ^= 1
    with pytest.raises(AssertionError, match="q: a row that does not exist"):
        within(results, fmt, x, rows=rows)


@every_format
def test_every_wrong_scale_is_seen(fmt):
    """Flip the lowest bit of bytes all over the storage, padding included."""
    x = values(5, 70)
    results = quantized(x, fmt)
    stored = torch.empty(0, dtype=torch.uint8).set_(results[1].untyped_storage())
    step = 1 if fmt.byte_scales else 4
    for place in range(step - 1, len(stored), step if len(stored) < 400 else 37):
        stored[place] ^= 1
        with pytest.raises(AssertionError, match="scales: "):
            within(results, fmt, x, 0.0)
        stored[place] ^= 1
    assert within(results, fmt, x, 0.0) == 0


def test_every_wrong_scale_of_a_row_is_seen():
    fmt = NVFP4.replace(row_scale=True)
    x = values(5, 70)
    results = quantized(x, fmt, Indexed(torch.tensor([0, 1, -1, 0, 0], dtype=torch.int32)))
    rows = Indexed(torch.tensor([0, 1, -1, 0, 0], dtype=torch.int32))
    assert within(results, fmt, x, 0.0, rows) == 0
    for row in range(5):
        before = results[2][row].item()
        results[2][row] = 1.0 if row == 2 else results[2][row].nan_to_num(1.0) * (1 + 2.0**-20)
        with pytest.raises(AssertionError, match="row scales: "):
            within(results, fmt, x, 0.0, rows)
        results[2][row] = before


def test_swapped_groups_are_seen():
    fmt = DEEP_GEMM.replace(scale_layout="row_major", group_size=32)
    x = values(4, 64) * torch.tensor([1.0, 1024.0], dtype=torch.float64).repeat_interleave(32)
    q, sf = quantized(x, fmt)
    swapped = sf.view(torch.uint8).flip(1).contiguous().view(sf.dtype)
    with pytest.raises(AssertionError, match="scales: "):
        within((q, swapped), fmt, x)


def test_signs_are_seen():
    fmt = DEEP_GEMM_SM90.replace(group_size=32)
    x = values(4, 64)
    with pytest.raises(AssertionError, match="q: "):
        within(quantized(-x, fmt), fmt, x)


def test_scales_that_are_no_powers_of_two_are_seen():
    x = values(4, 64)
    rounded = DEEP_GEMM_SM90.replace(group_size=32, round_scale=True)
    _, sf = quantized(x, rounded)
    sf[3, 0] *= 1 + 2.0**-20
    with pytest.raises(AssertionError, match="powers of two"):
        within((quantized(x, rounded)[0], sf), rounded, x, 2.0)
