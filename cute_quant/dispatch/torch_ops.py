"""The operators that torch knows: schemas, what they run, and what they return for fake tensors.

An operator carries its format as text and its row domain as a kind and a tensor. UE8M0 scales that
are no words are bytes to it, and so are FP4 values, since Inductor has neither float8_e8m0fnu nor
float4_e2m1fn_x2. What it returns is no argument, so a call that returns more than q and sf writes
to memory that is allocated before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from cute_quant.contract import checks
from cute_quant.contract.calls import Call, ResultShape
from cute_quant.contract.dtypes import describe
from cute_quant.contract.formats import Format
from cute_quant.contract.prologues import (
    RmsNorm,
    SiluMul,
    SiluMulBackward,
    make_rms_norm,
    make_silu_mul,
    make_silu_mul_backward,
)
from cute_quant.contract.rows import RowOperands, from_operands, to_operands
from cute_quant.contract.upper_scales import KINDS, UpperScale
from cute_quant.dispatch import launch, operators, repeats
from cute_quant.dispatch.launch import Results

_ROW_TENSORS = "Tensor? row_data=None, Tensor? index=None, Tensor? upper=None, Tensor? scatter=None"
_ROWS = 'str rows="dense", int alignment=1, str? upper_kind=None, SymInt? num_rows=None'
_OUT = "Tensor(a!) q, Tensor(b!) sf, Tensor(e!)? row_scales"
UPPER_ARGUMENTS = "Tensor? upper=None, str? upper_kind=None"
_RESIDUAL = "Tensor? residual, Tensor(c!)? residual_out, Tensor(d!)? normalized"
GATED_OPTIONS = ("interleaved", "clamp", "alpha", "beta")
GATED = "bool interleaved, float? clamp, float alpha, float beta"
"""Options of gradients of a gated activation, by name and as a schema has them."""
SILU_MUL_OPTIONS = (*GATED_OPTIONS, "rounding")
SILU_MUL = f"{GATED}, str rounding"
"""The same of the activation."""
_RMS_NORM_OPTIONS = ("eps", "weight_offset", "rounding")


_STORED_AS_BYTES = (torch.float8_e8m0fnu, torch.float4_e2m1fn_x2)


def stored_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that an operator has for a result of this one."""
    return torch.uint8 if dtype in _STORED_AS_BYTES else dtype


def as_stored(t: torch.Tensor) -> torch.Tensor:
    """Return values or scales as an operator takes and returns them."""
    return t.view(torch.uint8) if t.dtype in _STORED_AS_BYTES else t


