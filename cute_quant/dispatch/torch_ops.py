"""The operators that torch knows: their schemas, and what they return for fake tensors."""

from __future__ import annotations

import torch

from cute_quant.contract import checks
from cute_quant.contract.checks import Call
from cute_quant.contract.formats import make_format
from cute_quant.contract.prologues import RmsNorm, SiluMul, make_rms_norm, make_silu_mul
from cute_quant.contract.rows import Rows, from_operands
from cute_quant.dispatch import execution

_CHOICES = "int group_size, str scale_format, ScalarType dtype, bool round_scale, float min_scale"
_ROWS = 'str rows="dense", Tensor? row_data=None, int alignment=1, Tensor? index=None'


def not_differentiable(function: str, name: str) -> str:
    """What to say of an argument that requires a gradient."""
    return (
        f"{name}: expected a tensor that requires no gradient, since {function} is not "
        "differentiable; got one that does: detach it or call under torch.no_grad()"
    )


def empty_values(x: torch.Tensor, call: Call) -> torch.Tensor:
    """Values for the result of a call, real or fake as x is."""
    return x.new_empty((*call.batch_shape, call.mn, call.k), dtype=call.fmt.dtype)


def as_stored(sf: torch.Tensor) -> torch.Tensor:
    """Scales as an operator that writes takes or returns them: float8_e8m0fnu, which Inductor
    cannot hand to it or have of it, as bytes."""
    return sf.view(torch.uint8) if sf.dtype is torch.float8_e8m0fnu else sf


def _rows_of(
    rows: str = "dense",
    row_data: torch.Tensor | None = None,
    alignment: int = 1,
    index: torch.Tensor | None = None,
) -> tuple[Rows | None, torch.Tensor | None]:
    return from_operands(rows, row_data, alignment), index


def _typed(sf: torch.Tensor, choices: tuple) -> torch.Tensor:
    """Scales that came as bytes, in the dtype of their format."""
    group_size, scale_format, dtype, round_scale = choices[:4]
    fmt = make_format(group_size, scale_format, round_scale, dtype)
    as_bytes = sf.dtype is torch.uint8 and fmt.scale_dtype is torch.float8_e8m0fnu
    return sf.view(fmt.scale_dtype) if as_bytes else sf


