"""Run an engine's own tests of calls that are taken over, unchanged, with the plug-in and without.

    python -m tests.engines.upstream CHECKOUT [--engine sglang] [FILE]...

in the environment of `make test-engines`. CHECKOUT has the engine's repository, or its source
distribution, at the version that is installed. Without a GPU one is pretended, and what needs an
extension, or CUDA itself, fails with the plug-in and without. Prints both outcomes of each test,
and exits with 1 if one fails only with the plug-in.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
FILES = {
    "vllm": (
        "tests/kernels/quantization/test_per_token_group_quant.py",
        "tests/kernels/quantization/test_block_fp8.py",
        "tests/kernels/quantization/test_fp8_quant_group.py",
        "tests/kernels/quantization/test_fp8_quant.py",
        "tests/kernels/quantization/test_nvfp4_quant.py",
        "tests/kernels/quantization/test_silu_mul_nvfp4_quant.py",
        "tests/kernels/moe/test_silu_mul_per_token_group_quant_fp8_colmajor.py",
        "tests/kernels/moe/test_silu_mul_fp8_quant_deep_gemm.py",
        "tests/kernels/moe/test_block_fp8.py",
        "tests/kernels/moe/test_block_int8.py",
        "tests/kernels/moe/test_deepgemm.py",
        "tests/kernels/moe/test_batched_deepgemm.py",
        "tests/kernels/core/test_fused_silu_mul_block_quant.py",
        "tests/kernels/core/test_fused_quant_layernorm.py",
        "tests/kernels/test_fused_quant_activation.py",
        "tests/compile/passes/test_fusion.py",
        "tests/compile/passes/test_silu_mul_quant_fusion.py",
        "tests/compile/passes/test_silu_mul_quant_manual_fusion.py",
    ),
    "sglang": (
        "test/registered/kernels/ops/quantization/test_per_token_group_quant.py",
        "test/registered/kernels/ops/quantization/test_per_token_group_quant_8bit_v2.py",
        "test/registered/kernels/ops/quantization/test_per_token_quant_fp8.py",
        "test/registered/kernels/ops/quantization/test_fp8_kernel.py",
        "test/registered/kernels/ops/activation/test_fused_act_and_mul_quant.py",
        "test/registered/quant/test_fp8_kernel.py",
        "test/registered/quant/test_fp8_blockwise_row_padding.py",
        "test/registered/quant/test_int8_kernel.py",
        "test/registered/quant/test_block_int8.py",
    ),
}
GPUS = {"vllm": ("9.0", "10.0"), "sglang": ("",)}
"""Compute capabilities that are pretended."""

MEANT = {
    "test_quantfp8_group_edge_cases": "it asks forward_native for the bound of its own scales; the "
    "kernel, whose bits both have here, bounds the amax of a group by 1e-10",
    "test_quantfp8_group_functionality": "on Blackwell forward_native returns packed scales, as "
    "forward_cuda does, and the test takes them for float32",
    "test_quantize_to_fp4": "vLLM's kernel takes rcp.approx.ftz (nvfp4_utils.cuh), its reference "
    "divides: a code next to the middle of two may be the other one",
}
"""Tests that may fail with the plug-in, and why."""

Report = dict[str, Any]


def run(files: Sequence[str], options: argparse.Namespace, gpu: str, takes_over: bool) -> Report:
    """Run the tests of files in one process, and return what its plug-in reports."""
    with tempfile.TemporaryDirectory() as directory:
        # Without the engine's own sources beside them: the installed ones are tested.
        root, report = Path(directory) / "root", Path(directory) / "report.json"
        root.mkdir()
        for top in {file.partition("/")[0] for file in files}:
            (root / top).symlink_to(options.checkout.resolve() / top)
        settings = {
            "UPSTREAM_ENGINE": options.engine,
            "UPSTREAM_REPORT": str(report),
            "UPSTREAM_MOST": str(options.most),
            "UPSTREAM_SECONDS": str(options.seconds),
            f"CUTE_QUANT_{options.engine.upper()}": str(int(takes_over)),
            "PRETENDED_GPU": gpu,
            "PYTHONPATH": os.pathsep.join(map(str, (root, HERE, ROOT))),
        }
        plugins = ("-p", "upstream_plugin", "-p", "no:cacheprovider")
        arguments = ("-q", "--noconftest", "--continue-on-collection-errors", *plugins)
        command = [sys.executable, "-m", "pytest", *arguments, "--rootdir", str(root), *files]
        done = subprocess.run(
            command, cwd=root, env=os.environ | settings, capture_output=True, text=True
        )
        if report.exists():
            found: Report = json.loads(report.read_text())
            return found
    raise SystemExit(f"{done.stdout}\n{done.stderr}\npytest ended with {done.returncode}")


def text(outcomes: dict[str, int]) -> str:
    """Return how many tests had which outcome."""
    return ", ".join(f"{count} {name}" for name, count in sorted(outcomes.items())) or "none"


def main() -> int:
    parser = argparse.ArgumentParser("python -m tests.engines.upstream", description=__doc__)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("files", nargs="*", help="by default all that test what is taken over")
    parser.add_argument("--engine", choices=FILES, default="vllm")
    parser.add_argument("--gpu", action="append", help="to pretend, such as 9.0; default both")
    parser.add_argument("--most", type=int, default=8, help="parameters of a test; 0 for all")
    parser.add_argument("--seconds", type=int, default=20, help="that a test may take")
    options = parser.parse_intermixed_args()
    files = [f for f in options.files or FILES[options.engine] if (options.checkout / f).exists()]
    worse = []
    for gpu in options.gpu or GPUS[options.engine]:
        ours, theirs = (run(files, options, gpu, takes_over) for takes_over in (True, False))
        print(f"{options.engine} {gpu}".rstrip())
        print("".join(f"  not here: {line}\n" for line in ours["missing"]), end="")
        for name in dict.fromkeys([*ours["outcomes"], *theirs["outcomes"]]):
            outcomes = [report["outcomes"].get(name, {}) for report in (ours, theirs)]
            print(f"  {name}: {text(outcomes[0])}; without the plug-in {text(outcomes[1])}")
            if calls := ours["calls"].get(name):
                print(f"    taken over: {text(calls)}")
            for words, report in (("with", ours), ("without", theirs)):
                if name in report["reasons"]:
                    print(f"    {words} the plug-in: {report['reasons'][name]}")
            failed = [o.get("failed", 0) for o in outcomes]
            meant = MEANT.get(name.rpartition("::")[2])
            if failed[0] > failed[1] and meant:
                print(f"    meant: {meant}")
            elif failed[0] > failed[1]:
                worse.append(name)
        totals = [
            sum(map(collections.Counter, r["outcomes"].values()), collections.Counter())
            for r in (ours, theirs)
        ]
        print(f"  all: {text(totals[0])}; without the plug-in {text(totals[1])}")
    for name in worse:
        print(f"fails more often with the plug-in: {name}")
    return int(bool(worse))


if __name__ == "__main__":
    sys.exit(main())