def from_stored(stored: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return values or scales that came as bytes in the dtype of their format."""
    as_bytes = stored.dtype is torch.uint8 and dtype in _STORED_AS_BYTES
    return stored.view(dtype) if as_bytes else stored


def upper_scale_of(kind: str | None, upper: torch.Tensor | None) -> UpperScale | None:
    """Return the upper scale that the arguments of an operator describe."""
    if kind is None and upper is None:
        return None
    if kind not in KINDS or upper is None:
        raise ValueError(
            f"upper_kind: expected one of {', '.join(KINDS)} with a tensor `upper`, or neither, "
            f"got {kind!r} and {describe(upper)}"
        )
    return UpperScale(kind, upper)


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
    upper: torch.Tensor | None = None,
    upper_kind: str | None = None,
    row_scales: torch.Tensor | None = None,
    rng_state: torch.Tensor | None = None,
    scatter: torch.Tensor | None = None,
    num_rows: int | None = None,
) -> Call:
    """Return the call that the arguments of an operator describe."""
    parsed = Format.parse(fmt)
    return Call(
        x,
        parsed,
        None if q is None else from_stored(q, parsed.values),
        None if sf is None else from_stored(sf, parsed.sf_dtype),
        from_operands(RowOperands(rows, row_data, alignment)),
        index,
        upper=upper_scale_of(upper_kind, upper),
        row_scales=row_scales,
        rng_state=rng_state,
        scatter=scatter,
        num_rows=num_rows,
    )


def _silu_mul_call(*, gate_up: torch.Tensor, weight: torch.Tensor | None, **arguments: Any) -> Call:
    options = {name: arguments.pop(name) for name in SILU_MUL_OPTIONS}
    prologue = make_silu_mul(weight=weight, **options)
    return _quantize_call(x=gate_up, **arguments)._replace(prologue=prologue)


def _silu_mul_backward_call(*, grad: torch.Tensor, gate_up: torch.Tensor, **arguments: Any) -> Call:
    options = {name: arguments.pop(name) for name in GATED_OPTIONS}
    prologue = make_silu_mul_backward(grad, **options)
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
    return _new_stored_values(call, shape), new_stored_scales(call.x, call.fmt, shape)


def _register(
    name: str,
    arguments: str,
    options: str,
    make_call: Callable[..., Call],
    inputs: str,
) -> None:
    """Register an operator that runs a call.

    Args:
        name: its name in ``torch.ops.cute_quant``.
        arguments: its positional arguments, as in a schema. Unless q and sf are among them, it
            returns them.
        options: its keywords.
        make_call: takes both by name.
        inputs: what must require no gradient.
    """
    names = [argument.partition("=")[0].split()[-1] for argument in arguments.split(", ")]
    returns = "q" not in names

    def call_of(positional: tuple[Any, ...], keywords: dict[str, Any]) -> Call:
        call = make_call(**dict(zip(names, positional, strict=False)), **keywords)
        if returns and call.fmt.row_scale:
            raise ValueError(
                f"fmt: expected a format without row_scale, whose scales of rows {name} does not "
                f"return, got {call.fmt}: use {name.removesuffix('_residual')}_out"
            )
        return call

    def run(*positional: Any, **keywords: Any) -> Results | None:
        if not returns:
            launch.quantize(call_of(positional, keywords))
            return None
        results = repeats.run(name, positional, keywords)
        if results is None:
            call = call_of(positional, keywords)
            results = launch.quantize(call)
            repeats.remember(name, call, results, positional, keywords)
        return tuple(map(as_stored, results))

    def fake(*positional: Any, **keywords: Any) -> Results | None:
        call = call_of(positional, keywords)
        if returns:
            return _fake_results(call)
        checks.check_call(call)
        return None

    results = "(Tensor, Tensor)" if returns else "()"
    operators.register(name, f"({arguments}, *, {options}) -> {results}", run, fake, inputs)


def _dequantize_arguments(
    q: torch.Tensor,
    sf: torch.Tensor,
    fmt: str,
    dtype: torch.dtype,
    upper: torch.Tensor | None = None,
    upper_kind: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, Format, torch.dtype, UpperScale | None]:
    """Return what the arguments of an operator describe."""
    parsed = Format.parse(fmt)
    q, sf = from_stored(q, parsed.values), from_stored(sf, parsed.sf_dtype)
    return q, sf, parsed, dtype, upper_scale_of(upper_kind, upper)


def _dequantize(*arguments: Any) -> torch.Tensor:
    return launch.dequantize(*_dequantize_arguments(*arguments))


def _dequantize_meta(*arguments: Any) -> torch.Tensor:
    q, sf, fmt, dtype, upper = _dequantize_arguments(*arguments)
    shape = checks.check_dequantize(q, sf, fmt, dtype, upper)
    return q.new_empty((*shape.batch_shape, shape.mn, shape.k), dtype=dtype)


def _fake_quantize_call(
    x: torch.Tensor,
    fmt: str,
    upper: torch.Tensor | None = None,
    upper_kind: str | None = None,
) -> Call:
    return Call(x, Format.parse(fmt), upper=upper_scale_of(upper_kind, upper))


def _fake_quantize(*arguments: Any) -> torch.Tensor:
    return launch.fake_quantize(_fake_quantize_call(*arguments), None)


def _fake_quantize_meta(*arguments: Any) -> torch.Tensor:
    call = _fake_quantize_call(*arguments)
    checks.check_fake_quantize(call, None)
    return call.x.new_empty(call.x.shape)


_GATE_UP, _NORMED = "Tensor gate_up, Tensor? weight", "Tensor x, Tensor weight"
_BACKWARD = "Tensor grad, Tensor gate_up"
_SILU_MUL_END = f"{SILU_MUL}, {_ROWS}"
_RMS_NORM_END = "float eps, float weight_offset, str rounding, " + _ROWS
_END = f"str fmt, {_ROW_TENSORS}"
_ROUNDED = f"{_END}, Tensor? rng_state=None"
_register("quantize", f"Tensor x, {_ROUNDED}", _ROWS, _quantize_call, "x")
_register("quantize_out", f"Tensor x, {_OUT}, {_ROUNDED}", _ROWS, _quantize_call, "x")
_register(
    "silu_mul_quantize",
    f"{_GATE_UP}, {_END}",
    _SILU_MUL_END,
    _silu_mul_call,
    "gate_up and weight",
)
_register(
    "silu_mul_quantize_out",
    f"{_GATE_UP}, {_OUT}, {_END}",
    _SILU_MUL_END,
    _silu_mul_call,
    "gate_up and weight",
)
_register(
    "silu_mul_backward_quantize",
    f"{_BACKWARD}, {_ROUNDED}",
    f"{GATED}, {_ROWS}",
    _silu_mul_backward_call,
    "grad and gate_up",
)
_register(
    "silu_mul_backward_quantize_out",
    f"{_BACKWARD}, {_OUT}, {_ROUNDED}",
    f"{GATED}, {_ROWS}",
    _silu_mul_backward_call,
    "grad and gate_up",
)
_register(
    "rms_norm_quantize",
    f"{_NORMED}, {_END}",
    _RMS_NORM_END,
    _rms_norm_call,
    "x and weight",
)
_register(
    "rms_norm_quantize_residual",
    f"{_NORMED}, {_RESIDUAL}, {_END}",
    _RMS_NORM_END,
    _rms_norm_call,
    "x, weight and residual",
)
_register(
    "rms_norm_quantize_out",
    f"{_NORMED}, {_OUT}, {_RESIDUAL}, {_END}",
    _RMS_NORM_END,
    _rms_norm_call,
    "x, weight and residual",
)
operators.register(
    "dequantize",
    f"(Tensor q, Tensor sf, str fmt, ScalarType dtype, {UPPER_ARGUMENTS}) -> Tensor",
    _dequantize,
    _dequantize_meta,
    "q and sf",
)
operators.register(
    "fake_quantize",
    f"(Tensor x, str fmt, {UPPER_ARGUMENTS}) -> Tensor",
    _fake_quantize,
    _fake_quantize_meta,
    "x",
)


def quantize(call: Call) -> Results:
    """Hand a call to its operator, for a tracer to see."""
    fmt, prologue, ops = call.fmt, call.prologue, torch.ops.cute_quant
    checks.check_kinds(call)
    rows = to_operands(call.rows)
    upper_kind, upper = (None, None) if call.upper is None else call.upper
    options: dict[str, Any] = {"rows": rows.rows, "alignment": rows.alignment}
    if upper_kind is not None:
        options["upper_kind"] = upper_kind
    if call.num_rows is not None:
        options["num_rows"] = call.num_rows
    inputs: tuple[torch.Tensor | None, ...] = (call.x,)
    extra: tuple[torch.Tensor | None, ...] = ()
    operator, operator_out = ops.quantize, ops.quantize_out
    if isinstance(prologue, SiluMul):
        operator, operator_out = ops.silu_mul_quantize, ops.silu_mul_quantize_out
        inputs = (call.x, prologue.weight)
        options |= {name: getattr(prologue, name) for name in SILU_MUL_OPTIONS}
    elif isinstance(prologue, SiluMulBackward):
        operator = ops.silu_mul_backward_quantize
        operator_out = ops.silu_mul_backward_quantize_out
        inputs = (prologue.grad, call.x)
        options |= {name: getattr(prologue, name) for name in GATED_OPTIONS}
    elif isinstance(prologue, RmsNorm):
        operator, operator_out = ops.rms_norm_quantize, ops.rms_norm_quantize_out
        inputs = (call.x, prologue.weight)
        residual = None if prologue.residual_out is prologue.residual else prologue.residual
        extra = (residual, prologue.residual_out, prologue.normalized)
        options |= {name: getattr(prologue, name) for name in _RMS_NORM_OPTIONS}
    end: tuple[Any, ...] = (fmt.text, rows.row_data, call.index, upper, call.scatter)
    if call.rng_state is not None:
        end += (call.rng_state,)
    if call.q is None and call.sf is None and not fmt.row_scale:
        if any(t is not None for t in extra):
            # Operators that write are no pure functions, which compilers merge and move.
            stored = ops.rms_norm_quantize_residual(*inputs, *extra, *end, **options)
        else:
            stored = operator(*inputs, *end, **options)
        dtypes = fmt.values, fmt.sf_dtype
        return tuple(from_stored(t, dtype) for t, dtype in zip(stored, dtypes, strict=True))
    q, sf, row_scales = _allocate(call)
    operator_out(*inputs, q, as_stored(sf), row_scales, *extra, *end, **options)
    q = from_stored(q, fmt.values)
    return (q, sf) if row_scales is None else (q, sf, row_scales)


def dequantize(
    q: torch.Tensor,
    sf: torch.Tensor,
    fmt: Format,
    dtype: torch.dtype,
    upper: UpperScale | None,
) -> torch.Tensor:
    """Hand the arguments of a call to its operator, for a tracer to see."""
    kind, tensor = (None, None) if upper is None else upper
    y: torch.Tensor = torch.ops.cute_quant.dequantize(
        as_stored(q), as_stored(sf), fmt.text, dtype, tensor, kind
    )
    return y


def fake_quantize(call: Call) -> torch.Tensor:
    """Hand a call to its operator, for a tracer to see."""
    kind, tensor = (None, None) if call.upper is None else call.upper
    y: torch.Tensor = torch.ops.cute_quant.fake_quantize(call.x, call.fmt.text, tensor, kind)
    return y


def _allocate(call: Call) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return q, sf and scales of rows: the caller's, or new ones.

    New values are as stored. The caller's are no view: with one Inductor writes to a copy, and
    copies that back, for which it has no code where values are FP4.
    """
    shape, fmt = call.result_shape, call.fmt
    q, sf, row_scales = call.q, call.sf, call.row_scales
    if q is None:
        q = _new_stored_values(call, shape)
    if sf is None:
        sf = from_stored(new_stored_scales(call.x, fmt, shape), fmt.sf_dtype)
    if row_scales is None and fmt.row_scale:
        row_scales = call.x.new_empty((*shape.batch_shape, shape.mn), dtype=torch.float32)
    return q, sf, row_scales


def _new_stored_values(call: Call, shape: ResultShape) -> torch.Tensor:
    """Return memory for values."""
    return call.x.new_empty(shape.values(call.fmt), dtype=stored_dtype(call.fmt.values))


def new_stored_scales(x: torch.Tensor, fmt: Format, shape: ResultShape) -> torch.Tensor:
    """Return memory for scales without padding rows in the last column.

    Whether there are any depends on mn % 4, which must not become a guard.
    """
    sf_shape = Format.scale_shape(fmt, *shape)
    if fmt.mn_major:
        strides = Format.scale_strides(fmt, *shape)
        return x.new_empty_strided(sf_shape, strides, dtype=fmt.sf_dtype)
    return x.new_empty(sf_shape, dtype=stored_dtype(fmt.sf_dtype))
