"""Machine code of the kernels, read without a GPU.

    python -m bench.sass

Prints, for each kernel and architecture, its instructions beside the issue budget, its registers
and spills, the accesses to global memory, and the instructions by kind. For H100 and B200 it prints
the resources that 512 elements take, as `bench.resources` counts them: cycles of an SM of each, the
warps that it holds, the bytes that they have in flight, and what binds first.

A warp moves what its 32 threads read and write for 16 elements of the result each, and the warps
of a GPU together move no more than its memory does. The issue budget is how many instructions a
warp may issue until its schedulers, not memory, are the limit. All instructions of a function count
against it, also those that a warp skips. There is none where no clock or bandwidth of a GPU of the
architecture is published. Kernels are as launched by default: where the architecture has them, as
programmatic dependents.
"""

from __future__ import annotations

import collections
import dataclasses
import textwrap
from collections.abc import Iterator

import torch

from bench import resources
from bench.resources import MACHINES, Machine
from bench.stream import Stream
from cute_quant import DEEP_GEMM, DEEP_GEMM_SM90, MXFP4, MXFP8, NVFP4, ROWWISE_INT8
from cute_quant.contract.upper_scales import ENCODE
from cute_quant.jit.lookup import ARCHITECTURES
from cute_quant.kernels import architectures
from cute_quant.kernels.architectures import Gpu
from cute_quant.kernels.config import (
    DEFAULT_TILE,
    LANES,
    ONE_ROW,
    Access,
    Domain,
    QuantizerSpec,
    QuantizeSpec,
    RmsNormSpec,
    SiluMulBackwardSpec,
    SiluMulSpec,
    Spec,
    Tile,
    launched_on,
)
from cute_quant.kernels.heuristics import TWO_ROWS, TWO_TILES, VECTOR_TILES
from cute_quant.lab.machine_code import MachineCode, disassemble, machine_code

ELEMENTS_PER_WARP = 32 * 16
BYTES_PER_WARP = ELEMENTS_PER_WARP * 3 + ELEMENTS_PER_WARP // 128
"""Bytes that the quantizer moves for a row, in DeepGEMM's format."""
TWO_ROWS_OF_TWO_TILES = TWO_TILES._replace(rows_per_thread=2)
FP4_ACCESS = Access(store_bytes=8)
EIGHT_VALUES = VECTOR_TILES[16]
"""Tile of Hopper's vectors, of which a warp has half as many elements."""

WIDTH = 100
INDENT = " " * 4


def reported() -> Iterator[tuple[str, float, QuantizerSpec | Stream]]:
    """Yield name, rows or tiles of a warp, in 512 elements, and choices of each kernel."""
    bf16 = torch.bfloat16
    packed = DEEP_GEMM
    spec: QuantizerSpec
    for dtype, name, fmt in (
        (bf16, "bf16 -> e4m3, ue8m0", packed),
        (bf16, "bf16 -> e4m3, float32", DEEP_GEMM_SM90),
        (bf16, "bf16 -> e4m3, float32, powers of 2", DEEP_GEMM_SM90.replace(round_scale=True)),
        (torch.float16, "fp16 -> e4m3, ue8m0", packed),
        (bf16, "bf16 -> e4m3, ue8m0_128x4 of 32", MXFP8),
    ):
        for tile in (DEFAULT_TILE, TWO_ROWS):
            rows = tile.rows_per_thread
            yield f"{name}, rows a thread: {rows}", rows, QuantizeSpec(dtype, fmt, tile)
        spec = QuantizeSpec(dtype, fmt, EIGHT_VALUES, access=Access(store_bytes=8))
        yield f"{name}, rows a thread: 1, values: 8", 0.5, spec
    for name, domain in (
        ("masked", Domain("masked", False, True)),
        ("gathered", Domain("dense", True)),
    ):
        yield f"bf16 -> e4m3, ue8m0, {name}", 1, QuantizeSpec(bf16, packed, domain=domain)
    yield from fp4_reported()
    for max_warps, tiles, held in ((1, 2, True), (16, 2, True), (16, 4, True), (16, 1, False)):
        tile = ONE_ROW._replace(tiles_per_thread=tiles, row_warps=4 if max_warps == 1 else 1)
        shape = f"{max_warps} warps a row at most, tiles a thread: {tiles}"
        name = f"bf16 -> int8, float32 of whole rows, {shape}" + ("" if held else ", read twice")
        yield name, tiles, QuantizeSpec(bf16, ROWWISE_INT8, tile, max_warps=max_warps, held=held)
    for rows in (1, 2):
        spec = SiluMulSpec(bf16, packed, Tile(rows_per_thread=rows))
        yield f"SiLU * up, bf16 -> e4m3, ue8m0, rows a thread: {rows}", rows, spec
    spec = SiluMulSpec(bf16, packed, EIGHT_VALUES, access=Access(store_bytes=8))
    yield "SiLU * up, bf16 -> e4m3, ue8m0, rows a thread: 1, values: 8", 0.5, spec
    for name, fmt in (("e4m3", DEEP_GEMM_SM90), ("nvfp4", NVFP4)):
        upper, access = (ENCODE, FP4_ACCESS) if fmt.upper_scale else (None, Access())
        spec = QuantizeSpec(bf16, fmt, access=access, stochastic=True, upper=upper)
        yield f"bf16 -> {name}, rounded stochastically", 1, spec
    for interleaved in (False, True):
        spec = SiluMulBackwardSpec(bf16, DEEP_GEMM_SM90, interleaved=interleaved)
        layout = "interleaved" if interleaved else "in halves"
        yield f"gradients of SiLU * up {layout}, bf16 -> e4m3, float32", 1, spec
    for tiles, max_warps in ((1, 16), (1, 4), (2, 8)):
        for residual in (False, True):
            spec = RmsNormSpec(
                bf16,
                packed,
                Tile(row_warps=1),
                tiles_per_thread=tiles,
                max_warps=max_warps,
                residual=residual,
            )
            name = "RMSNorm with residual" if residual else "RMSNorm"
            shape = f"{max_warps} warps a row at most, tiles a thread: {tiles}"
            yield f"{name}, bf16 -> e4m3, ue8m0, {shape}", tiles, spec
    yield "stream, the ceiling", 1, Stream(True)
    yield "stream, the ceiling of SiLU * up", 1, Stream(True, 2, 1)
    yield "stream, the ceiling of RMSNorm with residual", 1, Stream(True, 2, 3)


