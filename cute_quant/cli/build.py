"""Compile kernels ahead of time into a directory.

It is used by cute_quant.load(DIR), or CUTE_QUANT_AOT_DIR=DIR, on machines that have torch and
apache-tvm-ffi but neither a compiler nor CuTe DSL, and from C++. Needs no GPU.

Kernels are named by a preset, or by patterns of names as --list prints them.

examples:
  cute-quant build --preset deepgemm --arch sm_90a --arch sm_100a -o kernels
  cute-quant build --kernel 'quantize-bfloat16-e4m3_128_e8m0*' -o kernels
  cute-quant build --preset moe --list
  cute-quant build --host aarch64 --runtime libcute_dsl_runtime.so -o kernels
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import fnmatch
import json
import multiprocessing
import os
import platform
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path

from cute_quant.jit import aot_build, aot_presets, keys, lookup, progress, toolchain
from cute_quant.kernels import architectures
from cute_quant.kernels.config import Spec

MAX_WORKERS = 8
"""Processes; each has a compiler in memory."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    families = tuple(family.name for family in architectures.FAMILIES)
    parser.add_argument(
        "--arch",
        action="append",
        choices=(*lookup.ARCHITECTURES.values(), *families),
        help="architecture of the GPU, or a family of them (sm_100f, sm_120f), of which one object "
        "serves every GPU; may be given several times (default: all architectures)",
    )
    parser.add_argument(
        "--preset",
        action="append",
        choices=aot_presets.PRESETS,
        help="kernels by use, may be given several times (default: deepgemm, without --kernel)",
    )
    parser.add_argument(
        "--kernel",
        action="append",
        metavar="PATTERN",
        help="kernels of the preset all by name, may be given several times",
    )
    parser.add_argument("-o", "--output", type=_path, metavar="DIR", help="directory to make")
    parser.add_argument(
        "--host",
        choices=toolchain.HOSTS,
        default=platform.machine(),
        help="processor of the machine with the GPU (default: as here)",
    )
    parser.add_argument(
        "--runtime",
        type=Path,
        metavar="FILE",
        help="the host's libcute_dsl_runtime.so, if it is not that of this machine",
    )
    parser.add_argument("--list", action="store_true", help="print names of kernels, build nothing")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _path(text: str) -> Path:
    # To pathlib nothing is the current directory.
    if not text:
        raise argparse.ArgumentTypeError("expected a path, got nothing")
    return Path(text)


def run(options: argparse.Namespace) -> int:
    targets = dict.fromkeys(options.arch or lookup.ARCHITECTURES.values())
    tasks = _tasks(targets, options.preset, options.kernel)
    if options.list:
        names = list(dict.fromkeys(_name(spec) for spec, _ in tasks))
        print(json.dumps(names, indent=1) if options.json else "\n".join(names))
        return 0
    if options.output is None:
        raise ValueError("expected -o DIR, the directory to make")
    dsl = toolchain.installed_dsl()
    if dsl is None:
        raise RuntimeError("CuTe DSL is not installed: pip install nvidia-cutlass-dsl")
    host = toolchain.HOSTS[options.host]
    if host.linker() is None:
        raise RuntimeError(f"no linker for {host.machine}: install binutils for it, or lld")
    runtime = options.runtime
    if runtime is None and host.machine == platform.machine():
        runtime = dsl.runtime
    aot_build.write(options.output, host, runtime, _built(tasks, host))
    size = sum(file.stat().st_size for file in options.output.iterdir())
    if options.json:
        print(json.dumps({"directory": str(options.output), "kernels": len(tasks), "bytes": size}))
        return 0
    print(f"{len(tasks)} kernels, {size / 2**20:.1f} MiB, in {options.output}")
    if runtime is None:
        print(f"it lacks the {toolchain.RUNTIME_NAME} of {host.machine}: give it with --runtime")
    return 0


def _name(spec: Spec) -> str:
    """Return the name of a kernel, the same where an architecture launches it without PDL."""
    return keys.spec_name(spec._replace(pdl=True))


def _tasks(
    targets: Iterable[str], names: list[str] | None, patterns: list[str] | None
) -> list[tuple[Spec, str]]:
    """Return the specs to build, each once; those of a preset may depend on the architecture."""
    if not names and not patterns:
        names = ["deepgemm"]
    tasks = [
        (spec, arch)
        for arch in targets
        for name in names or ()
        for spec in aot_presets.PRESETS[name](arch)
    ]
    every = [(s, arch) for arch in targets if patterns for s in aot_presets.all_kernels(arch)]
    names_of = {spec: _name(spec) for spec, _ in every}
    for pattern in patterns or ():
        matches = [task for task in every if fnmatch.fnmatchcase(names_of[task[0]], pattern)]
        if not matches:
            raise ValueError(
                f"--kernel: expected a name or a pattern of names that cute-quant build --preset "
                f"all --list prints, got {pattern!r}"
            )
        tasks += matches
    return list(dict.fromkeys(tasks))


def _built(
    tasks: list[tuple[Spec, str]], host: toolchain.Host
) -> Iterator[tuple[Spec, str, bytes]]:
    workers = min(len(os.sched_getaffinity(0)), MAX_WORKERS, len(tasks))
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, context) as pool:
        with _interrupts_ignored():
            futures = [pool.submit(_build, spec, arch, host) for spec, arch in tasks]
        try:
            for done, ((spec, arch), future) in enumerate(zip(tasks, futures, strict=True)):
                progress.bar(done, len(tasks), f"{keys.spec_name(spec)} {arch}")
                yield spec, arch, future.result()
        finally:
            pool.shutdown(cancel_futures=True)
            progress.end_bar()


@contextlib.contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Processes that start meanwhile ignore them for good, from before they import anything: a
    terminal interrupts all of its processes, and this one ends the others."""
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _build(spec: Spec, arch: str, host: toolchain.Host) -> bytes:
    return lookup.build_object(spec, arch, aot_build.symbol(spec, arch), host)
