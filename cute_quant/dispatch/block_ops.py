"""The operators of weights in square blocks that torch knows, as those of `torch_ops`."""

from __future__ import annotations

import torch

from cute_quant.contract import blocks
from cute_quant.contract.calls import ResultShape
from cute_quant.contract.checks import check_format
from cute_quant.contract.formats import Format
from cute_quant.contract.upper_scales import UpperScale
from cute_quant.dispatch import blocks as launches
from cute_quant.dispatch import operators
from cute_quant.dispatch.torch_ops import (
    UPPER_ARGUMENTS,
    as_stored,
    from_stored,
    new_stored_scales,
    stored_dtype,
    upper_scale_of,
)

Results = tuple[torch.Tensor, torch.Tensor]


def quantize(
    w: torch.Tensor, fmt: Format, q: torch.Tensor | None, sf: torch.Tensor | None
) -> Results:
    """Hand a call of ``quantize_blocks`` to its operator, for a tracer to see."""
    blocks.check_block_format(fmt)
    ops = torch.ops.cute_quant
    if q is None and sf is None:
        return _from_stored(ops.quantize_blocks(w, fmt.text), fmt)
    shape = blocks.check_quantize_blocks(w, fmt, q, sf)
    q, sf = _allocate(w, fmt, shape, q, sf, in_blocks=True)
    ops.quantize_blocks_out(w, q, as_stored(sf), fmt.text)
    return from_stored(q, fmt.values), sf


def requantize(
    w8: torch.Tensor,
    w_sf: torch.Tensor,
    fmt: Format,
    upper: UpperScale | None,
    q: torch.Tensor | None,
    sf: torch.Tensor | None,
) -> Results:
    """Hand a call of ``requantize_blocks`` to its operator, for a tracer to see."""
    check_format(fmt)
    ops = torch.ops.cute_quant
    kind, tensor = (None, None) if upper is None else upper
    if q is None and sf is None:
        return _from_stored(ops.requantize_blocks(w8, w_sf, fmt.text, tensor, kind), fmt)
    shape = blocks.check_requantize_blocks(w8, w_sf, fmt, upper, q, sf)
    q, sf = _allocate(w8, fmt, shape, q, sf, in_blocks=not blocks.quantized_by_row(fmt))
    ops.requantize_blocks_out(w8, w_sf, q, as_stored(sf), fmt.text, tensor, kind)
    return from_stored(q, fmt.values), sf


def dequantize(q: torch.Tensor, sf: torch.Tensor, fmt: Format, dtype: torch.dtype) -> torch.Tensor:
    """Hand a call of ``dequantize_blocks`` to its operator, for a tracer to see."""
    y: torch.Tensor = torch.ops.cute_quant.dequantize_blocks(as_stored(q), sf, fmt.text, dtype)
    return y


def _from_stored(stored: Results, fmt: Format) -> Results:
    q, sf = stored
    return from_stored(q, fmt.values), from_stored(sf, fmt.sf_dtype)


def _as_stored(results: Results) -> Results:
    q, sf = results
    return as_stored(q), as_stored(sf)


def _given(q: torch.Tensor, sf: torch.Tensor, fmt: Format) -> Results:
    """Return the memory of a caller that an operator got."""
    return from_stored(q, fmt.values), from_stored(sf, fmt.sf_dtype)


def _allocate(
    w: torch.Tensor,
    fmt: Format,
    shape: ResultShape,
    q: torch.Tensor | None = None,
    sf: torch.Tensor | None = None,
    *,
    in_blocks: bool,
) -> Results:
    """Return q, as stored if it is new, and sf: the caller's, or new ones on the device of w.

    Scales are of square blocks, or, unless `in_blocks`, of groups of rows.
    """
    if q is None:
        q = w.new_empty(shape.values(fmt), dtype=stored_dtype(fmt.values))
    if sf is None and in_blocks and blocks.stored_once(fmt):
        sf = w.new_empty(blocks.scale_shape(fmt, *shape), dtype=fmt.sf_dtype)
    elif sf is None:
        sf = from_stored(new_stored_scales(w, fmt, shape), fmt.sf_dtype)
    return q, sf


def _quantize(w: torch.Tensor, fmt: str) -> Results:
    return _as_stored(launches.quantize(w, Format.parse(fmt), None, None))


