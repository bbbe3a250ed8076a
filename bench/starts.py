"""How long a fresh process takes to its first kernel: cold, warm, and built ahead of time.

    python -m bench.starts

Medians of 10 processes each, from the end of `import torch` on. Without a GPU until the kernel is
there to be called; with one also to its first result, the GPU being awake. Processes prepare
together and are measured one after another. Modules have bytecode, as pip leaves them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from cute_quant import DEEP_GEMM
from cute_quant.cli import main as cli_main
from cute_quant.jit import keys
from cute_quant.kernels.config import QuantizeSpec

KERNEL = keys.spec_name(QuantizeSpec(torch.bfloat16, DEEP_GEMM))

START = """
import json, sys, time
import torch
gpu = torch.cuda.is_available()
if gpu:
    x = torch.randn(64, 7168, dtype=torch.bfloat16, device="cuda")
    torch.cuda.synchronize()
print("ready", flush=True)
sys.stdin.readline()
start = time.perf_counter()
import cute_quant
imported = time.perf_counter()
if gpu:
    cute_quant.quantize(x)
    torch.cuda.synchronize()
else:
    from cute_quant.jit import lookup
    from cute_quant.kernels.config import QuantizeSpec
    lookup.function(QuantizeSpec(torch.bfloat16, cute_quant.DEEP_GEMM), "sm_100a")
end = time.perf_counter()
print(json.dumps([imported - start, end - start, "cutlass" in sys.modules]))
"""

Start = tuple[float, float, bool]
"""Seconds to the end of the import and to that of the first call; whether it compiled."""


def measure(variables: list[dict[str, str]]) -> list[Start]:
    """Start a process for each set of environment variables and time it."""
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", START],
                    env={**os.environ, "PYTHONDONTWRITEBYTECODE": "", **own},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
            for own in variables
        ]
        for process in processes:
            assert process.stdout is not None  # It is a pipe.
            process.stdout.readline()
        return [_start(process) for process in processes]


def _start(process: subprocess.Popen[str]) -> Start:
    out, _ = process.communicate("go\n")
    if process.returncode:
        sys.exit(f"bench.starts: a process ended with {process.returncode}")
    imported, ended, compiled = json.loads(out)
    return imported, ended, compiled


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=10, help="of each kind (default: 10)")
    count = parser.parse_args().processes
    if count < 1:
        parser.error(f"--processes: expected 1 or more, got {count}")
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        kernels = directory / "kernels"
        if cli_main.main(["build", "--kernel", KERNEL, "-o", str(kernels)]):
            sys.exit("bench.starts: nothing was built")
        # A first process of each kind that is not counted writes bytecode and fills the cache.
        cold = [
            {"CUTE_QUANT_CACHE_DIR": str(directory / f"{i}"), "CUTE_QUANT_AOT_DIR": ""}
            for i in range(count + 1)
        ]
        ahead = {"CUTE_QUANT_AOT_DIR": str(kernels), "CUTE_QUANT_CACHE": "off"}
        kinds = {"cold": cold, "warm": cold[:1] * count, "built ahead": [ahead] * (count + 1)}
        until = "first result" if torch.cuda.is_available() else "kernel loaded"
        print(f"milliseconds after import torch, medians of {count} processes (least, most)")
        for kind, variables in kinds.items():
            runs = measure(variables)[-count:]
            columns = []
            for label, values in (("import", 0), (until, 1)):
                times = [1e3 * run[values] for run in runs]
                middle = statistics.median(times)
                columns.append(f"{label} {middle:7.1f} ({min(times):.1f}, {max(times):.1f})")
            compiled = sum(run[2] for run in runs)
            print(f"{kind:12} {'   '.join(columns)}   CuTe DSL imported in {compiled}", flush=True)


if __name__ == "__main__":
    main()
