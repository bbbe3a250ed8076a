"""Measure what is not one dense matrix of 16-bit rows: masked experts above all.

    python -m bench.masked [--columns K] [--experts E:MAX_M,...] [--output FILE]

Each row of the table is one kind of call. Beside its time: that of the dense kernel on as many
rows, where there is one to compare with, and that of a kernel that only streams as many bytes as
the call has to move, each live row and scale once. Two thirds of the streamed bytes are reads, as
for 16-bit inputs; those of other calls are mixed otherwise.

Calls are those of `quantize`, so programmatic dependents of each other, in CUDA graphs over
rotating buffers; the measurements of a row alternate, with as many buffers each. Outputs are
compared with the reference before they are timed.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from bench import environment, report
from bench.ceiling import ELEMENTS, Ceiling, Words, allocate
from bench.problem import FLOAT32, POISON, UE8M0
from bench.shapes import MAIN_COLUMN
from bench.stream import Traffic
from cute_quant import (
    MXFP8,
    ROWWISE_FP8,
    Format,
    Indexed,
    Masked,
    PrefixSum,
    dequantize,
    fake_quantize,
    quantize,
)
from cute_quant.contract import scale_storage
from cute_quant.lab import timing

EXPERTS = ((32, 1024), (256, 4096))
"""Experts of a GPU and rows that each has memory for: when decoding, and when prefilling."""

LIVE_ROWS = (8, 64, 512)
"""Live rows of each expert."""

ROWS = (64, 1024, 16384)
"""Rows of calls that are not masked."""

ZIPF_EXPONENT = 1.2
MATRICES = 8
"""Matrices of a batch."""
GROUPS = 32
"""Contiguous groups of rows, and the alignment of their starts, as in DeepGEMM."""
ALIGNMENT = 128

MEMORY_SHARE = 0.8
SAMPLED_ROWS = 16
DEVICE = "cuda"


class Call(NamedTuple):
    """A call on memory of its own.

    Attributes:
        run: what is measured.
        difference: how results differ from the reference in some rows; empty where no bit does.
    """

    run: Callable[[], object]
    difference: Callable[[], str]


@dataclass(frozen=True)
class Case:
    """A row of the table.

    Attributes:
        rows: live ones.
        bytes: to be read and written.
        allocation: bytes of one buffer.
        make: a call on a new buffer.
        dense: whether the dense kernel on as many rows is measured too.
    """

    name: str
    rows: int
    k: int
    bytes: int
    allocation: int
    make: Callable[[], Call]
    dense: bool = True


@dataclass(frozen=True)
class Result:
    """Medians, in seconds a call."""

    name: str
    rows: int
    k: int
    bytes: int
    buffers: int
    seconds: float
    quartiles: tuple[float, float]
    dense_seconds: float | None
    stream_seconds: float


def bytes_moved(rows: int, k: int, fmt: Format, itemsize: int = 2) -> int:
    return rows * k * (itemsize + 1) + rows * fmt.groups(k) * fmt.scale_dtype.itemsize


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=DEVICE).normal_()


def poison(*tensors: torch.Tensor) -> None:
    for t in tensors:
        storage = torch.empty(0, dtype=torch.uint8, device=t.device)
        storage.set_(t.untyped_storage()).fill_(POISON)


def sample(live: torch.Tensor) -> torch.Tensor:
    """Return the indices of some live rows, (rows,), the first and the last among them."""
    numbers = live.flatten().nonzero().flatten()
    picked = torch.linspace(0, len(numbers) - 1, min(SAMPLED_ROWS, len(numbers)))
    sampled: torch.Tensor = numbers[picked.round().long().to(numbers.device)].unique()
    return sampled


def scales_by_row(sf: torch.Tensor, fmt: Format, mn: int, k: int) -> torch.Tensor:
    """Return scales as integers (rows, columns), the matrices of a batch stacked along M."""
    scales = scale_storage.read(sf, fmt, mn, k)
    return scales.view(torch.int32 if scales.dtype is torch.float32 else torch.uint8).flatten(0, 1)


def difference(
    q: torch.Tensor,
    sf: torch.Tensor,
    fmt: Format,
    numbers: torch.Tensor,
    source: torch.Tensor,
) -> str:
    """Describe how results differ from the reference, empty if they are equal.

    Args:
        q: values of the results.
        sf: scales of the results.
        fmt: format of both.
        numbers: rows to compare, counted over all matrices.
        source: input of these rows.
    """
    mn, k = q.shape[-2:]
    expected_q, expected_sf = quantize(source.cpu(), fmt)
    actual_q = q.view(torch.uint8).flatten(0, -2)[numbers].cpu()
    wrong_q = int((actual_q != expected_q.view(torch.uint8)).sum())
    actual_sf = scales_by_row(sf, fmt, mn, k)[numbers].cpu()
    expected_sf = scales_by_row(expected_sf, fmt, len(numbers), k)
    wrong_sf = int((actual_sf != expected_sf).sum())
    if wrong_q or wrong_sf:
        return f"{wrong_q} values and {wrong_sf} scales in {len(numbers)} rows"
    return ""


def quantizing(
    x: torch.Tensor,
    fmt: Format,
    live: torch.Tensor | None = None,
    rows: Masked | PrefixSum | Indexed | None = None,
    index: torch.Tensor | None = None,
) -> Call:
    """Return a call of `quantize` that writes memory of its own.

    Args:
        x: the input.
        fmt: format of the results.
        live: (..., mn), whether a row exists. By default all do.
        rows: row domain of the call.
        index: rows of `x` to gather.
    """
    *batch, mn, k = x.shape if index is None else (*index.shape, x.shape[-1])
    q = torch.empty((*batch, mn, k), dtype=fmt.values, device=DEVICE)
    sf = fmt.empty_scales(batch, mn, k, torch.device(DEVICE))
    run = functools.partial(quantize, x, fmt, rows=rows, index=index, out=(q, sf))
    live = torch.ones((*batch, mn), dtype=torch.bool, device=DEVICE) if live is None else live

    def check() -> str:
        poison(q, sf)
        run()
        numbers = sample(live)
        if index is not None:
            source = x[index.flatten()[numbers].long()]
        elif batch:
            source = x[numbers // mn, numbers % mn]
        else:
            source = x[numbers]
        found = difference(q, sf, fmt, numbers, source)
        dead = sample(~live) if rows is not None and not live.all() else ()
        if not found and len(dead):
            held = POISON if isinstance(rows, Masked) else 0
            wrong = int((q.view(torch.uint8).flatten(0, -2)[dead] != held).sum())
            found = f"{wrong} values of rows that do not exist" if wrong else ""
        return found

    return Call(run, check)


def dense(mn: int, k: int) -> Call:
    return quantizing(random(mn, k), UE8M0)


def streaming(nbytes: int) -> Words:
    """Return memory for a kernel that moves as many bytes in all, a third of them written."""
    traffic = Traffic()
    per_vector = 4 * (traffic.words_in + traffic.words_out)
    return allocate(traffic, -(-nbytes // per_vector) * ELEMENTS)


# What is measured.


def masked_cases(experts: int, max_m: int, k: int) -> Iterator[Case]:
    """Yield cases with the same count of rows for each expert, and with uneven counts."""
    generator = torch.Generator().manual_seed(0)
    alone = torch.zeros(experts, dtype=torch.int64)
    alone[experts // 2] = max_m
    shares = 1 / torch.arange(1, experts + 1).double() ** ZIPF_EXPONENT
    shares = shares[torch.randperm(experts, generator=generator)]
    draws = torch.multinomial(shares, 64 * experts, replacement=True, generator=generator)
    counts = {f"{n} rows each": torch.full((experts,), n) for n in LIVE_ROWS if n <= max_m}
    counts["all rows of one"] = alone
    counts["Zipf, 64 on average"] = draws.bincount(minlength=experts).clamp(max=max_m)
    for name, count in counts.items():
        rows = int(count.sum())
        yield Case(
            f"masked {experts} x {max_m}, {name}",
            rows,
            k,
            bytes_moved(rows, k, UE8M0),
            bytes_moved(experts * max_m, k, UE8M0),
            functools.partial(masked, max_m, k, count.to(torch.int32)),
        )


def masked(max_m: int, k: int, counts: torch.Tensor) -> Call:
    counts = counts.to(DEVICE)
    live = torch.arange(max_m, device=DEVICE) < counts[:, None]
    return quantizing(random(len(counts), max_m, k), UE8M0, live, Masked(counts))


def other_cases(mn: int, k: int) -> Iterator[Case]:
    def case(
        name: str, make: Callable[[], Call], nbytes: int | None = None, dense: bool = True
    ) -> Case:
        nbytes = nbytes or bytes_moved(mn, k, UE8M0)
        return Case(name, mn, k, nbytes, 2 * nbytes, make, dense)

    yield case("dense", functools.partial(dense_call, mn, k), dense=False)
    yield case("batch, transposed", functools.partial(transposed, mn, k))
    yield case("index, in random order", functools.partial(gathered, mn, k, mn))
    tokens = max(mn // MATRICES, 1)
    once = bytes_moved(mn, k, UE8M0) - 2 * (mn - tokens) * k
    yield case(
        f"index, each row {MATRICES} times", functools.partial(gathered, mn, k, tokens), once
    )
    if mn >= GROUPS * ALIGNMENT:
        yield case("prefix sum, padding too", functools.partial(prefix_sum, mn, k))
    yield case("m_indices, padding too", functools.partial(indexed, mn, k))
    for name, fmt, dtype in (
        ("float32 scales", FLOAT32, torch.bfloat16),
        ("float32 input", UE8M0, torch.float32),
        ("MXFP8, groups of 32", MXFP8, torch.bfloat16),
        ("whole row", ROWWISE_FP8, torch.bfloat16),
    ):
        make = functools.partial(dense_call, mn, k, fmt, dtype)
        yield case(name, make, bytes_moved(mn, k, fmt, dtype.itemsize), dense=False)
    yield case("fake_quantize", functools.partial(faked, mn, k), 4 * mn * k, dense=False)
    yield case("dequantize", functools.partial(multiplied_back, mn, k), dense=False)


def dense_call(mn: int, k: int, fmt: Format = UE8M0, dtype: torch.dtype = torch.bfloat16) -> Call:
    return quantizing(random(mn, k, dtype=dtype), fmt)


def transposed(mn: int, k: int) -> Call:
    """Return a call on tokens, each with a row for every matrix, as a batch of matrices."""
    return quantizing(random(mn // MATRICES, MATRICES, k).transpose(0, 1), UE8M0)


def gathered(mn: int, k: int, tokens: int) -> Call:
    order = torch.randperm(mn, device=DEVICE).to(torch.int32) % tokens
    return quantizing(random(tokens, k), UE8M0, index=order)


def groups_of(mn: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ends of groups that start at multiples of the alignment, and which rows are in one."""
    generator = torch.Generator().manual_seed(0)
    step = mn // GROUPS // ALIGNMENT * ALIGNMENT
    starts = torch.arange(GROUPS) * step
    ends = starts + step - torch.randint(ALIGNMENT, (GROUPS,), generator=generator)
    row = torch.arange(mn)
    live = ((starts[:, None] <= row) & (row < ends[:, None])).any(0)
    return ends.to(DEVICE, torch.int32), live.to(DEVICE)


