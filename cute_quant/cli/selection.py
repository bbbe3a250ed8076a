"""Arguments that name kernels, by preset, by name or by the calls that take them."""

from __future__ import annotations

import argparse
import fnmatch
from collections.abc import Iterable

import torch

from cute_quant.contract.dtypes import INPUT_DTYPES, LOAD_BYTES
from cute_quant.contract.formats import DEEP_GEMM, Format
from cute_quant.contract.prologues import FUSED, ROUNDINGS
from cute_quant.contract.rows import DENSE, KINDS, Masked
from cute_quant.contract.upper_scales import ENCODE
from cute_quant.contract.upper_scales import KINDS as UPPER_KINDS
from cute_quant.dispatch import presets, reachable
from cute_quant.dispatch.call_range import (
    BOTH,
    CONVERT_SCALES,
    OF_COLUMNS,
    OPERATIONS,
    CallRange,
)
from cute_quant.dispatch.plan import Gpu
from cute_quant.jit import keys
from cute_quant.kernels.config import Spec

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in INPUT_DTYPES}
ANY_SMS = (1, *(part << i for i in range(9) for part in (2, 3)), 1024)
"""Numbers of multiprocessors of GPUs that take all kernels which any GPU takes.

Elements an SM are at most half as many again from one to the next, which no range of the heuristics
lies between."""

Task = tuple[Spec, str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command to its parser."""
    parser.add_argument(
        "--preset",
        action="append",
        choices=presets.PRESETS,
        help="kernels by use, may be given several times (default: deepgemm)",
    )
    parser.add_argument(
        "--kernel",
        action="append",
        metavar="PATTERN",
        help="kernels of the preset all by name, may be given several times",
    )
    calls = parser.add_argument_group("kernels of calls, as cute_quant.warm_up takes them")
    calls.add_argument("--k", action="append", type=int, help="columns, may be given several times")
    calls.add_argument("--max-rows", type=int, default=2**16, help="(default: 65536)")
    calls.add_argument("--operation", action="append", choices=OPERATIONS, help="(quantize)")
    calls.add_argument("--format", type=_format, default=DEEP_GEMM, help="(DEEP_GEMM)")
    calls.add_argument("--to", type=_format, metavar="FORMAT", help="of convert_scales")
    calls.add_argument("--column-format", type=_format, metavar="FORMAT", help="of both directions")
    calls.add_argument("--transposed", action="store_true", help="columns are")
    calls.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="(bfloat16)")
    calls.add_argument("--rows", action="append", choices=(DENSE, *KINDS), help="(dense)")
    calls.add_argument("--gathered", action="store_true", help="with an index")
    calls.add_argument("--scattered", action="store_true", help="with a scatter")
    calls.add_argument("--batched", action="store_true", help="with leading dimensions")
    calls.add_argument(
        "--alignment", type=int, choices=(1, 2, 4, 8, 16, LOAD_BYTES), default=LOAD_BYTES
    )
    for choice in ("interleaved", "clamped", "scaled", "shifted"):
        calls.add_argument(f"--{choice}", action="store_true", help="of silu_mul_quantize")
    calls.add_argument("--stochastic", action="store_true", help="with an rng_state")
    calls.add_argument("--rounding", choices=ROUNDINGS, default=FUSED)
    calls.add_argument("--weight-dtype", choices=DTYPES, help="of rms_norm_quantize")
    calls.add_argument(
        "--upper-scale",
        choices=UPPER_KINDS,
        default=ENCODE,
        help="the argument that the scale over e4m3 scales is given as (encode_scale)",
    )


def name(spec: Spec) -> str:
    """Return the name of a kernel, the same where an architecture launches it without PDL."""
    return keys.spec_name(spec._replace(pdl=True))


def _format(text: str) -> Format:
    try:
        return Format.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def tasks(options: argparse.Namespace, targets: Iterable[str]) -> list[Task]:
    """Return the kernels that are asked for, each once.

    Raises:
        ValueError: no kernel has a name that matches, or no call is possible.
    """
    names = options.preset or []
    if not (names or options.kernel or options.k):
        names = ["deepgemm"]
    found: list[Task] = []
    for arch in targets:
        found += [(spec, arch) for preset in names for spec in presets.PRESETS[preset](arch)]
        found += [
            (spec, arch)
            for calls in _ranges(options)
            for sms in ANY_SMS
            for spec in reachable.specs(calls, Gpu(arch, sms))
        ]
    return list(dict.fromkeys(found + _matches(options.kernel or (), targets)))


def _matches(patterns: Iterable[str], targets: Iterable[str]) -> list[Task]:
    every = [(s, arch) for arch in targets if patterns for s in presets.all_kernels(arch)]
    names_of = {spec: name(spec) for spec, _ in every}
    found: list[Task] = []
    for pattern in patterns:
        matches = [task for task in every if fnmatch.fnmatchcase(names_of[task[0]], pattern)]
        if not matches:
            raise ValueError(
                f"--kernel: expected a name or a pattern of names that cute-quant build --preset "
                f"all --list prints, got {pattern!r}"
            )
        found += matches
    return found


def _ranges(options: argparse.Namespace) -> list[CallRange]:
    if not options.k:
        return []
    calls = [
        CallRange(
            operation,
            options.format,
            DTYPES[options.dtype],
            tuple(options.k),
            options.max_rows,
            kind,
            options.gathered,
            options.batched or kind == Masked.kind,
            options.alignment,
            options.interleaved,
            options.clamped,
            options.scaled,
            options.shifted,
            options.rounding,
            _weight_dtype(options),
            scattered=options.scattered,
            stochastic=options.stochastic,
            to=options.to if operation == CONVERT_SCALES else None,
            column_fmt=options.column_format if operation in BOTH else None,
            transposed=options.transposed and operation in OF_COLUMNS,
        ).with_upper_scale(options.upper_scale)
        for operation in options.operation or OPERATIONS[:1]
        for kind in options.rows or (DENSE,)
    ]
    possible = [of_one for of_one in calls if of_one.possible]
    if not possible:
        raise ValueError("--operation, --rows: expected calls that there are, got none")
    for of_one in possible:
        of_one.check_columns()
    return possible


def _weight_dtype(options: argparse.Namespace) -> torch.dtype:
    return DTYPES[options.weight_dtype or options.dtype]
