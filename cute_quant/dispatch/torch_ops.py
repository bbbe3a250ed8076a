"""The operators that torch knows: schemas, what they run, and what they return for fake tensors.

An operator carries its format as text and its row domain as a kind and a tensor. UE8M0 scales that
are no words are bytes to it, since Inductor has no float8_e8m0fnu.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from cute_quant.contract import checks
from cute_quant.contract.calls import Call, ResultShape
from cute_quant.contract.formats import Format
from cute_quant.contract.prologues import RmsNorm, SiluMul, make_rms_norm, make_silu_mul
from cute_quant.contract.rows import RowOperands, from_operands, to_operands
from cute_quant.contract.torch_private import CustomOpDef
from cute_quant.dispatch import launch

Results = tuple[torch.Tensor, torch.Tensor]

_ROW_TENSORS = "Tensor? row_data=None, Tensor? index=None"
_ROWS = 'str rows="dense", int alignment=1'
_OUT = "Tensor(a!) q, Tensor(b!) sf"
_RESIDUAL = "Tensor? residual, Tensor(c!)? residual_out, Tensor(d!)? normalized"
_SILU_MUL_OPTIONS = ("interleaved", "clamp", "alpha", "beta", "rounding")
_RMS_NORM_OPTIONS = ("eps", "weight_offset", "rounding")


def not_differentiable(function: str, name: str) -> str:
    """Return what to say of an argument that requires a gradient."""
    return (
        f"{name}: expected a tensor that requires no gradient, since {function} is not "
        "differentiable; got one that does: detach it or call under torch.no_grad()"
    )


def as_stored(sf: torch.Tensor) -> torch.Tensor:
    """Return scales as an operator takes and returns them."""
    return sf.view(torch.uint8) if sf.dtype is torch.float8_e8m0fnu else sf


def as_scales(stored: torch.Tensor, fmt: Format) -> torch.Tensor:
    """Return scales that came as bytes in the dtype of their format."""
    as_bytes = stored.dtype is torch.uint8 and fmt.sf_dtype is torch.float8_e8m0fnu
    return stored.view(fmt.sf_dtype) if as_bytes else stored


def _quantize_call(
    *,
    x: torch.Tensor,
    fmt: str,
    q: torch.Tensor | None = None,
    sf: torch.Tensor | None = None,
    rows: str = "dense",
    row_data: torch.Tensor | None = None,
    alignment: int = 1,
    index: torch.Tensor | None = None,
) -> Call:
    """Return the call that the arguments of an operator describe."""
    parsed = Format.parse(fmt)
    sf = None if sf is None else as_scales(sf, parsed)
    return Call(x, parsed, q, sf, from_operands(RowOperands(rows, row_data, alignment)), index)


def _silu_mul_call(*, gate_up: torch.Tensor, weight: torch.Tensor | None, **arguments: Any) -> Call:
    options = {name: arguments.pop(name) for name in _SILU_MUL_OPTIONS}
    prologue = make_silu_mul(weight=weight, **options)
    return _quantize_call(x=gate_up, **arguments)._replace(prologue=prologue)


def _rms_norm_call(
    *,
    weight: torch.Tensor,
    residual: torch.Tensor | None = None,
    residual_out: torch.Tensor | None = None,
    normalized: torch.Tensor | None = None,
    **arguments: Any,
) -> Call:
    """Return the call that the arguments of an operator describe.

    Without a `residual`, `residual_out` is the residual, to be updated in place: what is written
    must not be an argument twice.
    """
    if residual is None:
        residual = residual_out
    elif residual is residual_out:
        raise ValueError("residual: expected None where residual_out is updated in place, got both")
    elif residual_out is None:
        raise ValueError(
            "residual_out: expected a tensor with a residual, which is only read, got None"
        )
    prologue = make_rms_norm(
        weight,
        residual=residual,
        residual_out=residual_out,
        normalized=normalized,
        **{name: arguments.pop(name) for name in _RMS_NORM_OPTIONS},
    )
    return _quantize_call(**arguments)._replace(prologue=prologue)


def _fake_results(call: Call) -> Results:
    shape = checks.check_call(call)
    q = call.x.new_empty(shape.values, dtype=call.fmt.values)
    return q, _new_stored_scales(call.x, call.fmt, shape)


def _register(
    name: str, arguments: str, options: str, make_call: Callable[..., Call]
) -> CustomOpDef:
    """Register an operator that runs a call.

    Args:
        name: its name in ``torch.ops.cute_quant``.
        arguments: its positional arguments, as in a schema. Unless q and sf are among them, it
            returns them.
        options: its keywords.
        make_call: takes both by name.
    """
    words = [argument.partition("=")[0].split() for argument in arguments.split(", ")]
    names = [name for _, name in words]
    mutated = tuple(name for kind, name in words if "!" in kind)
    returns = "q" not in names
    results = "(Tensor, Tensor)" if returns else "()"

    def run(*positional: Any, **keywords: Any) -> Results | None:
        call = make_call(**dict(zip(names, positional, strict=False)), **keywords)
        q, sf = launch.quantize(call)
        return (q, as_stored(sf)) if returns else None

    def fake(*positional: Any, **keywords: Any) -> Results | None:
        call = make_call(**dict(zip(names, positional, strict=False)), **keywords)
        if returns:
            return _fake_results(call)
        checks.check_call(call)
        return None

    operator = torch.library.custom_op(
        f"cute_quant::{name}",
        run,
        mutates_args=mutated,
        schema=f"({arguments}, *, {options}) -> {results}",
    )
    operator.register_fake(fake)
    return operator


def _dequantize(q: torch.Tensor, sf: torch.Tensor, fmt: str, dtype: torch.dtype) -> torch.Tensor:
    parsed = Format.parse(fmt)
    return launch.dequantize(q, as_scales(sf, parsed), parsed, dtype)


def _dequantize_meta(
    q: torch.Tensor, sf: torch.Tensor, fmt: str, dtype: torch.dtype
) -> torch.Tensor:
    parsed = Format.parse(fmt)
    checks.check_dequantize(q, as_scales(sf, parsed), parsed, dtype)
    return q.new_empty(q.shape, dtype=dtype)


def _fake_quantize(x: torch.Tensor, fmt: str) -> torch.Tensor:
    return launch.fake_quantize(x, Format.parse(fmt), None)


def _fake_quantize_meta(x: torch.Tensor, fmt: str) -> torch.Tensor:
    checks.check_fake_quantize(x, None, Format.parse(fmt))
    return x.new_empty(x.shape)


def _refuse_gradients(operator: CustomOpDef, function: str, name: str) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError(not_differentiable(function, name))

    operator.register_autograd(refuse, setup_context=refuse)


def _refuse_vmap(operator: CustomOpDef) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError(
            "torch.vmap is not supported: quantize the batch as leading dimensions instead"
        )

    operator.register_vmap(refuse)


def _register_all() -> list[CustomOpDef]:
    gate_up, normed = "Tensor gate_up, Tensor? weight", "Tensor x, Tensor weight"
    silu_mul = "bool interleaved, float? clamp, float alpha, float beta, str rounding, " + _ROWS
    rms_norm = "float eps, float weight_offset, str rounding, " + _ROWS
    end = f"str fmt, {_ROW_TENSORS}"
    quantize = _register("quantize", f"Tensor x, {end}", _ROWS, _quantize_call)
    silu_mul_quantize = _register(
        "silu_mul_quantize", f"{gate_up}, {end}", silu_mul, _silu_mul_call
    )
    rms_norm_quantize = _register("rms_norm_quantize", f"{normed}, {end}", rms_norm, _rms_norm_call)
    dequantize = torch.library.custom_op(
        "cute_quant::dequantize",
        _dequantize,
        mutates_args=(),
        schema="(Tensor q, Tensor sf, str fmt, ScalarType dtype) -> Tensor",
    )
    dequantize.register_fake(_dequantize_meta)
    fake_quantize = torch.library.custom_op(
        "cute_quant::fake_quantize",
        _fake_quantize,
        mutates_args=(),
        schema="(Tensor x, str fmt) -> Tensor",
    )
    fake_quantize.register_fake(_fake_quantize_meta)
    _refuse_gradients(quantize, "quantize", "x")
    _refuse_gradients(silu_mul_quantize, "silu_mul_quantize", "gate_up and weight")
    _refuse_gradients(rms_norm_quantize, "rms_norm_quantize", "x and weight")
    _refuse_gradients(dequantize, "dequantize", "q and sf")
    _refuse_gradients(fake_quantize, "fake_quantize", "x")
    operators = [
        quantize,
        silu_mul_quantize,
        rms_norm_quantize,
        dequantize,
        fake_quantize,
        _register("quantize_out", f"Tensor x, {_OUT}, {end}", _ROWS, _quantize_call),
        _register("silu_mul_quantize_out", f"{gate_up}, {_OUT}, {end}", silu_mul, _silu_mul_call),
        _register(
            "rms_norm_quantize_residual", f"{normed}, {_RESIDUAL}, {end}", rms_norm, _rms_norm_call
        ),
        _register(
            "rms_norm_quantize_out",
            f"{normed}, {_OUT}, {_RESIDUAL}, {end}",
            rms_norm,
            _rms_norm_call,
        ),
    ]
    for operator in operators:
        _refuse_vmap(operator)
    return operators


_operators = _register_all()
"""torch keeps no operator that nobody holds."""


def quantize(call: Call) -> Results:
    """Hand a call to its operator, for a tracer to see."""
    fmt, prologue, ops = call.fmt, call.prologue, torch.ops.cute_quant
    checks.check_kinds(call)
    rows = to_operands(call.rows)
    options: dict[str, Any] = {"rows": rows.rows, "alignment": rows.alignment}
    inputs: tuple[torch.Tensor | None, ...] = (call.x,)
    extra: tuple[torch.Tensor | None, ...] = ()
    operator, operator_out = ops.quantize, ops.quantize_out
    if isinstance(prologue, SiluMul):
        operator, operator_out = ops.silu_mul_quantize, ops.silu_mul_quantize_out
        inputs = (call.x, prologue.weight)
        options |= {name: getattr(prologue, name) for name in _SILU_MUL_OPTIONS}
    elif isinstance(prologue, RmsNorm):
        operator, operator_out = ops.rms_norm_quantize, ops.rms_norm_quantize_out
        inputs = (call.x, prologue.weight)
        residual = None if prologue.residual_out is prologue.residual else prologue.residual
        extra = (residual, prologue.residual_out, prologue.normalized)
        options |= {name: getattr(prologue, name) for name in _RMS_NORM_OPTIONS}
    end = (fmt.text, rows.row_data, call.index)
    if call.q is None and call.sf is None:
        if any(t is not None for t in extra):
            # Operators that write are no pure functions, which compilers merge and move.
            q, stored = ops.rms_norm_quantize_residual(*inputs, *extra, *end, **options)
        else:
            q, stored = operator(*inputs, *end, **options)
        return q, as_scales(stored, fmt)
    q, sf = _allocate(call)
    operator_out(*inputs, q, as_stored(sf), *extra, *end, **options)
    return q, sf


def _allocate(call: Call) -> Results:
    """Return q and sf of a call that gives one of them."""
    shape, fmt, q, sf = call.result_shape, call.fmt, call.q, call.sf
    if q is None:
        q = call.x.new_empty(shape.values, dtype=fmt.values)
    if sf is None:
        sf = as_scales(_new_stored_scales(call.x, fmt, shape), fmt)
    return q, sf


def _new_stored_scales(x: torch.Tensor, fmt: Format, shape: ResultShape) -> torch.Tensor:
    """Return memory for scales without padding rows in the last column.

    Whether there are any depends on mn % 4, which must not become a guard.
    """
    sf_shape = fmt.scale_shape(*shape)
    if fmt.mn_major:
        return x.new_empty_strided(sf_shape, fmt.scale_strides(*shape), dtype=fmt.sf_dtype)
    return x.new_empty(sf_shape, dtype=torch.uint8 if fmt.ue8m0 else fmt.sf_dtype)