def fp4_reported() -> Iterator[tuple[str, float, QuantizerSpec]]:
    """Yield name, rows and tiles of a warp, in 512 elements, and choices of FP4 kernels."""
    bf16 = torch.bfloat16
    row_scale = NVFP4.replace(row_scale=True)
    for name, fmt, upper in (("nvfp4", NVFP4, ENCODE), ("mxfp4", MXFP4, None)):
        for layout in ("128x4", "row_major"):
            for tile in (DEFAULT_TILE, TWO_TILES, TWO_ROWS_OF_TWO_TILES):
                rows, tiles = tile.rows_per_thread, tile.tiles_per_thread
                spec = QuantizeSpec(
                    bf16, fmt.replace(scale_layout=layout), tile, access=FP4_ACCESS, upper=upper
                )
                shape = f"rows a thread: {rows}, tiles: {tiles}"
                yield f"bf16 -> {name}, {layout}, {shape}", rows * tiles, spec
            spec = spec._replace(tile=EIGHT_VALUES, access=Access(store_bytes=4))
            yield f"bf16 -> {name}, {layout}, rows a thread: 1, tiles: 1, values: 8", 0.5, spec
    tile = ONE_ROW._replace(tiles_per_thread=2)
    spec = QuantizeSpec(bf16, row_scale, tile, access=FP4_ACCESS, max_warps=8)
    yield "bf16 -> nvfp4, a scale for each row, 8 warps a row at most, tiles a thread: 2", 2, spec
    silu_mul = SiluMulSpec(bf16, NVFP4, access=FP4_ACCESS, upper=ENCODE)
    yield "SiLU * up, bf16 -> nvfp4, 128x4", 1, silu_mul


def compiled(spec: Spec | Stream, arch: str) -> MachineCode:
    """Return the machine code of a kernel, a programmatic dependent where there are such."""
    if isinstance(spec, Stream):
        return disassemble(dataclasses.replace(spec, pdl=architectures.named(arch).pdl), arch)
    return machine_code(launched_on(spec, arch), arch)


def bytes_per_warp(spec: QuantizerSpec | Stream) -> int:
    """Return the bytes that a warp moves for each of its rows or tiles.

    Weights are not counted, since they stay in the caches.
    """
    if isinstance(spec, Stream):
        return ELEMENTS_PER_WARP * (2 * spec.loads + spec.stores)
    inputs = 1.0
    if isinstance(spec, SiluMulSpec):
        inputs = 2
    elif isinstance(spec, SiluMulBackwardSpec):
        inputs = 1.5
    elif isinstance(spec, RmsNormSpec) and spec.residual:
        inputs = 3
    fmt = spec.fmt
    values = fmt.value_columns(ELEMENTS_PER_WARP) * fmt.values.itemsize
    scales = 0 if fmt.whole_row else ELEMENTS_PER_WARP // fmt.group_size * fmt.scale_dtype.itemsize
    return int(ELEMENTS_PER_WARP * 2 * inputs) + values + scales


