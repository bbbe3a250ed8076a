"""FlashInfer's CuTe DSL kernels, to run in the emulator: groups in, scale bytes and codes out.

Where a kernel has a device function for a group, `QuantizeGroups` calls it, one group a thread.
Others run as they are, but for their launch, which asks the driver for the size of a GPU.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from unittest import mock

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
import numpy as np
import torch
from cutlass import BFloat16, Float32, Int32, Int64, Uint8
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from cute_quant import emulator
from cute_quant.emulator import isa
from tests.peers import formulas

ARCH = "sm_100a"
THREADS = 128


class QuantizeGroups:
    """Apply a function of FlashInfer to each row of a (groups, size) tensor.

    Args:
        function: maps a row and the encode scale to a scale byte and words of codes, in registers.
        size: elements of a group.
        words: 64-bit words of codes of a group.
    """

    def __init__(self, function: Callable, size: int, words: int):
        self.function = function
        self.size = size
        self.words = words

    def signature(self):
        groups = cute.sym_int32()
        x = matrix(BFloat16, groups, self.size)
        codes = matrix(Int64, groups, self.words)
        return x, vector(Uint8, groups), codes, Float32(1), stream()

    @cute.jit
    def __call__(
        self,
        mX: cute.Tensor,
        mS: cute.Tensor,
        mQ: cute.Tensor,
        encode_scale: Float32,
        stream: cuda.CUstream,
    ):
        grid = [cute.ceil_div(mX.shape[0], THREADS), 1, 1]
        self.kernel(mX, mS, mQ, encode_scale).launch(
            grid=grid, block=[THREADS, 1, 1], stream=stream
        )

    @cute.kernel
    def kernel(self, mX: cute.Tensor, mS: cute.Tensor, mQ: cute.Tensor, encode_scale: Float32):
        thread, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        group = block * THREADS + thread
        if group < mX.shape[0]:
            sf, words = self.function(mX[group, None], encode_scale)
            mS[group] = sf
            for i in cutlass.range_constexpr(self.words):
                mQ[group, i] = Int64(words[i])

    def run(self, x: np.ndarray, encode_scale: float = 1.0) -> formulas.Quantized:
        """Quantize groups whose values bf16 holds."""
        sf = torch.empty(len(x), dtype=torch.uint8)
        codes = torch.empty(len(x), self.words, dtype=torch.int64)
        t = torch.from_numpy(x).bfloat16()
        compiled(self)(t, sf, codes, encode_scale, outputs=(sf, codes))
        return sf.numpy(), unpacked(codes.view(torch.uint8)).reshape(x.shape)


def nvfp4(module: ModuleType, strict: bool = False, recipe: Any = None) -> QuantizeGroups:
    """Return a kernel of ``process_nvfp4_block_bfloat``, per tensor.

    Args:
        module: ``quantization_cute_dsl_utils``.
        recipe: a ``NVFP44Over6Config``, or None.
    """

    @cute.jit
    def function(row: cute.Tensor, encode_scale: Float32):
        sf, word = module.process_nvfp4_block_bfloat(
            row, Int32(0), encode_scale, strict, recipe, Float32(0)
        )
        return sf, (word,)

    return QuantizeGroups(function, 16, 1)


def mxfp4(module: ModuleType) -> QuantizeGroups:
    """Return a kernel of ``process_mxfp4_block_bfloat``."""

    @cute.jit
    def function(row: cute.Tensor, encode_scale: Float32):
        _, sf, first, second = module.process_mxfp4_block_bfloat(row, Int32(0))
        return sf, (first, second)

    return QuantizeGroups(function, 32, 2)


def run_mxfp8(module: ModuleType, t: torch.Tensor) -> formulas.Quantized:
    """Quantize (groups, 32) by ``MXFP8QuantizeLinearKernel``.

    Args:
        module: ``kernels.mxfp8_quantize``.
    """

    class Kernel(module.MXFP8QuantizeLinearKernel):
        def signature(self):
            groups = cute.sym_int32()
            x = matrix(Float32 if self.is_float32 else BFloat16, groups, 32)
            return x, matrix(Uint8, groups, 32), vector(Uint8, groups), stream()

        @cute.jit
        def __call__(
            self, mX: cute.Tensor, mQ: cute.Tensor, mS: cute.Tensor, stream: cuda.CUstream
        ):
            groups = mX.shape[0]
            grid = [cute.ceil_div(groups, self.SF_BLOCKS_PER_TB), 1, 1]
            self.kernel(mX, mQ, mS, groups).launch(
                grid=grid, block=[self.WARPS_PER_BLOCK * 32, 1, 1], stream=stream
            )

    q = torch.empty(t.shape, dtype=torch.uint8)
    sf = torch.empty(len(t), dtype=torch.uint8)
    kernel = Kernel(Float32 if t.dtype is torch.float32 else BFloat16, 32)
    compiled(kernel)(t, q, sf, outputs=(q, sf))
    return sf.numpy(), q.numpy()


def run_per_token(
    module: ModuleType, t: torch.Tensor, strict: bool = False, recipe: Any = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Quantize rows of bf16 by ``NVFP4QuantizePerTokenKernel``.

    Args:
        module: ``kernels.nvfp4_quantize``.
        recipe: a ``NVFP44Over6Config``, or None.

    Returns:
        The scales of rows, the scale bytes of groups, and their codes.
    """

    class Kernel(module.NVFP4QuantizePerTokenKernel):
        def signature(self):
            rows = cute.sym_int32()
            return (
                matrix(BFloat16, rows, self.K),
                matrix(Uint8, rows, self.K // 2),
                vector(Uint8, cute.sym_int32()),
                vector(Float32, rows),
                vector(Float32, 1),
                stream(),
            )

        @cute.jit
        def __call__(
            self,
            mX: cute.Tensor,
            mQ: cute.Tensor,
            mS: cute.Tensor,
            mRowScale: cute.Tensor,
            mInverse: cute.Tensor,
            stream: cuda.CUstream,
        ):
            rows = mX.shape[0]
            self.kernel(mX, mQ, mS, mRowScale, rows, rows, mInverse, mInverse).launch(
                grid=[rows, 1, 1], block=[self.threads, 1, 1], stream=stream
            )

    rows, k = t.shape
    q = torch.empty(rows, k // 2, dtype=torch.uint8)
    sf = torch.empty(rows * k // 16, dtype=torch.uint8)
    row_scale = torch.empty(rows)
    largest_scale = 448 if recipe is None else recipe.e4m3_max
    inverse = torch.tensor([1 / (largest_scale * 6)])
    kernel = Kernel(
        BFloat16,
        k,
        module.SF_LAYOUT_LINEAR,
        disable_fp4_quant_fast_math=strict,
        nvfp4_4over6_config=recipe,
    )
    # The emulator has shared memory of a size that the kernel says, not the launch.
    with mock.patch("cutlass.utils.SmemAllocator", StaticAllocator):
        compiled(kernel)(t, q, sf, row_scale, inverse, outputs=(q, sf, row_scale))
    return row_scale.numpy(), sf.numpy(), unpacked(q).reshape(-1, 16)


class StaticAllocator:
    def allocate_tensor(self, dtype, layout, byte_alignment):
        pointer = cute.arch.alloc_smem(dtype, cute.size(layout), alignment=byte_alignment)
        return cute.make_tensor(pointer, layout)


def matrix(dtype: type, rows: Any, columns: int) -> cute.Tensor:
    return make_fake_tensor(dtype, (rows, columns), stride=(columns, 1), assumed_align=16)


def vector(dtype: type, size: Any) -> cute.Tensor:
    return make_fake_tensor(dtype, (size,), stride=(1,))


def stream() -> Any:
    return make_fake_stream(use_tvm_ffi_env_stream=True)


def unpacked(t: torch.Tensor) -> np.ndarray:
    packed = t.numpy()
    return np.stack([packed & 15, packed >> 4], -1)


def compiled(kernel: Any) -> emulator.kernel.EmulatedKernel:
    with missing_instructions():
        return emulator.compile(kernel, ARCH)


@contextmanager
def missing_instructions() -> Iterator[None]:
    """Enter the instructions of these kernels that the emulator does not have."""
    missing = {name: op for name, op in INSTRUCTIONS.items() if name not in isa.OPERATIONS}
    with mock.patch.dict(isa.OPERATIONS, missing):
        yield


def cvt_f32_to_e2m1(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    upper, lower = (formulas.e2m1(v.astype(np.float64)) for v in (a, b))
    return upper << 4 | lower


def cvt_e2m1_to_f16(a: np.ndarray) -> np.ndarray:
    codes = np.stack([a & 15, a >> 4], -1)
    values = np.where(codes & 8, -1.0, 1.0) * formulas.E2M1[codes & 7]
    return values.astype(np.float16).view(np.uint32)[..., 0]


INSTRUCTIONS = {
    "abs.f32": isa.Operation("f32", ("f32",), np.abs, False),
    "cvt.rn.f16x2.e2m1x2": isa.Operation("b32", ("b8",), cvt_e2m1_to_f16, False),
    "cvt.rn.satfinite.e2m1x2.f32": isa.Operation("b8", ("f32", "f32"), cvt_f32_to_e2m1, False),
}
