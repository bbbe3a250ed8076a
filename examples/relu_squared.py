"""Square what a ReLU lets through and quantize it, in one kernel with the stage of the package.

    python examples/relu_squared.py

runs the kernel, on a GPU if there is one, else its PTX in the emulator, and compares its bits with
`quantize` of what torch computes.
"""

import functools

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
import torch
from cutlass import BFloat16, Float8E4M3FN, Float32, Int32, Uint32
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

import cute_quant as cq
from cute_quant import emulator, jit, kernels

FORMAT, WARPS = cq.DEEP_GEMM, 4


class ReluSquaredQuantize:
    """The kernel: ``signature`` describes its arguments to the compiler, ``__call__`` launches."""

    stage = kernels.Stage(Float32, FORMAT)  # takes float32, returns e4m3 and packed UE8M0

    def signature(self) -> tuple:
        mn, k = cute.sym_int32(), cute.sym_int32(divisibility=16)
        x = kernels.fake_matrix(BFloat16, (mn, k), 32)  # rows start at multiples of 32 bytes
        q = kernels.fake_matrix(Float8E4M3FN, (mn, k), 16)
        strides = cute.sym_int64(), cute.sym_int64()
        sf = make_fake_tensor(Int32, (mn, cute.sym_int32()), stride=strides)
        return x, q, sf, Int32(0), make_fake_stream(use_tvm_ffi_env_stream=True)

    @cute.jit
    def __call__(self, mX, mQ, mS, missing_rows: Int32, stream: cuda.CUstream):
        mn, k = mX.shape
        scales = self.stage.scales(mS, mn, k, missing_rows)
        bound = self.stage.scale_bound(Int32(FORMAT.floor))
        # A CTA has a row for each warp, padding rows of the scales included.
        grid = [cute.ceil_div(Int32(scales.rows), WARPS), self.stage.tiles(k), 1]
        self.kernel(kernels.Matrix(mX), kernels.Matrix(mQ), scales, bound, Uint32(mn)).launch(
            grid=grid, block=[kernels.LANES, WARPS, 1], stream=stream
        )

    @cute.kernel
    def kernel(
        self,
        x: kernels.Matrix,
        q: kernels.Matrix,
        scales: kernels.Scales,
        bound: Float32,
        mn: Uint32,
    ):
        lane, warp, _ = cute.arch.thread_idx()
        row_tile, column_tile, _ = cute.arch.block_idx()
        row, segment = Uint32(row_tile * WARPS + warp), kernels.Segment(column_tile, lane)
        exists, k = row < mn, x.tensor.shape[1]

        tXrX = kernels.zeros(16, BFloat16)  # 16 values of a row, contiguous along k
        kernels.load(x.row(row), segment, exists, tXrX, kernels.Access())
        tXrY = kernels.widen(tXrX)  # float32
        for i in cutlass.range_constexpr(16):
            # NaN is not below 0 and stays, where a maximum would drop it.
            positive = Float32(0.0) if tXrY[i] < 0.0 else tXrY[i]
            tXrY[i] = positive * positive

        tXrQ, scale = self.stage.quantize(tXrY, bound)
        kernels.store(tXrQ, q.row(row), segment, exists, kernels.Access())
        self.stage.store_scales(scales, kernels.Rows([row], mn), [scale], segment, k)


def empty_results(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Return memory for q and sf, and how many padding rows the last column of sf lacks."""
    q = torch.empty(x.shape, dtype=FORMAT.values, device=x.device)
    sf = cq.empty_scales(FORMAT, x.shape, device=x.device)
    return q, sf, FORMAT.scale_rows(x.shape[0]) - kernels.last_column_rows(sf)


@functools.cache
def compiled(device: int):
    return jit.build(ReluSquaredQuantize(), jit.architecture(device))


def relu_squared_quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """X (mn, k), bfloat16, on a GPU, k a multiple of 16. Returns q and sf of `FORMAT`."""
    q, sf, missing_rows = empty_results(x)
    if x.numel():
        compiled(x.get_device())(x, q, sf, missing_rows)
    return q, sf


def emulated(x: torch.Tensor, arch: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the kernel for `arch` in the emulator, on a CPU tensor."""
    q, sf, missing_rows = empty_results(x)
    kernel = emulator.compile(ReluSquaredQuantize(), arch)
    kernel(x, q, sf, missing_rows, outputs=(q, sf))
    return q, sf


def expected(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return cq.quantize(torch.relu(x.float()) ** 2, FORMAT)


def main() -> None:
    x = torch.randn(7, 1296, dtype=torch.bfloat16)
    q, sf = expected(x)
    if torch.cuda.is_available():
        results = {torch.cuda.get_device_name(): relu_squared_quantize(x.cuda())}
    else:
        results = {f"{arch}, emulated": emulated(x, arch) for arch in ("sm_90a", "sm_100a")}
    for name, (our_q, our_sf) in results.items():
        values = (our_q.cpu().view(torch.uint8) != q.view(torch.uint8)).sum()
        scales = (our_sf.cpu() != sf).sum()
        print(f"{name}: {values} of {q.numel()} values and {scales} of {sf.numel()} words differ")


if __name__ == "__main__":
    main()
