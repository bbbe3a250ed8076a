"""Calls of vLLM that the plug-in takes over: its own kernels beside those of this package.

An archive has vLLM's Python files and the sources of its quantizers, whose operators are compiled
with nvcc before anything is measured. Its Triton kernels run as they are. Pack it in the
environment of `make test-engines`, and run it on a machine with a GPU, which needs no vLLM:

    python -m bench.engines pack vllm.tar.xz --sources vllm-0.33.0/csrc
    python -m bench.engines run vllm.tar.xz

A time is that of a call in a CUDA graph, with the allocation of its results, the median over
replays that alternate between both. With ``--device cpu`` every call that can be made without CUDA
is made once.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import tempfile
import timeit
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from bench import vllm_archive, vllm_operators
from cute_quant import DEEP_GEMM_SM90, rms_norm_quantize
from cute_quant.contract.format_choices import VLLM
from cute_quant.contract.prologues import VLLM as VLLM_ROUNDING
from cute_quant.integrations.engines import vllm_calls as ours
from cute_quant.integrations.engines.comparison import difference
from cute_quant.lab import timing

FP8_UTILS = "vllm.model_executor.layers.quantization.utils.fp8_utils"
INT8_UTILS = "vllm.model_executor.layers.quantization.utils.int8_utils"
MXFP8_UTILS = "vllm.model_executor.layers.quantization.utils.mxfp8_utils"
CUSTOM_OPS = "vllm._custom_ops"
BATCHED = "vllm.model_executor.layers.fused_moe.experts.batched_deep_gemm_moe"
FUSED_ACTIVATIONS = "vllm.model_executor.layers.fusion.fused_act_quant"
IMPORTS = (FP8_UTILS, INT8_UTILS, MXFP8_UTILS, CUSTOM_OPS, BATCHED, FUSED_ACTIVATIONS)
KEPT = (*vllm_archive.KEPT, INT8_UTILS, MXFP8_UTILS, BATCHED, "vllm.model_executor.layers.fusion")
SOURCES = "csrc"
"""In the archive: the directory of vLLM's sources."""
EXPERTS = 8
ROWS, COLUMNS = (1, 64, 1024, 4096), 7168

Function = Callable[..., Any]


class Call(NamedTuple):
    """A call of vLLM, and the same one of this package.

    Attributes:
        name: as the table has it.
        kernel: what vLLM has: CUDA, Triton, or torch.
        theirs: vLLM's function.
        ours: the function that takes its place.
        arguments: of both.
    """

    name: str
    kernel: str
    theirs: Function
    ours: Function
    arguments: dict[str, Any]


