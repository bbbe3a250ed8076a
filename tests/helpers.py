"""What tests share: formats, poisoned outputs, bitwise comparison."""

import dataclasses
import itertools
import math
from collections.abc import Iterable

import torch

from cute_quant import quantize, reference
from cute_quant.formats import VALUE_DTYPE, Format, make_format, scale_floor
from cute_quant.rows import Rows, from_operands, to_operands

POISON = 0xA5

UE8M0 = make_format(128, "ue8m0", False)
FLOAT32 = make_format(128, "float32", False)
FLOAT32_ROUNDED = make_format(128, "float32", True)
FORMATS = (UE8M0, FLOAT32, FLOAT32_ROUNDED)

INPUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
EVERY_DTYPE = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)
EVERY_GROUP_SIZE = (16, 32, 64, 128, 256, -1)
EVERY_LAYOUT = (
    ("ue8m0", False),
    ("float32", False),
    ("float32", True),
    ("float32_row_major", False),
    ("float32_row_major", True),
    ("ue8m0_row_major", False),
    ("ue8m0_128x4", False),
)


def all_formats(
    dtypes: Iterable[torch.dtype] = EVERY_DTYPE, group_sizes: Iterable[int] = EVERY_GROUP_SIZE
) -> list[Format]:
    """Every combination that there is of these."""
    return [
        make_format(group_size, scale_format, round_scale, dtype)
        for dtype, group_size, (scale_format, round_scale) in itertools.product(
            dtypes, group_sizes, EVERY_LAYOUT
        )
        if scale_format != "ue8m0_128x4" or group_size == 32
    ]


def full_id(fmt: Format) -> str:
    """The name of a format of any dtype and group size."""
    dtype = str(fmt.dtype).removeprefix("torch.").removeprefix("float8_")
    return f"{dtype}-{format_id(fmt)}-{fmt.group_size}"


def format_id(fmt: Format) -> str:
    return fmt.scale_format + ("-rounded" if fmt.round_scale else "")


def format_arguments(fmt: Format) -> dict[str, object]:
    """The keywords of `quantize` that give this format."""
    return dataclasses.asdict(fmt)


def poisoned(nbytes: int, device: str) -> torch.Tensor:
    return torch.full((nbytes,), POISON, dtype=torch.uint8, device=device)


def poisoned_values(
    rows: int,
    k: int,
    device: str,
    dtype: torch.dtype = VALUE_DTYPE,
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
    """Scales in storage of their own, with or without the last column's padding rows."""
    shape = fmt.scale_shape(batch_shape, mn, k)
    strides = fmt.scale_strides(batch_shape, mn, k)
    size = math.prod(batch_shape) * fmt.scale_rows(mn) * fmt.columns(k)
    if not last_padding and size and fmt.mn_major:
        size -= fmt.scale_rows(mn) - mn
    storage = poisoned(fmt.scale_dtype.itemsize * size, device).view(fmt.scale_dtype)
    return storage.as_strided(shape, strides)


def bits(t: torch.Tensor) -> torch.Tensor:
    """The bytes of the tensor's elements, on the CPU."""
    return t.cpu().clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8)


def storage_bits(t: torch.Tensor) -> torch.Tensor:
    """The bytes of the tensor's whole storage, on the CPU."""
    return torch.empty(0, dtype=torch.uint8, device=t.device).set_(t.untyped_storage()).cpu()


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    torch.testing.assert_close(bits(actual), bits(expected), rtol=0, atol=0)


def check_against_reference(
    x: torch.Tensor,
    fmt: Format,
    min_scale: float = 1e-10,
    extra_rows: int = 0,
    last_padding: bool = True,
    rows: Rows | None = None,
    index: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize x on its device into poisoned memory; every byte must be the reference's."""
    *batch_shape, mn, k = x.shape if index is None else (*index.shape, x.shape[-1])
    batch_shape = tuple(batch_shape)
    (q, sf), (expected_q, expected_sf) = (
        (
            poisoned_values(mn + extra_rows, k, device, fmt.dtype, batch_shape),
            poisoned_scales(fmt, mn, k, device, last_padding, batch_shape),
        )
        for device in (x.device.type, "cpu")
    )
    choices = {"min_scale": min_scale, "rows": rows, "index": index, "out": (q, sf)}
    result = quantize(x, **format_arguments(fmt), **choices)
    assert result[0] is q and result[1] is sf
    reference.quantize_into(
        x.cpu(),
        expected_q,
        expected_sf,
        fmt,
        scale_floor(fmt, min_scale),
        on_device(rows, "cpu"),
        None if index is None else index.cpu(),
    )
    assert_same_bits(q, expected_q)
    torch.testing.assert_close(storage_bits(sf), storage_bits(expected_sf), rtol=0, atol=0)
    return q, sf


def on_device(rows: Rows | None, device: str) -> Rows | None:
    kind, data, alignment = to_operands(rows)
    return from_operands(kind, data if data is None else data.to(device), alignment)


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Every bit pattern is as likely as any other: subnormals, NaN and Inf come too."""
    generator = torch.Generator().manual_seed(seed)
    bits = {2: 16, 4: 32}[dtype.itemsize]
    integer = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    half = 2 ** (bits - 1)
    return torch.randint(-half, half, shape, generator=generator, dtype=integer).view(dtype)
