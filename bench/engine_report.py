"""Tables of `bench.engines`, `bench.vllm_layer` and `bench.vllm_model`, from what they printed.

The record is their output, under lines of text that say where and how it was measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

CALLS, LAYER, MODEL = "call", "rows", "step"
"""First columns of the three tables."""


def origin_lines(record: Path) -> Iterator[str]:
    """Yield the lines before the first table."""
    for line in record.read_text(encoding="utf-8").splitlines():
        if line.startswith("|"):
            return
        yield line


def rows_of(record: Path, first: str) -> Iterator[dict[str, str]]:
    """Yield the rows of the table with this first column, cells by the names of their columns."""
    header: list[str] = []
    for line in record.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split(" | ")]
        if not line.startswith("|"):
            header = []
        elif not header:
            header = cells
        elif header[0] == first and not cells[0].startswith("---"):
            yield dict(zip(header, cells, strict=True))


def calls_table(record: Path) -> Iterable[str]:
    """Return a row for each call, a column for each number of rows: vLLM's time and ours."""
    times: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows_of(record, CALLS):
        cell = f"{row['vLLM, us']} / {row['cute_quant, us']}"
        times.setdefault((row["call"], row["vLLM has"]), {})[row["rows"]] = cell
    counts = sorted({count for cells in times.values() for count in cells}, key=int)
    yield from origin_lines(record)
    yield f"| call, vLLM µs / cute_quant µs | vLLM has | {' | '.join(counts)} |"
    yield "| --- | --- |" + " ---: |" * len(counts)
    for names, cells in times.items():
        yield f"| {' | '.join([*names, *(cells.get(count, '') for count in counts)])} |"


def layer_table(record: Path) -> Iterable[str]:
    """Return a row for each number of rows: the quantizer of a linear layer, and all of it."""
    times: dict[str, dict[str, str]] = {}
    for row in rows_of(record, LAYER):
        cell = f"{row['vLLM, us']} / {row['cute_quant, us']}"
        times.setdefault(row["rows"], {})[row["of"]] = cell
    yield "| rows | the quantizer, vLLM µs / cute_quant µs | the layer |"
    yield "| ---: | ---: | ---: |"
    for count, cells in times.items():
        yield f"| {count} | {cells['quantize']} | {cells['apply']} |"


def model_table(record: Path) -> Iterable[str]:
    """Return a row for each kind of step of a model."""
    yield "| step | vLLM µs | cute_quant µs | vLLM / cute_quant |"
    yield "| --- | ---: | ---: | ---: |"
    for row in rows_of(record, MODEL):
        yield f"| {' | '.join(row.values())} |"
