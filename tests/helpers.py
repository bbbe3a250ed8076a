"""What tests share: poisoned outputs, bitwise comparison, and an exact oracle in fractions."""

import itertools
import math
from fractions import Fraction

import torch

from cute_quant import quantize, reference
from cute_quant.formats import VALUE_DTYPE, Format, make_format, scale_floor

POISON = 0xA5

UE8M0 = make_format(128, "ue8m0", False)
FLOAT32 = make_format(128, "float32", False)
FLOAT32_ROUNDED = make_format(128, "float32", True)
FORMATS = (UE8M0, FLOAT32, FLOAT32_ROUNDED)


def format_id(fmt: Format) -> str:
    return fmt.scale_format + ("-rounded" if fmt.round_scale else "")


def poisoned(nbytes: int, device: str) -> torch.Tensor:
    return torch.full((nbytes,), POISON, dtype=torch.uint8, device=device)


def poisoned_values(rows: int, k: int, device: str) -> torch.Tensor:
    return poisoned(rows * k, device).view(VALUE_DTYPE).view(rows, k)


def poisoned_scales(
    fmt: Format, mn: int, k: int, device: str, last_padding: bool = True
) -> torch.Tensor:
    """Scales in storage of their own, with or without the last column's padding rows."""
    _, columns = fmt.scale_shape(mn, k)
    strides = fmt.scale_strides(mn)
    words = columns * strides[1] if last_padding else (columns - 1) * strides[1] + mn
    storage = poisoned(4 * words, device).view(fmt.scale_dtype)
    return storage.as_strided((mn, columns), strides)


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
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize x on its device into poisoned memory; every byte must be the reference's."""
    mn, k = x.shape
    device = x.device.type
    q = poisoned_values(mn + extra_rows, k, device)
    sf = poisoned_scales(fmt, mn, k, device, last_padding)
    expected_q = poisoned_values(mn + extra_rows, k, "cpu")
    expected_sf = poisoned_scales(fmt, mn, k, "cpu", last_padding)
    result = quantize(
        x,
        fmt.group_size,
        fmt.scale_format,
        round_scale=fmt.round_scale,
        min_scale=min_scale,
        out=(q, sf),
    )
    assert result[0] is q and result[1] is sf
    reference.quantize_into(x.cpu(), expected_q, expected_sf, fmt, scale_floor(fmt, min_scale))
    assert_same_bits(q, expected_q)
    torch.testing.assert_close(storage_bits(sf), storage_bits(expected_sf), rtol=0, atol=0)
    return q, sf


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Every bit pattern is as likely as any other: subnormals, NaN and Inf come too."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**15), 2**15, shape, generator=generator, dtype=torch.int16).view(dtype)


# An oracle that shares no line and no method with the package: exact rational arithmetic.


def _e4m3_values() -> list[tuple[Fraction, int]]:
    values = []
    for code in range(0x7F):
        exponent, mantissa = code >> 3, code & 7
        if exponent == 0:
            value = Fraction(mantissa, 8) * Fraction(2) ** -6
        else:
            value = (1 + Fraction(mantissa, 8)) * Fraction(2) ** (exponent - 7)
        values.append((value, code))
    return values


E4M3_VALUES = _e4m3_values()


def exact_e4m3(value: Fraction) -> int:
    """The code of the nearest e4m3 magnitude, ties to the even code, saturating."""
    below = max(code for magnitude, code in E4M3_VALUES if magnitude <= value)
    if below == 0x7E:
        return below
    low, high = E4M3_VALUES[below][0], E4M3_VALUES[below + 1][0]
    if value - low == high - value:
        return below + (below & 1)
    return below if value - low < high - value else below + 1


def exact_exponent(group: list[float], min_scale: float) -> int:
    """The UE8M0 byte: by search for the smallest power of two, not by logarithm."""
    if not all(map(math.isfinite, group)):
        return 255
    target = max(Fraction(max(map(abs, group))) / 448, Fraction(min_scale))
    return next(e for e in itertools.count() if Fraction(2) ** (e - 127) >= target)


def exact_group(group: list[float], min_scale: float = 0.0) -> tuple[list[int], int]:
    """e4m3 codes and UE8M0 byte of one group."""
    exponent = exact_exponent(group, min_scale)
    if exponent == 255:
        return [0x7F] * len(group), exponent
    scale = Fraction(2) ** (exponent - 127)
    signs = [0x80 if math.copysign(1.0, v) < 0 else 0 for v in group]
    codes = [exact_e4m3(abs(Fraction(v)) / scale) for v in group]
    return [sign | code for sign, code in zip(signs, codes, strict=True)], exponent


def exact_float32(value: Fraction) -> Fraction:
    """The nearest normal float32, ties to even."""
    exponent = 0
    while value >= Fraction(2) ** (exponent + 1):
        exponent += 1
    while value < Fraction(2) ** exponent:
        exponent -= 1
    ulp = Fraction(2) ** (exponent - 23)
    return round(value / ulp) * ulp


def exact_float32_group(group: list[float], min_scale: float) -> tuple[list[int], float]:
    """e4m3 codes and float32 scale of one group of finite values."""
    amax = max(map(abs, map(Fraction, group)))
    quotient = exact_float32(amax / 448) if amax else Fraction(0)
    scale = max(quotient, Fraction(min_scale))
    reciprocal = exact_float32(1 / scale)
    codes = []
    for value in group:
        product = abs(Fraction(value)) * reciprocal
        magnitude = exact_e4m3(exact_float32(product)) if product else 0
        codes.append((0x80 if math.copysign(1.0, value) < 0 else 0) | magnitude)
    return codes, float(scale)
