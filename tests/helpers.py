"""Helpers of the tests: formats, poisoned outputs, bitwise comparison."""

import itertools
import math
import os
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from cute_quant import DEEP_GEMM, DEEP_GEMM_SM90, GROUPWISE_FP8, MXFP8, NVFP4, Format, quantize
from cute_quant.contract.rows import Masked, Rows, from_operands, to_operands
from cute_quant.contract.upper_scales import AMAX, DECODE, ENCODE, KINDS, UpperScale
from tests import oracle
from tests.exact import E2M1, E4M3, E5M2, INT8
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
EVERY_DTYPE = (E4M3, E5M2, INT8, E2M1)
BYTE_DTYPES = (E4M3, E5M2, INT8)
"""Those with a byte for each value."""
EVERY_GROUP_SIZE = (16, 32, 64, 128, 256, -1)
EVERY_LAYOUT = (
    DEEP_GEMM,
    DEEP_GEMM_SM90,
    FLOAT32_ROUNDED,
    GROUPWISE_FP8,
    GROUPWISE_FP8.replace(round_scale=True),
    DEEP_GEMM.replace(scale_layout="row_major"),
    DEEP_GEMM.replace(scale_layout="row_major_packed"),
    MXFP8.replace(scale_layout="8x4"),
    MXFP8,
)
"""A format of each layout and kind of scales with no other scale above them."""
NVFP4_FORMATS = tuple(
    NVFP4.replace(scale_layout=layout, row_scale=row_scale)
    for layout in ("mn_major_packed", "row_major", "row_major_packed", "8x4", "128x4")
    for row_scale in (False, True)
)


def all_formats(
    dtypes: Iterable[torch.dtype] = EVERY_DTYPE, group_sizes: Iterable[int] = EVERY_GROUP_SIZE
) -> list[Format]:
    """Return every supported combination of these dtypes, group sizes and layouts."""
    dtypes, group_sizes = tuple(dtypes), tuple(group_sizes)
    formats = [
        fmt.replace(values=dtype, group_size=group_size)
        for dtype, group_size, fmt in itertools.product(dtypes, group_sizes, EVERY_LAYOUT)
        if not fmt.blocked or group_size == 32
    ]
    return formats + [*NVFP4_FORMATS] * (E2M1 in dtypes and 16 in group_sizes)


def mostly_slow(formats: Iterable[Format], step: int = 2) -> list[object]:
    """Return parameters of a test, all but one of `step` marked slow."""
    return [
        fmt if i % step == 0 else pytest.param(fmt, marks=pytest.mark.slow)
        for i, fmt in enumerate(formats)
    ]


def whole_bytes(x: torch.Tensor, fmt: Format, columns: int = 1) -> torch.Tensor:
    """Return x with its last column once more where values share bytes and their number is odd.

    Args:
        columns: of x for each of the result.
    """
    odd = fmt.values is E2M1 and x.shape[-1] // columns % 2 == 1
    return torch.cat([x, x[..., -columns:]], -1) if odd else x