def prefix_sum(mn: int, k: int) -> Call:
    ends, live = groups_of(mn)
    return quantizing(random(mn, k), UE8M0, live, PrefixSum(ends, ALIGNMENT))


def indexed(mn: int, k: int) -> Call:
    generator = torch.Generator().manual_seed(0)
    m_indices = torch.randint(-1, GROUPS, (mn,), generator=generator, dtype=torch.int32)
    m_indices = m_indices.to(DEVICE)
    return quantizing(random(mn, k), UE8M0, m_indices >= 0, Indexed(m_indices))


def faked(mn: int, k: int) -> Call:
    x = random(mn, k)
    y = torch.empty_like(x)
    run = functools.partial(fake_quantize, x, out=y)

    def check() -> str:
        poison(y)
        run()
        return different_rows(y, fake_quantize, x)

    return Call(run, check)


def multiplied_back(mn: int, k: int) -> Call:
    """Return a call of `dequantize`.

    Each result is kept until the next one of the same buffer, so all have memory of their own.
    """
    q, sf = quantize(random(mn, k))
    kept: list[torch.Tensor] = []

    def run() -> None:
        kept[:] = [dequantize(q, sf)]

    def check() -> str:
        run()
        return different_rows(kept[0], dequantize, q, sf)

    return Call(run, check)


