"""python -m cute_quant layout: show layouts of threads, explain those of scales, time many."""

from __future__ import annotations

import argparse
import importlib.util
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from cute_quant.kernels.config import LOAD_HINTS, ORDERS

SHAPES = "256x7168,2048x7168,16384x7168"
NUMBERS = {
    "threads_per_group": "threads that hold a group of values",
    "values_per_thread": "values of a thread, contiguous along k, group_size / threads_per_group",
    "rows_per_thread": "rows of a thread, whose loads are in flight together",
    "row_warps": "warps of a CTA along M, each with rows of its own",
    "column_warps": "warps of a CTA along N, each with columns of its own",
    "load_bytes": "bytes of a load of a thread",
}
WORDS = {
    "warp_order": ("rasterization order of the warps of a CTA", ORDERS),
    "cta_order": ("rasterization order of CTAs", ORDERS),
    "load_hint": ("cache hint of the loads", LOAD_HINTS),
}
PROGRAM = "python -m cute_quant layout"
FORMAT = {"format": "DEEP_GEMM", "dtype": "bf16"}
"""Defaults."""
BAR = 30
MALFORMED = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""Errors that a file raises that no sweep wrote."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``layout``, for `run`."""
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    show = commands.add_parser("show", help="draw a thread-value layout")
    _add_choices(show, many=False)
    show.add_argument("--output", "-o", metavar="FILE", help=".txt, .svg, .png or .html")
    show.add_argument("--mn", type=int, help="rows of the input whose scales are drawn")
    show.add_argument("--k", type=int, help="its columns")
    trial = commands.add_parser("try", help="registers, instructions, sectors; time on a GPU")
    _add_choices(trial, many=False)
    trial.add_argument("--shapes", default=SHAPES, help="MNxK,... of the inputs to time")
    many = commands.add_parser(
        "sweep", help="try every combination of choices, or a step around the default each way"
    )
    _add_choices(many, many=True)
    many.add_argument("--shapes", default=SHAPES, help="MNxK,... of the inputs to time")
    many.add_argument("--json", metavar="FILE", type=Path, help="write what `report` reads")
    many.add_argument("--plot", metavar="FILE", type=Path, help="write a plot, .svg or .png")
    many.add_argument("--commit", metavar="NAME", help="name of the measured version, for reports")
    explained = commands.add_parser(
        "explain", help="where the scale of a row and a group lies, and who reads it"
    )
    explained.add_argument("format", metavar="FORMAT", help="name or text of a format")
    explained.add_argument("--mn", type=int, required=True, help="rows of the quantized values")
    explained.add_argument("--k", type=int, required=True, help="columns of the values")
    explained.add_argument("--row", type=int, help="of one scale, with --group")
    explained.add_argument("--group", type=int, help="of one scale, with --row")
    explained.add_argument("--json", action="store_true", help="print JSON")
    report = commands.add_parser("report", help="print what a sweep wrote")
    report.add_argument("file", metavar="FILE", type=Path)
    report.add_argument("--markdown", action="store_true", help="print a table for Markdown")
    report.add_argument("--plot", metavar="FILE", type=Path, help="write a plot, .svg or .png")


def _add_choices(parser: argparse.ArgumentParser, many: bool) -> None:
    """Add the options of `make_layout`; with `many`, each takes values separated by commas."""
    suffix = ",..." if many else ""
    group = parser.add_argument_group("layout")
    for name, what in NUMBERS.items():
        flag, kind = "--" + name.replace("_", "-"), _numbers if many else int
        group.add_argument(flag, type=kind, metavar="N" + suffix, help=what)
    for name, (what, words) in WORDS.items():
        flag = "--" + name.replace("_", "-")
        help_text = f"{what}: {', '.join(words)}"
        group.add_argument(
            flag, type=_words if many else str, metavar="NAME" + suffix, help=help_text
        )
    group = parser.add_argument_group("format")
    group.add_argument(
        "--format", metavar="FORMAT", help="name or text of a format, by default DEEP_GEMM"
    )
    group.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), help="of x")
    parser.set_defaults(**FORMAT)


