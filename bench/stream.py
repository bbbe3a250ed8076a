"""The ceiling: a kernel that moves the quantizer's bytes and computes nothing.

Each thread loads 32 bytes and stores 16, as the quantizer does for 16 elements. The two halves of
what it loaded are joined by an exclusive or, only so that neither load can be dropped.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import cuda.bindings.driver as cuda
import cutlass.cute as cute
from cutlass import Int32, const_expr
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from cute_quant import compile

THREADS_PER_CTA = 128
WORDS_IN = 8
WORDS_OUT = 4


@dataclass(frozen=True)
class Stream:
    """Compile-time choice: whether the launch is a programmatic dependent one."""

    pdl: bool

    def signature(self) -> tuple:
        n_in = cute.sym_int64(divisibility=WORDS_IN)
        n_out = cute.sym_int64(divisibility=WORDS_OUT)
        return (
            make_fake_tensor(Int32, (n_in,), stride=(1,), assumed_align=32),
            make_fake_tensor(Int32, (n_out,), stride=(1,), assumed_align=16),
            make_fake_stream(use_tvm_ffi_env_stream=True),
        )

    @cute.jit
    def __call__(
        self,
        mX: cute.Tensor,  # (8 n,) int32
        mY: cute.Tensor,  # (4 n,) int32
        stream: cuda.CUstream,
    ):
        op = cute.nvgpu.CopyUniversalOp()
        threads = cute.make_layout(THREADS_PER_CTA)
        load = cute.make_tiled_copy_tv(
            cute.make_copy_atom(op, Int32, num_bits_per_copy=256),
            threads,
            cute.make_layout(WORDS_IN),
        )
        store = cute.make_tiled_copy_tv(
            cute.make_copy_atom(op, Int32, num_bits_per_copy=128),
            threads,
            cute.make_layout(WORDS_OUT),
        )
        tiles = cute.ceil_div(mX.shape[0], THREADS_PER_CTA * WORDS_IN)
        self.kernel(mX, mY, load, store).launch(
            grid=[tiles, 1, 1], block=[THREADS_PER_CTA, 1, 1], stream=stream, use_pdl=self.pdl
        )

    @cute.kernel
    def kernel(self, mX: cute.Tensor, mY: cute.Tensor, load: cute.TiledCopy, store: cute.TiledCopy):
        if const_expr(self.pdl):
            cute.arch.griddepcontrol_launch_dependents()
        thread, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        gX = cute.local_tile(mX, (THREADS_PER_CTA * WORDS_IN,), (block,))
        gY = cute.local_tile(mY, (THREADS_PER_CTA * WORDS_OUT,), (block,))
        tXgX = load.get_slice(thread).partition_S(gX)
        tXgY = store.get_slice(thread).partition_D(gY)
        if const_expr(self.pdl):
            cute.arch.griddepcontrol_wait()
        if (block * THREADS_PER_CTA + thread) * WORDS_OUT < mY.shape[0]:
            tXrX = cute.make_rmem_tensor_like(tXgX)
            cute.copy(load, tXgX, tXrX)
            tXrY = cute.make_rmem_tensor_like(tXgY)
            for i in range(WORDS_OUT, unroll_full=True):
                tXrY[i] = tXrX[i] ^ tXrX[i + WORDS_OUT]
            cute.copy(store, tXrY, tXgY)


@functools.cache
def function(pdl: bool, arch: str) -> Callable[..., None]:
    """The compiled kernel, to be called on torch tensors."""
    return compile.build(Stream(pdl), arch)._tvm_ffi_function
