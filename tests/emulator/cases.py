"""What the emulated quantizer is run on, and the comparison of every byte with the reference."""

from __future__ import annotations

import torch

from cute_quant import reference
from cute_quant.formats import (
    DEFAULT_MIN_SCALE,
    RECIPROCAL_FLOAT32,
    VALUE_DTYPE,
    make_format,
    scale_floor,
)
from tests.emulator.quantizer import Kernel
from tests.helpers import FORMATS, POISON, poisoned_scales, random_bits, storage_bits

ARCHITECTURES = ("sm_100a", "sm_90a")
DTYPES = (torch.bfloat16, torch.float16)
EVERY_FORMAT = (*FORMATS, make_format(128, RECIPROCAL_FLOAT32, False))
GROUP = 128


def special_groups(mn: int, k: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """An input whose groups take turns at everything that needs care, from random bits."""
    x = random_bits((mn, k), dtype, seed)
    bits = x.view(torch.int16)
    infinity = torch.tensor(torch.inf, dtype=dtype).view(torch.int16).item()
    one = torch.tensor(1.0, dtype=dtype).view(torch.int16).item()
    generator = torch.Generator().manual_seed(seed)
    groups = bits.view(mn, k // GROUP, GROUP)
    for row in range(mn):
        for column in range(k // GROUP):
            group = groups[row, column]
            at = torch.randint(GROUP, (1,), generator=generator).item()
            finite = torch.where((group & infinity) == infinity, group ^ infinity, group)
            match (row + column + seed) % 12:
                case 0:  # random bits, NaN and Inf among them
                    pass
                case 1:  # random finite values
                    group.copy_(finite)
                case 2:
                    group.zero_()
                case 3:
                    group.fill_(-(2**15))  # -0.0
                case 4:  # one NaN, any payload, either sign
                    payload = 1 + (group[at] & (32767 - infinity - 1))
                    group.copy_(finite)
                    group[at] = (infinity | payload) | (-(2**15) if at % 2 else 0)
                case 5:
                    group.copy_(finite)
                    group[at] = infinity
                case 6:
                    group.copy_(finite)
                    group[at] = infinity | -(2**15)
                case 7:  # subnormals: the exponent is cleared
                    group.bitwise_and_(~infinity)
                case 8:  # the largest finite value
                    group.copy_(finite)
                    group[at] = infinity - 1
                case 9:  # one binade, where every rounding counts: exponent of 1.0
                    group.bitwise_and_(~infinity).bitwise_or_(one & infinity)
                case 10:  # amax at or beside 448 · 2^n, where the scale steps
                    group.copy_(torch.full((GROUP,), one // 2, dtype=torch.int16))
                    top = torch.tensor(448.0, dtype=dtype).view(torch.int16).item()
                    group[at] = top + at % 3 - 1
                case 11:  # small against the floor
                    small = torch.randn(GROUP, generator=generator) * 1e-7
                    group.copy_(small.to(dtype).view(torch.int16))
    return x


def strided(rows: torch.Tensor, stride: int) -> torch.Tensor:
    """The same rows with a stride; what lies between them is poison."""
    mn, k = rows.shape
    storage = torch.full((mn * stride * rows.itemsize,), POISON, dtype=torch.uint8)
    result = storage.view(rows.dtype).as_strided((mn, k), (stride, 1))
    result.view(torch.int16).copy_(rows.view(torch.int16))
    return result


def poisoned_rows(rows: int, k: int, stride: int) -> torch.Tensor:
    storage = torch.full((rows * stride,), POISON, dtype=torch.uint8)
    return storage.view(VALUE_DTYPE).as_strided((rows, k), (stride, 1))


def check(
    kernel: Kernel,
    x: torch.Tensor,
    *,
    min_scale: float = DEFAULT_MIN_SCALE,
    extra_rows: int = 0,
    last_padding: bool = True,
    q_stride: int | None = None,
    **options,
) -> None:
    """Run the kernel into poisoned memory; every byte of it must be the reference's."""
    mn, k = x.shape
    fmt = kernel.fmt
    rows, stride = mn + extra_rows, q_stride or k
    results = [
        (poisoned_rows(rows, k, stride), poisoned_scales(fmt, mn, k, "cpu", last_padding))
        for _ in range(2)
    ]
    before = storage_bits(x).clone()
    floor = scale_floor(fmt, min_scale)
    kernel(x, *results[0], floor, **options)
    reference.quantize_into(x, *results[1], fmt, floor)
    for name, actual, expected in zip(("q", "sf"), *results, strict=True):
        differ = storage_bits(actual) != storage_bits(expected)
        if differ.any():
            at = int(differ.nonzero()[0])
            got, want = storage_bits(actual)[at], storage_bits(expected)[at]
            raise AssertionError(
                f"{name}: {int(differ.sum())} bytes differ from the reference, the first at byte "
                f"{at} of its storage: {got:#04x}, expected {want:#04x}"
            )
    assert torch.equal(storage_bits(x), before), "x was written"