def report(
    targets: str,
    code: MachineCode,
    rows: float,
    gpu: Gpu | None,
    nbytes: int = BYTES_PER_WARP,
) -> list[str]:
    """Return lines about a kernel: one of numbers, then the instructions by kind.

    Args:
        targets: names of the architectures that the machine code is the same for.
        code: the machine code.
        rows: rows of a warp, or its tiles of one row, of 512 elements each.
        gpu: GPU of the architectures, None if its limits are not known.
        nbytes: bytes that a warp moves for each row or tile.
    """
    count = len(code.opcodes)
    share = ""
    if gpu:
        budget = gpu.issue_budget(rows * nbytes)
        share = f"{count / budget:4.0%} of {gpu.name}'s {budget}"
    spills = code.count("LDL", "STL")
    memory = _counted(op for op in code.opcodes if op.startswith(("LDG", "STG", "LDS", "STS")))
    kinds = _counted(op.split(".")[0] for op in code.opcodes)
    wrapped = textwrap.wrap(
        kinds.replace(" ", "\0").replace(",\0", ", "),  # a number stays with its name
        WIDTH,
        initial_indent=INDENT,
        subsequent_indent=INDENT,
    )
    return [
        f"  {targets:16} {count:12}  {share:19} {code.registers:9} {spills:6} "
        f"{code.shared:6}  {memory}",
        *(line.replace("\0", " ") for line in wrapped),
    ]


def cta_warps(spec: QuantizerSpec | Stream) -> int:
    """Return the warps of a CTA, the most where a launch counts them."""
    if isinstance(spec, Stream):
        return spec.threads // LANES
    if isinstance(spec, RmsNormSpec) or spec.fmt.by_row:
        return spec.max_warps * spec.tile.row_warps
    return spec.tile.row_warps * spec.tile.column_warps


def resource_lines(
    spec: QuantizerSpec | Stream, code: MachineCode, rows: float, machine: Machine
) -> list[str]:
    """Return lines about the resources of a kernel, for each of the rows or tiles of a warp."""
    warps = cta_warps(spec)
    cycles = resources.steady(code, warps, rows * bytes_per_warp(spec), machine)
    of_row = {name: count / rows for name, count in cycles.items()}
    by_need = sorted(of_row, key=lambda name: -of_row[name])
    needs = ", ".join(f"{name} {of_row[name]:.1f}" for name in by_need)
    resident = resources.resident_ctas(code, warps, machine.arch) * warps
    loaded = resident * resources.bytes_in_flight(code)
    return textwrap.wrap(
        f"{machine.gpu.name}, estimated cycles of an SM for {ELEMENTS_PER_WARP} elements: {needs}. "
        f"Bound by {by_need[0]}. {resident} warps load {loaded / 1024:.0f} KB at once.",
        WIDTH,
        initial_indent=INDENT,
        subsequent_indent=INDENT,
    )


def _counted(names: Iterator[str]) -> str:
    """Return each name once, the most frequent first, with how often it came."""
    counts = collections.Counter(names).most_common()
    return ", ".join(f"{n} {name}" for name, n in counts)


def main() -> None:
    print(
        f"  {'target':16} {'instructions':>12}  {'of the issue budget':19} {'registers':>9} "
        f"{'spills':>6} {'shared':>6}  accesses to memory; below, instructions by kind"
    )
    for name, rows, spec in reported():
        print(f"\n{name}")
        same: dict[MachineCode, list[str]] = {}
        bounds: dict[str, list[str]] = {}
        for arch in ARCHITECTURES.values():
            code = compiled(spec, arch)
            same.setdefault(dataclasses.replace(code, text="", controls=()), []).append(arch)
            if machine := MACHINES.get(arch):
                bounds[arch] = resource_lines(spec, code, rows, machine)
        for code, targets in same.items():
            gpu = architectures.named(targets[0]).gpu
            lines = report(" ".join(targets), code, rows, gpu, bytes_per_warp(spec))
            lines += (line for target in targets for line in bounds.get(target, ()))
            print(*lines, sep="\n", flush=True)


if __name__ == "__main__":
    main()
