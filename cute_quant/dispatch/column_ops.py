"""The operators of groups along rows that torch knows, as those of `torch_ops`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from cute_quant.contract import columns
from cute_quant.contract.calls import ResultShape
from cute_quant.contract.columns import ColumnCall, Output, Pair
from cute_quant.contract.dtypes import describe
from cute_quant.contract.formats import Format
from cute_quant.contract.prologues import (
    GatedPrologue,
    SiluMul,
    SiluMulBackward,
    make_silu_mul,
    make_silu_mul_backward,
)
from cute_quant.contract.rows import DENSE, RowOperands, from_operands, to_operands
from cute_quant.dispatch import columns as launches
from cute_quant.dispatch import operators
from cute_quant.dispatch.columns import Results
from cute_quant.dispatch.torch_ops import (
    GATED,
    GATED_OPTIONS,
    SILU_MUL,
    SILU_MUL_OPTIONS,
    as_stored,
    from_stored,
    new_stored_scales,
    stored_dtype,
)

_OPTIONS = 'bool transposed=False, str rows="dense", int alignment=1'


class _Operation(NamedTuple):
    """An operation on columns, as its operators have it.

    Attributes:
        name: of the public function.
        inputs: the tensors that it reads, as a schema has them.
        formats: names of its formats, that of columns last.
        options: further options, as a schema has them.
        prologue: makes the prologue of further tensors and options, by their names.
    """

    name: str
    inputs: str
    formats: tuple[str, ...]
    options: str = _OPTIONS
    prologue: Callable[[dict[str, Any]], GatedPrologue] | None = None


def _silu_mul(arguments: dict[str, Any]) -> GatedPrologue:
    options = {name: arguments[name] for name in SILU_MUL_OPTIONS}
    return make_silu_mul(weight=arguments["weight"], **options)


def _silu_mul_backward(arguments: dict[str, Any]) -> GatedPrologue:
    options = {name: arguments[name] for name in GATED_OPTIONS}
    return make_silu_mul_backward(arguments["grad"], **options)


_BOTH = "fmt", "column_fmt"
_COLUMNS = _Operation("quantize_columns", "Tensor x", ("fmt",))
_ROWS_AND_COLUMNS = _Operation("quantize_both", "Tensor x", _BOTH)
_GATED = _Operation(
    "silu_mul_quantize_both",
    "Tensor gate_up, Tensor? weight",
    _BOTH,
    f"{SILU_MUL}, {_OPTIONS}",
    _silu_mul,
)
_GRADIENTS = _Operation(
    "silu_mul_backward_quantize_both",
    "Tensor grad, Tensor gate_up",
    _BOTH,
    f"{GATED}, {_OPTIONS}",
    _silu_mul_backward,
)


def run(call: ColumnCall) -> Results:
    """Hand a call to its operator, for a tracer to see."""
    # A schema cannot name what is wrong with these.
    columns.check_formats(call)
    columns.check_transposed(call.transposed)
    columns.check_rows_of_groups(call.rows)
    if not isinstance(call.rng_state, (torch.Tensor, type(None))):
        raise TypeError(f"rng_state: expected a tensor or None, got {describe(call.rng_state)}")
    rows, prologue = to_operands(call.rows), call.prologue
    options = {"transposed": call.transposed, "rows": rows.rows, "alignment": rows.alignment}
    inputs: tuple[torch.Tensor | None, ...] = (call.x,)
    name = (_COLUMNS if call.along_k is None else _ROWS_AND_COLUMNS).name
    match prologue:
        case SiluMul():
            name, inputs = _GATED.name, (call.x, prologue.weight)
            options |= {option: getattr(prologue, option) for option in SILU_MUL_OPTIONS}
        case SiluMulBackward():
            name, inputs = _GRADIENTS.name, (prologue.grad, call.x)
            options |= {option: getattr(prologue, option) for option in GATED_OPTIONS}
    formats = [output.fmt.text for output in call.outputs]
    ops, end = torch.ops.cute_quant, (*formats, rows.row_data, call.rng_state)
    if all(output.q is None and output.sf is None for output in call.outputs):
        return _results(call, getattr(ops, name)(*inputs, *end, **options))
    memory = _allocate(call, columns.check_columns(call))
    getattr(ops, f"{name}_out")(*inputs, *memory, *end, **options)
    return _results(call, memory)


def _results(call: ColumnCall, stored: Any) -> Results:
    """Return what an operator returned, in the dtypes of the formats."""
    pairs = [
        (from_stored(q, output.fmt.values), from_stored(sf, output.fmt.sf_dtype))
        for output, q, sf in zip(call.outputs, stored[::2], stored[1::2], strict=True)
    ]
    return Results(pairs[-1], None if call.along_k is None else pairs[0])


def _allocate(call: ColumnCall, shape: ResultShape) -> list[torch.Tensor]:
    """Return the tensors of all results as stored: the caller's, or new ones on the device of x."""
    x, memory = call.x, []
    for output in call.outputs:
        fmt, q, sf = output
        of_columns = output is call.columns
        if q is None:
            of_values = columns.values_shape(shape, call.transposed) if of_columns else shape
            q = x.new_empty(of_values.values(fmt), dtype=stored_dtype(fmt.values))
        if sf is None and of_columns:
            sf = x.new_empty(columns.scale_shape(fmt, shape), dtype=stored_dtype(fmt.sf_dtype))
        elif sf is None:
            sf = new_stored_scales(x, fmt, shape)
        memory += [q, as_stored(sf)]
    return memory


