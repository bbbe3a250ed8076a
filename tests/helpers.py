"""Helpers of the tests: formats, poisoned outputs, bitwise comparison."""

import itertools
import math
import os
from collections.abc import Iterable
from pathlib import Path

import torch

from cute_quant import DEEP_GEMM, DEEP_GEMM_SM90, GROUPWISE_FP8, MXFP8, Format, quantize
from cute_quant.contract.rows import Masked, Rows, from_operands, to_operands
from tests import oracle
from tests.prologues import Bounds

POISON = 0xA5

ROOT = Path(__file__).parents[1]


def environment(**variables: str) -> dict[str, str]:
    """Return the environment of a process that a test starts: this checkout comes first in it."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, **variables}


ARCHITECTURES = ("sm_100a", "sm_90a")
"""Targets that the emulator runs every case for; tests/kernels/test_architectures.py has others."""

UE8M0 = DEEP_GEMM
FLOAT32 = DEEP_GEMM_SM90
FLOAT32_ROUNDED = DEEP_GEMM_SM90.replace(round_scale=True)
FORMATS = (UE8M0, FLOAT32, FLOAT32_ROUNDED)

DIFFERING_SHARE = 1e-3
"""Share of bytes that may differ where a GPU computes the values in float32. On an H100 up to 2e-4
did in rows of a norm, which share a factor, and next to none elsewhere."""

INPUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
EVERY_DTYPE = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)
EVERY_GROUP_SIZE = (16, 32, 64, 128, 256, -1)
EVERY_LAYOUT = (
    DEEP_GEMM,
    DEEP_GEMM_SM90,
    FLOAT32_ROUNDED,
    GROUPWISE_FP8,
    GROUPWISE_FP8.replace(round_scale=True),
    DEEP_GEMM.replace(scale_layout="row_major"),
    MXFP8,
)
"""A format of each layout and kind of scales."""


def all_formats(
    dtypes: Iterable[torch.dtype] = EVERY_DTYPE, group_sizes: Iterable[int] = EVERY_GROUP_SIZE
) -> list[Format]:
    """Return every supported combination of these dtypes, group sizes and layouts."""
    return [
        fmt.replace(values=dtype, group_size=group_size)
        for dtype, group_size, fmt in itertools.product(dtypes, group_sizes, EVERY_LAYOUT)
        if fmt is not MXFP8 or group_size == 32
    ]


def poisoned(nbytes: int, device: str) -> torch.Tensor:
    return torch.full((nbytes,), POISON, dtype=torch.uint8, device=device)


def poisoned_values(
    rows: int,
    k: int,
    device: str,
    dtype: torch.dtype = torch.float8_e4m3fn,
    batch_shape: tuple[int, ...] = (),
) -> torch.Tensor:
    shape = (*batch_shape, rows, k)
    return poisoned(math.prod(shape), device).view(dtype).view(shape)


def poisoned_scales(
    fmt: Format,
    mn: int,
    k: int,
    device: str,
    last_padding: bool = True,
    batch_shape: tuple[int, ...] = (),
) -> torch.Tensor:
    """Return scales in storage of their own, with or without the last column's padding rows."""
    shape = fmt.scale_shape(batch_shape, mn, k)
    strides = fmt.scale_strides(batch_shape, mn, k)
    size = math.prod(batch_shape) * fmt.scale_rows(mn) * fmt.columns(k)
    if not last_padding and size and fmt.mn_major:
        size -= fmt.scale_rows(mn) - mn
    storage = poisoned(fmt.sf_dtype.itemsize * size, device).view(fmt.sf_dtype)
    return storage.as_strided(shape, strides)


def bits(t: torch.Tensor) -> torch.Tensor:
    """Return the bytes of the tensor's elements, on the CPU."""
    return t.cpu().clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8)


def storage_bits(t: torch.Tensor) -> torch.Tensor:
    """Return the bytes of the tensor's whole storage, on the CPU."""
    return torch.empty(0, dtype=torch.uint8, device=t.device).set_(t.untyped_storage()).cpu()


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    torch.testing.assert_close(bits(actual), bits(expected), rtol=0, atol=0)


