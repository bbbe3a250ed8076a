"""The choices that make a format: what there is, what fits together, and how they read as text."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from cute_quant.contract.dtypes import (
    E4M3_MAX,
    E4M3_MIN_SCALES,
    MAX_MIN_SCALE,
    MIN_SCALES,
    NO_MIN_SCALE,
    SMALLEST_NORMAL,
    UE8M0_BIAS,
    VALUE_TYPES,
    describe,
    dtype_name,
    dtype_names,
    is_number,
    to_float32,
)

WHOLE_ROW = -1
GROUP_SIZES = (16, 32, 64, 128, 256)
MAX_COLUMNS = 2**20
"""Columns of a result."""

MN_MAJOR = "mn_major"
MN_MAJOR_PACKED = "mn_major_packed"
ROW_MAJOR = "row_major"
ROW_MAJOR_PACKED = "row_major_packed"
BLOCKED = "128x4"
BLOCKED_8 = "8x4"
BLOCK_ROWS = {BLOCKED: 128, BLOCKED_8: 8}
"""Rows of a block, which holds the scale bytes of 4 groups in each. cuBLAS and CUTLASS read blocks
of 128 rows, TensorRT-LLM those of 8 where there are few rows."""
BLOCKED_GROUP_SIZES = {torch.float8_e8m0fnu: 32, torch.float8_e4m3fn: 16}
"""The one group size of scales in blocks, whose readers know MX formats and NVFP4 alone."""

_BYTE_LAYOUTS = (MN_MAJOR_PACKED, ROW_MAJOR, ROW_MAJOR_PACKED, BLOCKED, BLOCKED_8)
SCALE_LAYOUTS = {
    torch.float8_e8m0fnu: _BYTE_LAYOUTS,
    torch.float8_e4m3fn: _BYTE_LAYOUTS,
    torch.float32: (MN_MAJOR, ROW_MAJOR),
}
"""Layouts by the dtype of scales."""

E4M3_GROUP_SIZE = 16
"""The one group size under e4m3 scales, that of NVFP4."""

IEEE = "ieee"
VLLM, VLLM_EMULATION, FLASHINFER, TE, TORCHAO, DEEPGEMM = E4M3_LIBRARIES = (
    "vllm",
    "vllm_emulation",
    "flashinfer",
    "te",
    "torchao",
    "deepgemm",
)
"""Libraries that quantize to NVFP4."""
VLLM_TRITON, VLLM_BF16 = "vllm_triton", "vllm_bf16"
SGLANG, TILEKERNELS = "sglang", "tilekernels"
LIBRARIES = (*E4M3_LIBRARIES, VLLM_TRITON, VLLM_BF16, SGLANG, TILEKERNELS)
NUMERICS = (IEEE, *LIBRARIES)
"""How scales and values are computed: each operation rounded correctly, or as a library does."""
MX_GROUP_SIZE = 32
MX_LIBRARIES = {
    torch.float8_e4m3fn: (VLLM, FLASHINFER, TE, TORCHAO, DEEPGEMM),
    torch.float4_e2m1fn_x2: (VLLM, FLASHINFER, TORCHAO, DEEPGEMM),
}
"""Libraries that quantize to MX formats, by the dtype of values."""

QUOTIENT, PRODUCT, INVERTED = "amax / M", "amax * fl(1 / M)", "1 / (M / amax)"
BF16_PRODUCT = "bf16(amax * bf16(1 / M))"
"""Float32 scales for an amax, M being the largest value."""
DIVIDED, OF_SCALE, OF_AMAX = "x / scale", "1 / scale", "M / amax"
APPROXIMATE_OF_SCALE, APPROXIMATE_OF_AMAX = "rcp.approx(scale)", "M * rcp.approx(amax)"
BF16_OF_SCALE = "bf16(1 / scale)"
"""Multiplier of values under float32 scales, or that they are divided. Products with a multiplier
that is rounded to bf16 are, too."""


class Steps(NamedTuple):
    """How values are scaled in float32, each step rounded to nearest even."""

    scale: str
    multiplier: str

    @property
    def bounds_amax(self) -> bool:
        """Return whether the amax has a lower bound: that of the scale gives other bits."""
        return self.multiplier not in (OF_SCALE, DIVIDED)


FLOAT32_STEPS = {
    IEEE: Steps(QUOTIENT, OF_SCALE),
    VLLM: Steps(QUOTIENT, DIVIDED),
    VLLM_TRITON: Steps(PRODUCT, APPROXIMATE_OF_SCALE),
    VLLM_BF16: Steps(BF16_PRODUCT, BF16_OF_SCALE),
    SGLANG: Steps(PRODUCT, APPROXIMATE_OF_AMAX),
    TORCHAO: Steps(INVERTED, OF_AMAX),
    TILEKERNELS: Steps(QUOTIENT, OF_AMAX),
    DEEPGEMM: Steps(PRODUCT, OF_SCALE),
}
"""Steps to e4m3 values. `float32_steps` has those to other values and of whole rows."""
INT8_LIBRARIES = (VLLM, VLLM_TRITON, SGLANG, DEEPGEMM)
MIN_EXACT_SCALE = 2.0**-90
"""The least `min_scale` with numerics of a library: no step to it leaves the normal numbers."""

_SHORT_NAMES = {
    torch.float8_e4m3fn: "e4m3",
    torch.float8_e5m2: "e5m2",
    torch.float4_e2m1fn_x2: "e2m1",
    torch.int8: "int8",
    torch.float8_e8m0fnu: "e8m0",
    torch.float32: "float32",
}
_DTYPES = {name: dtype for dtype, name in _SHORT_NAMES.items()}
_ROW = "row"
"""The group size of whole rows in the text of a format."""
_SEPARATOR = ":"


class Choices(NamedTuple):
    """The fields of a format, by which it is found again."""

    values: torch.dtype
    group_size: int
    scale_dtype: torch.dtype
    scale_layout: str
    round_scale: bool = False
    min_scale: float | str | None = None
    numerics: str = IEEE
    row_scale: bool = False
    four_over_six: bool = False


_FLAGS = {name for name, default in Choices._field_defaults.items() if default is False}
"""Choices that stand in the text without a value."""


def check_choices(
    values: object, group_size: object, scale_dtype: object, scale_layout: object
) -> None:
    """Check the dtypes, the size of a group and the layout.

    Raises:
        TypeError, ValueError: one of them is not supported, or they contradict each other.
    """
    if not isinstance(values, torch.dtype) or values not in VALUE_TYPES:
        raise TypeError(
            f"values: expected one of {dtype_names(VALUE_TYPES)}, got {describe(values)}"
        )
    # 128.0 and True are equal to ints, and no group sizes.
    if type(group_size) is not int or group_size not in (*GROUP_SIZES, WHOLE_ROW):
        raise ValueError(
            f"group_size: expected one of {GROUP_SIZES} or {WHOLE_ROW} for the whole row, "
            f"got {describe(group_size)}"
        )
    if not isinstance(scale_dtype, torch.dtype) or scale_dtype not in SCALE_LAYOUTS:
        raise TypeError(
            f"scale_dtype: expected {dtype_names(SCALE_LAYOUTS)}, got {describe(scale_dtype)}"
        )
    layouts = SCALE_LAYOUTS[scale_dtype]
    if not isinstance(scale_layout, str) or scale_layout not in layouts:
        raise ValueError(
            f"scale_layout: expected one of {layouts} for {dtype_name(scale_dtype)} scales, "
            f"got {describe(scale_layout)}"
        )
    if scale_layout in BLOCK_ROWS and group_size != BLOCKED_GROUP_SIZES[scale_dtype]:
        raise ValueError(
            f"group_size: expected {BLOCKED_GROUP_SIZES[scale_dtype]} for {scale_layout=!s}, which "
            f"cuBLAS, CUTLASS and torch read for MX formats and NVFP4 alone, got {group_size!r}"
        )
    if scale_dtype is torch.float8_e4m3fn:
        if values is not torch.float4_e2m1fn_x2:
            raise ValueError(
                f"values: expected float4_e2m1fn_x2 for float8_e4m3fn scales, those of NVFP4, got "
                f"{dtype_name(values)}"
            )
        if group_size != E4M3_GROUP_SIZE:
            raise ValueError(
                f"group_size: expected {E4M3_GROUP_SIZE} for float8_e4m3fn scales, those of "
                f"NVFP4, got {group_size!r}"
            )


def check_upper_scale(
    scale_dtype: torch.dtype, numerics: str, row_scale: object, four_over_six: object
) -> None:
    """Check the choices that formats with a scale above the groups' have.

    Raises:
        TypeError, ValueError: a choice is not supported for scales of this dtype.
    """
    for name, choice in (("row_scale", row_scale), ("four_over_six", four_over_six)):
        if not isinstance(choice, bool):
            raise TypeError(f"{name}: expected a bool, got {describe(choice)}")
        if choice and scale_dtype is not torch.float8_e4m3fn:
            raise ValueError(
                f"{name}: expected False for {dtype_name(scale_dtype)} scales, over which there is "
                f"no other scale, got True"
            )
    if four_over_six and numerics != IEEE:
        raise ValueError(
            f"four_over_six: expected False for {numerics=!s}, which has one scale, got True"
        )


def known_numerics(
    values: torch.dtype, group_size: int, scale_dtype: torch.dtype, round_scale: bool
) -> tuple[str, ...]:
    """Return the numerics that there are for these choices."""
    if scale_dtype is torch.float8_e4m3fn:
        return (IEEE, *E4M3_LIBRARIES)
    if scale_dtype is torch.float8_e8m0fnu and group_size == MX_GROUP_SIZE:
        return (IEEE, *MX_LIBRARIES.get(values, ()))
    if scale_dtype is not torch.float32 or round_scale:
        return (IEEE, VLLM_BF16) if values is torch.float8_e4m3fn else (IEEE,)
    if values is torch.float8_e4m3fn:
        return tuple(FLOAT32_STEPS)
    if values is torch.int8:
        # Triton's kernel for whole rows is SGLang's.
        return (IEEE, *(n for n in INT8_LIBRARIES if n != VLLM_TRITON or group_size != WHOLE_ROW))
    return (IEEE, DEEPGEMM)


def float32_steps(values: torch.dtype, group_size: int, numerics: str) -> Steps:
    """Return the steps to values under float32 scales."""
    if numerics == VLLM and values is torch.int8:
        return Steps(QUOTIENT, OF_AMAX if group_size == WHOLE_ROW else OF_SCALE)
    if numerics == SGLANG and group_size == WHOLE_ROW and values is not torch.int8:
        return Steps(PRODUCT, APPROXIMATE_OF_SCALE)
    return FLOAT32_STEPS[numerics]


def truncates(values: torch.dtype, group_size: int, numerics: str) -> bool:
    """Return whether values are rounded towards zero, those of `adds_half` after that."""
    libraries = (SGLANG,) if group_size == WHOLE_ROW else (VLLM, VLLM_TRITON, SGLANG)
    return values is torch.int8 and numerics in libraries


def adds_half(values: torch.dtype, group_size: int, numerics: str) -> bool:
    """Return whether values are rounded to nearest, halves away from zero."""
    return values is torch.int8 and group_size == WHOLE_ROW and numerics == SGLANG


def zeros_have_zero(values: torch.dtype, group_size: int, numerics: str) -> bool:
    """Return whether the scale of zeros is 0, whatever the smallest one."""
    library = VLLM if values is torch.int8 else SGLANG
    eight_bits = values in (torch.int8, torch.float8_e4m3fn)
    return group_size == WHOLE_ROW and eight_bits and numerics == library


def check_numerics(
    values: torch.dtype,
    group_size: int,
    scale_dtype: torch.dtype,
    round_scale: object,
    numerics: object,
) -> None:
    """Check how scales are computed.

    Raises:
        TypeError, ValueError: a choice is not supported for scales of this dtype.
    """
    if not isinstance(round_scale, bool):
        raise TypeError(f"round_scale: expected a bool, got {describe(round_scale)}")
    if round_scale and scale_dtype is not torch.float32:
        raise ValueError(
            f"round_scale: expected False for {dtype_name(scale_dtype)} scales, which are "
            f"rounded anyway, got True"
        )
    known = known_numerics(values, group_size, scale_dtype, round_scale)
    if not isinstance(numerics, str) or numerics not in known:
        rounded = ", rounded to powers of two" if round_scale else ""
        raise ValueError(
            f"numerics: expected one of {known} for {dtype_name(values)} values in groups of "
            f"{group_size} under {dtype_name(scale_dtype)} scales{rounded}, "
            f"got {describe(numerics)}"
        )


def default_min_scale(values: torch.dtype, scale_dtype: torch.dtype, numerics: str) -> str:
    """Return the name of the smallest scale by default, which numerics of a library decide."""
    if scale_dtype is torch.float8_e4m3fn:
        return numerics if numerics in E4M3_MIN_SCALES else NO_MIN_SCALE
    if scale_dtype is torch.float8_e8m0fnu and numerics not in (IEEE, VLLM_BF16):
        return numerics if numerics == DEEPGEMM else "ocp"
    if numerics == VLLM:
        return SGLANG if values is torch.int8 else VLLM_FUSED
    return _FLOAT32_MIN_SCALES.get(numerics, VLLM)


VLLM_FUSED = "vllm_fused"
_FLOAT32_MIN_SCALES = {
    VLLM_TRITON: SGLANG,  # 1e-10 / M, too
    VLLM_BF16: SGLANG,
    SGLANG: SGLANG,
    TORCHAO: TORCHAO,
    TILEKERNELS: DEEPGEMM,
}


def scale_floor(
    min_scale: object,
    largest: float,
    scale_dtype: torch.dtype,
    power_of_two: bool,
    numerics: str,
    steps: Steps,
    default: str,
) -> int | float:
    """Return the smallest scale as kernels take it.

    It is `min_scale` rounded to float32, or to e4m3 if scales are. If scales are powers of two it
    is the UE8M0 byte of the smallest power of two that is not below that. Where steps bound the
    amax it is the amax of that scale.

    Args:
        min_scale: a number, the name of a library, or None for the default.
        largest: the largest finite value of the dtype of values.
        scale_dtype: float8_e8m0fnu, float8_e4m3fn or float32.
        power_of_two: whether scales are powers of two.
        numerics: one of ``NUMERICS``.
        steps: to values under float32 scales.
        default: as `default_min_scale` returns it.

    Raises:
        TypeError, ValueError: it is no number or name, or beyond what scales can be.
    """
    e4m3 = scale_dtype is torch.float8_e4m3fn
    bounds = E4M3_MIN_SCALES if e4m3 else {n: bound(largest) for n, bound in MIN_SCALES.items()}
    if min_scale is None:
        min_scale = default
    if isinstance(min_scale, str):
        if min_scale not in bounds:
            raise ValueError(
                f"min_scale: expected a number or one of {tuple(bounds)}, got {min_scale!r}"
            )
        value = bounds[min_scale]
    elif is_number(min_scale):
        value = min_scale
    else:
        raise TypeError(
            f"min_scale: expected a number or one of {tuple(bounds)}, got {describe(min_scale)}"
        )
    lowest = SMALLEST_NORMAL if scale_dtype is torch.float32 else 0.0
    if numerics == VLLM_BF16 or (lowest and numerics not in (IEEE, DEEPGEMM)):
        lowest = MIN_EXACT_SCALE
    highest = E4M3_MAX if e4m3 else MAX_MIN_SCALE
    if not lowest <= value <= highest:
        raise ValueError(
            f"min_scale: expected {lowest} <= min_scale <= {highest} for "
            f"{dtype_name(scale_dtype)} scales, got {min_scale!r}"
        )
    floor = to_float32(float(value) * largest if steps.bounds_amax else float(value))
    if e4m3:
        return torch.tensor(floor).to(scale_dtype).item()
    if not power_of_two:
        return floor
    if floor == 0.0:
        return 0
    mantissa, exponent = math.frexp(floor)
    return max(0, exponent - (mantissa == 0.5) + UE8M0_BIAS)


def choices_text(choices: Choices) -> str:
    """Return choices as text, such as ``e4m3:128:e8m0:mn_major_packed``."""
    size = _ROW if choices.group_size == WHOLE_ROW else str(choices.group_size)
    values, scales = _SHORT_NAMES[choices.values], _SHORT_NAMES[choices.scale_dtype]
    words = [values, size, scales, choices.scale_layout]
    for name, default in Choices._field_defaults.items():
        value = getattr(choices, name)
        if value != default:
            words.append(name if value is True else f"{name}={value}")
    return _SEPARATOR.join(words)


def parse_choices(text: str) -> dict[str, Any]:
    """Invert :func:`choices_text`.

    Raises:
        KeyError, ValueError: `text` is none of its results.
    """
    parts = text.split(_SEPARATOR)
    if len(parts) < 4:
        raise ValueError("values, group size, scales and layout are not all there")
    values, size, scales, layout, *options = parts
    choices: dict[str, Any] = {}
    for option in options:
        name, _, value = option.partition("=")
        if name in choices:
            raise ValueError(f"{name}: given twice")
        choices[name] = value
    for name in choices.keys() & _FLAGS:
        if name not in options:
            raise ValueError(f"{name}: expected no value")
        choices[name] = True
    if "min_scale" in choices and choices["min_scale"] not in {*MIN_SCALES, *E4M3_MIN_SCALES}:
        choices["min_scale"] = float(choices["min_scale"])
    group_size = WHOLE_ROW if size == _ROW else int(size)
    fields = {
        "values": _DTYPES[values],
        "group_size": group_size,
        "scale_dtype": _DTYPES[scales],
        "scale_layout": layout,
    }
    return fields | choices
