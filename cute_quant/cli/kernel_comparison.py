"""Compare what a kernel writes with the reference, and count neighbours."""

from __future__ import annotations

import torch

import cute_quant
from cute_quant.cli.kernel_results import Results
from cute_quant.contract.dtypes import INPUT_DTYPES
from cute_quant.contract.formats import Format
from cute_quant.contract.tensors import storage_bytes
from cute_quant.kernels.config import (
    ColumnsSpec,
    QuantizeSpec,
    RmsNormSpec,
    SiluMulBackwardSpec,
    SiluMulSpec,
    Spec,
)

ROUNDED_SHARE, ROUNDED_AT_LEAST = 1e-3, 2
"""Share, and least number, of values and of power-of-two scales that may be off by one step."""
SCALE_ERROR = 2.0**-18
"""Relative error of other scales: 64 roundings of float32."""


class WrongResult(Exception):
    """A kernel's result is not the reference's."""


def compare(spec: Spec, actual: Results, expected: Results) -> int | None:
    """How many values and scales are the neighbours of the reference's, None if none may be.

    Raises:
        WrongResult: a result is anything else.
    """
    if expected.residual is not None:
        # Of a NaN no more is promised than that it is one.
        a, b = (_present("the residual", r.residual).cpu() for r in (actual, expected))
        a, b = a.nan_to_num(nan=torch.inf), b.nan_to_num(nan=torch.inf)
        _require_equal("the residual", _bytes(a), _bytes(b))
    if expected.decode_scales is not None:
        a, b = (_present("decode scales", r.decode_scales).cpu() for r in (actual, expected))
        if isinstance(spec, QuantizeSpec):
            _require_equal("decode scales", _bytes(a), _bytes(b))
        wrong = f"more than {SCALE_ERROR:.1g} away from the reference's"
        _require_all("decode scales", _close(a, b), wrong)
    if isinstance(spec, (SiluMulSpec, SiluMulBackwardSpec, RmsNormSpec)):
        count = _neighbouring_scales(_scales(actual), _scales(expected), spec.fmt)
        count += _neighbouring_values(actual, expected, spec.fmt)
        if expected.normalized is not None:
            a = _present("normalized", actual.normalized).cpu().float()
            b = expected.normalized.float()
            step = torch.maximum(a.abs(), b.abs()) * torch.finfo(spec.dtype).eps
            _require_near("normalized", a, b, step)
            count += _few("normalized", (a != b) & ~b.isnan())
        return count
    _require_equal("values", *(_bytes(_one_nan(t.values)) for t in (actual, expected)))
    if expected.scales is not None:
        _require_equal(
            "scales", storage_bytes(_scales(actual)).cpu(), storage_bytes(expected.scales)
        )
    return None


def compare_columns(
    spec: ColumnsSpec, actual: list[Results], expected: list[Results]
) -> int | None:
    """As `compare`, of all results of a call on columns."""
    count, formats = 0, [f for f in (spec.fmt, spec.row_fmt) if f is not None]
    for fmt, a, b in zip(formats, actual, expected, strict=True):
        if spec.gated is None:
            _require_equal("values", _bytes(a.values), _bytes(b.values))
            _require_equal("scales", storage_bytes(_scales(a)).cpu(), storage_bytes(_scales(b)))
        else:
            count += _neighbouring_scales(_scales(a), _scales(b), fmt)
            count += _neighbouring_values(a, b, fmt)
    return None if spec.gated is None else count


def _one_nan(values: torch.Tensor) -> torch.Tensor:
    """Return values multiplied back with one NaN for all; others have the bits of their format."""
    return values.where(~values.isnan(), torch.nan) if values.dtype in INPUT_DTYPES else values


def _present(name: str, t: torch.Tensor | None) -> torch.Tensor:
    """Return a result that the call has to have.

    Raises:
        WrongResult: it has none.
    """
    if t is None:
        raise WrongResult(f"{name}: expected a tensor, got None")
    return t


def _scales(results: Results) -> torch.Tensor:
    """Return the scales of a call that quantizes."""
    return _present("scales", results.scales)


def _require_equal(name: str, actual: torch.Tensor, expected: torch.Tensor) -> None:
    _require_all(f"bytes of {name}", actual == expected, "not the reference's")