def check_every_byte(
    x: torch.Tensor,
    fmt: Format,
    extra_rows: int = 0,
    last_padding: bool = True,
    rows: Rows | None = None,
    index: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize x on its device into poisoned memory; every byte must be the oracle's.

    What a call allocates holds the same, wherever it is defined.
    """
    *batch_shape, mn, k = x.shape if index is None else (*index.shape, x.shape[-1])
    batch_shape = tuple(batch_shape)
    (q, sf), (expected_q, expected_sf) = (
        (
            poisoned_values(mn + extra_rows, k, device, fmt.values, batch_shape),
            poisoned_scales(fmt, mn, k, device, last_padding, batch_shape),
        )
        for device in (x.device.type, "cpu")
    )
    result = quantize(x, fmt, rows=rows, index=index, out=(q, sf))
    assert result[0] is q and result[1] is sf
    oracle.quantize_into(x, expected_q, expected_sf, fmt, rows, index)
    assert_same_bits(q, expected_q)
    torch.testing.assert_close(storage_bits(sf), storage_bits(expected_sf), rtol=0, atol=0)
    own_q, own_sf = quantize(x, fmt, rows=rows, index=index)
    assert own_q.shape == (*batch_shape, mn, k) and own_q.is_contiguous()
    assert own_q.dtype is fmt.values
    assert own_sf.shape == sf.shape and own_sf.stride() == sf.stride()
    if not isinstance(rows, Masked):
        assert_same_bits(own_q, q[..., :mn, :])
        assert_same_bits(own_sf, sf)
    return q, sf


def assert_quantized_as(
    q: torch.Tensor,
    sf: torch.Tensor,
    fmt: Format,
    bounds: Bounds,
    rows: Rows | None = None,
    index: torch.Tensor | None = None,
    share: float = DIFFERING_SHARE,
) -> None:
    """Check every byte: on the CPU exactly, on a GPU as :func:`assert_quantized_within`.

    No more than a `share` of the values may differ.
    """
    if q.is_cpu:
        bounds = Bounds(*[bounds.values] * 3)
    count = assert_quantized_within(q, sf, fmt, *bounds, rows, index)
    assert count <= (0 if q.is_cpu else 2 + share * q.numel())


def assert_quantized_within(
    q: torch.Tensor,
    sf: torch.Tensor,
    fmt: Format,
    values: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    rows: Rows | None = None,
    index: torch.Tensor | None = None,
) -> int:
    """Check the results of a kernel that computes the values only to within `low` and `high`.

    Each scale lies between those of the least and the largest amax that its group may have. Each
    value lies between what the two ends become under the scale that is stored. All other bytes,
    padding and those of rows that do not exist, are the oracle's.

    Args:
        q, sf: of `poisoned_values` and `poisoned_scales`, on any device, with or without more rows
            and the last column's padding.
        values, low, high: (..., mn, k) or with an index (T, k), on the CPU; rounded to float32,
            and so Inf beyond it. Where one is NaN all are.
        rows, index: on the CPU.

    Returns:
        How many bytes of q, and of sf if its scales are powers of two, differ from those of
        `values`. Other scales do where the last bit of an amax does.
    """
    values, low, high = values.float(), low.float(), high.float()
    magnitudes = low.abs(), high.abs()
    least = torch.minimum(*magnitudes).where((low < 0) == (high < 0), 0.0)
    least = least.where(~low.isnan(), torch.nan)
    (expected_q, expected_sf), (_, least_sf), (_, most_sf) = (
        _expected_in_poison(x, q, sf, fmt, rows, index)
        for x in (values, least, torch.maximum(*magnitudes))
    )
    kind = torch.uint8 if fmt.ue8m0 else torch.float32
    stored, least_sf, most_sf = (storage_bits(t).view(kind) for t in (sf, least_sf, most_sf))
    if not fmt.ue8m0:
        assert not stored.isinf().any()
        stored, least_sf, most_sf = (t.nan_to_num(math.inf) for t in (stored, least_sf, most_sf))
    outside = ((stored < least_sf) | (stored > most_sf)).nonzero().flatten()
    assert not len(outside), f"scales: {stored[outside[0]]} at {outside[0]} of the storage"

    leading = (low if index is None else index).shape[: -1 if index is not None else -2]
    batch = math.prod(leading)
    k, mn = low.shape[-1], low.shape[-2] if index is None else index.shape[-1]
    low, high = (t.reshape(-1, k) for t in (low, high))
    sources = torch.from_numpy(oracle.live_rows(rows, index, batch, mn, len(low)))
    live = sources >= 0
    low, high = (torch.cat([t, t.new_zeros(1, k)])[sources] for t in (low, high))
    scales = torch.from_numpy(oracle.stored_scales(sf, fmt, batch, mn, k)).float()
    size = k if fmt.group_size == -1 else fmt.group_size
    scales = scales.repeat_interleave(max(size, 1), 2)[..., :k]
    if fmt.power_of_two:
        mantissas = torch.frexp(scales[live])[0].nan_to_num(0.5)
        assert (mantissas == 0.5).all(), "scales: not powers of two"
    actual, expected_q = (t.cpu().reshape(batch, -1, k) for t in (q, expected_q))
    inside = actual[:, :mn].view(torch.uint8) == fmt.value_type.nan_byte
    ends = _rounded(low, scales, fmt), actual[:, :mn].float(), _rounded(high, scales, fmt)
    inside = inside.where(scales.isnan(), (ends[0] <= ends[1]) & (ends[1] <= ends[2]))
    wrong = (~inside & live.unsqueeze(2)).nonzero().tolist()
    assert not wrong, f"q: {tuple(end[tuple(wrong[0])].item() for end in ends)} at {wrong[0]}"
    differs = actual.view(torch.uint8) != expected_q.view(torch.uint8)
    dead = torch.ones(differs.shape[:2], dtype=torch.bool)
    dead[:, :mn] = ~live
    assert not differs[dead].any(), "q: a row that does not exist"
    count = int(differs.sum())
    if fmt.power_of_two:
        count += int((storage_bits(sf) != storage_bits(expected_sf)).sum())
    return count


def _expected_in_poison(
    x: torch.Tensor,
    q: torch.Tensor,
    sf: torch.Tensor,
    fmt: Format,
    rows: Rows | None,
    index: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the oracle's results for `x` in poisoned memory that looks like `q` and `sf`."""
    expected_q = poisoned(q.numel(), "cpu").view(fmt.values).view(q.shape)
    storage = poisoned(sf.untyped_storage().nbytes(), "cpu").view(fmt.sf_dtype)
    expected_sf = storage.as_strided(sf.shape, sf.stride(), sf.storage_offset())
    oracle.quantize_into(x, expected_q, expected_sf, fmt, rows, index)
    return expected_q, expected_sf


def _rounded(values: torch.Tensor, scales: torch.Tensor, fmt: Format) -> torch.Tensor:
    """Return float32 `values` divided by `scales` and rounded to values of `fmt`, saturated."""
    limit = fmt.value_type.max
    scaled = (values * (1.0 / scales)).clamp(-limit, limit)
    return scaled.round() if fmt.values is torch.int8 else scaled.to(fmt.values).float()


def moved(t: torch.Tensor, device: str) -> torch.Tensor:
    """Return `t` on `device` with its strides."""
    storage = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage())
    return storage.to(device).as_strided(t.shape, t.stride(), t.storage_offset())


def on_device(rows: Rows | None, device: str) -> Rows | None:
    operands = to_operands(rows)
    if operands.row_data is None:
        return rows
    return from_operands(operands._replace(row_data=operands.row_data.to(device)))


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Return uniformly random bit patterns, subnormals, NaN and Inf included."""
    generator = torch.Generator().manual_seed(seed)
    bits = {2: 16, 4: 32}[dtype.itemsize]
    integer = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    half = 2 ** (bits - 1)
    return torch.randint(-half, half, shape, generator=generator, dtype=integer).view(dtype)
