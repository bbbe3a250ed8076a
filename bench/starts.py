"""How long a fresh process takes to its first kernel: cold, warm, and built ahead of time.

    python -m bench.starts

Medians of 10 processes each, from the end of `import torch` on. Without a GPU until the kernel is
there to be called; with one also to its first result, the GPU being awake.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from cute_quant import cli, naming
from cute_quant.formats import UE8M0_PACKED, make_format
from cute_quant.specs import QuantizeSpec

KERNEL = naming.spec_name(QuantizeSpec(torch.bfloat16, make_format(128, UE8M0_PACKED, False)))

START = """
import json, sys, time
import torch
gpu = torch.cuda.is_available()
if gpu:
    x = torch.randn(64, 7168, dtype=torch.bfloat16, device="cuda")
    torch.cuda.synchronize()
start = time.perf_counter()
import cute_quant
imported = time.perf_counter()
if gpu:
    cute_quant.quantize(x)
    torch.cuda.synchronize()
else:
    from cute_quant import compile
    from cute_quant.formats import make_format
    from cute_quant.specs import QuantizeSpec
    compile.function(QuantizeSpec(torch.bfloat16, make_format(128, "ue8m0", False)), "sm_100a")
end = time.perf_counter()
print(json.dumps([imported - start, end - start, "cutlass" in sys.modules]))
"""


def measure(**variables: str) -> tuple[float, float, bool]:
    """Seconds to the end of the import and to that of the first call; whether it compiled."""
    done = subprocess.run(
        [sys.executable, "-c", START],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    return tuple(json.loads(done.stdout))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=10, help="of each kind (default: 10)")
    count = parser.parse_args().processes
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        kernels = directory / "kernels"
        if cli.main(["build", "--kernel", KERNEL, "-o", str(kernels)]):
            sys.exit("bench.starts: nothing was built")
        warm = {"CUTE_QUANT_CACHE_DIR": str(directory / "warm"), "CUTE_QUANT_AOT_DIR": ""}
        measure(**warm)
        kinds = {
            "cold": [
                {**warm, "CUTE_QUANT_CACHE_DIR": str(directory / f"{i}")} for i in range(count)
            ],
            "warm": [warm] * count,
            "built ahead": [
                {"CUTE_QUANT_AOT_DIR": str(kernels), "CUTE_QUANT_CACHE": "off"}
                for _ in range(count)
            ],
        }
        until = "first result" if torch.cuda.is_available() else "kernel loaded"
        print(f"milliseconds after import torch, medians of {count} processes (least, most)")
        for kind, all_variables in kinds.items():
            runs = [measure(**variables) for variables in all_variables]
            columns = []
            for label, values in (("import", 0), (until, 1)):
                times = [1e3 * run[values] for run in runs]
                middle = statistics.median(times)
                columns.append(f"{label} {middle:7.1f} ({min(times):.1f}, {max(times):.1f})")
            compiled = sum(run[2] for run in runs)
            print(f"{kind:12} {'   '.join(columns)}   CuTe DSL imported in {compiled}", flush=True)


if __name__ == "__main__":
    main()
