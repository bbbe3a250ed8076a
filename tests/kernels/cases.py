"""What the emulated quantizer is run on, and the comparison of every byte with the oracle."""

from __future__ import annotations

import math

import torch

from cute_quant import quantize
from cute_quant.contract.format_choices import DEEPGEMM, WHOLE_ROW
from cute_quant.contract.formats import Format
from cute_quant.contract.rows import Masked, Rows
from cute_quant.contract.upper_scales import UpperScale
from tests import oracle
from tests.helpers import (
    FLOAT32,
    FORMATS,
    as_arguments,
    expect,
    poisoned,
    poisoned_row_scales,
    poisoned_scales,
    random_bits,
    storage_bits,
    upper_scale,
    whole_bytes,
)
from tests.kernels.emulated_gpu import Gpu
from tests.oracle import INTEGERS

DTYPES = (torch.bfloat16, torch.float16)
EVERY_FORMAT = (*FORMATS, FLOAT32.replace(numerics=DEEPGEMM))


def special_groups(
    mn: int, k: int, dtype: torch.dtype, seed: int, fmt: Format = FORMATS[0]
) -> torch.Tensor:
    """An input whose groups take turns at everything that needs care, from random bits."""
    size = max(k, 1) if fmt.group_size == WHOLE_ROW else fmt.group_size
    groups = math.ceil(k / size)
    generator = torch.Generator().manual_seed(seed)
    bits = random_bits((mn, groups, size), dtype, seed).view(INTEGERS[dtype.itemsize])

    def pattern(value: float) -> int:
        return torch.tensor(value, dtype=dtype).view(bits.dtype).item()

    infinity, one, largest = (pattern(v) for v in (torch.inf, 1.0, fmt.value_type.max))
    sign = torch.iinfo(bits.dtype).min
    here = torch.randint(min(size, k), (mn, groups, 1), generator=generator)
    here = here.where(here < k - torch.arange(groups).view(-1, 1) * size, 0)
    at = torch.arange(size) == here  # one value of each group
    finite = torch.where((bits & infinity) == infinity, bits ^ infinity, bits)
    small = (torch.randn(bits.shape, generator=generator) * 1e-7).to(dtype).view(bits.dtype)
    choices = (
        bits,  # NaN and Inf among them
        finite,
        torch.zeros_like(bits),
        torch.full_like(bits, sign),  # -0.0
        # One NaN, of any payload and either sign.
        torch.where(at, bits | infinity | 1, finite),
        torch.where(at, infinity, finite),
        torch.where(at, infinity | sign, finite),
        bits & ~infinity,  # subnormals: the exponent is cleared
        torch.where(at, infinity - 1, finite),  # the largest finite value
        bits & ~infinity | one & infinity,  # one binade, where every rounding counts
        # amax at or beside the largest value times a power of two, where the scale steps
        torch.where(at, largest + here % 3 - 1, one // 2).to(bits.dtype),
        small,  # against the floor
    )
    turn = torch.arange(mn).view(-1, 1, 1) + torch.arange(groups).view(-1, 1) + seed
    assert all(c.dtype == bits.dtype for c in choices)
    chosen = torch.stack(choices).gather(0, (turn % len(choices)).expand_as(bits)[None])[0]
    return chosen.view(dtype).flatten(1)[:, :k].contiguous()


def strided(t: torch.Tensor, row_stride: int, offset: int = 0) -> torch.Tensor:
    """The same rows with a stride, `offset` elements past an aligned address, amid poison."""
    strides = [row_stride, 1]
    for size in reversed(t.shape[1:-1]):
        strides.insert(0, strides[0] * size)
    result = poisoned_matrix(tuple(t.shape), tuple(strides), t.dtype, offset)
    integer = INTEGERS[t.itemsize]
    result.view(integer).copy_(t.view(integer))
    return result


def poisoned_matrix(
    shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, offset: int = 0
) -> torch.Tensor:
    """Poison all over, at its place in a storage of its own that ends a bit later."""
    extent = 1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    storage = poisoned((offset + max(extent, 0) + 3) * dtype.itemsize, "cpu")
    return storage.view(dtype).as_strided(shape, strides, offset)


def check(
    gpu: Gpu,
    x: torch.Tensor,
    fmt: Format,
    *,
    rows: Rows | None = None,
    index: torch.Tensor | None = None,
    extra_rows: int = 0,
    last_padding: bool = True,
    q_strides: tuple[int, ...] | None = None,
    q_offset: int = 0,
    upper: UpperScale | None = None,
    rng_state: torch.Tensor | None = None,
    scatter: torch.Tensor | None = None,
    num_rows: int | None = None,
    **options,
) -> None:
    """Run a call into poisoned memory; every byte of it must be the oracle's.

    Args:
        x: gets another column where values share bytes and their number is odd.
        q_strides: of all dimensions but the last, in elements.
        upper: by default one that fits x, of a kind and shape that its size chooses.
    """
    x = whole_bytes(x, fmt)
    upper = upper_scale(x, fmt, index) if upper is None else upper
    *batch_shape, mn, k = x.shape if index is None else (*index.shape, x.shape[-1])
    if scatter is not None:
        mn, batch_shape = num_rows, list(rows.masked_m.shape if isinstance(rows, Masked) else ())
    q_shape = (*batch_shape, mn + extra_rows, fmt.value_columns(k))
    if q_strides is None:
        q_strides = torch.empty(q_shape, device="meta").stride()[:-1]
    results = [
        (
            poisoned_matrix(q_shape, (*q_strides, 1), fmt.values, q_offset),
            poisoned_scales(fmt, mn, k, "cpu", last_padding, tuple(batch_shape)),
            *[poisoned_row_scales((*batch_shape, mn), "cpu")] * fmt.row_scale,
        )
        for _ in range(2)
    ]
    data = None if rows is None else rows.data
    inputs = [t for t in (x, data, index, scatter) if t is not None]
    inputs += [] if upper is None else [upper.tensor]
    before = [storage_bits(t).clone() for t in inputs]
    q, sf, *row_scales = results[0]
    row_scales = row_scales[0] if row_scales else None
    given = {"upper": upper, "row_scales": row_scales, "rng_state": rng_state, "scatter": scatter}
    gpu.quantize(x, q, sf, fmt, rows, index, **given, **options)
    expect(results[1], x, fmt, rows, index, upper, rng_state=rng_state, scatter=scatter)
    for name, actual, expected in zip(("q", "sf", "row scales"), *results, strict=False):
        assert_same_storage(name, actual, expected)
    for t, bits in zip(inputs, before, strict=True):
        assert torch.equal(storage_bits(t), bits), "an input was written"


def check_fake(
    gpu: Gpu,
    x: torch.Tensor,
    fmt: Format,
    *,
    strides: tuple[int, ...] | None = None,
    offset: int = 0,
    upper: UpperScale | None = None,
) -> None:
    """The same for a call of `fake_quantize`."""
    x = whole_bytes(x, fmt)
    upper = upper_scale(x, fmt) if upper is None else upper
    strides = (strides or x.contiguous().stride()[:-1]) + (1,)
    actual, expected = (poisoned_matrix(tuple(x.shape), strides, x.dtype, offset) for _ in range(2))
    gpu.fake_quantize(x, actual, fmt, upper)
    integer = INTEGERS[x.itemsize]
    expected.view(integer).copy_(oracle.fake_quantize(x, fmt, upper).view(integer))
    assert_same_products("out", actual, expected)


def check_dequantize(
    gpu: Gpu,
    q: torch.Tensor,
    sf: torch.Tensor,
    fmt: Format,
    dtype: torch.dtype,
    upper: UpperScale | None = None,
) -> None:
    """The same for a call of `dequantize`."""
    actual = gpu.dequantize(q, sf, fmt, dtype, upper)
    assert_same_products("y", actual, oracle.dequantize(q, sf, fmt, dtype, upper))


def quantized(x: torch.Tensor, fmt: Format) -> tuple[tuple[torch.Tensor, ...], UpperScale | None]:
    """Return values and scales that the CPU makes of x, and what they are multiplied back with."""
    x = whole_bytes(x, fmt)
    upper = upper_scale(x, fmt)
    q, sf, *row_scales = quantize(x, fmt, **as_arguments(upper))
    return (q, sf), UpperScale("decode_scale", row_scales[0]) if row_scales else upper


def assert_same_products(name: str, actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Of a NaN no more is promised than that it is one."""
    for t in (actual, expected):
        t.masked_fill_(t.isnan(), torch.nan)
    assert_same_storage(name, actual, expected)


def assert_same_storage(name: str, actual: torch.Tensor, expected: torch.Tensor) -> None:
    differ = storage_bits(actual) != storage_bits(expected)
    if differ.any():
        at = int(differ.nonzero()[0])
        got, want = storage_bits(actual)[at], storage_bits(expected)[at]
        raise AssertionError(
            f"{name}: {int(differ.sum())} bytes differ from the oracle, the first at byte "
            f"{at} of its storage: {got:#04x}, expected {want:#04x}"
        )
