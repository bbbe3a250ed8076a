"""Quantize the tensors of a file with two numerics, and say where the results differ and why.

Both results are of one format, under the same upper scale where it has one: that of the tensor's
amax, or of the amax that is given. On a GPU its kernels are compared, otherwise the CPU reference.

examples:
  cute-quant diff activations.safetensors --a vllm --b te
  cute-quant diff weights.pt --format MXFP8 --a torchao --b ieee --tensor down_proj.weight --json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from cute_quant.cli import differences, tensor_files
from cute_quant.cli.differences import CODE_REASONS, SCALE_REASONS, Comparison
from cute_quant.contract.dtypes import INPUT_DTYPES, dtype_name, dtype_names
from cute_quant.contract.format_choices import MAX_COLUMNS, NUMERICS, ROW_MAJOR
from cute_quant.contract.formats import Format
from cute_quant.contract.upper_scales import factors_of_amax


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command to its parser."""
    parser.add_argument("file", type=Path, help=", ".join(tensor_files.SUFFIXES))
    parser.add_argument("--a", required=True, metavar="NUMERICS", help=", ".join(NUMERICS))
    parser.add_argument("--b", required=True, metavar="NUMERICS", help="another of them")
    parser.add_argument("--format", default="NVFP4", help="name or text of a format (NVFP4)")
    parser.add_argument("--tensor", metavar="NAME", help="one tensor (all that fit)")
    parser.add_argument(
        "--amax", type=float, help="of which the upper scale is made (the tensor's)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    """Run the command, and return the exit status."""
    a, b = _formats(options)
    _check_amax(options.amax, a)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    reports: list[dict[str, Any]] = []
    skipped: dict[str, str] = {}
    for name, t in tensor_files.read(options.file, options.tensor):
        misfit = _misfit(t, a, options.amax)
        if misfit is not None:
            skipped[name] = misfit
            continue
        report = _report(name, t.to(device), a, b, options.amax)
        reports.append(report)
        if not options.json:
            print("\n".join(_lines(report, options.a, options.b)), end="\n\n", flush=True)
    if not reports:
        misfits = "; ".join(f"{name}: {text}" for name, text in skipped.items())
        raise ValueError(
            f"file: expected a matrix of {dtype_names(INPUT_DTYPES)} that {options.format} takes, "
            f"got {misfits or 'no tensor'}"
        )
    if options.json:
        choices = {"format": str(a.replace(numerics="ieee")), "a": options.a, "b": options.b}
        machine = {"file": str(options.file), "device": device}
        print(json.dumps({**machine, **choices, "tensors": reports, "skipped": skipped}, indent=1))
    elif skipped:
        print(*(f"skipped {name}: {text}" for name, text in skipped.items()), sep="\n")
    return 0


def _formats(options: argparse.Namespace) -> tuple[Format, Format]:
    """Return the format with both numerics, in the layout that has a scale for each group.

    Raises:
        ValueError: there is no such format, or it has no such numerics.
    """
    if options.a == options.b:
        raise ValueError(f"a, b: expected two numerics, got {options.a!r} twice")
    fmt = Format.parse(options.format).replace(scale_layout=ROW_MAJOR)
    try:
        return fmt.replace(numerics=options.a), fmt.replace(numerics=options.b)
    except ValueError as error:
        raise ValueError(f"a, b: {error}") from None


def _check_amax(amax: float | None, fmt: Format) -> None:
    if amax is None:
        return
    if not fmt.upper_scale or fmt.row_scale:
        raise ValueError(f"amax: expected none for {fmt}, which takes no upper scale, got {amax}")
    if not 0 <= amax < float("inf"):
        raise ValueError(f"amax: expected a finite number from 0, got {amax}")


def _misfit(t: torch.Tensor, fmt: Format, amax: float | None) -> str | None:
    """Return why a tensor cannot be quantized, None if it can."""
    if t.dtype not in INPUT_DTYPES:
        return f"{dtype_name(t.dtype)}, not {dtype_names(INPUT_DTYPES)}"
    if t.ndim < 2 or not t.numel():
        return f"shape {tuple(t.shape)}, no matrix"
    k = t.shape[-1]
    if k % fmt.value_type.per_byte:
        return f"k = {k} is odd, and two values share a byte"
    if k > MAX_COLUMNS:
        return f"k = {k} is above {MAX_COLUMNS}"
    needs_amax = fmt.upper_scale and not fmt.row_scale and amax is None
    if needs_amax and not t.isfinite().all():
        return "its amax is not finite, give --amax"
    return None


def _report(
    name: str, x: torch.Tensor, a: Format, b: Format, given_amax: float | None
) -> dict[str, Any]:
    """Return the comparison of a tensor's results, for JSON."""
    amax = None
    report: dict[str, Any] = {"name": name, "dtype": dtype_name(x.dtype), "shape": list(x.shape)}
    if a.upper_scale and not a.row_scale:
        amax = x.abs().amax().float()
        amax = amax if given_amax is None else torch.full_like(amax, given_amax)
        report |= {"amax": amax.item(), "encode_scale": factors_of_amax(amax).encode.item()}
    found = differences.compare(x, a, b, amax)
    return report | _numbers(found)


def _numbers(found: Comparison) -> dict[str, Any]:
    return {
        "groups": found.groups,
        "scales_differ": found.scale_reasons.total(),
        "scale_reasons": dict(found.scale_reasons),
        "codes": found.elements,
        "codes_differ": found.code_reasons.total(),
        "code_reasons": dict(found.code_reasons),
        "largest_difference": found.largest_difference,
        "places": [place._asdict() for place in found.places],
    }


def _lines(report: dict[str, Any], a: str, b: str) -> Iterator[str]:
    shape = ", ".join(map(str, report["shape"]))
    yield f"{report['name']}: {report['dtype']} ({shape}), {a} and {b}"
    if "amax" in report:
        yield f"  {'amax':14} {report['amax']:g}, encode scale {report['encode_scale']:g}"
    for of, all_, reasons in (
        ("scales", "groups", SCALE_REASONS),
        ("codes", "codes", CODE_REASONS),
    ):
        differ, count = report[f"{of}_differ"], report[all_]
        share = f" ({100 * differ / count:.2g}%)" if differ else ""
        yield f"  {of:14} {differ} of {count} differ{share}"
        counts = report[f"{of.removesuffix('s')}_reasons"]
        for reason in filter(counts.get, reasons):
            yield f"  {counts[reason]:14} {reason}: {reasons[reason]}"
    yield f"  {'values':14} largest difference {report['largest_difference']:g}"
    if report["places"]:
        yield f"  {'row':>6} {'group':>6} {'column':>6} {'scales':>23} {'codes':>7} {'x':>12}"
    for place in report["places"]:
        scales = " ".join(f"{scale:11.6g}" for scale in place["scales"])
        column = codes = x = ""
        if place["codes"] is not None:
            column, x = str(place["column"]), f"{place['x']:.6g}"
            codes = " ".join(f"{code:3x}" for code in place["codes"])
        yield (
            f"  {place['row']:6} {place['group']:6} {column:>6} {scales} {codes:>7} {x:>12}  "
            f"{place['reason']}"
        )