def _quantize_fake(w: torch.Tensor, fmt: str) -> Results:
    parsed = Format.parse(fmt)
    shape = blocks.check_quantize_blocks(w, parsed)
    return _as_stored(_allocate(w, parsed, shape, in_blocks=True))


def _quantize_out(w: torch.Tensor, q: torch.Tensor, sf: torch.Tensor, fmt: str) -> None:
    parsed = Format.parse(fmt)
    launches.quantize(w, parsed, *_given(q, sf, parsed))


def _quantize_out_fake(w: torch.Tensor, q: torch.Tensor, sf: torch.Tensor, fmt: str) -> None:
    parsed = Format.parse(fmt)
    blocks.check_quantize_blocks(w, parsed, *_given(q, sf, parsed))


def _requantize(
    w8: torch.Tensor,
    w_sf: torch.Tensor,
    fmt: str,
    upper: torch.Tensor | None = None,
    upper_kind: str | None = None,
) -> Results:
    scale = upper_scale_of(upper_kind, upper)
    return _as_stored(launches.requantize(w8, w_sf, Format.parse(fmt), scale, None, None))


def _requantize_fake(
    w8: torch.Tensor,
    w_sf: torch.Tensor,
    fmt: str,
    upper: torch.Tensor | None = None,
    upper_kind: str | None = None,
) -> Results:
    parsed = Format.parse(fmt)
    scale = upper_scale_of(upper_kind, upper)
    shape = blocks.check_requantize_blocks(w8, w_sf, parsed, scale)
    in_blocks = not blocks.quantized_by_row(parsed)
    return _as_stored(_allocate(w8, parsed, shape, in_blocks=in_blocks))


def _requantize_out(
    w8: torch.Tensor,
    w_sf: torch.Tensor,
    q: torch.Tensor,
    sf: torch.Tensor,
    fmt: str,
    upper: torch.Tensor | None = None,
    upper_kind: str | None = None,
) -> None:
    parsed, scale = Format.parse(fmt), upper_scale_of(upper_kind, upper)
    launches.requantize(w8, w_sf, parsed, scale, *_given(q, sf, parsed))


def _requantize_out_fake(
    w8: torch.Tensor,
    w_sf: torch.Tensor,
    q: torch.Tensor,
    sf: torch.Tensor,
    fmt: str,
    upper: torch.Tensor | None = None,
    upper_kind: str | None = None,
) -> None:
    parsed, scale = Format.parse(fmt), upper_scale_of(upper_kind, upper)
    blocks.check_requantize_blocks(w8, w_sf, parsed, scale, *_given(q, sf, parsed))


def _dequantize(q: torch.Tensor, sf: torch.Tensor, fmt: str, dtype: torch.dtype) -> torch.Tensor:
    parsed = Format.parse(fmt)
    return launches.dequantize(from_stored(q, parsed.values), sf, parsed, dtype)


def _dequantize_fake(
    q: torch.Tensor, sf: torch.Tensor, fmt: str, dtype: torch.dtype
) -> torch.Tensor:
    parsed = Format.parse(fmt)
    values = from_stored(q, parsed.values)
    shape = blocks.check_dequantize_blocks(values, sf, parsed, dtype)
    return q.new_empty((*shape.batch_shape, shape.mn, shape.k), dtype=dtype)


_MEMORY, _PAIR = "Tensor(a!) q, Tensor(b!) sf", "(Tensor, Tensor)"
_SOURCE, _END = "Tensor w8, Tensor w_sf", f"str fmt, {UPPER_ARGUMENTS}"
operators.register(
    "quantize_blocks", f"(Tensor w, str fmt) -> {_PAIR}", _quantize, _quantize_fake, "w"
)
operators.register(
    "quantize_blocks_out",
    f"(Tensor w, {_MEMORY}, str fmt) -> ()",
    _quantize_out,
    _quantize_out_fake,
    "w",
)
operators.register(
    "requantize_blocks",
    f"({_SOURCE}, {_END}) -> {_PAIR}",
    _requantize,
    _requantize_fake,
    "w8 and w_sf",
)
operators.register(
    "requantize_blocks_out",
    f"({_SOURCE}, {_MEMORY}, {_END}) -> ()",
    _requantize_out,
    _requantize_out_fake,
    "w8 and w_sf",
)
operators.register(
    "dequantize_blocks",
    "(Tensor q, Tensor sf, str fmt, ScalarType dtype) -> Tensor",
    _dequantize,
    _dequantize_fake,
    "q and sf",
)
