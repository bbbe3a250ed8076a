"""Hold every kernel against the reference on this machine's GPU, one line each.

Every byte has to be the reference's. Activations and norms compute in float32, the reference in
float64: there the line says how many values and scales are rounded to the neighbour, of which few
may be. Without a GPU, compile each kernel for each architecture; nothing is run, and no result is
compared. Kernels are those of bf16 and the formats of DeepGEMM, NVFP4 and MXFP4, or of a preset.

examples:
  cute-quant check
  cute-quant check --preset all --json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch

import cute_quant
from cute_quant.contract import blocks
from cute_quant.contract.calls import ResultShape
from cute_quant.contract.dtypes import INPUT_DTYPES, STORE_BYTES, UPPER_MAX, ceil_div
from cute_quant.contract.formats import DEEP_GEMM_SM90, Format
from cute_quant.contract.rows import Indexed, Masked, PrefixSum, Rows
from cute_quant.contract.upper_scales import AMAX, DECODE, ENCODE
from cute_quant.dispatch import presets
from cute_quant.jit import keys, lookup, progress
from cute_quant.kernels import heuristics
from cute_quant.kernels.config import (
    DENSE_ROWS,
    BlocksSpec,
    ColumnsSpec,
    ConvertSpec,
    DequantizeSpec,
    Domain,
    QuantizerSpec,
    QuantizeSpec,
    RequantizeSpec,
    RmsNormSpec,
    SiluMulBackwardSpec,
    SiluMulSpec,
    Spec,
)

COLUMNS = 1024
FEW_ROWS = 203
"""No multiple of 4, so that columns of scales have padding."""
SIZES = (
    (FEW_ROWS, COLUMNS),
    (4, COLUMNS // 4),
    (4, COLUMNS),
    *((rows + 3, COLUMNS) for i in range(2, 16) for rows in (2 << i, 3 << i)),
    *((1, COLUMNS >> i) for i in range(2, 5)),
)
"""(mn, k) of results, one for each range of the heuristics on GPUs of 3 to 2000 SMs.

The first that takes a kernel is run: those of a single row on GPUs of few SMs alone."""
WHOLE_ROWS = 208
"""A multiple of 16, for weights that are contiguous along them."""
MATRICES = 3
GROUPS = {PrefixSum.kind: 2, Indexed.kind: 4}
"""Groups of rows stacked along M."""
SEED = 0
POISON = 0xA5

ROUNDED_SHARE, ROUNDED_AT_LEAST = 1e-3, 2
"""Share, and least number, of values and of power-of-two scales that may be off by one step."""
SCALE_ERROR = 2.0**-18
"""Relative error of other scales: 64 roundings of float32."""


class WrongResult(Exception):
    """A kernel's result is not the reference's."""


class Results(NamedTuple):
    """Everything that a call writes.

    Attributes:
        values: what is quantized, or multiplied back.
        scales: if there are any, with all padding in their storage.
        residual, normalized: of a norm, if it writes them.
        decode_scales: of rows, where the call returns them; else of the upper scale, if it has one.
    """

    values: torch.Tensor
    scales: torch.Tensor | None = None
    residual: torch.Tensor | None = None
    normalized: torch.Tensor | None = None
    decode_scales: torch.Tensor | None = None


@dataclass(frozen=True)
class Outcome:
    """Outcome of the check of one kernel.

    Attributes:
        did: whether it was run or only compiled.
        rounded: values and scales that are the neighbours of the reference's; None where all have
            to be equal.
        error: what is wrong, None if nothing is.
    """

    kernel: str
    arch: str
    did: str
    rounded: int | None
    error: str | None

    def __str__(self) -> str:
        verdict = "ok" if self.error is None else "FAILED"
        line = f"{verdict:6} {self.did:8} {self.arch:8} {self.kernel}"
        if self.error is not None:
            return f"{line}: {self.error}"
        return line if self.rounded is None else f"{line}: {self.rounded} rounded to the neighbour"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command to its parser."""
    parser.add_argument("--preset", choices=presets.PRESETS, help="kernels by use")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    """Run the command, and return the exit status."""
    preset = presets.PRESETS[options.preset] if options.preset else presets.of_each_kind
    gpu = torch.cuda.is_available()
    if gpu:
        architectures = [lookup.architecture(torch.cuda.current_device())]
    else:
        architectures = list(lookup.ARCHITECTURES.values())
    kernels = [(spec, arch) for arch in architectures for spec in preset(arch)]
    if not options.json:
        names = ", ".join(architectures)
        task = "comparing with the reference" if gpu else "no GPU: compiling only"
        print(f"{len(kernels)} kernels for {names}, {task}", flush=True)
    outcomes: list[Outcome] = []
    for spec, arch in kernels:
        progress.bar(len(outcomes), len(kernels), f"{arch} {spec.kernel}")
        outcomes.append(_outcome(spec, arch, gpu))
        progress.end_bar()
        if not options.json:
            print(outcomes[-1], flush=True)
    failed = sum(outcome.error is not None for outcome in outcomes)
    if options.json:
        print(json.dumps([asdict(outcome) for outcome in outcomes], indent=1))
    else:
        verdict = "kernels match the reference" if gpu else "kernels compiled, none was run"
        print(f"{len(outcomes) - failed} of {len(outcomes)} {verdict}")
    return 1 if failed else 0