def calls(rows: int, k: int, device: torch.device) -> Iterator[Call]:
    """Return the calls for a number of rows of k columns of results."""
    generator = torch.Generator(device).manual_seed(rows)
    normal = functools.partial(torch.randn, generator=generator, device=device)
    x = normal(rows, k).bfloat16()
    gate_up = normal(rows, 2 * k).bfloat16()

    def of(module: str, function: Function, name: str | None = None) -> dict[str, Function]:
        theirs = getattr(importlib.import_module(module), name or function.__name__)
        return {"theirs": theirs, "ours": function}

    group_quant = of(FP8_UTILS, ours.per_token_group_quant_fp8)
    of_tma = {"column_major_scales": True, "tma_aligned_scales": True, "use_ue8m0": True}
    for text, options in (("MN-major powers of two", of_tma), ("row-major", {"use_ue8m0": False})):
        arguments = {"x": x, "group_size": 128, **options}
        yield Call(f"groups, {text}", "CUDA", **group_quant, arguments=arguments)
    packed = of(FP8_UTILS, ours.per_token_group_quant_fp8_packed_for_deepgemm)
    arguments = {"x": x, "group_size": 128, "use_ue8m0": True}
    yield Call("groups, packed UE8M0", "CUDA", **packed, arguments=arguments)
    arguments = {"input": x, "use_per_token_if_dynamic": True}
    yield Call("rows", "CUDA", **of(CUSTOM_OPS, ours.scaled_fp8_quant), arguments=arguments)
    int8 = of(INT8_UTILS, ours.per_token_group_quant_int8)
    yield Call("groups, int8", "CUDA", **int8, arguments={"x": x, "group_size": 128})
    mxfp8 = of(MXFP8_UTILS, ours.mxfp8_e4m3_quantize)
    arguments = {"x": x, "is_sf_swizzled_layout": True}
    yield Call("MXFP8, 128x4", "torch", **mxfp8, arguments=arguments)
    sf = torch.randint(255, (rows, k // 32), dtype=torch.uint8, generator=generator, device=device)
    swizzle = of(MXFP8_UTILS, ours.swizzle_mxfp8_scale)
    arguments = {"sf": sf, "M": rows, "K": k}
    yield Call("scales to 128x4", "torch", **swizzle, arguments=arguments)
    if rows % 128 == 0:
        # Its grid has whole tiles of rows.
        stacked = of(FP8_UTILS, ours.silu_mul_per_token_group_quant_fp8_colmajor)
        arguments = {"input": gate_up, "use_ue8m0": True}
        yield Call("SiLU, MN-major", "Triton", **stacked, arguments=arguments)
    fused = of(FP8_UTILS, ours.silu_mul_quant_fp8_packed_triton)
    yield Call("SiLU, packed UE8M0", "Triton", **fused, arguments={"input": gate_up})
    name = "_silu_and_mul_fp8_dynamic_128"
    activation = of(FUSED_ACTIVATIONS, ours.silu_and_mul_fp8_dynamic_128, name)
    arguments = {"x": gate_up, "linear": SimpleNamespace()}
    yield Call("SiLU, row-major", "CUDA", **activation, arguments=arguments)
    if rows % EXPERTS == 0:
        from vllm.utils.deep_gemm import DeepGemmQuantScaleFMT

        of_experts = gate_up.view(EXPERTS, rows // EXPERTS, 2 * k)
        counts = torch.full((EXPERTS,), rows // EXPERTS, dtype=torch.int32, device=device)
        masked = of(BATCHED, ours.persistent_masked_m_silu_mul_quant)
        arguments = {"y": of_experts, "tokens_per_expert": counts}
        arguments["quant_scale_fmt"] = DeepGemmQuantScaleFMT.FLOAT32_CEIL_UE8M0
        yield Call(f"SiLU, {EXPERTS} masked experts", "CUDA", **masked, arguments=arguments)
    weight = normal(k).bfloat16()
    arguments = {"x": x, "weight": weight}
    yield Call("norm, MN-major", "CUDA", norm_of_vllm, norm, arguments)
    arguments = {"x": x, "weight": weight, "residual": normal(rows, k).bfloat16()}
    yield Call("norm of a sum, MN-major", "CUDA", norm_of_vllm, norm, arguments)


NORM_FORMAT = DEEP_GEMM_SM90.replace(numerics=VLLM)
"""Bits of ``rms_norm_per_block_quant``."""
Residual = torch.Tensor | None


def norm_of_vllm(x: torch.Tensor, weight: torch.Tensor, residual: Residual = None) -> Any:
    """Call the operator that vLLM's pass puts into graphs."""
    rows, k = x.shape
    q = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    sf = x.new_empty((k // 128, rows), dtype=torch.float32).mT
    torch.ops._C.rms_norm_per_block_quant(q, x, weight, sf, 1e-6, None, residual, 128, True)
    return q, sf


def norm(x: torch.Tensor, weight: torch.Tensor, residual: Residual = None) -> Any:
    """Call what this package's pass puts into graphs; columns of scales are aligned."""
    q, sf, *_ = rms_norm_quantize(
        x, weight, NORM_FORMAT, eps=1e-6, rounding=VLLM_ROUNDING, residual=residual
    )
    return q, sf


def measure(call: Call, on_cuda: bool) -> str:
    """Return the cells of a call: times of both, and whether they have the same bits."""
    theirs, mine = (_results(function, call.arguments) for function in (call.theirs, call.ours))
    found = difference(mine, theirs)
    functions = [functools.partial(function, **call.arguments) for function in call[2:4]]
    if on_cuda:
        graphs = {number: timing.capture([f]) for number, f in enumerate(functions)}
        seconds = timing.median_seconds(graphs)
    else:
        seconds = {number: timeit.timeit(f, number=1) for number, f in enumerate(functions)}
    times = [1e6 * seconds[number] for number in range(2)]
    return f"{times[0]:.2f} | {times[1]:.2f} | {times[0] / times[1]:.2f} | {found or 'equal'} |"


def _results(function: Function, arguments: dict[str, Any]) -> Any:
    """Return values and scales of a call, with arguments of its own: some are written to."""
    own = {n: a.clone() if isinstance(a, torch.Tensor) else a for n, a in arguments.items()}
    found = function(**own)
    if hasattr(found, "orig_shape"):
        found = found.data, found.scale
    # Columns of scales may be padded in one of them.
    return [t.contiguous() for t in ([found] if isinstance(found, torch.Tensor) else found)]


def run(options: argparse.Namespace) -> None:
    """Print a table of all calls."""
    device = torch.device(options.device)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        vllm_archive.load(options.archive, directory)
        if device.type == "cuda":
            print(torch.cuda.get_device_name(device))
            major, minor = torch.cuda.get_device_capability(device)
            try:
                library = vllm_operators.build(directory / SOURCES, directory, f"{major}{minor}a")
                torch.ops.load_library(str(library))
            except (RuntimeError, OSError) as error:
                print(f"vLLM's kernels for CUDA are left out: {error}")
            timing.warm_up()
        print("| call | rows | vLLM has | vLLM, us | cute_quant, us | vLLM / cute_quant | bits |")
        print("| --- | ---: | --- | ---: | ---: | ---: | --- |")
        for rows in options.rows:
            for call in calls(rows, options.k, device):
                try:
                    line = measure(call, device.type == "cuda")
                except Exception as error:
                    first = (str(error).strip() or type(error).__name__).splitlines()[0]
                    line = f" | | | not measured: {first[:120]} |"
                print(f"| {call.name} | {rows} | {call.kernel} | {line}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser("python -m bench.engines", description=__doc__)
    parser.add_argument("command", choices=("pack", "run"))
    parser.add_argument("archive", type=Path)
    parser.add_argument("--sources", type=Path, help="vLLM's directory csrc, to pack")
    parser.add_argument("--k", type=int, default=COLUMNS)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    if options.command == "run":
        run(options)
        return
    if options.sources is None:
        parser.error("--sources: expected vLLM's directory csrc to pack")
    if not torch.cuda.is_available():
        vllm_archive.pretend()
    root = options.sources.resolve()
    files = {f"{SOURCES}/{path.relative_to(root)}": path for path in vllm_operators.files(root)}
    vllm_archive.pack(options.archive, IMPORTS, KEPT, files)


if __name__ == "__main__":
    main()
