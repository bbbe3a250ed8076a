"""Rotary embedding and quantization in one kernel, written with the stage of `cute_quant.kernels`.

A head of 128 of the queries of FP8 attention is a group: eight lanes hold it, 16 columns each, and
a column's partner, 64 further or before, is with the fourth lane after or before.

    python examples/rope_quantize.py

runs the kernel, on a GPU if there is one, else its PTX in the emulator, and compares the result
with the rotation in float64.
"""

import functools
from collections.abc import Callable

import cuda.bindings.driver as cuda
import cutlass.cute as cute
import torch
from cutlass import BFloat16, Float8E4M3FN, Float32, Int32, Uint32
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from cute_quant import DEEP_GEMM as FORMAT
from cute_quant import dequantize, emulator, jit, quantize
from cute_quant import kernels as cq

HEAD, HALF = 128, 64


class RopeQuantize:
    stage = cq.Stage(Float32, FORMAT)

    def signature(self) -> tuple:
        mn, k = cute.sym_int32(), cute.sym_int32(divisibility=HEAD)
        angles = make_fake_tensor(Float32, (mn, HALF), stride=(HALF, 1), assumed_align=32)
        strides = cute.sym_int64(), cute.sym_int64()
        scales = make_fake_tensor(Int32, (mn, cute.sym_int32()), stride=strides)
        x, q = cq.fake_matrix(BFloat16, (mn, k), 32), cq.fake_matrix(Float8E4M3FN, (mn, k), 16)
        return x, angles, angles, q, scales, Int32(0), make_fake_stream(use_tvm_ffi_env_stream=True)

    @cute.jit
    def __call__(self, mX, mCos, mSin, mQ, mS, missing_rows: Int32, stream: cuda.CUstream):
        mn, k = mX.shape
        scales = self.stage.scales(mS, mn, k, missing_rows)
        bound = self.stage.scale_bound(Int32(FORMAT.floor))
        self.kernel(cq.Matrix(mX), mCos, mSin, cq.Matrix(mQ), scales, bound, Uint32(mn)).launch(
            grid=[cute.ceil_div(Int32(scales.rows), 4), self.stage.tiles(k), 1],
            block=[cq.LANES, 4, 1],
            stream=stream,
        )

    @cute.kernel
    def kernel(
        self, x: cq.Matrix, mCos, mSin, q: cq.Matrix, scales: cq.Scales, bound: Float32, mn: Uint32
    ):
        lane, warp, _ = cute.arch.thread_idx()
        row_tile, tile, _ = cute.arch.block_idx()
        row, segment = Uint32(row_tile * 4 + warp), cq.Segment(tile, lane)
        exists, k, angles = row < mn, x.tensor.shape[1], cq.Segment(Int32(0), lane % 4)
        tXrX, tXrC, tXrS = cq.zeros(16, BFloat16), cq.zeros(16, Float32), cq.zeros(16, Float32)
        cq.load(x.row(row), segment, exists, tXrX, cq.Access())
        cq.load(cq.Matrix(mCos).row(row), angles, exists, tXrC, cq.Access())
        cq.load(cq.Matrix(mSin).row(row), angles, exists, tXrS, cq.Access())
        values, partners = cq.widen(tXrX), cq.zeros(16, Float32)
        sign = Float32(-1.0) if lane % 8 < 4 else Float32(1.0)
        for i in range(16, unroll_full=True):
            partners[i] = sign * cute.arch.shuffle_sync_bfly(values[i], offset=4)
        rotated = values.load() * tXrC.load() + partners.load() * tXrS.load()
        tXrQ, scale = self.stage.quantize(cq.registers(rotated), bound)
        cq.store(tXrQ, q.row(row), segment, exists, cq.Access())
        self.stage.store_scales(scales, cq.Rows([row], mn), [scale], segment, k)


@functools.cache
def compiled(device: int):
    return jit.build(RopeQuantize(), jit.architecture(device))


def rope_quantize(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    run: Callable[..., None] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate and quantize heads.

    Args:
        x: (tokens, heads * 128), bfloat16.
        cos: (tokens, 64), float32, cosines of the angles.
        sin: (tokens, 64), float32, sines of the angles.
        run: the kernel, by default compiled for the GPU of x.

    Returns:
        q and sf of `FORMAT`.
    """
    q = torch.empty(x.shape, dtype=FORMAT.values, device=x.device)
    sf = FORMAT.empty_scales((), *x.shape, x.device)
    if x.numel():
        missing_rows = FORMAT.scale_rows(x.shape[0]) - cq.last_column_rows(sf)
        run = compiled(x.get_device()) if run is None else run
        run(x, cos, sin, q, sf, missing_rows)
    return q, sf


def emulated(arch: str) -> Callable[..., None]:
    """Return the kernel for `arch` as a function of CPU tensors."""
    kernel = emulator.compile(RopeQuantize(), arch)
    return lambda *arguments: kernel(*arguments, outputs=arguments[3:5])


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Return the rotation of x in float64."""
    cos, sin = cos.double()[:, None], sin.double()[:, None]
    first, second = x.double().unflatten(1, (-1, HEAD)).chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).flatten(1)


def main() -> None:
    tokens, heads = 5, 8
    x = torch.randn(tokens, heads * HEAD).to(torch.bfloat16)
    angles = torch.rand(tokens, HALF) * 2 * torch.pi
    operands, exact = (x, angles.cos(), angles.sin()), rotated(x, angles.cos(), angles.sin())
    if torch.cuda.is_available():
        on_gpu = rope_quantize(*(t.cuda() for t in operands))
        results = {torch.cuda.get_device_name(): tuple(t.cpu() for t in on_gpu)}
    else:
        archs = "sm_90a", "sm_100a"
        results = {f"{arch}, emulated": rope_quantize(*operands, emulated(arch)) for arch in archs}
    for name, (q, sf) in results.items():
        error = dequantize(q, sf, FORMAT, dtype=torch.float32).double() - exact
        print(f"{name}: error {100 * (error.norm() / exact.norm()).item():.2f} % of the rotation")
    q, sf = quantize(exact.float(), FORMAT)
    error = dequantize(q, sf, FORMAT, dtype=torch.float32).double() - exact
    print(f"quantize after it: error {100 * (error.norm() / exact.norm()).item():.2f} %")


if __name__ == "__main__":
    main()