def _outcome(spec: Spec, arch: str, gpu: bool) -> Outcome:
    """Run a kernel and compare its results, or compile it where there is no GPU."""
    rounded = error = None
    try:
        if gpu and isinstance(spec, ColumnsSpec):
            rounded = _compare_columns(spec, _of_columns(spec, "cuda"), _of_columns(spec, "cpu"))
        elif gpu:
            rounded = _compare(spec, _results(spec, "cuda"), _results(spec, "cpu"))
        else:
            lookup.build(lookup.kernel(spec), arch)
    except WrongResult as raised:
        error = str(raised)
    except Exception as raised:
        error = " ".join(f"{type(raised).__name__}: {raised}".split())
    return Outcome(keys.spec_name(spec), arch, "ran" if gpu else "compiled", rounded, error)


def _compare(spec: Spec, actual: Results, expected: Results) -> int | None:
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
        _require_equal("scales", _storage(_scales(actual)).cpu(), _storage(expected.scales))
    return None


def _compare_columns(
    spec: ColumnsSpec, actual: list[Results], expected: list[Results]
) -> int | None:
    """As `_compare`, of all results of a call on columns."""
    count, formats = 0, [f for f in (spec.fmt, spec.row_fmt) if f is not None]
    for fmt, a, b in zip(formats, actual, expected, strict=True):
        if spec.gated is None:
            _require_equal("values", _bytes(a.values), _bytes(b.values))
            _require_equal("scales", _storage(_scales(a)).cpu(), _storage(_scales(b)))
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
    actual, expected = _storage(actual).cpu(), _storage(expected)
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


