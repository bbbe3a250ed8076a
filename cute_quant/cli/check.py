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
from dataclasses import asdict, dataclass

import torch

from cute_quant.cli.kernel_comparison import WrongResult, compare, compare_columns
from cute_quant.cli.kernel_results import results_of, results_of_columns
from cute_quant.dispatch import presets
from cute_quant.jit import keys, lookup, progress
from cute_quant.kernels.config import ColumnsSpec, Spec


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
            rounded = compare_columns(
                spec, results_of_columns(spec, "cuda"), results_of_columns(spec, "cpu")
            )
        elif gpu:
            rounded = compare(spec, results_of(spec, "cuda"), results_of(spec, "cpu"))
        else:
            lookup.build(lookup.kernel(spec), arch)
    except WrongResult as raised:
        error = str(raised)
    except Exception as raised:
        error = " ".join(f"{type(raised).__name__}: {raised}".split())
    return Outcome(keys.spec_name(spec), arch, "ran" if gpu else "compiled", rounded, error)