def _fake_results(x: torch.Tensor, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    fmt, batch_shape, mn, k = call
    # Not `empty_scales`: its storage, which a fake has none of, depends on mn % 4.
    shape = fmt.scale_shape(batch_shape, mn, k)
    if fmt.mn_major:
        strides = fmt.scale_strides(batch_shape, mn, k)
        sf = x.new_empty_strided(shape, strides, dtype=fmt.scale_dtype)
    else:
        sf = x.new_empty(shape, dtype=fmt.scale_dtype)
    return empty_values(x, call), sf


@torch.library.custom_op(
    "cute_quant::quantize",
    mutates_args=(),
    schema=f"(Tensor x, {_CHOICES}, {_ROWS}) -> (Tensor, Tensor)",
)
def _quantize_op(x: torch.Tensor, *operands: object) -> tuple[torch.Tensor, torch.Tensor]:
    return execution.quantize(x, None, None, operands[:5], *_rows_of(*operands[5:]))


@_quantize_op.register_fake
def _(x: torch.Tensor, *operands: object) -> tuple[torch.Tensor, torch.Tensor]:
    call = checks.check_call(x, None, None, operands[:5], *_rows_of(*operands[5:]))
    return _fake_results(x, call)


@torch.library.custom_op(
    "cute_quant::quantize_out",
    mutates_args=("q", "sf"),
    schema=f"(Tensor x, Tensor(a!) q, Tensor(b!) sf, {_CHOICES}, {_ROWS}) -> ()",
)
def _quantize_out_op(x: torch.Tensor, q: torch.Tensor, sf: torch.Tensor, *operands: object) -> None:
    execution.quantize(x, q, _typed(sf, operands), operands[:5], *_rows_of(*operands[5:]))


@_quantize_out_op.register_fake
def _(x: torch.Tensor, q: torch.Tensor, sf: torch.Tensor, *operands: object) -> None:
    checks.check_call(x, q, _typed(sf, operands), operands[:5], *_rows_of(*operands[5:]))


_SILU_MUL = "bool interleaved, float? clamp, float alpha, float beta, str rounding, Tensor? weight"


def _silu_mul_call(operands: tuple) -> tuple[tuple, Rows | None, torch.Tensor | None, SiluMul]:
    """Choices, rows, index and prologue of the operands after the tensors."""
    return operands[:5], *_rows_of(*operands[11:]), make_silu_mul(*operands[5:11])


@torch.library.custom_op(
    "cute_quant::silu_mul_quantize",
    mutates_args=(),
    schema=f"(Tensor gate_up, {_CHOICES}, {_SILU_MUL}, {_ROWS}) -> (Tensor, Tensor)",
)
def _silu_mul_quantize_op(
    gate_up: torch.Tensor, *operands: object
) -> tuple[torch.Tensor, torch.Tensor]:
    choices, rows, index, prologue = _silu_mul_call(operands)
    return execution.quantize(gate_up, None, None, choices, rows, index, prologue=prologue)


@_silu_mul_quantize_op.register_fake
def _(gate_up: torch.Tensor, *operands: object) -> tuple[torch.Tensor, torch.Tensor]:
    return _fake_results(gate_up, checks.check_call(gate_up, None, None, *_silu_mul_call(operands)))


@torch.library.custom_op(
    "cute_quant::silu_mul_quantize_out",
    mutates_args=("q", "sf"),
    schema=f"(Tensor gate_up, Tensor(a!) q, Tensor(b!) sf, {_CHOICES}, {_SILU_MUL}, {_ROWS}) -> ()",
)
def _silu_mul_quantize_out_op(
    gate_up: torch.Tensor, q: torch.Tensor, sf: torch.Tensor, *operands: object
) -> None:
    choices, rows, index, prologue = _silu_mul_call(operands)
    sf = _typed(sf, choices)
    execution.quantize(gate_up, q, sf, choices, rows, index, prologue=prologue)


@_silu_mul_quantize_out_op.register_fake
def _(gate_up: torch.Tensor, q: torch.Tensor, sf: torch.Tensor, *operands: object) -> None:
    checks.check_call(gate_up, q, _typed(sf, operands), *_silu_mul_call(operands))


_RMS_NORM = (
    "Tensor x, Tensor weight, Tensor? residual, Tensor(a!)? residual_out, Tensor(b!)? normalized"
)
_RMS_NORM_OPTIONS = "float eps, float weight_offset, str rounding"


def _rms_norm_call(
    weight: torch.Tensor,
    residual: torch.Tensor | None,
    residual_out: torch.Tensor | None,
    normalized: torch.Tensor | None,
    operands: tuple,
) -> tuple[tuple, Rows | None, torch.Tensor | None, RmsNorm]:
    """Choices, rows, index and prologue. Without a `residual`, `residual_out` is the residual, to
    be updated in place: what is written must not be an argument twice."""
    if residual is None:
        residual = residual_out
    elif residual is residual_out:
        raise ValueError("residual: expected None where residual_out is updated in place, got both")
    elif residual_out is None:
        raise ValueError(
            "residual_out: expected a tensor with a residual, which is only read, got None"
        )
    options = *operands[5:8], residual, residual_out, normalized
    return operands[:5], *_rows_of(*operands[8:]), make_rms_norm(weight, *options)


@torch.library.custom_op(
    "cute_quant::rms_norm_quantize",
    mutates_args=("residual_out", "normalized"),
    schema=f"({_RMS_NORM}, {_CHOICES}, {_RMS_NORM_OPTIONS}, {_ROWS}) -> (Tensor, Tensor)",
)
def _rms_norm_quantize_op(
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor | None,
    residual_out: torch.Tensor | None,
    normalized: torch.Tensor | None,
    *operands: object,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns q and sf, float8_e8m0fnu as bytes."""
    choices, rows, index, prologue = _rms_norm_call(
        weight, residual, residual_out, normalized, operands
    )
    q, sf = execution.quantize(x, None, None, choices, rows, index, prologue=prologue)
    return q, as_stored(sf)


@_rms_norm_quantize_op.register_fake
def _(
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor | None,
    residual_out: torch.Tensor | None,
    normalized: torch.Tensor | None,
    *operands: object,
) -> tuple[torch.Tensor, torch.Tensor]:
    call = _rms_norm_call(weight, residual, residual_out, normalized, operands)
    q, sf = _fake_results(x, checks.check_call(x, None, None, *call))
    return q, as_stored(sf)


@torch.library.custom_op(
    "cute_quant::rms_norm_quantize_out",
    mutates_args=("residual_out", "normalized", "q", "sf"),
    schema=f"({_RMS_NORM}, Tensor(c!) q, Tensor(d!) sf, {_CHOICES}, {_RMS_NORM_OPTIONS}, {_ROWS})"
    " -> ()",
)
def _rms_norm_quantize_out_op(
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor | None,
    residual_out: torch.Tensor | None,
    normalized: torch.Tensor | None,
    q: torch.Tensor,
    sf: torch.Tensor,
    *operands: object,
) -> None:
    choices, rows, index, prologue = _rms_norm_call(
        weight, residual, residual_out, normalized, operands
    )
    execution.quantize(x, q, _typed(sf, choices), choices, rows, index, prologue=prologue)


@_rms_norm_quantize_out_op.register_fake
def _(
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor | None,
    residual_out: torch.Tensor | None,
    normalized: torch.Tensor | None,
    q: torch.Tensor,
    sf: torch.Tensor,
    *operands: object,
) -> None:
    call = _rms_norm_call(weight, residual, residual_out, normalized, operands)
    checks.check_call(x, q, _typed(sf, operands), *call)


@torch.library.custom_op(
    "cute_quant::dequantize",
    mutates_args=(),
    schema="(Tensor q, Tensor sf, int group_size, ScalarType dtype) -> Tensor",
)
def _dequantize_op(
    q: torch.Tensor, sf: torch.Tensor, group_size: int, dtype: torch.dtype
) -> torch.Tensor:
    return execution.dequantize(q, sf, group_size, dtype)


@_dequantize_op.register_fake
def _(q: torch.Tensor, sf: torch.Tensor, group_size: int, dtype: torch.dtype) -> torch.Tensor:
    checks.check_dequantize_call(q, sf, group_size, dtype)
    return q.new_empty(q.shape, dtype=dtype)


@torch.library.custom_op(
    "cute_quant::fake_quantize",
    mutates_args=(),
    schema=f"(Tensor x, {_CHOICES}) -> Tensor",
)
def _fake_quantize_op(x: torch.Tensor, *choices: object) -> torch.Tensor:
    return execution.fake_quantize(x, None, choices)


@_fake_quantize_op.register_fake
def _(x: torch.Tensor, *choices: object) -> torch.Tensor:
    checks.check_fake_call(x, None, choices)
    return x.new_empty(x.shape)


def _refuse_gradients(operator: torch.library.CustomOpDef, function: str, name: str) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError(not_differentiable(function, name))

    operator.register_autograd(refuse, setup_context=refuse)


_refuse_gradients(_quantize_op, "quantize", "x")
_refuse_gradients(_silu_mul_quantize_op, "silu_mul_quantize", "gate_up and weight")
_refuse_gradients(_dequantize_op, "dequantize", "q and sf")
_refuse_gradients(_fake_quantize_op, "fake_quantize", "x")