def _of_columns(spec: ColumnsSpec, device: str) -> list[Results]:
    """Return the results of a call on columns: those of the transpose, then those of rows."""
    generator = torch.Generator().manual_seed(SEED)
    gated, k = spec.gated, COLUMNS
    mn = FEW_ROWS if spec.q_access.ragged and spec.transposed else WHOLE_ROWS
    columns = 2 * k if gated is not None and not gated.backward else k
    x = _activations((mn, columns), spec.dtype, generator, 7).to(device)
    shape = (k, ceil_div(mn, STORE_BYTES) * STORE_BYTES) if spec.transposed else (mn, k)
    memory = torch.full(shape, POISON, dtype=torch.uint8, device=device).view(spec.fmt.values)
    out: Any = (memory[:, :mn] if spec.transposed else memory, None)
    rows, rng_state = None, None
    if spec.kind == PrefixSum.kind:
        rows = PrefixSum(torch.tensor([mn // 4, mn // 2 + 64], dtype=torch.int32, device=device))
    if spec.stochastic:
        rng_state = torch.tensor([1, 2], device=device)
    options: dict[str, Any] = {"rows": rows, "rng_state": rng_state, "transposed": spec.transposed}
    formats: list[Any] = [spec.fmt] if spec.row_fmt is None else [spec.row_fmt, spec.fmt]
    options["out"] = out if spec.row_fmt is None else (None, out)
    inputs: list[torch.Tensor] = [x]
    operation: Callable[..., Any] = cute_quant.quantize_columns
    if spec.row_fmt is not None:
        operation = cute_quant.quantize_both
    if gated is not None:
        operation = cute_quant.silu_mul_quantize_both
        options |= {
            "interleaved": gated.interleaved,
            "clamp": 7.0 if gated.clamped else None,
            "alpha": 1.702 if gated.scaled else 1.0,
            "beta": 1.0 if gated.shifted else 0.0,
        }
        if gated.backward:
            operation = cute_quant.silu_mul_backward_quantize_both
            grad = torch.randn((mn, k // 2), generator=generator)
            inputs.insert(0, grad.to(device, spec.dtype))
        else:
            weight = torch.rand(mn, generator=generator) if gated.weighted else None
            options["weight"] = None if weight is None else weight.to(device)
            options["rounding"] = gated.rounding
    results: Any = operation(*inputs, *formats, **options)
    of_rows, (q, sf) = (None, results) if spec.row_fmt is None else results
    q = q if spec.transposed else q.mT.contiguous()
    found = [Results(q, sf if spec.fmt.blocked else sf.mT)]
    return found if of_rows is None else [*found, Results(*of_rows)]


def _results(spec: Spec, device: str) -> Results:
    """Return the results of a call that takes this kernel."""
    generator = torch.Generator().manual_seed(SEED)
    if isinstance(spec, ConvertSpec):
        return _conversion(spec, device, generator)
    if isinstance(spec, BlocksSpec | RequantizeSpec) or getattr(spec, "square", False):
        return _weights(spec, device, generator)
    assert isinstance(spec, QuantizerSpec | DequantizeSpec), "no selection has it"
    fmt = spec.fmt
    domain = DENSE_ROWS if isinstance(spec, DequantizeSpec) else spec.domain
    batch_shape = (MATRICES,) if domain.batched else ()
    mn, k = _size(spec)
    index = None
    if domain.gathered:
        index = torch.randint(FEW_ROWS, (*batch_shape, mn), dtype=torch.int32, generator=generator)
    own_rows = domain.gathered or domain.scattered
    shape = (FEW_ROWS, k) if own_rows else (*batch_shape, mn, k)
    if isinstance(spec, SiluMulSpec):
        shape = (*shape[:-1], 2 * k)
    # Under one scale for all rows, smaller ones would be 0.
    x = _activations(shape, spec.dtype, generator, 3 if fmt.upper_scale else 14)
    decode_scales = None if spec.upper is None else _decode_scale(spec, x).to(device)
    upper: dict[str, Any] = _upper_scale(spec.upper, decode_scales)
    if domain.grouped:
        # Values are compared before they are multiplied with those of their groups.
        factors = 2.0 ** torch.arange(GROUPS[domain.kind], device=device)
        upper = {name: t * factors for name, t in upper.items()}
        decode_scales = torch.ones((), device=device)
    x = x.to(device)
    if isinstance(spec, QuantizeSpec) and spec.fake:
        return Results(cute_quant.fake_quantize(x, fmt, **upper))
    if isinstance(spec, DequantizeSpec):
        q, sf, *row_scales = cute_quant.quantize(x, fmt, **({} if fmt.row_scale else upper))
        upper = {DECODE: row_scales[0]} if row_scales else upper
        return Results(cute_quant.dequantize(q, sf, fmt, dtype=spec.dtype, **upper))
    columns = fmt.value_columns(k)
    q = torch.full((*batch_shape, mn, columns), POISON, dtype=torch.uint8, device=device)
    q = q.view(fmt.values)
    sf = fmt.empty_scales(batch_shape, mn, k, q.device)
    _storage(sf).fill_(POISON)
    out: tuple[torch.Tensor, ...] = (q, sf)
    if fmt.row_scale:
        decode_scales = torch.full((*batch_shape, mn), torch.nan, device=device)
        out = (q, sf, decode_scales)
    rows = _rows(domain, mn, device, generator)
    moves: dict[str, Any] = {"rows": rows, "index": None if index is None else index.to(device)}
    if domain.scattered:
        # Each row of the result once, and -1.
        places = torch.full((FEW_ROWS * ceil_div(q.numel() // columns + 1, FEW_ROWS),), -1)
        order = torch.randperm(len(places), generator=generator)
        places[order[: q.numel() // columns]] = torch.arange(q.numel() // columns)
        moves["scatter"] = places.view(FEW_ROWS, -1).to(device, torch.int32)
    residual = normalized = None
    rng_state = torch.tensor([1, 2], device=device) if getattr(spec, "stochastic", False) else None
    match spec:
        case QuantizeSpec():
            cute_quant.quantize(x, fmt, **moves, rng_state=rng_state, out=out, **upper)
        case SiluMulSpec():
            weight = None
            if spec.weighted:
                of_rows = x.shape[:-1] if domain.scattered else q.shape[:-1]
                weight = torch.rand(of_rows, generator=generator).to(device)
            cute_quant.silu_mul_quantize(
                x,
                fmt,
                **moves,
                interleaved=spec.interleaved,
                clamp=7.0 if spec.clamped else None,
                alpha=1.702 if spec.scaled else 1.0,
                beta=1.0 if spec.shifted else 0.0,
                weight=weight,
                rounding=spec.rounding,
                out=out,
                **upper,
            )
        case SiluMulBackwardSpec():
            grad = torch.randn((*x.shape[:-1], k // 2), generator=generator)
            cute_quant.silu_mul_backward_quantize(
                grad.to(device, x.dtype),
                x,
                fmt,
                rows=rows,
                interleaved=spec.interleaved,
                clamp=7.0 if spec.clamped else None,
                alpha=1.702 if spec.scaled else 1.0,
                beta=1.0 if spec.shifted else 0.0,
                rng_state=rng_state,
                out=out,
                **upper,
            )
        case RmsNormSpec():
            weight = torch.randn(k, generator=generator).to(device, spec.weight_dtype)
            if spec.residual:
                residual = torch.randn(x.shape, generator=generator).to(device, x.dtype)
            written = cute_quant.rms_norm_quantize(
                x,
                weight,
                fmt,
                residual=residual,
                **moves,
                rounding=spec.rounding,
                normalized=spec.normalized,
                out=out,
                **upper,
            )
            normalized = written[-1] if spec.normalized else None
    return Results(q, sf, residual, normalized, decode_scales)


def _weights(spec: Spec, device: str, generator: torch.Generator) -> Results:
    """Return the results of a call on weights that takes this kernel."""
    assert isinstance(spec, BlocksSpec | RequantizeSpec | DequantizeSpec)
    fmt, transposed = spec.fmt, isinstance(spec, BlocksSpec) and spec.transposed
    rows, k = (WHOLE_ROWS, COLUMNS) if transposed else _size(spec)
    w = _activations((rows, k), torch.float32, generator, 3)
    if isinstance(spec, DequantizeSpec):
        q, sf = cute_quant.quantize_blocks(w.to(device), fmt)
        return Results(cute_quant.dequantize_blocks(q, sf, fmt, dtype=spec.dtype))
    upper = None if isinstance(spec, BlocksSpec) else spec.upper
    scales = _upper_scale(upper, _decode_scale(spec, w).to(device))
    q = torch.full((rows, fmt.value_columns(k)), POISON, dtype=torch.uint8, device=device)
    q = q.view(fmt.values)
    by_row = isinstance(spec, RequantizeSpec)
    sf = (
        fmt.empty_scales((), rows, k, q.device)
        if by_row
        else blocks.empty_scales(fmt, ResultShape((), rows, k), q.device)
    )
    _storage(sf).fill_(POISON)
    if by_row or spec.dtype is fmt.values:
        w8, w_sf = cute_quant.quantize_blocks(
            w, DEEP_GEMM_SM90.replace(group_size=spec.source_block)
        )
        w8, w_sf = (_along_n(w8) if transposed else w8).to(device), w_sf.to(device)
        cute_quant.requantize_blocks(w8, w_sf, fmt, out=(q, sf), **scales)
    else:
        w = w.to(spec.dtype)
        w = (_along_n(w) if transposed else w).to(device)
        cute_quant.quantize_blocks(w, fmt, out=(q, sf))
    return Results(q, sf)


def _along_n(w: torch.Tensor) -> torch.Tensor:
    """Return the same weights contiguous along n."""
    return w.mT.contiguous().mT


def _conversion(spec: ConvertSpec, device: str, generator: torch.Generator) -> Results:
    """Return the results of a conversion of scales that takes this kernel."""
    fmt, to = (one.replace(round_scale=not one.byte_scales) for one in (spec.source, spec.result))
    x = _activations((FEW_ROWS, COLUMNS), torch.float32, generator, 14)
    _, sf = cute_quant.quantize(x.to(device), fmt)
    result = to.empty_scales((), FEW_ROWS, COLUMNS, sf.device)
    _storage(result).fill_(POISON)
    cute_quant.convert_scales(sf, fmt, to, x.shape, out=result)
    return Results(result, result)


def _decode_scale(spec: Spec, x: torch.Tensor) -> torch.Tensor:
    """Return a scale that maps what a call quantizes to the range of its format."""
    amax = x.float().nan_to_num(0.0, 0.0, 0.0).abs().amax()
    match spec:
        case SiluMulSpec() | SiluMulBackwardSpec():
            amax = amax * amax
        case RmsNormSpec():
            amax = amax.new_tensor(32.0)
    return amax / UPPER_MAX


def _upper_scale(kind: str | None, decode_scale: torch.Tensor | None) -> dict[str, Any]:
    """Return the argument that gives an upper scale, none without one."""
    if kind is None or decode_scale is None:
        return {}
    forms = {
        DECODE: decode_scale,
        ENCODE: 1.0 / decode_scale,
        AMAX: decode_scale * UPPER_MAX,
    }
    return {kind: forms[kind]}


def _size(spec: Spec) -> tuple[int, int]:
    """(mn, k) of a result that a kernel of this tile is launched for."""
    if isinstance(spec, QuantizerSpec) and (isinstance(spec, RmsNormSpec) or spec.fmt.by_row):
        return presets.size_of_whole_rows(spec)
    if not isinstance(spec, QuantizeSpec | SiluMulSpec | SiluMulBackwardSpec | RequantizeSpec):
        return SIZES[0]
    domain = DENSE_ROWS if isinstance(spec, RequantizeSpec) else spec.domain
    if domain.scattered or getattr(spec, "fake", False):
        return SIZES[0]
    shape = heuristics.silu_shape
    if isinstance(spec, RequantizeSpec):
        shape = heuristics.wide_shape
    elif isinstance(spec, QuantizeSpec):
        shape = heuristics.wide_shape if spec.stochastic else heuristics.shape
    device = torch.cuda.current_device()
    gpu = lookup.multiprocessors(device), lookup.architecture(device)
    matrices = MATRICES if domain.batched else 1
    for mn, k in SIZES:
        if shape(matrices, mn, k, spec.fmt, domain.masked, *gpu).tile == spec.tile:
            return mn, k
    raise ValueError(f"spec: expected a tile that is chosen for some size, got {spec.tile}")


def _activations(
    shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator, octaves: int
) -> torch.Tensor:
    """Rows of magnitudes from 2^-octaves to 2^octaves; of the first four, some are not finite."""
    x = torch.randn(shape, generator=generator)
    x *= 2.0 ** torch.randint(-octaves, octaves, (*shape[:-1], 1), generator=generator)
    # Slices may be empty, where there are fewer rows or columns.
    x[..., 1:2, :] = 0.0
    x[..., 2:3, 5] = float("nan")
    x[..., 3:4, 200:201] = float("inf")
    return x.to(dtype)


def _rows(domain: Domain, mn: int, device: str, generator: torch.Generator) -> Rows | None:
    def integers(*values: Any) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    if domain.masked:
        return Masked(integers(0, mn // 3, mn))
    if domain.prefix_sum:
        return PrefixSum(integers(mn // 4, min(mn // 2 + 64, mn)))  # GROUPS of them
    if domain.indexed:
        groups = GROUPS[domain.kind]
        experts = torch.randint(-1, groups, (mn,), dtype=torch.int32, generator=generator)
        return Indexed(experts.to(device))
    return None


def _bytes(t: torch.Tensor) -> torch.Tensor:
    """Return the bytes of the elements, on the CPU."""
    return t.cpu().contiguous().flatten().view(torch.uint8)


def _storage(t: torch.Tensor) -> torch.Tensor:
    """The bytes of all of the tensor's storage, where they are."""
    return torch.empty(0, dtype=torch.uint8, device=t.device).set_(t.untyped_storage())
