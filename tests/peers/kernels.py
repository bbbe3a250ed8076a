"""Kernels that call FlashInfer's device functions, one group a thread, to run in the emulator.

`libraries.flashinfer_kernel_parts` has the functions. A kernel loads what they do not load
themselves, and stores the scale byte and the codes of its group.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
        x = make_fake_tensor(
            BFloat16, (groups, self.size), stride=(self.size, 1), assumed_align=32
        )
        sf = make_fake_tensor(Uint8, (groups,), stride=(1,))
        codes = make_fake_tensor(Int64, (groups, self.words), stride=(self.words, 1))
        return x, sf, codes, Float32(1), make_fake_stream(use_tvm_ffi_env_stream=True)

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


def nvfp4(parts, strict: bool = False, recipe=None) -> QuantizeGroups:
    """Return the kernel of ``process_nvfp4_block_bfloat``, per tensor.

    Args:
        recipe: a ``NVFP44Over6Config``, or None.
    """

    @cute.jit
    def function(row: cute.Tensor, encode_scale: Float32):
        sf, word = parts.process_nvfp4_block_bfloat(
            row, Int32(0), encode_scale, strict, recipe, Float32(0)
        )
        return sf, (word,)

    return QuantizeGroups(function, 16, 1)


def mxfp4(parts) -> QuantizeGroups:
    """Return the kernel of ``process_mxfp4_block_bfloat``."""

    @cute.jit
    def function(row: cute.Tensor, encode_scale: Float32):
        _, sf, first, second = parts.process_mxfp4_block_bfloat(row, Int32(0))
        return sf, (first, second)

    return QuantizeGroups(function, 32, 2)


def run(kernel: QuantizeGroups, x: np.ndarray, encode_scale: float = 1.0) -> formulas.Quantized:
    """Run a kernel on groups that bf16 holds, and return the scale bytes and the codes."""
    t = torch.from_numpy(x).bfloat16()
    sf = torch.empty(len(x), dtype=torch.uint8)
    words = torch.empty(len(x), kernel.words, dtype=torch.int64)
    with missing_instructions():
        emulator.compile(kernel, "sm_100a")(t, sf, words, encode_scale, outputs=(sf, words))
    packed = words.view(torch.uint8).numpy()
    return sf.numpy(), np.stack([packed & 15, packed >> 4], -1).reshape(len(x), -1)


@contextmanager
def missing_instructions() -> Iterator[None]:
    """Enter the instructions of these kernels that the emulator does not have."""
    missing = {name: op for name, op in INSTRUCTIONS.items() if name not in isa.OPERATIONS}
    with mock.patch.dict(isa.OPERATIONS, missing):
        yield


def cvt_f32_to_e2m1(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    upper, lower = (formulas.e2m1(v.astype(np.float64)) for v in (a, b))
    return (upper << 4 | lower).astype(np.uint8)


def cvt_e2m1_to_f16(a: np.ndarray) -> np.ndarray:
    codes = np.stack([a & 15, a >> 4], -1)
    values = np.where(codes & 8, -1.0, 1.0) * formulas.E2M1[codes & 7]
    return values.astype(np.float16).view(np.uint32)[..., 0]


INSTRUCTIONS = {
    "cvt.rn.satfinite.e2m1x2.f32": isa.Operation("b8", ("f32", "f32"), cvt_f32_to_e2m1, False),
    "abs.f32": isa.Operation("f32", ("f32",), np.abs, False),
    "cvt.rn.f16x2.e2m1x2": isa.Operation("b32", ("b8",), cvt_e2m1_to_f16, False),
}
