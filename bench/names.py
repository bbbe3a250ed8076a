"""Names by which results are looked up. Nothing here needs more than Python."""

PLAIN, PDL = "plain", "pdl"
LAUNCHES = (PLAIN, PDL)
"""A plain launch waits for the one before it to end. With PDL, programmatic dependent launch, it
starts while that one runs and waits in its code."""

CUTE_QUANT, STREAM, COPY = "cute_quant", "stream", "copy_"
FLOAT16_INPUT, FLOAT32_SCALES = "cute_quant fp16", "cute_quant fp32 sf"

QUANTIZE_OUT = "quantize(x, out=(q, sf))"
QUANTIZE = "quantize(x)"
NORM = "rms_norm_quantize(x, weight, residual=r)"
OPERATOR, NORM_OPERATOR = (
    "torch.ops.cute_quant.quantize(x, ...)",
    "torch.ops.cute_quant.rms_norm_quantize_residual(x, ...)",
)
"""Operators, as compiled graphs call them."""
LAUNCH = "launch = bind(x, out=(q, sf)); launch()"
NEG = "torch.neg(x)"
EMPTY_LIKE = "torch.empty_like(x)"

SILU_MUL, RMS_NORM, ALONE = "silu_mul_quantize", "rms_norm_quantize", "quantize"
"""Operations, of which the last is what the first two end with."""

TRITON, COMPILED, TWO_KERNELS = "Triton", "torch.compile", "two kernels"
"""Beside an operation of ours: a Triton kernel, `torch.compile` of all of it, and of what comes
before the quantizer, which follows as a kernel of its own."""


def of_operation(operation: str, provider: str) -> str:
    """Return the name of a provider where there are several operations."""
    return f"{operation}: {provider}"