def upper_scale(
    x: torch.Tensor, fmt: Format, index: torch.Tensor | None = None, turn: int | None = None
) -> UpperScale | None:
    """Return an upper scale that fits x, on its device, None for formats that take none.

    Args:
        turn: which kind of argument, and which shape; by default what the size of x says.
    """
    if not fmt.upper_scale or fmt.row_scale:
        return None
    turn = x.numel() // 2 + x.shape[-2] if turn is None else turn
    batch_shape = tuple((x if index is None else index).shape[: -2 if index is None else -1])
    shape = ((), (1,), batch_shape)[turn // 3 % 3]
    finite = x.detach().cpu().float()
    finite = finite.where(finite.isfinite(), 0.0).abs()
    if shape == batch_shape and index is None and x.numel():
        amax = finite.amax((-1, -2))
    else:
        amax = (finite.amax() if x.numel() else torch.tensor(1.0)).expand(shape)
    kind = KINDS[turn % 3]
    forms = oracle.forms_of_amax(amax.double().numpy())
    given = {AMAX: amax.numpy(), ENCODE: forms.encode, DECODE: forms.decode}[kind]
    tensor = torch.from_numpy(given.astype("float32")).reshape(shape)
    return UpperScale(kind, tensor.clone().to(x.device))


def as_arguments(upper: UpperScale | None) -> dict[str, torch.Tensor]:
    """Return an upper scale as a call takes it."""
    return {} if upper is None else {upper.kind: upper.tensor}


def decode_arguments(
    upper: UpperScale | None, results: tuple[torch.Tensor, ...]
) -> dict[str, torch.Tensor]:
    """Return the scale that ``dequantize`` takes for results: that of the call, or their own."""
    return {DECODE: results[2]} if len(results) > 2 else as_arguments(upper)


def poisoned(nbytes: int, device: str) -> torch.Tensor:
    return torch.full((nbytes,), POISON, dtype=torch.uint8, device=device)


def poisoned_values(
    rows: int,
    k: int,
    device: str,
    dtype: torch.dtype = torch.float8_e4m3fn,
    batch_shape: tuple[int, ...] = (),
) -> torch.Tensor:
    shape = (*batch_shape, rows, k // 2 if dtype is E2M1 else k)
    return poisoned(math.prod(shape), device).view(dtype).view(shape)


def poisoned_row_scales(shape: tuple[int, ...], device: str) -> torch.Tensor:
    return poisoned(4 * math.prod(shape), device).view(torch.float32).view(shape)


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


def poisoned_results(
    fmt: Format,
    mn: int,
    k: int,
    device: str,
    extra_rows: int = 0,
    last_padding: bool = True,
    batch_shape: tuple[int, ...] = (),
) -> tuple[torch.Tensor, ...]:
    """Return memory for q and sf, and for the scales of rows of formats that have them."""
    results = (
        poisoned_values(mn + extra_rows, k, device, fmt.values, batch_shape),
        poisoned_scales(fmt, mn, k, device, last_padding, batch_shape),
    )
    return (*results, *[poisoned_row_scales((*batch_shape, mn), device)] * fmt.row_scale)


def expect(
    results: tuple[torch.Tensor, ...],
    x: torch.Tensor,
    fmt: Format,
    rows: Rows | None = None,
    index: torch.Tensor | None = None,
    upper: UpperScale | None = None,
    scaled_as: torch.Tensor | None = None,
    rng_state: torch.Tensor | None = None,
    scatter: torch.Tensor | None = None,
) -> None:
    """Write the oracle's results to memory like that of ``poisoned_results``."""
    q, sf, *row_scales = results
    of_rows = row_scales[0] if row_scales else None
    further = {"rng_state": rng_state, "scatter": scatter}
    oracle.quantize_into(x, q, sf, fmt, rows, index, upper, of_rows, scaled_as, **further)


def check_every_byte(
    x: torch.Tensor,
    fmt: Format,
    extra_rows: int = 0,
    last_padding: bool = True,
    rows: Rows | None = None,
    index: torch.Tensor | None = None,
    upper: UpperScale | None = None,
    rng_state: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """Quantize x on its device into poisoned memory; every byte must be the oracle's.

    What a call allocates holds the same, wherever it is defined.

    Args:
        upper: by default one that fits x, of a kind and shape that its size chooses.
    """
    *batch_shape, mn, k = x.shape if index is None else (*index.shape, x.shape[-1])
    batch_shape = tuple(batch_shape)
    upper = upper_scale(x, fmt, index) if upper is None else upper
    arguments = {"rows": rows, "index": index, "rng_state": rng_state, **as_arguments(upper)}
    given, expected = (
        poisoned_results(fmt, mn, k, device, extra_rows, last_padding, batch_shape)
        for device in (x.device.type, "cpu")
    )
    results = quantize(x, fmt, **arguments, out=given)
    assert len(results) == len(given)
    assert all(result is own for result, own in zip(results, given, strict=True))
    expect(expected, x, fmt, rows, index, upper, rng_state=rng_state)
    for actual, wanted in zip(given[::2], expected[::2], strict=True):
        assert_same_bits(actual, wanted)
    q, sf = given[:2]
    torch.testing.assert_close(storage_bits(sf), storage_bits(expected[1]), rtol=0, atol=0)
    own = quantize(x, fmt, **arguments)
    assert own[0].shape == (*batch_shape, mn, q.shape[-1]) and own[0].is_contiguous()
    assert own[0].dtype is fmt.values
    assert own[1].shape == sf.shape and own[1].stride() == sf.stride()
    if not isinstance(rows, Masked):
        assert_same_bits(own[0], q[..., :mn, :])
        for actual, wanted in zip(own[1:], given[1:], strict=True):
            assert_same_bits(actual, wanted)
    return given


def assert_quantized_as(
    q: torch.Tensor,
    sf: torch.Tensor,
    fmt: Format,
    bounds: Bounds,
    rows: Rows | None = None,
    index: torch.Tensor | None = None,
    share: float = DIFFERING_SHARE,
    upper: UpperScale | None = None,
    row_scales: torch.Tensor | None = None,
) -> None:
    """Check every byte: on the CPU exactly, on a GPU as :func:`assert_quantized_within`.

    No more than a `share` of the values may differ.
    """
    if q.is_cpu:
        bounds = Bounds(*[bounds.values] * 3)
    count = assert_quantized_within(q, sf, fmt, *bounds, rows, index, upper, row_scales)
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
    upper: UpperScale | None = None,
    row_scales: torch.Tensor | None = None,
) -> int:
    """Check the results of a kernel that computes the values only to within `low` and `high`.

    Each scale lies between those of the least and the largest amax that its group may have, and the
    scale of a row between those of its amax. Each value lies between what the two ends become under
    the scale that is stored. All other bytes, padding and those of rows that do not exist, are the
    oracle's.

    Args:
        q, sf: of `poisoned_values` and `poisoned_scales`, on any device, with or without more rows
            and the last column's padding.
        values, low, high: (..., mn, k) or with an index (T, k), on the CPU; rounded to float32,
            and so Inf beyond it. Where one is NaN all are.
        rows, index: on the CPU.
        upper: the scale over e4m3 scales, if the call took one.
        row_scales: of poison as q and sf, if the format has one for each row.

    Returns:
        How many values of q, and bytes of sf if its scales are bytes or powers of two, differ from
        those of `values`. Other scales do where the last bit of an amax does.
    """
    values, low, high = values.float(), low.float(), high.float()
    magnitudes = low.abs(), high.abs()
    least = torch.minimum(*magnitudes).where((low < 0) == (high < 0), 0.0)
    least, most = least.where(~low.isnan(), torch.nan), torch.maximum(*magnitudes)
    given = [q, sf, *([] if row_scales is None else [row_scales])]
    expected = _expected_in_poison(values, given, fmt, rows, index, upper, values)
    # A larger amax of a row makes its groups' scales smaller, but not that of zeros or Inf.
    amax_of_rows = (values,) if row_scales is None else (least, most)
    ends = [
        _expected_in_poison(x, given, fmt, rows, index, upper, scaled_as)
        for x, scaled_as in itertools.product((least, most), amax_of_rows)
    ]
    _assert_between("scales", sf, [end[1] for end in ends], fmt.byte_scales)
    if row_scales is not None:
        _assert_between("row scales", row_scales, [end[2] for end in ends], False)

    leading = (low if index is None else index).shape[: -1 if index is not None else -2]
    batch = math.prod(leading)
    k, mn = low.shape[-1], low.shape[-2] if index is None else index.shape[-1]
    low, high = (t.reshape(-1, k) for t in (low, high))
    sources = torch.from_numpy(oracle.live_rows(rows, index, batch, mn, len(low)))
    live = sources >= 0
    low, high = (torch.cat([t, t.new_zeros(1, k)])[sources] for t in (low, high))
    scales = torch.from_numpy(oracle.stored_scales(sf, fmt, batch, mn, k)).float()
    if fmt.power_of_two:
        mantissas = torch.frexp(scales[live])[0].nan_to_num(0.5)
        assert (mantissas == 0.5).all(), "scales: not powers of two"
    if row_scales is not None:
        scales = scales * row_scales.cpu().reshape(batch, mn, 1)
    elif upper is not None:
        scales = scales * torch.from_numpy(oracle.forms_of(upper).decode).float()
    size = k if fmt.group_size == -1 else fmt.group_size
    scales = scales.repeat_interleave(max(size, 1), 2)[..., :k]
    codes, expected_codes = (_codes(t, fmt).view(batch, -1, k) for t in (q, expected[0]))
    actual = torch.from_numpy(oracle.values_of(codes[:, :mn].numpy(), fmt.values)).float()
    ends = _rounded(low, scales, fmt), actual, _rounded(high, scales, fmt)
    nan = codes[:, :mn] == fmt.value_type.nan_byte
    inside = nan.where(scales.isnan(), (ends[0] <= ends[1]) & (ends[1] <= ends[2]))
    wrong = (~inside & live.unsqueeze(2)).nonzero().tolist()
    assert not wrong, f"q: {tuple(end[tuple(wrong[0])].item() for end in ends)} at {wrong[0]}"
    differs = codes != expected_codes
    dead = torch.ones(differs.shape[:2], dtype=torch.bool)
    dead[:, :mn] = ~live
    assert not differs[dead].any(), "q: a row that does not exist"
    count = int(differs.sum())
    if fmt.power_of_two or fmt.byte_scales:
        count += int((storage_bits(sf) != storage_bits(expected[1])).sum())
    return count


def _assert_between(
    name: str, stored: torch.Tensor, ends: list[torch.Tensor], in_bytes: bool
) -> None:
    """Check the whole storages of scales, positive numbers whose order is that of their bytes."""
    kind = torch.uint8 if in_bytes else torch.float32
    stored, *ends = (storage_bits(t).view(kind) for t in (stored, *ends))
    if not in_bytes:
        assert not stored.isinf().any()
        stored, *ends = (t.nan_to_num(math.inf) for t in (stored, *ends))
    low, high = torch.stack(ends).aminmax(dim=0)
    outside = ((stored < low) | (stored > high)).nonzero().flatten()
    assert not len(outside), f"{name}: {stored[outside[0]]} at {outside[0]} of the storage"


def _expected_in_poison(
    x: torch.Tensor,
    given: list[torch.Tensor],
    fmt: Format,
    rows: Rows | None,
    index: torch.Tensor | None,
    upper: UpperScale | None,
    scaled_as: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """Return the oracle's results for `x` in poisoned memory that looks like what is `given`.

    Args:
        scaled_as: whose rows have the scales of rows.
    """
    q, sf, *row_scales = given
    expected_q = poisoned(q.numel(), "cpu").view(fmt.values).view(q.shape)
    storage = poisoned(sf.untyped_storage().nbytes(), "cpu").view(fmt.sf_dtype)
    expected_sf = storage.as_strided(sf.shape, sf.stride(), sf.storage_offset())
    further = [poisoned_row_scales(tuple(t.shape), "cpu") for t in row_scales]
    results = (expected_q, expected_sf, *further)
    expect(results, x, fmt, rows, index, upper, scaled_as)
    return results


def _codes(q: torch.Tensor, fmt: Format) -> torch.Tensor:
    """Return the codes of values (..., k), each in a byte."""
    content = q.cpu().view(torch.uint8).contiguous().numpy()
    return torch.from_numpy(oracle.unpacked(content, fmt.values))


def _rounded(values: torch.Tensor, scales: torch.Tensor, fmt: Format) -> torch.Tensor:
    """Return float32 `values` divided by `scales` and rounded to values of `fmt`, saturated.

    Under a scale of 0 they are 0.
    """
    limit = fmt.value_type.max
    scaled = (values * (1.0 / scales).where(scales != 0, 0.0)).clamp(-limit, limit)
    if fmt.values is INT8:
        return scaled.round()
    if fmt.values is not E2M1:
        return scaled.to(fmt.values).float()
    table = oracle.TABLES[E2M1]
    magnitudes = table[oracle.nearest(scaled.abs().nan_to_num(0.0).double().numpy(), table)]
    return torch.from_numpy(magnitudes).float().copysign(scaled).where(~scaled.isnan(), torch.nan)


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
