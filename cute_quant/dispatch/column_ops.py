"""The operators of groups along rows that torch knows, as those of `torch_ops`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from cute_quant.contract import columns
from cute_quant.contract.calls import ResultShape
from cute_quant.contract.checks import check_row_kind
from cute_quant.contract.column_reference import Pair
from cute_quant.contract.columns import ColumnCall, Output
from cute_quant.contract.formats import Format
from cute_quant.contract.rows import RowOperands, from_operands, to_operands
from cute_quant.contract.torch_private import CustomOpDef
from cute_quant.dispatch import columns as launches
from cute_quant.dispatch.columns import Results
from cute_quant.dispatch.torch_ops import (
    as_stored,
    from_stored,
    new_stored_scales,
    refuse_gradients,
    refuse_vmap,
    stored_dtype,
)

_OPTIONS = 'bool transposed=False, str rows="dense", int alignment=1'


def run(call: ColumnCall) -> Results:
    """Hand a call to its operator, for a tracer to see."""
    # A schema cannot name what is wrong with these.
    columns.check_formats(call)
    columns.check_transposed(call.transposed)
    check_row_kind(call.rows)
    ops, along_k = torch.ops.cute_quant, call.along_k
    rows = to_operands(call.rows)
    options = {"transposed": call.transposed, "rows": rows.rows, "alignment": rows.alignment}
    formats = [output.fmt.text for output in _outputs(call)]
    if all(output.q is output.sf is None for output in _outputs(call)):
        operator = ops.quantize_columns if along_k is None else ops.quantize_both
        return _results(call, operator(call.x, *formats, rows.row_data, **options))
    operator = ops.quantize_columns_out if along_k is None else ops.quantize_both_out
    memory = _allocate(call, columns.check_columns(call))
    operator(call.x, *memory, *formats, rows.row_data, **options)
    return _results(call, memory)


def _outputs(call: ColumnCall) -> list[Output]:
    """Return the results of a call in the order of its operator: along k first."""
    return [call.columns] if call.along_k is None else [call.along_k, call.columns]


def _results(call: ColumnCall, stored: Any) -> Results:
    """Return what an operator returned, in the dtypes of the formats."""
    pairs = [
        (from_stored(q, output.fmt.values), from_stored(sf, output.fmt.sf_dtype))
        for output, q, sf in zip(_outputs(call), stored[::2], stored[1::2], strict=True)
    ]
    return Results(pairs[-1], None if call.along_k is None else pairs[0])


def _allocate(call: ColumnCall, shape: ResultShape) -> list[torch.Tensor]:
    """Return the tensors of all results as stored: the caller's, or new ones on the device of x."""
    x, memory = call.x, []
    for output in _outputs(call):
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


def _call_of(x: torch.Tensor, formats: list[str], given: Any, **options: Any) -> ColumnCall:
    """Return the call that the arguments of an operator describe.

    Args:
        x: the input.
        formats: one for each result, that of columns last.
        given: memory for values and scales of each result; empty to allocate it.
        **options: the row domain and whether the values of columns are transposed.
    """
    rows = from_operands(RowOperands(options["rows"], options["row_data"], options["alignment"]))
    outputs = []
    for i, text in enumerate(formats):
        fmt, output = Format.parse(text), Output(Format.parse(text))
        if given:
            q, sf = given[2 * i : 2 * i + 2]
            output = Output(fmt, from_stored(q, fmt.values), from_stored(sf, fmt.sf_dtype))
        outputs.append(output)
    along_k = outputs[0] if len(outputs) > 1 else None
    return ColumnCall(x, outputs[-1], options["transposed"], rows, along_k)


def _tensors(results: Results) -> tuple[torch.Tensor, ...]:
    """Return the results of a call as its operator does."""
    pairs: list[Pair] = [results.columns]
    if results.along_k is not None:
        pairs.insert(0, results.along_k)
    return tuple(as_stored(t) for pair in pairs for t in pair)


def _register(name: str, formats: int, writes: bool) -> CustomOpDef:
    """Register an operator that runs a call.

    Args:
        name: its name in ``torch.ops.cute_quant``.
        formats: how many it has.
        writes: whether it writes to memory that it gets, instead of returning results.
    """
    texts = ["fmt"] if formats == 1 else ["fmt", "column_fmt"]
    results = ["q", "sf"] if formats == 1 else ["q", "sf", "column_q", "column_sf"]
    memory = results if writes else []
    schema = ", ".join(
        [
            "Tensor x",
            *(f"Tensor({letter}!) {t}" for letter, t in zip("abcd", memory, strict=False)),
            *(f"str {text}" for text in texts),
            "Tensor? row_data=None, *",
            _OPTIONS,
        ]
    )
    returned = "()" if writes else f"({', '.join(['Tensor'] * len(results))})"

    def parsed(arguments: tuple[Any, ...], options: dict[str, Any]) -> ColumnCall:
        x, *others = arguments
        given, others = others[: len(memory)], others[len(memory) :]
        row_data = others[formats] if len(others) > formats else None
        defaults = {"transposed": False, "rows": "dense", "alignment": 1, "row_data": row_data}
        return _call_of(x, others[:formats], given, **defaults | options)

    def execute(*arguments: Any, **options: Any) -> tuple[torch.Tensor, ...] | None:
        results = launches.run(parsed(arguments, options))
        return None if writes else _tensors(results)

    def fake(*arguments: Any, **options: Any) -> tuple[torch.Tensor, ...] | None:
        call = parsed(arguments, options)
        shape = columns.check_columns(call)
        return None if writes else tuple(_allocate(call, shape))

    run_and_fake: tuple[Callable[..., Any], ...] = execute, fake
    operator = torch.library.custom_op(
        f"cute_quant::{name}",
        run_and_fake[0],
        mutates_args=tuple(memory),
        schema=f"({schema}) -> {returned}",
    )
    operator.register_fake(run_and_fake[1])
    refuse_vmap(operator)
    if not writes:
        refuse_gradients(operator, name, "x")
    return operator


_operators = [
    _register(f"{name}{'_out' * writes}", formats, writes)
    for name, formats in (("quantize_columns", 1), ("quantize_both", 2))
    for writes in (False, True)
]
"""torch keeps no operator that nobody holds."""
