"""Versions, GPUs, and what is supported on this machine and why not.

examples:
  cute-quant info
  cute-quant info --json
"""

from __future__ import annotations

import argparse
import json
import platform

import torch

from cute_quant import __version__
from cute_quant.jit import aot_load, disk_cache, lookup, toolchain
from cute_quant.jit.lookup import ARCHITECTURES
from cute_quant.kernels import architectures


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    report = describe()
    if options.json:
        print(json.dumps(report, indent=1))
        return 0
    for name, value in report.items():
        for line in value if isinstance(value, list) else [value]:
            print(f"{name + ':':20} {line}")
    return 0


def describe() -> dict[str, str | list[str]]:
    """Describe this machine as far as the package depends on it."""
    versions = {name: version or "not installed" for name, version in toolchain.versions().items()}
    if toolchain.installed_dsl() is None:
        versions["nvidia-cutlass-dsl"] += ": only kernels built ahead of time run on a GPU"
    driver = toolchain.driver_cuda_version()
    return {
        "cute_quant": __version__,
        "python": f"{platform.python_version()}, {platform.machine()}",
        **versions,
        "driver": "none" if driver is None else f"for CUDA {driver[0]}.{driver[1]}",
        "GPUs": _gpus(),
        "compiles for": ", ".join(ARCHITECTURES.values())
        if toolchain.installed_dsl()
        else "nothing",
        "linker": _linker(),
        "disk cache": _cache(),
        "built ahead": _built_ahead(),
    }


def _gpus() -> list[str]:
    if not torch.cuda.is_available():
        return ["none: tensors on the CPU take the reference, kernels compile but do not run"]
    return [_gpu(index) for index in range(torch.cuda.device_count())]


def _gpu(index: int) -> str:
    arch = lookup.find_architecture(index)
    described = lookup.describe_device(index)
    if arch is not None:
        return f"{described}: path: kernels, {arch}"
    return (
        f"{described}: path: reference on the GPU, slowly: kernels are built for compute "
        f"capability {architectures.supported()}"
    )


def _linker() -> str:
    found = toolchain.this_host().linker()
    return found or "none: each process compiles anew; install binutils to have kernels kept"


def _cache() -> str:
    try:
        store = disk_cache.open_cache()
    except (OSError, RuntimeError, ValueError) as error:
        return f"not used: {error}"
    if store is None:
        return f"none: {disk_cache.why_none()}"
    kernels = len(store.entries())
    return f"{store.directory}, {kernels} kernels{'' if store.writable else ', read-only'}"


def _built_ahead() -> list[str]:
    reason = aot_load.why_not_used()
    used = [f"{d.path}, {len(d.kernels)} kernels" for d in aot_load.loaded()]
    return [*used, *([f"not used: {reason}"] if reason is not None else [])] or [
        f"none: {aot_load.DIRECTORY_VARIABLE} names a directory of cute-quant build"
    ]