def _neighbouring_scales(actual: torch.Tensor, expected: torch.Tensor, fmt: Format) -> int:
    """Return how many scales of a byte are next to the reference's; 0 where scales are floats.

    Floats have to be close to the reference's. Padding and rows that
    nobody writes are equal in any case.
    """
    actual, expected = storage_bytes(actual).cpu(), storage_bytes(expected)
    if not fmt.byte_scales:
        close = _close(actual.view(torch.float32), expected.view(torch.float32))
        _require_all("scales", close, f"more than {SCALE_ERROR:.1g} away from the reference's")
        return 0
    apart = (actual.int() - expected.int()).abs()
    _require_all("scales", apart <= 1, "not neighbours of the reference's")
    return _few("scales", apart == 1)


def _neighbouring_values(actual: Results, expected: Results, fmt: Format) -> int:
    """How many values are the reference's neighbours, but for those under a scale that is."""
    (a, a_scales), (b, b_scales) = (_multiplied_back(r, fmt) for r in (actual, expected))
    largest = torch.maximum(a.abs(), b.abs())
    relative, least = _steps(fmt.values)
    smallest = torch.maximum(a_scales.abs(), b_scales.abs()) * least
    # Multiples of the smallest are as far apart as it, and as their scales put them.
    most = torch.maximum(largest * relative, smallest + largest * SCALE_ERROR)
    _require_near("values", a, b, most)
    differing = _codes(actual.values) != _codes(expected.values)
    return _few("values", differing & _close(a_scales, b_scales).flatten())


def _steps(values: torch.dtype) -> tuple[float, float]:
    """Return the distance of 1 to the next value, and the smallest value."""
    if values is torch.float4_e2m1fn_x2:
        return 0.5, 0.5
    kind = torch.finfo(values)
    return kind.eps, kind.smallest_normal * kind.eps


def _codes(values: torch.Tensor) -> torch.Tensor:
    """Return the codes of values, each in a byte of its own, on the CPU."""
    if values.dtype is not torch.float4_e2m1fn_x2:
        return _bytes(values)
    pairs = _bytes(values)
    return torch.stack([pairs & 0xF, pairs >> 4], -1).flatten()


def _ones(values: torch.Tensor) -> torch.Tensor:
    """Return ones in the shape and dtype of values."""
    if values.dtype is not torch.float4_e2m1fn_x2:
        return torch.ones(values.shape).to(values.dtype)
    return torch.full(values.shape, 0x22, dtype=torch.uint8).view(values.dtype)


def _multiplied_back(results: Results, fmt: Format) -> tuple[torch.Tensor, torch.Tensor]:
    """Values times scales, and the scale of each value, in float32 on the CPU."""
    q, sf = results.values.cpu(), _scales(results).cpu()
    upper = None if results.decode_scales is None else results.decode_scales.cpu()
    values, scales = (
        cute_quant.dequantize(t, sf, fmt, dtype=torch.float32, decode_scale=upper)
        for t in (q, _ones(q))
    )
    return values, scales


def _close(actual: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    return torch.isclose(actual, expected, rtol=SCALE_ERROR, atol=0.0, equal_nan=True)


def _require_near(name: str, a: torch.Tensor, b: torch.Tensor, most: torch.Tensor) -> None:
    near = ((a - b).abs() <= most) | (a.isnan() & b.isnan())
    _require_all(name, near, "not neighbours of the reference's")


def _require_all(name: str, right: torch.Tensor, wrong: str) -> None:
    if not right.all():
        raise WrongResult(f"{int((~right).sum())} of {right.numel()} {name} are {wrong}")


def _few(name: str, differing: torch.Tensor) -> int:
    count, most = int(differing.sum()), ROUNDED_AT_LEAST + ROUNDED_SHARE * differing.numel()
    if count > most:
        raise WrongResult(
            f"{count} of {differing.numel()} {name} are neighbours of the reference's, expected "
            f"at most {int(most)}"
        )
    return count


def _bytes(t: torch.Tensor) -> torch.Tensor:
    """Return the bytes of the elements, on the CPU."""
    return t.cpu().contiguous().flatten().view(torch.uint8)
