"""Renew the pictures of the documents, and the tables between marks, from recorded results.

    python -m bench.figures

Needs no GPU, but the records of `quantize`, the fused operations and the sweep. The other tables
are left out where their record is missing, and the screenshot of a page where there is no Chromium.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from bench import bound, engine_report, masked, numerics, report, resources, sass, stage_report
from bench.names import CUTE_QUANT, EMPTY_LIKE, NEG, PDL, STREAM
from bench.resources import MACHINES
from bench.results import Results
from cute_quant import NVFP4
from cute_quant.lab import draw, make_layout
from cute_quant.lab import report as sweep_report
from cute_quant.lab.machine_code import EXAMINED, machine_code
from cute_quant.lab.sweep import from_json, origin

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "bench" / "results"
LAYOUTS = ROOT / "docs" / "layouts"
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "performance.md", ROOT / "docs" / "layouts.md")

QUANTIZE = RECORDS / "h100.jsonl"
STAGES = RECORDS / "h100-stages.jsonl"
MASKED = RECORDS / "h100-masked.jsonl"
HOST = RECORDS / "h100-host.jsonl"
FP4 = RECORDS / "h100-fp4.jsonl"
BLOCKS = RECORDS / "h100-blocks.jsonl"
ENGINES = RECORDS / "h100-engines.md"
COLUMNS = RECORDS / "h100-columns.jsonl"
GATED_COLUMNS = RECORDS / "h100-columns-gated.jsonl"
GRADIENTS = RECORDS / "h100-gradients.jsonl"
SWEEP = LAYOUTS / "sweep.json"

SUMMARY_ROWS = 1, 64, 1024, 4096, 32768
MOST_ESTIMATED_ROWS = 16384

PICTURES: dict[str, dict[str, Any]] = {
    "default": {},
    "sixteen": {"threads_per_group": 16, "row_warps": 1},
    "four": {"threads_per_group": 4, "row_warps": 1},
    "nvfp4": {"fmt": NVFP4.replace(scale_layout="8x4"), "row_warps": 1},
}
"""Choices of the layouts that are drawn."""

SASS_KERNELS = (
    "bf16 -> e4m3, ue8m0, rows",
    "bf16 -> e4m3, rounded",
    "bf16 -> nvfp4",
    "bf16 -> mxfp4",
    "SiLU",
    "gradients",
    "RMSNorm",
)
"""How the names of kernels start whose instructions are tabled."""

PAGE: dict[str, Any] = {"rows_per_thread": 2, "row_warps": 2, "column_warps": 2}
PAGE_SIZE = 1280, 1000
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def quantize_table() -> Iterable[str]:
    results = Results.read(QUANTIZE)
    yield from report.origin_lines(results.machine)
    yield from report.table_lines(results, [main_column(results)])


def summary_table() -> Iterable[str]:
    """Return the rows of the README, all with programmatic dependent launch."""
    results = Results.read(QUANTIZE)
    k = main_column(results)
    vllm = next(name for name in results.providers(PDL) if name.startswith("vLLM"))
    yield f"| M | stream | cute_quant | {vllm} | cute_quant / stream | {vllm} / cute_quant |"
    yield "| ---: |" + " ---: |" * 5
    for mn in SUMMARY_ROWS:
        timed = [results.get(name, PDL, mn, k) for name in (STREAM, CUTE_QUANT, vllm)]
        stream, own, other = (result.seconds for result in timed if result is not None)
        times = " | ".join(report.microseconds(seconds) for seconds in (stream, own, other))
        yield f"| {mn} | {times} | {own / stream:.2f} | {other / own:.1f} |"
    machine = results.machine
    yield ""
    yield f"{machine['gpu']}, {machine['date'].split()[0]}, commit {machine['commit']}."


def stages_table() -> Iterable[str]:
    results = Results.read(STAGES)
    yield from report.origin_lines(results.machine)
    for operation in stage_report.OPERATIONS[:2]:
        part = stage_report.of(results, operation)
        yield from (f"`{operation}`:", "", *report.table_lines(part, [main_column(part)]))


def masked_table() -> Iterable[str]:
    lines = [json.loads(line) for line in MASKED.read_text(encoding="utf-8").splitlines()]
    yield from report.origin_lines(lines[0]["machine"])
    yield "| call | rows | µs | dense µs | / dense | / stream |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: |"
    for line in lines[1:]:
        yield masked.table_row(masked.Result(**line["result"]))


def fp4_table() -> Iterable[str]:
    """Return the rows of `quantize` for each format, and of the way back beside vLLM."""
    return cases_table(FP4, "vLLM")


def blocks_table() -> Iterable[str]:
    """Return the rows of weights in square blocks, beside DeepGEMM's cast."""
    return cases_table(BLOCKS, "DeepGEMM")