def _call_of(operation: _Operation, arguments: dict[str, Any], memory: list[str]) -> ColumnCall:
    """Return the call that the arguments of an operator describe.

    Args:
        operation: what it does.
        arguments: by name.
        memory: names of the tensors for values and scales of each result; none to allocate them.
    """
    kind, alignment = arguments.get("rows", DENSE), arguments.get("alignment", 1)
    rows = from_operands(RowOperands(kind, arguments.get("row_data"), alignment))
    outputs = []
    for i, name in enumerate(operation.formats):
        fmt = Format.parse(arguments[name])
        output = Output(fmt)
        if memory:
            q, sf = (arguments[name] for name in memory[2 * i : 2 * i + 2])
            output = Output(fmt, from_stored(q, fmt.values), from_stored(sf, fmt.sf_dtype))
        outputs.append(output)
    prologue = None if operation.prologue is None else operation.prologue(arguments)
    return ColumnCall(
        arguments["x" if prologue is None else prologue.input_name],
        outputs[-1],
        arguments.get("transposed", False),
        rows,
        outputs[0] if len(outputs) > 1 else None,
        prologue,
        arguments.get("rng_state"),
    )


def _tensors(results: Results) -> tuple[torch.Tensor, ...]:
    """Return the results of a call as its operator does."""
    pairs: list[Pair] = [results.columns]
    if results.along_k is not None:
        pairs.insert(0, results.along_k)
    return tuple(as_stored(t) for pair in pairs for t in pair)


def _register(operation: _Operation, *, writes: bool) -> None:
    """Register an operator that runs a call.

    Args:
        operation: what it does.
        writes: whether it writes to memory that it gets, instead of returning results.
    """
    name = f"{operation.name}{'_out' * writes}"
    results = ["q", "sf", "column_q", "column_sf"][: 2 * len(operation.formats)]
    memory = results if writes else []
    arguments = [
        *operation.inputs.split(", "),
        *(f"Tensor({letter}!) {t}" for letter, t in zip("abcd", memory, strict=False)),
        *(f"str {text}" for text in operation.formats),
        "Tensor? row_data=None",
        "Tensor? rng_state=None",
    ]
    names = [argument.partition("=")[0].split()[-1] for argument in arguments]
    returned = "()" if writes else f"({', '.join(['Tensor'] * len(results))})"

    def parsed(positional: tuple[Any, ...], options: dict[str, Any]) -> ColumnCall:
        given = dict(zip(names, positional, strict=False))
        return _call_of(operation, given | options, memory)

    def execute(*positional: Any, **options: Any) -> tuple[torch.Tensor, ...] | None:
        results = launches.run(parsed(positional, options))
        return None if writes else _tensors(results)

    def fake(*positional: Any, **options: Any) -> tuple[torch.Tensor, ...] | None:
        call = parsed(positional, options)
        shape = columns.check_columns(call)
        return None if writes else tuple(_allocate(call, shape))

    inputs = " and ".join(names[: len(operation.inputs.split(", "))])
    operators.register(
        name,
        f"({', '.join(arguments)}, *, {operation.options}) -> {returned}",
        execute,
        fake,
        inputs,
    )


for _operation in (_COLUMNS, _ROWS_AND_COLUMNS, _GATED, _GRADIENTS):
    _register(_operation, writes=False)
    _register(_operation, writes=True)
