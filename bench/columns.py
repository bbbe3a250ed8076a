"""Measure groups along rows, and both directions from one read, beside a copy of as many bytes.

    python -m bench.columns [--shapes MxK,...] [--experts N] [--output FILE]

The tables have `quantize_columns` of bf16 as x lies and transposed, over all rows and over experts
of uneven sizes, and `quantize_both`. Rows between experts are written as zeros but not read, which
the bytes of the copy leave out. Beside them stands what takes their place without them: a copy of
the transpose, and `quantize`. Times are of launches in CUDA graphs over rotating buffers, ours
and those of the ceiling programmatic dependents of each other. Outputs are compared with the
reference on the CPU before they are timed, in the first and the last columns.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from bench.cases import Case, Makers, Run, begin, parser_of, require, run, streaming_bytes
from bench.masked import poison, random
from cute_quant import (
    DEEP_GEMM_32,
    DEEP_GEMM_SM90,
    MXFP8,
    Format,
    PrefixSum,
    bind,
    convert_scales,
    quantize,
    quantize_both,
    quantize_columns,
)
from cute_quant.contract.dtypes import align
from cute_quant.contract.format_choices import ROW_MAJOR
from cute_quant.contract.reference.rows import groups_of_rows

SHAPES = ((2048, 7168), (8192, 8192), (16384, 7168))
EXPERTS = 32
ALIGNMENT = 128
ROWS_PER_EXPERT = 2 * ALIGNMENT
"""On average at least, with padding: fewer rows have fewer experts."""
COMPARED = 256
"""Columns at each end that are compared with the reference."""
DEVICE = "cuda"


class Kind(NamedTuple):
    """Calls that are alike but for their sizes.

    Attributes:
        fmt: of columns.
        transposed: whether their values are the transpose.
        row_fmt: of rows in the same call, None without.
        experts: whether rows are stacked experts.
    """

    fmt: Format
    transposed: bool
    row_fmt: Format | None = None
    experts: bool = False

    def __str__(self) -> str:
        names = {DEEP_GEMM_SM90: "SM90", DEEP_GEMM_32: "32", MXFP8: "MXFP8"}
        direction = "transposed" if self.transposed else "as x lies"
        words = ["both" if self.row_fmt else "columns", names[self.fmt], direction]
        return " ".join([*words, *["experts"] * self.experts])


KINDS = (
    Kind(DEEP_GEMM_SM90, False),
    Kind(DEEP_GEMM_32, False),
    Kind(DEEP_GEMM_SM90, True),
    Kind(MXFP8, True),
    Kind(DEEP_GEMM_32, False, None, True),
    Kind(DEEP_GEMM_SM90, True, None, True),
    Kind(DEEP_GEMM_SM90, True, DEEP_GEMM_SM90),
    Kind(DEEP_GEMM_32, False, DEEP_GEMM_32),
    Kind(MXFP8, True, MXFP8),
    Kind(DEEP_GEMM_SM90, True, DEEP_GEMM_SM90, True),
)


def uneven_experts(mn: int, count: int) -> PrefixSum:
    """Return up to `count` groups of rows whose sizes vary by a factor of 3, one of them empty.

    Raises:
        ValueError: not one of them fits in mn rows.
    """
    if mn < ROWS_PER_EXPERT or count < 1:
        raise ValueError(
            f"mn, count: expected at least {ROWS_PER_EXPERT} rows and 1 expert, got {mn}, {count}"
        )
    count = min(count, mn // ROWS_PER_EXPERT)
    generator = torch.Generator().manual_seed(0)
    shares = torch.rand(count, generator=generator) + 0.5
    if count > 1:
        shares[count // 2] = 0.0
    sizes = (shares / shares.sum() * (mn - count * ALIGNMENT // 2)).int().tolist()
    ends, end = [], 0
    for size in sizes:
        end = min(align(end, ALIGNMENT) + size, mn)
        ends.append(end)
    return PrefixSum(torch.tensor(ends, dtype=torch.int32, device=DEVICE), ALIGNMENT)


def existing_rows(rows: PrefixSum | None, mn: int) -> int:
    """Return how many of mn rows are in a group, all without groups."""
    return mn if rows is None else int((groups_of_rows(rows, mn) >= 0).sum())


def rows_of_scales(sf: torch.Tensor, fmt: Format, columns: int, mn: int) -> torch.Tensor:
    """Return the bytes of scales in blocks, (columns, groups) on the CPU, without padding."""
    to = fmt.replace(scale_layout=ROW_MAJOR)
    return convert_scales(sf.cpu(), fmt, to, (columns, mn)).view(torch.uint8)


def compare(x: torch.Tensor, kind: Kind, rows: PrefixSum | None, results: Any) -> None:
    """Compare the results of columns at both ends with the reference."""
    q, sf = results
    on_cpu = None if rows is None else PrefixSum(rows.ends.cpu(), rows.alignment)
    for some in (slice(0, COMPARED), slice(x.shape[1] - COMPARED, x.shape[1])):
        expected = quantize_columns(
            x[:, some].cpu().contiguous(), kind.fmt, transposed=kind.transposed, rows=on_cpu
        )
        part = (some,) if kind.transposed else (slice(None), some)
        actual = q.view(torch.uint8)[part].cpu()
        require(torch.equal(actual, expected[0].view(torch.uint8)), f"{kind}: values")
        if kind.fmt.blocked:
            scales = rows_of_scales(sf, kind.fmt, x.shape[1], x.shape[0])[some]
            wanted = rows_of_scales(expected[1], kind.fmt, COMPARED, x.shape[0])
        else:
            scales, wanted = sf[:, some].cpu(), expected[1]
        require(torch.equal(scales, wanted), f"{kind}: scales")


def quantizing(kind: Kind, mn: int, k: int, rows: PrefixSum | None) -> Run:
    """Return a launch."""
    x = random(mn, k)
    options: dict[str, Any] = {"transposed": kind.transposed, "rows": rows}
    if kind.row_fmt is None:
        launch = bind(x, kind.fmt, operation=quantize_columns, **options)
        tensors = columns = launch.results
    else:
        launch = bind(x, kind.row_fmt, kind.fmt, operation=quantize_both, **options)
        of_rows, columns = launch.results
        tensors = (*of_rows, *columns)
    poison(*tensors)
    launch()
    compare(x, kind, rows, columns)
    if kind.row_fmt is not None:
        for actual, expected in zip(of_rows, quantize(x, kind.row_fmt, rows=rows), strict=True):
            if actual.itemsize == 1:
                actual, expected = actual.view(torch.uint8), expected.view(torch.uint8)
            require(torch.equal(actual, expected), f"{kind}: rows")
    return launch


def transposing(kind: Kind, mn: int, k: int, rows: PrefixSum | None) -> Run:
    """Return calls that quantize a copy of the transpose, and x where both are wanted."""
    x = random(mn, k)

    def call() -> None:
        if kind.row_fmt is not None:
            quantize(x, kind.row_fmt, rows=rows)
        quantize(x.mT.contiguous(), kind.fmt)

    call()
    return call


def cases(shapes: list[tuple[int, int]], count: int) -> Iterator[Case]:
    """Yield a case for each kind and shape; scales are not counted."""
    for mn, k in shapes:
        for kind in KINDS:
            rows = uneven_experts(mn, count) if kind.experts else None
            results = 1 if kind.row_fmt is None else 2
            moved = (2 * existing_rows(rows, mn) + results * mn) * k
            makers: Makers = {
                "cute_quant": functools.partial(quantizing, kind, mn, k, rows),
                "stream": functools.partial(streaming_bytes, moved, 8, 4 * results),
                "transpose first": functools.partial(transposing, kind, mn, k, rows),
            }
            yield Case(str(kind), mn, k, moved, makers)


def parse_shapes(text: str) -> list[tuple[int, int]]:
    shapes = []
    for part in text.split(","):
        mn, k = map(int, part.split("x"))
        shapes.append((mn, k))
    return shapes


def parse(
    module: str, description: str | None, of: str, shapes: Sequence[tuple[int, int]]
) -> argparse.Namespace:
    """Return the options of a benchmark of both directions, with `shapes` of what is quantized."""
    parser = parser_of(module, description)
    add = parser.add_argument
    add("--shapes", type=parse_shapes, default=list(shapes), metavar="MxK,...", help=f"of {of}")
    most = f"at most, {ROWS_PER_EXPERT} rows each on average at least (%(default)s)"
    add("--experts", type=int, default=EXPERTS, metavar="N", help=most)
    return parser.parse_args()


def main() -> None:
    options = parse("bench.columns", __doc__, "x", SHAPES)
    machine = begin("bench.columns", options.commit)
    run(cases(options.shapes, options.experts), machine, "transpose first", options.output)


if __name__ == "__main__":
    main()