def run(options: argparse.Namespace) -> int:
    """Run the command of `layout` that `options` name.

    Returns:
        The exit status: 0, 2 where an option is refused, or 1 where a file or a module cannot be
        used. The reason is on stderr.

    Raises:
        BrokenPipeError: stdout is closed.
    """
    try:
        _COMMANDS[options.command](options)
    except BrokenPipeError:
        raise
    except (OSError, ValueError, ModuleNotFoundError) as error:
        print(f"{PROGRAM} {options.command}: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run a command line."""
    parser = argparse.ArgumentParser(PROGRAM, description=__doc__)
    add_arguments(parser)
    return run(parser.parse_args(arguments))


def _show(options: argparse.Namespace) -> None:
    from cute_quant.lab.draw import draw

    layout = _layout(options)
    text = draw(layout, options.output, options.mn, options.k, _command(options))
    print(f"wrote {options.output}" if options.output else text)


def _explain(options: argparse.Namespace) -> None:
    from cute_quant.lab import explanation

    if (options.row is None) != (options.group is None):
        raise ValueError("row, group: expected both or neither")
    size = _format(options), options.mn, options.k
    facts: dict[str, Any] = explanation.explain(*size)
    if options.row is None:
        text = explanation.describe(*size)
    else:
        facts["place"] = explanation.place(*size, options.row, options.group)
        text = explanation.describe_place(facts["place"])
    print(json.dumps(facts, indent=1) if options.json else text)


def _command(options: argparse.Namespace) -> str:
    """Return the command line that draws the same layout, without the defaults."""
    given = _chosen(options)
    for name in (*FORMAT, "mn", "k"):
        value = getattr(options, name)
        if value != FORMAT.get(name):
            given[name] = value
    words = [*PROGRAM.split(), "show"]
    for name, value in given.items():
        words += ["--" + name.replace("_", "-"), str(value)]
    return shlex.join([*words, "-o", str(options.output)])


def _try(options: argparse.Namespace) -> None:
    from cute_quant.lab import pictures, report
    from cute_quant.lab.sweep import sweep

    layout = _layout(options)
    print(f"{pictures.summary(layout)}\n")
    trials = sweep(dict.fromkeys((layout.default, layout)), _shapes(options.shapes))
    print(f"{report.text_table(trials)}\n\n{report.legend(trials)}")


def _sweep(options: argparse.Namespace) -> None:
    from cute_quant.lab import layout
    from cute_quant.lab.sweep import sweep, to_json

    _check_plot(options.plot)
    for path in (options.json, options.plot):
        _check_writable(path)
    shapes, chosen = _shapes(options.shapes), _chosen(options)
    fmt, dtype = _format(options), layout.DTYPES[options.dtype]
    if chosen:
        found = [layout.make_layout(fmt, dtype)]
        for choices, made in layout.product(fmt, dtype, chosen):
            if isinstance(made, layout.Layout):
                found.append(made)
            else:
                words = ", ".join(f"{name}={value}" for name, value in choices.items())
                print(f"refused: {words}: {made}", file=sys.stderr)
        found = list(dict.fromkeys(found))
    else:
        found = layout.around_the_default(fmt, dtype)
    trials = sweep(found, shapes, _progress)
    data = to_json(trials, options.commit)
    if options.json:
        options.json.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    _print(trials, data, options.plot, markdown=False)


def _report(options: argparse.Namespace) -> None:
    from cute_quant.lab.sweep import from_json

    _check_plot(options.plot)
    _check_writable(options.plot)
    try:
        data = json.loads(options.file.read_text(encoding="utf-8"))
        trials = from_json(data)
    except MALFORMED as error:
        raise ValueError(f"{options.file}: expected what a sweep writes, got {error!r}") from None
    for number, trial in enumerate(trials):
        if not trial.code and not trial.failure:
            _progress(number, len(trials), trial.layout.name)
            trial.examine()
    _print(trials, data, options.plot, options.markdown)


def _print(trials: list[Any], data: dict[str, Any], plot: Path | None, markdown: bool) -> None:
    from cute_quant.lab import report
    from cute_quant.lab.sweep import origin

    if markdown:
        print(report.markdown_table(trials))
    else:
        print(
            report.text_table(trials), report.text_plot(trials), report.legend(trials), sep="\n\n"
        )
    if plot is None:
        return
    drawing = report.plot(trials, origin(data))
    if plot.suffix == ".svg":
        plot.write_text(drawing.svg(), encoding="utf-8")
    else:
        plot.write_bytes(drawing.png())


_COMMANDS = {
    "show": _show,
    "try": _try,
    "sweep": _sweep,
    "explain": _explain,
    "report": _report,
}


def _check_plot(path: Path | None) -> None:
    """Check that a plot can be written.

    Raises:
        ModuleNotFoundError: it is to be a PNG, and matplotlib is not installed.
        ValueError: it is to be something else.
    """
    if path is None:
        return
    if path.suffix not in (".svg", ".png"):
        raise ValueError(f"plot: expected a name that ends in .svg or .png, got {path}")
    if path.suffix == ".png" and importlib.util.find_spec("matplotlib") is None:
        raise ModuleNotFoundError("plot: expected matplotlib, which draws .png, got none; use .svg")


def _check_writable(path: Path | None) -> None:
    """Raise the OSError that writing a file would raise after minutes of work."""
    if path is None:
        return
    existed = path.exists() or path.is_symlink()
    path.open("ab").close()
    if not existed:
        path.unlink()


def _progress(done: int, of: int, name: str) -> None:
    """Show a bar in a terminal, elsewhere a line for each layout."""
    filled = BAR * done // of
    bar = f"[{'#' * filled}{'.' * (BAR - filled)}] {done}/{of} {name}"
    if sys.stderr.isatty():
        print(f"\r{bar:<78.78}", end="\n" if done == of else "", file=sys.stderr, flush=True)
    else:
        print(bar, file=sys.stderr, flush=True)


def _chosen(options: argparse.Namespace) -> dict[str, Any]:
    found = {name: getattr(options, name) for name in (*NUMBERS, *WORDS)}
    return {name: value for name, value in found.items() if value is not None}


def _format(options: argparse.Namespace) -> Any:
    from cute_quant.contract.formats import Format

    return Format.parse(options.format)


def _layout(options: argparse.Namespace) -> Any:
    from cute_quant.lab.layout import DTYPES, make_layout

    return make_layout(_format(options), DTYPES[options.dtype], **_chosen(options))


def _shapes(text: str) -> list[tuple[int, int]]:
    try:
        shapes = []
        for shape in text.split(","):
            mn, k = map(int, shape.split("x"))
            shapes.append((mn, k))
    except ValueError:
        shapes = []
    if not shapes or min(map(min, shapes)) < 1:
        raise ValueError(f"shapes: expected MNxK,... such as {SHAPES}, got {text!r}")
    return shapes


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _words(text: str) -> list[str]:
    return text.split(",")