def columns_table() -> Iterable[str]:
    """Return the rows of groups along rows, beside a copy of the transpose and `quantize`."""
    return cases_table(COLUMNS, "transpose first")


def gated_columns_table() -> Iterable[str]:
    """Return the rows of gated activations both ways, beside torch and `quantize_both`."""
    return cases_table(GATED_COLUMNS, "torch first")


def gradients_table() -> Iterable[str]:
    """Return the rows of gradients in one direction, beside torch and `quantize`."""
    return cases_table(GRADIENTS, "torch")


def cases_table(record: Path, other: str) -> Iterable[str]:
    """Return the rows of a record of `bench.cases`, some of them beside another library."""
    lines = [json.loads(line) for line in record.read_text(encoding="utf-8").splitlines()]
    yield from report.origin_lines(lines[0]["machine"])
    yield f"| call | rows x k | µs | / stream | {other} / cute_quant |"
    yield "| --- | ---: | ---: | ---: | ---: |"
    for line in lines[1:]:
        result = line["result"]
        seconds = result["seconds"]
        own = seconds[CUTE_QUANT]
        cells = [result["name"], f"{result['m']} x {result['k']}", report.microseconds(own)]
        cells.append(f"{own / seconds[STREAM]:.2f}")
        cells.append(f"{seconds[other] / own:.2f}" if other in seconds else "")
        yield f"| {' | '.join(cells)} |"


def host_table() -> Iterable[str]:
    results = Results.read(HOST)
    yield from report.origin_lines(results.machine)
    yield "| call | µs | / `torch.neg` |"
    yield "| --- | ---: | ---: |"
    for name, seconds in results.host.items():
        if name != EMPTY_LIKE:
            yield f"| `{name}` | {seconds * 1e6:.2f} | {seconds / results.host[NEG]:.2f} |"


def sass_table() -> Iterable[str]:
    """Return instructions of kernels for bf16, beside the issue budget, and what binds first."""
    gpus = {arch: architecture.gpu for arch, architecture in EXAMINED.items() if architecture.gpu}
    targets = (f"{arch}, of {gpu.name}'s budget" for arch, gpu in gpus.items())
    yield f"| kernel | {' | '.join(targets)} |"
    yield "| --- |" + " ---: |" * len(gpus)
    for name, rows, spec in sass.reported():
        if not name.startswith(SASS_KERNELS):
            continue
        cells = [name.replace(", bf16 -> e4m3, ue8m0", "")]
        for arch, gpu in gpus.items():
            code, nbytes = machine_code(spec, arch), rows * sass.bytes_per_warp(spec)
            count, budget = len(code.opcodes), gpu.issue_budget(nbytes)
            cycles = resources.steady(code, sass.cta_warps(spec), nbytes, MACHINES[arch])
            first = max(cycles, key=lambda name: cycles[name])
            cells.append(f"{count} of {budget} ({count / budget:.0%}), {first}")
        yield f"| {' | '.join(cells)} |"


def bound_table() -> Iterable[str]:
    """Return estimates of the largest calls that were measured; for B200 if they are close."""
    machine = json.loads(bound.MEASURED.read_text(encoding="utf-8").splitlines()[0])["machine"]
    yield from report.origin_lines(machine)
    times = bound.read(bound.MEASURED)
    found = bound.estimates(times, MACHINES["sm_90a"])
    result = bound.check(found)
    yield f"{len(found)} calls of {result.kernels} kernels: rank correlation"
    yield f"{result.correlation:.3f}, relative error {result.median:.1%} in the median,"
    yield f"{result.largest:.0%} at most."
    if not result.passes:
        return
    largest = {e.time.name: e for e in found if e.time.m <= MOST_ESTIMATED_ROWS}
    there = bound.estimates([e.time for e in largest.values()], MACHINES["sm_100a"])
    yield ""
    titles = "call", "rows x k", "H100 µs", "estimate", "bound by", "B200 estimate, not measured"
    yield f"| {' | '.join(titles)} | bound by |"
    yield "| --- | ---: | ---: | ---: | --- | ---: | --- |"
    for here, estimate in zip(largest.values(), there, strict=True):
        time = here.time
        cells = [time.name, f"{time.m} x {time.k}", report.microseconds(time.seconds)]
        for e in (here, estimate):
            cells += [report.microseconds(e.bound.estimate), e.bound.first]
        yield f"| {' | '.join(cells)} |"


