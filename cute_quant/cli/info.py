"""Versions, GPUs, what calls on this machine run, and what is supported and why not.

An entry of the disk cache is written and read to see whether it works.

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
from cute_quant.dispatch import presets
from cute_quant.jit import aot_load, compilation, disk_cache, dsl_variables, keys, lookup, toolchain
from cute_quant.jit.lookup import ARCHITECTURES
from cute_quant.kernels import architectures
from cute_quant.kernels.config import Spec


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command to its parser."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    """Run the command, and return the exit status."""
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
        "conflicts": toolchain.conflicts() or "none",
        "GPUs": _gpus(),
        "CPU tensors": "the reference, in plain torch",
        "missing kernels": _missing(),
        "compiles for": ", ".join(ARCHITECTURES.values())
        if toolchain.installed_dsl()
        else "nothing",
        "linker": _linker(),
        "disk cache": _cache(),
        "built ahead": _built_ahead(),
        "presets": _presets(),
    }


def _gpus() -> list[str]:
    if not torch.cuda.is_available():
        return ["none: kernels compile but do not run"]
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


def _missing() -> str:
    """Say what a call does that takes a kernel that is not built."""
    try:
        reason = compilation.why_refused() or dsl_variables.refused()
    except ValueError as error:
        return f"calls raise: {error}"
    if reason is not None:
        return f"calls raise: {reason}"
    if toolchain.installed_dsl() is None:
        return "calls raise: CuTe DSL is not installed"
    return "are compiled in the call"


def _cache() -> str:
    try:
        store = disk_cache.open_cache()
        if store is None:
            return f"none: {disk_cache.why_none()}"
        kernels = len(store.entries())
        if not store.writable:
            return f"{store.directory}, {kernels} kernels, read-only"
        store.try_out()
    except (OSError, RuntimeError, ValueError) as error:
        return f"not used: {error}"
    return f"{store.directory}, {kernels} kernels; an entry was written and read"


def _presets() -> list[str]:
    """Say how much of each preset needs no compiler, on the architectures of this machine."""
    ahead = {kernel for directory in aot_load.loaded() for kernel in directory.kernels}
    kept = _kept()
    architectures = {arch for _, arch in ahead} | set(kept.values())
    if torch.cuda.is_available():
        capabilities = map(torch.cuda.get_device_capability, range(torch.cuda.device_count()))
        architectures = {ARCHITECTURES[c] for c in capabilities if c in ARCHITECTURES}

    def is_built(spec: Spec, arch: str) -> bool:
        if (keys.spec_text(spec), arch) in ahead:
            return True
        return bool(kept) and disk_cache.key(spec, arch, lookup.compile_options(arch)) in kept

    lines = []
    for arch in sorted(architectures & set(ARCHITECTURES.values())):
        for name, preset in presets.PRESETS.items():
            built = [is_built(spec, arch) for spec in preset(arch)]
            state = "complete" if all(built) else f"{sum(built)} of {len(built)} kernels"
            lines.append(f"{name} for {arch}: {state}")
    return lines or ["none: cute-quant warm-up --preset moe compiles one into the disk cache"]


def _kept() -> dict[str, str]:
    """Return the architectures of entries of the disk cache by their keys."""
    if toolchain.installed_dsl() is None or toolchain.tvm_ffi_version() is None:
        return {}  # Nothing has a key.
    try:
        store = disk_cache.open_cache()
        entries = [] if store is None else store.entries()
    except (OSError, RuntimeError, ValueError):
        return {}
    return {e.path.stem: e.record["arch"] for e in entries if e.record is not None}


def _built_ahead() -> list[str]:
    reason = aot_load.why_not_used()
    used = [f"{d.path}, {len(d.kernels)} kernels" for d in aot_load.loaded()]
    return [*used, *([f"not used: {reason}"] if reason is not None else [])] or [
        f"none: {aot_load.DIRECTORY_VARIABLE} names a directory of cute-quant build"
    ]
