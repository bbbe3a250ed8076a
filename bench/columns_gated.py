"""Measure SwiGLU and its gradients, quantized along both directions, beside a copy of the bytes.

    python -m bench.columns_gated [--shapes MxK,...] [--experts N] [--output FILE]

The tables have `silu_mul_quantize_both` and `silu_mul_backward_quantize_both` of bf16, K being the
columns of products, and `quantize_both` as far as it rounds stochastically. Beside them stands what
takes their place: the same in torch, compiled into one kernel that writes bf16, and
`quantize_both`. Times are of launches in CUDA graphs over rotating buffers, ours and those of the
ceiling programmatic dependents of each other. Rows are compared with the operations of rows before
they are timed, and columns with those of torch's bf16 values, which are close.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from bench.cases import Case, Makers, Run, begin, require, run, streaming_bytes
from bench.columns import DEVICE, existing_rows, parse, uneven_experts
from bench.gradients import gradients
from bench.masked import poison, random
from bench.stream import BYTES_PER_WORD
from cute_quant import (
    DEEP_GEMM,
    DEEP_GEMM_32,
    DEEP_GEMM_SM90,
    MXFP8,
    Format,
    PrefixSum,
    bind,
    quantize,
    quantize_both,
    quantize_columns,
    silu_mul_backward_quantize,
    silu_mul_backward_quantize_both,
    silu_mul_quantize,
    silu_mul_quantize_both,
)

SHAPES = ((2048, 2048), (8192, 4096), (16384, 2048))
LARGEST_ERROR = 0.2
"""Largest error of columns, next to those of values that torch rounded to bf16 before."""
Operation = Callable[..., Any]
OPERATIONS: dict[str, tuple[Operation, Operation]] = {
    "x": (quantize_both, quantize),
    "products": (silu_mul_quantize_both, silu_mul_quantize),
    "gradients": (silu_mul_backward_quantize_both, silu_mul_backward_quantize),
}
"""Operations on both directions, and on rows, by what is quantized."""
RESULTS = {"x": 1, "products": 1, "gradients": 2}
"""Columns of results, for each of K."""


class Kind(NamedTuple):
    """Calls that are alike but for their sizes.

    Attributes:
        of: what is quantized, of ``RESULTS``.
        fmt, column_fmt, transposed: of the results.
        experts: whether rows are stacked experts.
        stochastic: whether values are rounded by random numbers.
    """

    of: str
    fmt: Format
    column_fmt: Format
    transposed: bool
    experts: bool = False
    stochastic: bool = False

    def __str__(self) -> str:
        names = {DEEP_GEMM_SM90: "SM90", DEEP_GEMM_32: "32", MXFP8: "MXFP8"}
        direction = "transposed" if self.transposed else "as x lies"
        words = [self.of, names[self.column_fmt], direction]
        return " ".join([*words, *["experts"] * self.experts, *["stochastic"] * self.stochastic])


SM90 = DEEP_GEMM_SM90, DEEP_GEMM_SM90, True
SM100 = DEEP_GEMM, DEEP_GEMM_32, False
KINDS = (
    *(
        Kind(of, *formats, experts)
        for of in ("products", "gradients")
        for formats, experts in (
            (SM90, False),
            (SM90, True),
            (SM100, False),
            ((MXFP8, MXFP8, True), False),
        )
    ),
    *(Kind(of, *SM90, False, True) for of in RESULTS),
)


def inputs(kind: Kind, mn: int, k: int) -> list[torch.Tensor]:
    """Return the tensors that are read."""
    shapes = {"x": [k], "products": [2 * k], "gradients": [k, 2 * k]}
    return [random(mn, columns) for columns in shapes[kind.of]]


def values(kind: Kind, *given: torch.Tensor) -> torch.Tensor:
    """Return what is quantized, in bfloat16."""
    if kind.of == "x":
        return given[0]
    if kind.of == "gradients":
        return gradients(*given)
    gate, up = given[0].float().chunk(2, -1)
    return (functional.silu(gate) * up).bfloat16()


def quantizing(kind: Kind, mn: int, k: int, rows: PrefixSum | None) -> Run:
    """Return a launch, after its results were compared."""
    operation, of_rows = OPERATIONS[kind.of]
    given = inputs(kind, mn, k)
    options: dict[str, Any] = {"rows": rows}
    drawn: dict[str, Any] = {}
    if kind.stochastic:
        drawn = {"rng_state": torch.tensor([1, 2], device=DEVICE)}
    launch = bind(
        *given,
        kind.fmt,
        kind.column_fmt,
        operation=operation,
        transposed=kind.transposed,
        **options,
        **drawn,
    )
    row_pair, columns = launch.results
    poison(*row_pair, *columns)
    launch()
    if not (kind.stochastic and kind.of == "products"):
        expected = of_rows(*given, kind.fmt, **options, **drawn)
        for actual, wanted in zip(row_pair, expected, strict=True):
            if actual.itemsize == 1:
                actual, wanted = actual.view(torch.uint8), wanted.view(torch.uint8)
            require(torch.equal(actual, wanted), f"{kind}: rows")
    if not kind.stochastic:
        rounded = quantize_columns(
            values(kind, *given), kind.column_fmt, transposed=kind.transposed, **options
        )
        actual, wanted = (t[0].float() for t in (columns, rounded))
        error = ((actual - wanted).norm() / wanted.norm()).item()
        require(error < LARGEST_ERROR, f"{kind}: columns")
    return launch


def in_torch(kind: Kind, mn: int, k: int, rows: PrefixSum | None) -> Run:
    """Return calls that compute bf16 in a kernel, and quantize it in another."""
    given = inputs(kind, mn, k)
    compiled = torch.compile(functools.partial(values, kind), dynamic=False)
    options: dict[str, Any] = {"transposed": kind.transposed, "rows": rows}
    return lambda: quantize_both(compiled(*given), kind.fmt, kind.column_fmt, **options)


def cases(shapes: list[tuple[int, int]], count: int) -> Iterator[Case]:
    """Yield a case for each kind and shape; scales are not counted."""
    for mn, k in shapes:
        for kind in KINDS:
            rows = uneven_experts(mn, count) if kind.experts else None
            # Of 8 columns, or 16 of x: loads, their words, and words of both results.
            of, vectors = kind.of, k // (16 if kind.of == "x" else 8)
            loads, words_in, words_out = {
                "x": (1, 8, 8),
                "products": (1, 8, 4),
                "gradients": (3, 4, 8),
            }[of]
            read, written = loads * words_in * existing_rows(rows, mn), words_out * mn
            moved = BYTES_PER_WORD * (read + written) * vectors
            makers: Makers = {
                "cute_quant": functools.partial(quantizing, kind, mn, k, rows),
                "stream": functools.partial(streaming_bytes, moved, words_in, words_out, loads),
            }
            if not kind.stochastic:
                makers["torch first"] = functools.partial(in_torch, kind, mn, k, rows)
            yield Case(str(kind), mn, RESULTS[of] * k, moved, makers)


def main() -> None:
    options = parse("bench.columns_gated", __doc__, "products", SHAPES)
    machine = begin("bench.columns_gated", options.commit)
    run(cases(options.shapes, options.experts), machine, "torch first", options.output)


if __name__ == "__main__":
    main()
