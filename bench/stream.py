"""The ceiling: a kernel that moves the bytes of an operation and computes nothing.

For 16 elements a thread loads 32 bytes and stores 16, as the quantizer does, or several times
either, each time from or to another part of memory, as an operation of several tensors does. All
words that it loaded are joined by exclusive ors, only so that no load can be dropped.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
import torch
from cutlass import Int32, const_expr
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from cute_quant.jit import lookup

THREADS_PER_CTA = 128
WORDS_IN = 8
WORDS_OUT = 4


@dataclass(frozen=True)
class Stream:
    """Compile-time choices.

    Attributes:
        pdl: whether the launch is a programmatic dependent one.
        loads: of 32 bytes, by a thread.
        stores: of 16 bytes, by a thread, three at most.
    """

    pdl: bool
    loads: int = 1
    stores: int = 1

    def signature(self) -> tuple:
        n_in = cute.sym_int64(divisibility=self.loads * WORDS_IN)
        n_out = cute.sym_int64(divisibility=self.stores * WORDS_OUT)
        return (
            make_fake_tensor(Int32, (n_in,), stride=(1,), assumed_align=32),
            make_fake_tensor(Int32, (n_out,), stride=(1,), assumed_align=16),
            make_fake_stream(use_tvm_ffi_env_stream=True),
        )

    @cute.jit
    def __call__(
        self,
        mX: cute.Tensor,  # (loads 8 n,) int32
        mY: cute.Tensor,  # (stores 4 n,) int32
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
        mX, mY = in_parts(mX, self.loads, WORDS_IN), in_parts(mY, self.stores, WORDS_OUT)
        tiles = cute.ceil_div(mX.shape[0], THREADS_PER_CTA * WORDS_IN)
        self.kernel(mX, mY, load, store).launch(
            grid=[tiles, 1, 1], block=[THREADS_PER_CTA, 1, 1], stream=stream, use_pdl=self.pdl
        )

    @cute.kernel
    def kernel(
        self,
        mX: cute.Tensor,  # (8 n, loads)
        mY: cute.Tensor,  # (4 n, stores)
        load: cute.TiledCopy,
        store: cute.TiledCopy,
    ):
        if const_expr(self.pdl):
            cute.arch.griddepcontrol_launch_dependents()
        thread, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        tXgX = [
            load.get_slice(thread).partition_S(
                cute.local_tile(mX[None, i], (THREADS_PER_CTA * WORDS_IN,), (block,))
            )
            for i in range(self.loads)
        ]
        tXgY = [
            store.get_slice(thread).partition_D(
                cute.local_tile(mY[None, i], (THREADS_PER_CTA * WORDS_OUT,), (block,))
            )
            for i in range(self.stores)
        ]
        if const_expr(self.pdl):
            cute.arch.griddepcontrol_wait()
        if (block * THREADS_PER_CTA + thread) * WORDS_OUT < mY.shape[0]:
            tXrX = [cute.make_rmem_tensor_like(t) for t in tXgX]
            for i in cutlass.range_constexpr(self.loads):
                cute.copy(load, tXgX[i], tXrX[i])
            words = [joined(tXrX, i) for i in range(WORDS_IN)]
            first, second = words[:WORDS_OUT], words[WORDS_OUT:]
            folded = [a ^ b for a, b in zip(first, second, strict=True)]
            for i in cutlass.range_constexpr(self.stores):
                tXrY = cute.make_rmem_tensor_like(tXgY[i])
                for j in cutlass.range_constexpr(WORDS_OUT):
                    tXrY[j] = (folded, first, second)[i][j]
                cute.copy(store, tXrY, tXgY[i])


def in_parts(m: cute.Tensor, parts: int, divisibility: int) -> cute.Tensor:
    """Return a vector as (size / parts, parts), its parts stacked."""
    size = cute.assume(m.shape[0] // parts, divby=divisibility)
    return cute.make_tensor(m.iterator, cute.make_layout((size, parts), stride=(1, size)))


def joined(tensors: list[cute.Tensor], number: int) -> Int32:
    """Return the exclusive or of a word of each."""
    result = tensors[0][number]
    for t in tensors[1:]:
        result = result ^ t[number]
    return result


def expected(x: torch.Tensor, loads: int, stores: int) -> torch.Tensor:
    """Return what the kernel writes for the int32 words `x` (loads 8 n,): (stores, 4 n)."""
    words = functools.reduce(torch.bitwise_xor, x.view(loads, -1))
    first, second = words.view(-1, 2, WORDS_OUT).unbind(1)
    return torch.stack((first ^ second, first, second)[:stores]).flatten(1)


@functools.cache
def function(spec: Stream, arch: str) -> Callable[..., None]:
    """Return the compiled kernel, to be called on torch tensors."""
    return lookup.build(spec, arch)._tvm_ffi_function
