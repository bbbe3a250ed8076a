"""Random calls within declared ranges, for the test that a warm-up leaves nothing to compile."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

import cute_quant as cq
from cute_quant.contract.rows import DENSE, Indexed, Masked, PrefixSum
from tests.fuzz.case import Kernel
from tests.fuzz.draw import Draw, powers_of_two

NUMBERS = {"clamp": 7.0, "alpha": 1.702, "beta": 1.0}
"""Of SwiGLU in ranges that have them."""

RANGES: dict[str, dict[str, Any]] = {
    "one size": {"k": 7168, "max_rows": 700},
    "batches": {"k": (512, 2048), "max_rows": 2500, "batched": True, "alignment": 16},
    "any k": {"fmt": cq.MXFP8, "k": (7, 100, 520, 1000), "max_rows": 300, "alignment": 4},
    "float32": {"fmt": cq.ROWWISE_INT8, "dtype": torch.float32, "k": (384, 6), "max_rows": 50},
    "experts": {
        "fmt": cq.DEEP_GEMM_SM90,
        "k": (1024, 1040),
        "max_rows": 3000,
        "rows": (None, Masked, PrefixSum, Indexed),
        "gathered": True,
        "batched": True,
        "alignment": 8,
    },
    "SwiGLU": {
        "operations": "silu_mul_quantize",
        "k": (2048, 24),
        "max_rows": 2000,
        "rows": (None, Masked, Indexed),
        "alignment": 16,
    },
    "gpt-oss": {
        "operations": "silu_mul_quantize",
        "dtype": torch.float16,
        "k": (512,),
        "max_rows": 100,
        "batched": True,
        "interleaved": True,
        "rounding": "unfused",
        "alignment": 4,
        **NUMBERS,
    },
    "norms": {
        "operations": "rms_norm_quantize",
        "k": (512, 4096, 1000),
        "max_rows": 300,
        "batched": True,
        # Weights are drawn anywhere.
        "alignment": 1,
        "weight_dtype": torch.float32,
    },
    "norms of groups": {
        "operations": "rms_norm_quantize",
        "dtype": torch.float32,
        "k": (1024,),
        "max_rows": 100,
        "rows": (None, PrefixSum, Masked),
        "gathered": True,
        "alignment": 1,
    },
    "NVFP4": {
        "fmt": cq.NVFP4,
        "k": (512, 72, 2048),
        "max_rows": 700,
        "batched": True,
        "alignment": 8,
        "upper_scale": "amax",
    },
    "MXFP4 experts": {
        "fmt": cq.MXFP4,
        "k": (512, 34),
        "max_rows": 600,
        "rows": (None, Masked, Indexed),
        "gathered": True,
        "alignment": 2,
    },
    "NVFP4 with scales of rows": {
        "operations": ("quantize", "silu_mul_quantize", "fake_quantize", "dequantize"),
        "fmt": cq.NVFP4.replace(row_scale=True),
        "k": (512, 4096),
        "max_rows": 300,
        "batched": True,
        "alignment": 16,
    },
    "NVFP4 there and back": {
        "operations": ("fake_quantize", "dequantize"),
        "fmt": cq.NVFP4,
        "k": (512, 24, 34),
        "max_rows": 600,
        "batched": True,
        "alignment": 16,
        "upper_scale": "decode_scale",
    },
    "there and back": {
        "operations": ("fake_quantize", "dequantize"),
        "k": (2048, 96, 33),
        "max_rows": 2200,
        "batched": True,
        "alignment": 2,
    },
    "weights": {
        "operations": ("quantize_blocks", "dequantize_blocks", "requantize_blocks"),
        "fmt": cq.DEEP_GEMM_SM90,
        "k": (512, 72),
        "max_rows": 700,
        "batched": True,
        "alignment": 4,
    },
    "one size of weights": {
        "operations": ("quantize_blocks", "dequantize_blocks", "requantize_blocks"),
        "fmt": cq.MXFP8,
        "dtype": torch.float32,
        "k": 304,
        "max_rows": 300,
    },
    "checkpoints in NVFP4": {
        "operations": "requantize_blocks",
        "fmt": cq.NVFP4,
        "k": (512, 72, 34),
        "max_rows": 500,
        "batched": True,
        "alignment": 2,
        "upper_scale": "amax",
    },
    "scales of experts": {
        "operations": "convert_scales",
        "fmt": cq.GROUPWISE_FP8.replace(round_scale=True),
        "to": cq.DEEP_GEMM,
        "k": (512, 1024),
        "max_rows": 600,
        "rows": (None, Masked, PrefixSum, Indexed),
        "batched": True,
        "alignment": 8,
    },
    "scales in blocks": {
        "operations": "convert_scales",
        "fmt": cq.MXFP8,
        "to": cq.MXFP8.replace(scale_layout="row_major"),
        "k": (512, 100, 40),
        "max_rows": 300,
        "batched": True,
        "alignment": 1,
    },
    "one size of scales": {
        "operations": "convert_scales",
        "fmt": cq.NVFP4.replace(scale_layout="row_major"),
        "to": cq.NVFP4,
        "k": 112,
        "max_rows": 300,
    },
}
"""Arguments of ``cute_quant.warm_up``, one range for each way to declare it."""

WEIGHTS = ("quantize_blocks", "dequantize_blocks", "requantize_blocks")

KERNELS = {"silu_mul_quantize": "silu_mul", "rms_norm_quantize": "rms_norm"}
"""Names of operations in cases."""


def draw_call(arguments: dict[str, Any], seed: object) -> Callable[[str], object]:
    """Draw a call in a range; return what makes it on a device."""
    generator = random.Random(f"{seed}")
    operations = arguments.get("operations", "quantize")
    operation = operations if isinstance(operations, str) else generator.choice(operations)
    k = generator.choice(arguments["k"]) if isinstance(arguments["k"], tuple) else arguments["k"]
    fmt, dtype = arguments.get("fmt", cq.DEEP_GEMM), arguments.get("dtype", torch.bfloat16)
    rows = generator.choice(arguments.get("rows", (None,)))
    if operation in WEIGHTS or operation == "convert_scales":
        draw_other = _draw_weights if operation in WEIGHTS else _draw_conversion
        return draw_other(arguments, operation, rows, k, generator)
    grouped = operation not in ("fake_quantize", "dequantize")
    gathered = grouped and generator.choice((False, arguments.get("gathered", False)))
    batched = arguments.get("batched", False) and rows is None and generator.random() < 0.5
    batched = batched or rows is Masked
    least = arguments.get("alignment", 32)
    result = dtype if operation == "fake_quantize" else fmt.values
    result_columns = k if operation == "fake_quantize" else fmt.value_columns(k)
    columns = 2 * k if operation == "silu_mul_quantize" else k
    loads = powers_of_two(max(least, dtype.itemsize), 32)
    stores = powers_of_two(max(min(least, 16), result.itemsize), 16)
    if generator.random() < 0.3:  # as contiguous rows are aligned
        loads = [math.gcd(32, columns * dtype.itemsize)]
        stores = [math.gcd(16, result_columns * result.itemsize)]
    kernel = Kernel(
        dtype,
        fmt,
        DENSE if rows is None else rows.kind,
        gathered,
        batched,
        generator.choice(loads),
        generator.choice(stores),
        k % 16 != 0,
        KERNELS.get(operation, operation),
        tuple(_options(arguments, operation, rows, gathered, generator).items()),
        _upper_scale(arguments, operation, fmt),
    )
    draw = Draw(kernel, seed)
    batch_shape, mn = _shape(arguments["max_rows"], batched, rows is Masked or gathered, generator)
    if operation == "dequantize":
        return _dequantize(draw, batch_shape, mn, k)
    case = draw.finish(batch_shape, mn, k)
    if operation == "silu_mul_quantize":
        case = replace(
            case, numbers={**_neutral(), **{n: arguments[n] for n in NUMBERS if n in arguments}}
        )

    def run(device: str) -> object:
        return case.call({name: arena.to(device) for name, arena in case.arenas().items()})

    return run


def _upper_scale(arguments: dict[str, Any], operation: str, fmt: cq.Format) -> str | None:
    """Return the argument that the upper scale of a call is given as."""
    if not fmt.upper_scale:
        return None
    if fmt.row_scale:
        return "decode_scale" if operation == "dequantize" else None
    return arguments.get("upper_scale", "encode_scale")


def _neutral() -> dict[str, Any]:
    return {"clamp": None, "alpha": 1.0, "beta": 0.0}


def _options(
    arguments: dict[str, Any], operation: str, rows: Any, gathered: bool, generator: random.Random
) -> dict[str, Any]:
    rounding = arguments.get("rounding", "fused")
    match operation:
        case "silu_mul_quantize":
            return {"interleaved": arguments.get("interleaved", False), "rounding": rounding}
        case "rms_norm_quantize":
            of_x = arguments.get("weight_dtype") is None
            plain = rows is None and not gathered
            return {
                "rounding": rounding,
                "weight_dtype": "x" if of_x else "float32",
                "residual": generator.choice([None, "in place", "elsewhere"]) if plain else None,
                "normalized": generator.choice([None, "given"]) if plain else None,
            }
    return {}


MOST_EXTRA_ROWS = 130
"""Rows that `Draw.finish` may add to q."""


def _shape(
    max_rows: int, batched: bool, one_dimension: bool, generator: random.Random
) -> tuple[tuple[int, ...], int]:
    """Draw leading dimensions and rows; small, large, and the limit itself."""
    most = generator.choice([1, 2, 5, 40, max_rows, max_rows])
    total = generator.randint(1, most)
    if not batched:
        return (), max(1, min(total, max_rows - MOST_EXTRA_ROWS)) if max_rows > 140 else 1
    matrices = generator.choice([1, 2, 3, 7])
    mn = max(1, min(total, max_rows - matrices * MOST_EXTRA_ROWS) // matrices)
    if matrices * (mn + MOST_EXTRA_ROWS) > max_rows:
        matrices, mn = 1, max(1, min(mn, max_rows - MOST_EXTRA_ROWS))
    shapes = [(matrices,)] if one_dimension else [(matrices,), (1, matrices), (matrices, 1)]
    return generator.choice(shapes), mn


def _dequantize(
    draw: Draw, batch_shape: tuple[int, ...], mn: int, k: int
) -> Callable[[str], object]:
    kernel = draw.kernel
    nbytes = draw.any_of(powers_of_two(kernel.load_bytes if kernel.load_bytes < 16 else 16, 16))
    columns = kernel.fmt.value_columns(k)
    place = draw.matrix(kernel.fmt.values, (*batch_shape, mn, columns), nbytes, True)
    shape = (*batch_shape, mn) if kernel.fmt.row_scale else draw.any_of([(), (1,), batch_shape])

    def run(device: str) -> object:
        q = place.view(torch.zeros(place.nbytes, dtype=torch.uint8, device=device))
        sf = kernel.fmt.empty_scales(batch_shape, mn, k, torch.device(device))
        upper = {} if kernel.upper is None else {kernel.upper: torch.ones(shape, device=device)}
        return cq.dequantize(q, sf, kernel.fmt, dtype=kernel.dtype, **upper)

    return run


def _draw_weights(
    arguments: dict[str, Any], operation: str, rows: Any, k: int, generator: random.Random
) -> Callable[[str], object]:
    """Draw a call on weights (..., n, k), of any strides that the range has."""
    fmt, dtype = arguments["fmt"], arguments.get("dtype", torch.bfloat16)
    least = arguments.get("alignment", 32)
    leading, n = _leading(arguments, rows, generator)
    by_row = fmt.value_type.per_byte > 1
    along_n = generator.random() < 0.5 and not (by_row and operation == "requantize_blocks")
    values_shape = (*leading, n, fmt.value_columns(k))
    back = operation == "dequantize_blocks"
    w_dtype = {"quantize_blocks": dtype, "requantize_blocks": torch.float8_e4m3fn}.get(
        operation, fmt.values
    )
    w_shape = values_shape if back else (*leading, k, n) if along_n else (*leading, n, k)
    draw_w = _draw_matrix(w_shape, w_dtype, least, generator)
    draw_q = _draw_matrix(values_shape, fmt.values, least, generator)
    block = generator.choice((32, 128)) if operation == "requantize_blocks" else fmt.group_size
    scales_shape = (*leading, -(-n // block), -(-k // block))

    def run(device: str) -> object:
        w, q = draw_w(device), draw_q(device)
        if back:
            sf = torch.zeros(scales_shape, device=device)
            if fmt.byte_scales:
                sf = cq.empty_scales(fmt, (*leading, n, k), device=device)
            return cq.dequantize_blocks(w, sf, fmt, dtype=dtype)
        w = w.mT if along_n else w
        if operation == "quantize_blocks":
            return cq.quantize_blocks(w, fmt, out=(q, None))
        kind = _upper_scale(arguments, operation, fmt)
        upper = {} if kind is None else {kind: torch.ones((), device=device)}
        sf = torch.zeros(scales_shape, device=device)
        return cq.requantize_blocks(w, sf, fmt, out=(q, None), **upper)

    return run


def _draw_conversion(
    arguments: dict[str, Any], operation: str, rows: Any, k: int, generator: random.Random
) -> Callable[[str], object]:
    """Draw a conversion of scales, which may lie apart where they are row-major."""
    fmt, to = arguments["fmt"], arguments["to"]
    least = arguments.get("alignment", 32)
    leading, mn = _leading(arguments, rows, generator)
    if rows is Masked and not leading:
        leading = (1,)
    shape = (*leading, mn, k)
    row_major = fmt.scale_layout == "row_major"
    draw_sf = _draw_matrix(fmt.scale_shape(leading, mn, k), fmt.sf_dtype, least, generator)
    nbytes = max(least, to.sf_dtype.itemsize) * generator.randrange(4)

    def run(device: str) -> object:
        sf = draw_sf(device) if row_major else cq.empty_scales(fmt, shape, device=device)
        given = None
        if rows is not None:
            count = {Masked: leading, PrefixSum: (2,)}.get(rows, (mn,))
            given = rows(torch.zeros(count, dtype=torch.int32, device=device))
        new = cq.empty_scales(to, shape, device=device)
        memory = torch.zeros(nbytes + new.untyped_storage().nbytes(), dtype=torch.uint8)
        moved = memory.to(device)[nbytes:].view(to.sf_dtype)
        out = moved.as_strided(new.shape, new.stride(), moved.storage_offset())
        return cq.convert_scales(sf, fmt, to, shape, rows=given, out=out)

    return run


def _leading(
    arguments: dict[str, Any], rows: Any, generator: random.Random
) -> tuple[tuple[int, ...], int]:
    """Draw leading dimensions and rows."""
    most = generator.choice([1, 2, 5, 40, arguments["max_rows"]])
    total = generator.randint(1, most)
    batched = rows is Masked or (
        rows is None and arguments.get("batched", False) and generator.random() < 0.5
    )
    if not batched:
        return (), total
    matrices = generator.choice([size for size in (1, 2, 3) if size <= total])
    return (matrices,), total // matrices


def _draw_matrix(
    shape: tuple[int, ...], dtype: torch.dtype, least: int, generator: random.Random
) -> Callable[[str], torch.Tensor]:
    """Draw strides of zeros: contiguous, or rows at multiples of `least` bytes."""
    *leading, columns = shape
    unit = max(1, least // dtype.itemsize)
    row = -(-columns // unit) * unit + unit * generator.randrange(4)
    offset = unit * generator.randrange(4)
    contiguous = generator.random() < 0.4

    def make(device: str) -> torch.Tensor:
        nbytes = dtype.itemsize * (offset + math.prod(leading) * row)
        memory = torch.zeros(nbytes, dtype=torch.uint8, device=device).view(dtype)
        if contiguous:
            return memory[: math.prod(shape)].view(shape)
        return memory[offset:].view(*leading, row)[..., :columns]

    return make
