"""Operations bound to their memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cute_quant.contract.dtypes import describe
from cute_quant.contract.torch_private import outside_of_graphs
from cute_quant.dispatch import launch
from cute_quant.dispatch.launch import Launch
from cute_quant.ops.columns import (
    quantize_both,
    quantize_columns,
    silu_mul_backward_quantize_both,
    silu_mul_quantize_both,
)
from cute_quant.ops.rows import (
    dequantize,
    fake_quantize,
    quantize,
    rms_norm_quantize,
    silu_mul_backward_quantize,
    silu_mul_quantize,
)
from cute_quant.ops.scales import convert_scales
from cute_quant.ops.weights import dequantize_blocks, quantize_blocks, requantize_blocks


@outside_of_graphs
def bind(*args: Any, operation: Callable[..., Any] = quantize, **kwargs: Any) -> Launch:
    """Check a call once, and return its launch, for loops over the same memory.

    ``launch = bind(x, fmt, out=(q, sf))`` checks what ``quantize(x, fmt, out=(q, sf))`` does,
    compiles the kernel and allocates what `out` leaves out, but launches nothing. Each ``launch()``
    runs the operation on what the tensors hold then, on the current stream, without checks, and
    returns its results, the same tensors every time. It may be captured in a CUDA graph after a
    launch of it, or after :func:`warm_up`.

    The launch keeps its tensors. It does not see that one of them is resized, or given other
    storage. `check` reads counts once, here. Under ``torch.compile`` neither is traced.

    Args:
        *args: positional arguments of `operation`.
        **kwargs: keyword arguments of `operation`.
        operation: :func:`quantize`, :func:`silu_mul_quantize`,
            :func:`silu_mul_backward_quantize`, :func:`rms_norm_quantize`, :func:`dequantize`,
            :func:`fake_quantize`, :func:`quantize_blocks`, :func:`dequantize_blocks`,
            :func:`requantize_blocks`, :func:`quantize_columns`, :func:`quantize_both`,
            :func:`silu_mul_quantize_both`, :func:`silu_mul_backward_quantize_both` or
            :func:`convert_scales`.

    Returns:
        The launch: a callable whose ``results`` are what `operation` returns.

    Raises:
        TypeError: `operation` is none of them, its tensors have no memory, or as it raises itself.
        ValueError, RuntimeError: as `operation` raises them.
    """
    operations = (
        quantize,
        silu_mul_quantize,
        silu_mul_backward_quantize,
        rms_norm_quantize,
        dequantize,
        fake_quantize,
        quantize_blocks,
        dequantize_blocks,
        requantize_blocks,
        convert_scales,
        quantize_columns,
        quantize_both,
        silu_mul_quantize_both,
        silu_mul_backward_quantize_both,
    )
    if not any(operation is function for function in operations):
        names = ", ".join(function.__name__ for function in operations)
        raise TypeError(f"operation: expected one of {names}, got {describe(operation)}")
    return launch.bind(operation, *args, **kwargs)
