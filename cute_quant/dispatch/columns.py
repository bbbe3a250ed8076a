"""Calls on groups along rows, alone or with groups along k: memory, kernels, launches."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from cute_quant.contract import columns
from cute_quant.contract.calls import ResultShape
from cute_quant.contract.columns import ColumnCall, Output, Pair
from cute_quant.contract.contents import check_counts
from cute_quant.contract.dtypes import STORE_BYTES
from cute_quant.contract.formats import Format
from cute_quant.contract.prologues import GatedPrologue, SiluMul, SiluMulBackward
from cute_quant.contract.reference import columns as column_reference
from cute_quant.contract.rows import DENSE
from cute_quant.contract.tensors import (
    Region,
    check_disjoint,
    check_no_tangents,
    check_real,
    region,
    region_of_scales,
)
from cute_quant.contract.torch_private import in_dual_level
from cute_quant.dispatch import launch
from cute_quant.dispatch.call_range import CallRange
from cute_quant.dispatch.plan import (
    PrologueChoice,
    alignment,
    choose_silu_mul,
    choose_silu_mul_backward,
    compiled,
    matrix_view,
    missing_scale_rows,
    view_of_scales,
)
from cute_quant.jit import lookup
from cute_quant.kernels import architectures, heuristics
from cute_quant.kernels.config import BLOCK_TILE, Access, ColumnsSpec, Gated


class Results(NamedTuple):
    """Values and scales of groups along rows, and those of groups along k, None without."""

    columns: Pair
    along_k: Pair | None


def run(call: ColumnCall, *, check: bool = False) -> Results:
    """Run ``cute_quant.quantize_columns`` or ``quantize_both`` on tensors with memory.

    Args:
        call: not checked yet.
        check: read the ends of groups, which synchronizes, and raise on those out of range.
    """
    shape = columns.check_columns(call)
    check_real(call.tensors)
    if in_dual_level():
        check_no_tangents(call.tensors)
    columns.check_word_alignment(call)
    if check:
        check_counts(call.rows, None, shape.mn, shape.mn)
    results = allocate(call, shape)
    _check_regions(call, results)
    if not launch.has_kernels(call.x):
        launch.run(column_reference.quantize_into, (call, *results), [])
    elif call.x.numel():
        _launch(call, results)
    return results


def _launch(call: ColumnCall, results: Results) -> None:
    """Launch the kernel."""
    x, fmt, (q, sf) = call.x, call.columns.fmt, results.columns
    arch = lookup.architecture(x.get_device())
    row_operands: tuple[torch.Tensor | None, ...] = None, None
    missing_rows, written = 0, [q, sf]
    row_floor: float = 0
    row_q = None
    if call.along_k is not None and results.along_k is not None:
        row_fmt, (row_q, row_sf) = call.along_k.fmt, results.along_k
        row_operands = (
            matrix_view(row_q, batched=True).of(row_q),
            view_of_scales(row_sf, row_fmt.scale_dims).of(row_sf),
        )
        missing_rows, row_floor = missing_scale_rows(row_sf, row_fmt), row_fmt.floor
        written += [row_q, row_sf]
    weight = grad = None
    if isinstance(call.prologue, SiluMul):
        weight = call.prologue.weight
    elif isinstance(call.prologue, SiluMulBackward):
        grad = call.prologue.grad
    operands = (
        matrix_view(x, batched=True).of(x),
        matrix_view(q, batched=True).of(q),
        view_of_scales(sf, fmt.scale_dims).of(sf),
        *row_operands,
        None if call.rows is None else call.rows.data,
        call.rng_state,
        None if weight is None else weight.view(-1, weight.shape[-1]),
        None if grad is None else matrix_view(grad, batched=True).of(grad),
    )
    spec, activation = choose_spec(call, results, arch)
    alignment = 1 if call.rows is None else call.rows.alignment
    numbers = alignment, missing_rows, fmt.floor, row_floor, *activation
    calls = functools.partial(CallRange.of_columns, call, q, row_q)
    function = compiled(spec, arch, lambda: calls().remedy(arch))
    launch.run(function, (*operands, *numbers), written)


class Choice(NamedTuple):
    """The spec of a kernel, and the numbers of a gated activation that it takes."""

    spec: ColumnsSpec
    numbers: tuple[float, ...]


def choose_spec(call: ColumnCall, results: Results, arch: str) -> Choice:
    """Choose the spec of the kernel for a call and memory for its results."""
    x, (q, _), k = call.x, results.columns, call.shape.k
    stochastic = call.rng_state is not None
    values = heuristics.column_values(x.dtype, arch, stochastic=stochastic)
    q_values = STORE_BYTES if call.transposed else values
    row_fmt, row_bytes = None, values
    if call.along_k is not None and results.along_k is not None:
        row_fmt = call.along_k.fmt.kernel_format
        row_bytes = _alignment(results.along_k[0], values)
    gated, part, load_bytes = None, k, values * x.itemsize
    numbers: tuple[float, ...] = (0.0, 1.0, 0.0)
    if call.prologue is not None:
        prologue = _prologue(call.prologue, x.dtype, k)
        gated, numbers, part = Gated(**prologue.choices), prologue.numbers, prologue.part or k
        load_bytes = min(load_bytes, prologue.load_bytes)
    spec = ColumnsSpec(
        x.dtype,
        call.columns.fmt.kernel_format,
        values,
        Access(_alignment(x, load_bytes), row_bytes, ragged=part % values != 0),
        Access(store_bytes=_alignment(q, q_values), ragged=q.shape[-1] % q_values != 0),
        call.transposed,
        row_fmt,
        DENSE if call.rows is None else call.rows.kind,
        gated,
        stochastic,
        architectures.named(arch).pdl,
    )
    return Choice(spec, numbers)


def _prologue(prologue: GatedPrologue, dtype: torch.dtype, k: int) -> PrologueChoice:
    """Choose what a gated activation asks of the kernel."""
    if isinstance(prologue, SiluMul):
        return choose_silu_mul(prologue, dtype, k, batched=True)
    choice = choose_silu_mul_backward(prologue, k, batched=True)
    paired = not prologue.interleaved and k % (2 * BLOCK_TILE) == 0
    return choice._replace(choices=choice.choices | {"backward": True, "paired": paired})


def _alignment(t: torch.Tensor, limit: int) -> int:
    """Return the bytes, up to a limit, that all rows of a tensor start at multiples of."""
    return alignment(t.data_ptr(), matrix_view(t, batched=True), t.itemsize, limit)


def allocate(call: ColumnCall, shape: ResultShape) -> Results:
    """Return memory for the results of a call: the caller's, or new."""
    fmt = call.columns.fmt
    of_values = columns.values_shape(shape, call.transposed)
    q, sf = _values(call, call.columns, of_values), call.columns.sf
    if sf is None:
        sf = torch.empty(columns.scale_shape(fmt, shape), dtype=fmt.sf_dtype, device=call.x.device)
    if call.along_k is None:
        return Results((q, sf), None)
    sf_along_k = call.along_k.sf
    if sf_along_k is None:
        sf_along_k = call.along_k.fmt.empty_scales(*shape, call.x.device)
    return Results((q, sf), (_values(call, call.along_k, shape), sf_along_k))


def _values(call: ColumnCall, output: Output, shape: ResultShape) -> torch.Tensor:
    """Return memory for values of a shape."""
    if output.q is not None:
        return output.q
    return torch.empty(shape.values(output.fmt), dtype=output.fmt.values, device=call.x.device)


def _check_regions(call: ColumnCall, results: Results) -> None:
    """Check that the memory that a call writes overlaps nothing else of it."""
    which, (q, sf) = call.which, results.columns
    writes = [region(f"out {which}q", q), region(f"out {which}sf", sf)]
    if call.along_k is not None and results.along_k is not None:
        q, sf = results.along_k
        writes += _regions_along_k(call.along_k.fmt, q, sf)
    check_disjoint([region(name, t) for name, t in call.reads.items() if t is not None], writes)


def _regions_along_k(fmt: Format, q: torch.Tensor, sf: torch.Tensor) -> list[Region]:
    return [region("out q", q), region_of_scales("out sf", sf, mn_major=fmt.mn_major)]
