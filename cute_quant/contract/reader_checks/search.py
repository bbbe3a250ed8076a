"""All that is wrong between a producer of quantized values and a GEMM that reads them."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from cute_quant.contract import scale_storage
from cute_quant.contract.calls import ResultShape
from cute_quant.contract.format_choices import ROW_MAJOR
from cute_quant.contract.reader_checks.k_grouped import wrong_k_grouped
from cute_quant.contract.reader_checks.operands import (
    wrong_dtypes,
    wrong_format,
    wrong_shapes,
)
from cute_quant.contract.reader_checks.padding import wrong_padding
from cute_quant.contract.reader_checks.placement import wrong_alignment, wrong_strides
from cute_quant.contract.reader_checks.quantized import Finding, Quantized
from cute_quant.contract.reader_checks.scales import wrong_nan, wrong_powers_of_two
from cute_quant.contract.reader_checks.upper_scale import wrong_upper_scale
from cute_quant.contract.reader_checks.values import wrong_values
from cute_quant.contract.reference.blocks import rows_of_blocks
from cute_quant.contract.scale_conversion import rows_that_exist


def findings(given: Quantized) -> list[Finding]:
    """Return all that is wrong, first what is wrong before values are looked at."""
    if given.reader.k_grouped:
        return list(wrong_k_grouped(given))
    found = [*wrong_format(given), *wrong_dtypes(given)]
    if found:
        return found
    found = list(wrong_shapes(given))
    if not given.q.numel():
        return found
    found += [*wrong_strides(given), *wrong_alignment(given)]
    if any(finding.rule in ("shape", "strides") for finding in found):
        return found
    if given.x is not None and tuple(given.x.shape) != (expected := _sizes(given.shape)):
        text = f"x: expected the shape of the values {expected}, got {tuple(given.x.shape)}"
        found.append(Finding("shape", text))
        given = given._replace(x=None)
    return [*found, *(_contents_of_blocks if given.of_blocks else _contents)(given)]


def _sizes(shape: ResultShape) -> tuple[int, ...]:
    return (*shape.batch_shape, shape.mn, shape.k)


def _contents(given: Quantized) -> Iterator[Finding]:
    """Look at values and scales, which synchronizes."""
    sf, fmt, shape = given.sf, given.fmt, given.shape
    scales = scale_storage.read(sf, fmt, shape.mn, shape.k)
    live = torch.ones(scales.shape[:2], dtype=torch.bool, device=sf.device)
    if given.rows is not None:
        live = live & rows_that_exist(given.rows, shape.mn)
    yield from wrong_padding(given, shape)
    if given.reader.powers_of_two and not fmt.byte_scales:
        # In every row: the device looks at those that nobody asks for too.
        yield from wrong_powers_of_two(scales, given.reader)
    yield from wrong_nan(scales, live, fmt)
    if fmt.upper_scale:
        yield from wrong_upper_scale(given, scales, live)
    yield from wrong_values(given, shape, live)


def _contents_of_blocks(given: Quantized) -> Iterator[Finding]:
    """Look at values and at float32 scales of square blocks, which synchronizes."""
    fmt, shape = given.fmt, given.shape
    scales = given.sf.reshape(-1, *given.sf.shape[-2:])
    if given.reader.powers_of_two:
        yield from wrong_powers_of_two(scales, given.reader)
    yield from wrong_nan(scales, torch.ones_like(scales[..., 0], dtype=torch.bool), fmt)
    by_row = rows_of_blocks(given.sf, fmt.group_size, shape.mn).contiguous()
    given = given._replace(sf=by_row, fmt=fmt.replace(scale_layout=ROW_MAJOR))
    live = torch.ones(len(scales), shape.mn, dtype=torch.bool, device=scales.device)
    yield from wrong_values(given, shape, live)
