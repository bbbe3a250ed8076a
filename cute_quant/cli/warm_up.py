"""Compile kernels into the disk cache, before processes that serve look for them.

Kernels are named by a preset, by patterns of names, or by the calls that take them; a call that
finds its kernel missing says which options. Needs no GPU.

examples:
  cute-quant warm-up --preset moe
  cute-quant warm-up --k 7168 --k 2048 --max-rows 32768
  cute-quant warm-up --operation silu_mul_quantize --k 2048 --rows masked --arch sm_100a
"""

from __future__ import annotations

import argparse
import json

import torch

from cute_quant.cli import selection
from cute_quant.dispatch import warm_up
from cute_quant.jit import disk_cache, lookup


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command to its parser."""
    parser.add_argument(
        "--arch",
        action="append",
        choices=tuple(lookup.ARCHITECTURES.values()),
        help="architecture of the GPU, may be given several times (default: those of this machine, "
        "without a GPU all)",
    )
    selection.add_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    """Run the command, and return the exit status."""
    tasks = selection.tasks(options, options.arch or _architectures())
    if not lookup.keeps():
        raise RuntimeError("there is no disk cache to compile into: cute-quant info says why")
    done = warm_up.in_cache(tasks)
    if options.json:
        kernels = [kernel._asdict() for kernel in done]
        print(json.dumps({"seconds": done.seconds, "kernels": kernels}, indent=1))
    else:
        print(f"{done}, in {disk_cache.default_directory()}")
    return 0


def _architectures() -> list[str]:
    """Return those of the GPUs of this machine; all where there is none."""
    if not torch.cuda.is_available():
        return list(lookup.ARCHITECTURES.values())
    found = map(lookup.find_architecture, range(torch.cuda.device_count()))
    return list(dict.fromkeys(arch for arch in found if arch is not None))
