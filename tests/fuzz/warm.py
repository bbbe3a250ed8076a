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
}
"""Arguments of ``cute_quant.warm_up``, one range for each way to declare it."""

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