def sweep_table() -> Iterable[str]:
    data = json.loads(SWEEP.read_text(encoding="utf-8"))
    yield from (f"{origin(data)}:", "", sweep_report.markdown_table(from_json(data)))


TABLES: dict[str, tuple[Path | None, Callable[[], Iterable[str]]]] = {
    "summary": (QUANTIZE, summary_table),
    "quantize": (QUANTIZE, quantize_table),
    "stages": (STAGES, stages_table),
    "masked": (MASKED, masked_table),
    "fp4": (FP4, fp4_table),
    "blocks": (BLOCKS, blocks_table),
    "columns": (COLUMNS, columns_table),
    "gated columns": (GATED_COLUMNS, gated_columns_table),
    "gradients": (GRADIENTS, gradients_table),
    "host": (HOST, host_table),
    "engines": (ENGINES, lambda: engine_report.calls_table(ENGINES)),
    "engine layer": (ENGINES, lambda: engine_report.layer_table(ENGINES)),
    "engine model": (ENGINES, lambda: engine_report.model_table(ENGINES)),
    "sass": (None, sass_table),
    "bound": (bound.MEASURED, bound_table),
    "sweep": (SWEEP, sweep_table),
}
"""By the name in a document: the record, if it is one of a GPU, and the lines."""


def filled(document: str, names: Iterable[str] = TABLES) -> str:
    """Return a document with its tables renewed, each between two comments."""
    for name in names:
        record, lines = TABLES[name]
        table = "" if record and not record.exists() else "\n".join(lines()).strip() + "\n\n"
        # Twice as many backslashes: these are no references to groups.
        document = re.sub(
            rf"(<!-- make figures: {name} -->\n\n).*?(<!-- end -->)",
            r"\1" + table.replace("\\", r"\\") + r"\2",
            document,
            flags=re.DOTALL,
        )
    return document


def main_column(results: Results) -> int:
    return stage_report.main_column(results)


def draw_page(path: Path) -> bool:
    """Take a screenshot of a page, if there is a browser for it."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        return False
    with tempfile.TemporaryDirectory() as directory:
        page = Path(directory) / "layout.html"
        draw(make_layout(**PAGE), page)
        size = ",".join(map(str, PAGE_SIZE))
        options = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars")
        profile = f"--user-data-dir={directory}/profile"
        command = [browser, *options, profile, f"--window-size={size}", f"--screenshot={path}"]
        subprocess.run([*command, page.as_uri()], check=True, capture_output=True)
    return True


def main() -> None:
    results = Results.read(QUANTIZE)
    report.draw(results, QUANTIZE.with_suffix(".png"), main_column(results))
    results = Results.read(STAGES)
    stage_report.draw(results, STAGES.with_suffix(".png"), main_column(results))
    for name, choices in PICTURES.items():
        draw(make_layout(**choices), LAYOUTS / f"{name}.svg")
    numerics.main()
    data = json.loads(SWEEP.read_text(encoding="utf-8"))
    drawing = sweep_report.plot(from_json(data), origin(data))
    (LAYOUTS / "sweep.svg").write_text(drawing.svg(), encoding="utf-8")
    if not draw_page(LAYOUTS / "page.png"):
        print("page.png: left as it is, no Chromium here", file=sys.stderr)
    for document in DOCUMENTS:
        document.write_text(filled(document.read_text(encoding="utf-8")), encoding="utf-8")
    for record, _ in TABLES.values():
        if record and not record.exists():
            print(f"{record.relative_to(ROOT)}: not recorded, its table is left out")


if __name__ == "__main__":
    main()
