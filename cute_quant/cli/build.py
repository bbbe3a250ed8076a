"""Compile kernels ahead of time into a directory.

It is used by cute_quant.load(DIR), or CUTE_QUANT_AOT_DIR=DIR, on machines that have torch and
apache-tvm-ffi but neither a compiler nor CuTe DSL, and from C++. Needs no GPU.

Kernels are named by a preset, by patterns of names as --list prints them, or by the calls that
take them.

examples:
  cute-quant build --preset deepgemm --arch sm_90a --arch sm_100a -o kernels
  cute-quant build --kernel 'quantize-bfloat16-e4m3_128_e8m0*' -o kernels
  cute-quant build --preset moe --list
  cute-quant build --k 7168 --max-rows 32768 --alignment 16 -o kernels
  cute-quant build --host aarch64 --runtime libcute_dsl_runtime.so -o kernels
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Iterator
from pathlib import Path

from cute_quant.cli import selection
from cute_quant.jit import aot_build, keys, lookup, progress, toolchain, workers
from cute_quant.kernels import architectures
from cute_quant.kernels.config import Spec


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command to its parser."""
    families = tuple(family.name for family in architectures.FAMILIES)
    parser.add_argument(
        "--arch",
        action="append",
        choices=(*lookup.ARCHITECTURES.values(), *families),
        help="architecture of the GPU, or a family of them (sm_100f, sm_120f), of which one object "
        "serves every GPU; may be given several times (default: all architectures)",
    )
    selection.add_arguments(parser)
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
    """Run the command, and return the exit status."""
    targets = dict.fromkeys(options.arch or lookup.ARCHITECTURES.values())
    tasks = selection.tasks(options, targets)
    if options.list:
        names = list(dict.fromkeys(selection.name(spec) for spec, _ in tasks))
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


def _built(
    tasks: list[tuple[Spec, str]], host: toolchain.Host
) -> Iterator[tuple[Spec, str, bytes]]:
    built: dict[int, bytes] = {}
    calls = [(spec, arch, host) for spec, arch in tasks]
    done = workers.results(_build, calls, max(1, workers.count_for(len(calls))))
    try:
        # In their order, so that a directory does not depend on which was done first.
        for number, (spec, arch) in enumerate(tasks):
            progress.bar(number, len(tasks), f"{keys.spec_name(spec)} {arch}")
            while number not in built:
                index, content = next(done)
                built[index] = content
            yield spec, arch, built.pop(number)
    finally:
        done.close()
        progress.end_bar()


def _build(spec: Spec, arch: str, host: toolchain.Host) -> bytes:
    return lookup.build_object(spec, arch, aot_build.symbol(spec, arch), host)
