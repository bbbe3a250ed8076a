"""The operators that torch knows: their schemas, and what they return for fake tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch

from cute_quant import checks, execution
from cute_quant.checks import Call
from cute_quant.formats import make_format
from cute_quant.prologues import RmsNorm, SiluMul, make_rms_norm, make_silu_mul
from cute_quant.rows import Rows, from_operands

_library = torch.library.Library("cute_quant", "FRAGMENT")

_CHOICES = "int group_size, str scale_format, ScalarType dtype, bool round_scale, float min_scale"
_ROWS = 'str rows="dense", Tensor? row_data=None, int alignment=1, Tensor? index=None'


def not_differentiable(function: str, name: str) -> str:
    """What to say of an argument that requires a gradient."""
    return (
        f"{name}: expected a tensor that requires no gradient, since {function} is not "
        "differentiable; got one that does: detach it or call under torch.no_grad()"
    )


def _register(schema: str, run: Callable, fake: Callable) -> None:
    """Make an operator known to torch, which refuses gradients as soon as it is called.

    Not with `torch.library.custom_op`: it takes a millisecond of the import for each operator, and
    lets gradients of what one writes fail in the backward pass only.

    Args:
        fake: returns what `run` returns, for tensors without memory.
    """
    name = schema.split("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    operator = getattr(torch.ops.cute_quant, name).default

    def refuse_gradients(keys: torch.DispatchKeySet, *args: object) -> object:
        if torch.is_grad_enabled():
            for argument, t in zip(operator._schema.arguments, args, strict=False):
                if isinstance(t, torch.Tensor) and t.requires_grad:
                    function = name.removesuffix("_out")
                    raise RuntimeError(not_differentiable(function, argument.name))
        return operator.redispatch(keys & torch._C._after_autograd_keyset, *args)

    _library.impl(name, run, "CompositeExplicitAutograd")
    _library.impl(name, refuse_gradients, "Autograd", with_keyset=True)
    torch.library.register_fake(f"cute_quant::{name}", fake, lib=_library)


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


def _quantize(x: torch.Tensor, *operands: object) -> tuple[torch.Tensor, torch.Tensor]:
    return execution.quantize(x, None, None, operands[:5], *_rows_of(*operands[5:]))


def _quantize_fake(x: torch.Tensor, *operands: object) -> tuple[torch.Tensor, torch.Tensor]:
    call = checks.check_call(x, None, None, operands[:5], *_rows_of(*operands[5:]))
    return _fake_results(x, call)


_register(f"quantize(Tensor x, {_CHOICES}, {_ROWS}) -> (Tensor, Tensor)", _quantize, _quantize_fake)


def _quantize_out(x: torch.Tensor, q: torch.Tensor, sf: torch.Tensor, *operands: object) -> None:
    execution.quantize(x, q, _typed(sf, operands), operands[:5], *_rows_of(*operands[5:]))


def _quantize_out_fake(
    x: torch.Tensor, q: torch.Tensor, sf: torch.Tensor, *operands: object
) -> None:
    checks.check_call(x, q, _typed(sf, operands), operands[:5], *_rows_of(*operands[5:]))


_register(
    f"quantize_out(Tensor x, Tensor(a!) q, Tensor(b!) sf, {_CHOICES}, {_ROWS}) -> ()",
    _quantize_out,
    _quantize_out_fake,
)


_SILU_MUL = "bool interleaved, float? clamp, float alpha, float beta, str rounding, Tensor? weight"


def _silu_mul_call(operands: tuple) -> tuple[tuple, Rows | None, torch.Tensor | None, SiluMul]:
    """Choices, rows, index and prologue of the operands after the tensors."""
    return operands[:5], *_rows_of(*operands[11:]), make_silu_mul(*operands[5:11])


def _silu_mul_quantize(
    gate_up: torch.Tensor, *operands: object
) -> tuple[torch.Tensor, torch.Tensor]:
    choices, rows, index, prologue = _silu_mul_call(operands)
    return execution.quantize(gate_up, None, None, choices, rows, index, prologue=prologue)


def _silu_mul_quantize_fake(
    gate_up: torch.Tensor, *operands: object
) -> tuple[torch.Tensor, torch.Tensor]:
    return _fake_results(gate_up, checks.check_call(gate_up, None, None, *_silu_mul_call(operands)))


_register(
    f"silu_mul_quantize(Tensor gate_up, {_CHOICES}, {_SILU_MUL}, {_ROWS}) -> (Tensor, Tensor)",
    _silu_mul_quantize,
    _silu_mul_quantize_fake,
)


def _silu_mul_quantize_out(
    gate_up: torch.Tensor, q: torch.Tensor, sf: torch.Tensor, *operands: object
) -> None:
    choices, rows, index, prologue = _silu_mul_call(operands)
    sf = _typed(sf, choices)
    execution.quantize(gate_up, q, sf, choices, rows, index, prologue=prologue)


def _silu_mul_quantize_out_fake(
    gate_up: torch.Tensor, q: torch.Tensor, sf: torch.Tensor, *operands: object
) -> None:
    checks.check_call(gate_up, q, _typed(sf, operands), *_silu_mul_call(operands))


_register(
    "silu_mul_quantize_out(Tensor gate_up, Tensor(a!) q, Tensor(b!) sf, "
    f"{_CHOICES}, {_SILU_MUL}, {_ROWS}) -> ()",
    _silu_mul_quantize_out,
    _silu_mul_quantize_out_fake,
)


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
    elif residual_out is None:
        raise ValueError(
            "residual_out: expected a tensor with a residual, which is only read, got None"
        )
    options = *operands[5:8], residual, residual_out, normalized
    return operands[:5], *_rows_of(*operands[8:]), make_rms_norm(weight, *options)


def _rms_norm_quantize(
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


def _rms_norm_quantize_fake(
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


_register(
    f"rms_norm_quantize({_RMS_NORM}, {_CHOICES}, {_RMS_NORM_OPTIONS}, {_ROWS}) -> (Tensor, Tensor)",
    _rms_norm_quantize,
    _rms_norm_quantize_fake,
)


def _rms_norm_quantize_out(
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


def _rms_norm_quantize_out_fake(
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


_register(
    f"rms_norm_quantize_out({_RMS_NORM}, Tensor(c!) q, Tensor(d!) sf, "
    f"{_CHOICES}, {_RMS_NORM_OPTIONS}, {_ROWS}) -> ()",
    _rms_norm_quantize_out,
    _rms_norm_quantize_out_fake,
)


def _dequantize_fake(
    q: torch.Tensor, sf: torch.Tensor, group_size: int, dtype: torch.dtype
) -> torch.Tensor:
    checks.check_dequantize_call(q, sf, group_size, dtype)
    return q.new_empty(q.shape, dtype=dtype)


_register(
    "dequantize(Tensor q, Tensor sf, int group_size, ScalarType dtype) -> Tensor",
    execution.dequantize,
    _dequantize_fake,
)


def _fake_quantize(x: torch.Tensor, *choices: object) -> torch.Tensor:
    return execution.fake_quantize(x, None, choices)


def _fake_quantize_fake(x: torch.Tensor, *choices: object) -> torch.Tensor:
    checks.check_fake_call(x, None, choices)
    return x.new_empty(x.shape)


_register(f"fake_quantize(Tensor x, {_CHOICES}) -> Tensor", _fake_quantize, _fake_quantize_fake)
