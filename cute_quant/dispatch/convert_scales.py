"""Scales from one layout to another: views, the kernel, and the operators that torch knows."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch

from cute_quant.contract import scale_conversion
from cute_quant.contract.checks import check_values_shape
from cute_quant.contract.contents import check_counts
from cute_quant.contract.dtypes import BYTES_PER_WORD
from cute_quant.contract.formats import Format
from cute_quant.contract.rows import RowOperands, from_operands, to_operands
from cute_quant.contract.scale_conversion import Conversion
from cute_quant.contract.tensors import (
    check_disjoint,
    check_no_tangents,
    check_real,
    region,
    region_of_scales,
)
from cute_quant.contract.torch_private import in_dual_level
from cute_quant.dispatch import launch, operators, torch_ops
from cute_quant.dispatch.call_range import CallRange
from cute_quant.dispatch.plan import compiled, missing_scale_rows, view_of_scales
from cute_quant.jit import lookup
from cute_quant.kernels import architectures
from cute_quant.kernels.config import ConvertSpec

VECTOR_BYTES = 16


def run(call: Conversion, *, check: bool = False) -> torch.Tensor:
    """Run ``cute_quant.convert_scales`` on tensors with memory.

    Args:
        call: not checked yet.
        check: read counts and scales, which synchronizes, and raise on those that are lost.
    """
    scale_conversion.check(call)
    check_real(call.tensors)
    if in_dual_level():
        check_no_tangents(call.tensors)
    sf, to, shape, result = call.sf, call.to, call.shape, call.out
    if result is None:
        result = to.empty_scales(*shape, sf.device)
    else:
        reads = [region(name, t) for name, t in call.tensors.items() if t is not None]
        reads = [read for read in reads if read.name != "out"]
        check_disjoint(reads, [region_of_scales("out", result, mn_major=to.mn_major)])
    if check:
        check_counts(call.rows, None, 0, shape.mn)
        scale_conversion.check_powers_of_two(call)
    if not result.numel():
        return result
    if launch.has_kernels(sf):
        _launch(call, result)
    else:
        launch.run(scale_conversion.convert_into, (call, result), [result])
    return result


def _launch(call: Conversion, result: torch.Tensor) -> None:
    """Launch the kernel of a call whose result has elements."""
    sf, fmt, to, shape, rows, _ = call
    device = sf.get_device()
    arch = lookup.architecture(device)
    spec = choose_spec(call, result, arch)
    calls = functools.partial(CallRange.of_conversion, call, result)
    function = compiled(spec, arch, lambda: calls().remedy(arch))
    arguments = (
        _operand(sf, fmt),
        _operand(result, to),
        None if rows is None else rows.data,
        shape.mn,
        fmt.groups(shape.k),
        missing_scale_rows(result, to),
        1 if rows is None else rows.alignment,
        call.zero,
    )
    launch.run(function, arguments, [result])


def _operand(sf: torch.Tensor, fmt: Format) -> torch.Tensor:
    """Return scales as the kernel takes them: words, float32, or bytes of any meaning."""
    viewed = view_of_scales(sf, fmt.scale_dims).of(sf)
    assert viewed is not None
    return viewed.view(torch.uint8) if viewed.element_size() == 1 else viewed


def choose_spec(call: Conversion, result: torch.Tensor, arch: str) -> ConvertSpec:
    """Choose the spec of the kernel for a call: its layouts, and the widths that they allow."""
    kind = to_operands(call.rows).rows
    fmt, to = layout_format(call.fmt), layout_format(call.to)
    return ConvertSpec(
        fmt,
        to,
        kind,
        load_bytes(call.sf, fmt),
        store_bytes(result, to),
        architectures.named(arch).pdl,
    )


@functools.cache
def layout_format(fmt: Format) -> Format:
    """Return the format that stands for all with this layout, and bytes or float32 as scales."""
    scale_dtype = torch.float8_e8m0fnu if fmt.byte_scales else torch.float32
    return Format(torch.float8_e4m3fn, 32, scale_dtype, fmt.scale_layout)


def load_bytes(sf: torch.Tensor, fmt: Format) -> int:
    """Return the bytes of a load: the scales of four groups where they are aligned, or one."""
    if fmt.packed:
        return BYTES_PER_WORD
    itemsize = sf.element_size()
    whole = fmt.blocked or (sf.shape[-1] % BYTES_PER_WORD == 0 and sf.stride(-1) == 1)
    four = BYTES_PER_WORD * itemsize
    return four if whole and _aligned(sf, fmt, four) else itemsize


def store_bytes(result: torch.Tensor, to: Format) -> int:
    """Return the bytes of a store: a vector, a word or a scale, as the result is aligned."""
    widest = VECTOR_BYTES
    if not (to.mn_major or to.blocked) and to.byte_scales:
        # A thread has a word of a row. The bytes of a row may end within one.
        ragged = not to.packed and result.shape[-1] % BYTES_PER_WORD != 0
        widest = 1 if ragged else BYTES_PER_WORD
    widths = (VECTOR_BYTES, BYTES_PER_WORD, 1)
    return next(n for n in widths if n <= widest and _aligned(result, to, n))


def _aligned(sf: torch.Tensor, fmt: Format, nbytes: int) -> bool:
    """Return whether vectors start at multiples of `nbytes` in every row, column or block."""
    shape, strides = view_of_scales(sf, fmt.scale_dims)
    used = [s for size, s in zip(shape[:1], strides[:1], strict=True) if size > 1]
    used += [s for size, s in zip(shape[1:], strides[1:], strict=True) if size > 1 and s != 1]
    offsets = (stride * sf.element_size() for stride in used)
    return math.gcd(nbytes, sf.data_ptr(), *offsets) == nbytes


def _call(
    sf: torch.Tensor,
    fmt: str,
    to: str,
    shape: list[int],
    rows: str = "dense",
    row_data: torch.Tensor | None = None,
    alignment: int = 1,
    out: torch.Tensor | None = None,
) -> Conversion:
    """Return the call that the arguments of an operator describe."""
    one, other = Format.parse(fmt), Format.parse(to)
    return Conversion(
        torch_ops.from_stored(sf, one.sf_dtype),
        one,
        other,
        check_values_shape(list(shape)),
        from_operands(RowOperands(rows, row_data, alignment)),
        None if out is None else torch_ops.from_stored(out, other.sf_dtype),
    )


def _convert(*arguments: Any) -> torch.Tensor:
    return torch_ops.as_stored(run(_call(*arguments)))


def _convert_meta(*arguments: Any) -> torch.Tensor:
    call = _call(*arguments)
    scale_conversion.check(call)
    return torch_ops.new_stored_scales(call.sf, call.to, call.shape)


def _convert_out(*arguments: Any) -> None:
    run(_call(*arguments))


def _convert_out_meta(*arguments: Any) -> None:
    scale_conversion.check(_call(*arguments))


_ARGUMENTS = "Tensor sf, str fmt, str to, SymInt[] shape, str rows, Tensor? row_data, int alignment"
operators.register("convert_scales", f"({_ARGUMENTS}) -> Tensor", _convert, _convert_meta, "sf")
operators.register(
    "convert_scales_out",
    f"({_ARGUMENTS}, Tensor(a!) out) -> ()",
    _convert_out,
    _convert_out_meta,
    "sf",
)


def trace(call: Conversion) -> torch.Tensor:
    """Hand a call to its operator, for a tracer to see."""
    to, rows, out = call.to, to_operands(call.rows), call.out
    batch_shape, mn, k = call.shape
    sizes = [*batch_shape, mn, k]
    arguments = (torch_ops.as_stored(call.sf), call.fmt.text, to.text, sizes, *rows)
    if out is None:
        stored = torch.ops.cute_quant.convert_scales(*arguments)
        return torch_ops.from_stored(stored, to.sf_dtype)
    torch.ops.cute_quant.convert_scales_out(*arguments, torch_ops.as_stored(out))
    return out