def different_rows(
    y: torch.Tensor, function: Callable[..., torch.Tensor], *inputs: torch.Tensor
) -> str:
    """Describe how sampled rows of `y` differ from the reference, empty if they are equal."""
    numbers = sample(torch.ones(len(y), dtype=torch.bool, device=y.device))
    rows = []
    for t in inputs:
        # Elements of 8 bits are picked as bytes.
        picked = t.view(torch.uint8) if t.dtype.itemsize == 1 else t
        rows.append(picked[numbers].cpu().view(t.dtype))
    wrong = int((y[numbers].cpu() != function(*rows)).sum())
    return f"{wrong} products in {len(numbers)} rows" if wrong else ""


# Measuring.


def measure(case: Case) -> Result | str:
    """Time a case, or return the reason why it cannot be timed."""
    torch.cuda.empty_cache()
    memory = int(torch.cuda.mem_get_info()[0] * MEMORY_SHARE)
    fitting = memory // (case.allocation + (2 if case.dense else 1) * case.bytes)
    if fitting < 2:
        return f"needs {2 * case.allocation / 1e9:.0f} GB"
    buffers = min(timing.buffer_count(case.bytes), fitting)
    makers: dict[str, Callable[[], Call]] = {"own": case.make}
    if case.dense:
        makers["dense"] = functools.partial(dense, case.rows, case.k)
    launches = timing.launch_count(case.bytes)
    graphs = {}
    for name, make in makers.items():
        calls = [make() for _ in range(buffers)]
        for call in (calls[0], calls[-1]):
            found = call.difference()
            if found:
                raise RuntimeError(f"{case.name}, {name}: differs from the reference: {found}")
        graphs[name] = timing.capture([call.run for call in calls], launches)
    fastest = Ceiling([streaming(case.bytes) for _ in range(buffers)])
    graphs["stream"] = timing.capture(fastest.calls(), launches)
    measured = timing.measure(graphs)
    return Result(
        case.name,
        case.rows,
        case.k,
        case.bytes,
        buffers,
        measured["own"].median,
        measured["own"].quartiles,
        measured["dense"].median if case.dense else None,
        measured["stream"].median,
    )


