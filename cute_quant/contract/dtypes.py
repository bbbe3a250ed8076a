"""Dtypes of inputs, values and scales, and the constants of the contract. Needs torch alone."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeGuard, TypeVar

import torch

INPUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

E4M3_MAX = 448.0
E5M2_MAX = 57344.0
E2M1_MAX = 6.0
INT8_MAX = 127.0
"""int8 is symmetric: -128 is not used."""
BELOW_HALF = 0.5 - 2.0**-25
"""The largest float32 below a half. Added before truncation it rounds halves, and no less, up."""

FLOAT32_MAX = (2 - 2.0**-23) * 2.0**127
FLOAT32_MANTISSA_BITS = 23
FLOAT32_BIAS = 127
SMALLEST_NORMAL = 2.0**-126
UE8M0_BIAS = 127
UE8M0_MAX = 254
UE8M0_NAN = 255
SMALLEST_UE8M0 = 0x00400000
"""Bits of 2^-127, the byte 0 and the only UE8M0 scale that is a subnormal float32."""
NOT_A_POWER_OF_TWO = 0x807FFFFF
"""Bits of a float32 that are 0 in 0, in normal powers of two and in Inf."""
E4M3_NAN = 0x7F

LOAD_BYTES = 32
STORE_BYTES = 16
"""Bytes that a thread of a GPU loads of x and stores of q at once."""

BYTES_PER_WORD = 4
SCALE_ROW_ALIGNMENT = 4
"""TMA's 16 bytes in words: a column of MN-major scales starts at a multiple of this many rows. The
rows between a masked expert's count and the next multiple are its padding."""

BLOCK_GROUPS = 4
BLOCK_LANES = 32
"""Most rows of a block whose scales are a constant distance apart; those of the block's other rows
lie between."""

BLOCK_SIZES = (32, 128)
"""Rows, and columns, of a square block of weights."""
SOURCE_BLOCK = 128
"""Those of the blocks of FP8 checkpoints, as most of them are."""
SOURCE_DTYPE = torch.float8_e4m3fn
"""The dtype of their values."""


class ValueType(NamedTuple):
    """Facts about a dtype of values.

    Attributes:
        max: the largest finite value, to which the amax of a group is scaled.
        nan_byte: the byte of every value in a group that is not finite.
        mantissa_bits: of a normal value; integers count as values without an exponent.
        min_exponent: of the smallest normal value, or of the first above all integers. Below it
            values lie as far apart as above.
        per_byte: values in a byte, the earlier one in the low bits.
    """

    max: float
    nan_byte: int
    mantissa_bits: int
    min_exponent: int
    per_byte: int = 1

    @property
    def fraction_bits(self) -> int:
        """Return the mantissa bits of a float32 that a value has no place for."""
        return FLOAT32_MANTISSA_BITS - self.mantissa_bits

    @property
    def max_exponent(self) -> int:
        """Return the exponent p of max = 1.f * 2^p."""
        return math.frexp(self.max)[1] - 1

    @property
    def max_mantissa(self) -> int:
        """Return the fraction f of max = 1.f * 2^p, as the mantissa bits of a float32."""
        return int((self.max / 2.0**self.max_exponent - 1.0) * 2**FLOAT32_MANTISSA_BITS)


VALUE_TYPES = {
    torch.float8_e4m3fn: ValueType(E4M3_MAX, 0x7F, 3, -6),
    torch.float8_e5m2: ValueType(E5M2_MAX, 0x7F, 2, -14),
    torch.int8: ValueType(INT8_MAX, 0, 7, 7),
    torch.float4_e2m1fn_x2: ValueType(E2M1_MAX, 0, 1, 0, per_byte=2),
}

VLLM_MIN_SCALE = 1e-10
VLLM_ZERO_MULTIPLIER = 1e-8
"""Multiplier under a scale of 0 in vLLM's emulation of NVFP4."""
MAX_MIN_SCALE = 2.0**100
MIN_SCALES: dict[str, Callable[[float], float]] = {
    "vllm": lambda largest: VLLM_MIN_SCALE,
    "deepgemm": lambda largest: to_float32(1e-4) / largest,
    "sglang": lambda largest: to_float32(1e-10) / largest,
    "vllm_fused": lambda largest: 1.0 / (512.0 * largest),
    "torchao": lambda largest: to_float32(1e-12) / largest,
    "ocp": lambda largest: 0.0,
}
"""Lower bounds of scales as libraries have them, computed from the largest value of the dtype.
DeepGEMM, SGLang and torchao bound the amax, a float32, and divide it. vLLM's kernels for whole rows
and its fused ones bound the scale."""

NO_MIN_SCALE = "none"
E4M3_MIN_SCALES = {NO_MIN_SCALE: 0.0, "deepgemm": 2.0**-9, "torchao": 2.0**-6}
"""Lower bounds of e4m3 scales as libraries have them."""

MAX_UPPER_SCALE = 2.0**117
"""Bound of an upper scale and of its reciprocal, so that no step between them leaves the normal
numbers of float32."""
UPPER_MAX = E4M3_MAX * E2M1_MAX
"""2688, the largest product of a value and an e4m3 scale: the encode scale maps amax to it."""

Counts = TypeVar("Counts", int, torch.Tensor)
"""A count, or a tensor of counts."""


def to_float32(value: float) -> float:
    """Round `value` to float32, to nearest even, in plain Python arithmetic."""
    _, exponent = math.frexp(value)
    ulp = 2.0 ** max(exponent - 24, -149)
    return round(value / ulp) * ulp


def ceil_div(a: Counts, b: int) -> Counts:
    """Return a / b, rounded up."""
    return (a + b - 1) // b


def align(a: Counts, b: int) -> Counts:
    """Return `a` rounded up to a multiple of `b`."""
    return ceil_div(a, b) * b


def is_number(value: object) -> TypeGuard[float]:
    """Return whether an argument is a real number of any type; a bool is not."""
    # An exact float is found before the abstract class is asked, which takes longer.
    return isinstance(value, (float, numbers.Real)) and not isinstance(value, bool)


def describe(value: object) -> str:
    """Describe a wrong argument in a message, without a look into a tensor."""
    if isinstance(value, torch.Tensor):
        return f"a tensor of {dtype_name(value.dtype)}"
    plain = value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device))
    return repr(value) if plain else type(value).__name__


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype without that of its module."""
    return str(dtype).removeprefix("torch.")


def dtype_names(dtypes: Iterable[torch.dtype]) -> str:
    """Return the names of dtypes for a message."""
    return " or ".join(map(dtype_name, dtypes))
