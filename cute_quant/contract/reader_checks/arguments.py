"""Arguments of ``check_scales`` that no finding is about."""

from __future__ import annotations

import torch

from cute_quant.contract.calls import Call
from cute_quant.contract.checks import check_row_domain, check_upper_scale, upper_scale_shapes
from cute_quant.contract.dtypes import INPUT_DTYPES
from cute_quant.contract.reader_checks.quantized import Quantized
from cute_quant.contract.tensors import check_device, check_real, check_tensor
from cute_quant.contract.upper_scales import DECODE, UpperScale


def check_arguments(given: Quantized) -> None:
    """Check what no finding is about: memory, the row domain, the upper scale and x.

    Raises:
        TypeError, ValueError, RuntimeError: an argument is wrong.
    """
    q, sf, _, reader, _, rows, upper, x = given
    if reader.k_grouped:
        for name, argument in (("rows", rows), ("x", x)):
            if argument is not None:
                raise ValueError(
                    f"{name}: expected None for {reader.name}, whose groups lie along k, got one"
                )
    check_tensor("q", q, (q.dtype,))
    check_tensor("sf", sf, (sf.dtype,))
    tensors = {"q": q, "sf": sf, "x": x}
    if x is not None:
        check_tensor("x", x, INPUT_DTYPES)
        check_device("x", x, q, "q")
    if rows is not None:
        name = f"rows.{rows.data_name}"
        check_tensor(name, rows.data, (torch.int32,))
        tensors[name] = rows.data
        if q.ndim == 1 + len(rows.dimensions):
            check_row_domain(rows, q, "q", tuple(q.shape[:-1]), "q", q.shape[-1])
    if upper is not None:
        _check_upper_scale(given, upper)
        tensors[upper.kind] = upper.tensor
    check_real(tensors)


def _check_upper_scale(given: Quantized, upper: UpperScale) -> None:
    """Check an upper scale that is given."""
    q, fmt = given.q, given.fmt
    shapes = upper_scale_shapes(
        fmt, tuple(q.shape[:-2]), Call(q, fmt, rows=given.rows, upper=upper)
    )
    if fmt.row_scale:
        if upper.kind != DECODE:
            raise ValueError(
                f"{upper.kind}: expected {DECODE} for {fmt}, the scales of rows that quantize "
                "returned, got a tensor"
            )
        shapes = [tuple(q.shape[:-1])]
    check_upper_scale(upper, fmt, shapes, q, "q")