HEADER = f"{'':40} {'rows':>7} {'us':>8} {'dense':>8} {'/dense':>7} {'stream':>8} {'/stream':>7}"


def line(result: Result) -> str:
    own, baseline = result.seconds, result.dense_seconds
    ratio = "" if baseline is None else f"{own / baseline:.2f}"
    microseconds = "" if baseline is None else f"{baseline * 1e6:.2f}"
    return (
        f"{result.name:40} {result.rows:7} {own * 1e6:8.2f} {microseconds:>8} {ratio:>7} "
        f"{result.stream_seconds * 1e6:8.2f} {own / result.stream_seconds:7.2f}"
    )


def table_row(result: Result) -> str:
    """Return a row of a table for Markdown."""
    own, baseline = result.seconds, result.dense_seconds
    cells = [result.name, str(result.rows), report.microseconds(own)]
    if baseline is None:
        cells += ["", ""]
    else:
        cells += [report.microseconds(baseline), f"{own / baseline:.2f}"]
    cells.append(f"{own / result.stream_seconds:.2f}")
    return f"| {' | '.join(cells)} |"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.masked",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--columns", type=int, default=MAIN_COLUMN, metavar="K", help="default: %(default)s")
    add("--rows", type=_numbers, default=ROWS, metavar="M,...", help="of calls without experts")
    add("--experts", type=_pairs, default=EXPERTS, metavar="E:MAX_M,...", help="default: all")
    add("--output", type=Path, metavar="FILE", help="JSON lines: the machine, then the results")
    add("--commit", help="name of the measured version, where there is no git to ask")
    return parser.parse_args()


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(","))) if text else ()


def _pairs(text: str) -> tuple[tuple[int, int], ...]:
    """Parse an argument such as ``32:1024,256:4096``.

    Raises:
        ValueError: a part is not a pair of integers.
    """
    return tuple(_pair(part) for part in text.split(",")) if text else ()


def _pair(text: str) -> tuple[int, int]:
    experts, max_m = map(int, text.split(":"))
    return experts, max_m


def main() -> None:
    options = parse()
    if not torch.cuda.is_available():
        sys.exit("bench.masked: needs a CUDA GPU of compute capability 9.0, 10.0 or 10.3")
    torch.manual_seed(0)
    machine = environment.describe("python -m bench.masked", options.commit)
    print(f"{machine['gpu']}, {machine['commit']}, k = {options.columns}, microseconds a call")
    cases = [
        *(case for e, max_m in options.experts for case in masked_cases(e, max_m, options.columns)),
        *(case for mn in options.rows for case in other_cases(mn, options.columns)),
    ]
    timing.warm_up()
    print(HEADER, flush=True)
    lines = [json.dumps({"machine": machine})]
    for case in cases:
        result = measure(case)
        if isinstance(result, str):
            print(f"{case.name:40} {case.rows:7} {result}", flush=True)
            continue
        print(line(result), flush=True)
        lines.append(json.dumps({"result": asdict(result)}))
        if options.output:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
