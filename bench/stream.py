"""The ceiling: a kernel that moves the bytes of an operation and computes nothing.

For 16 elements a thread loads 32 bytes and stores 16, as the quantizer does, or several times
either, each time from or to another part of memory, as an operation of several tensors does. Other
values have other numbers of bytes. All words that it loaded are joined by exclusive ors, only so
that no load can be dropped.
"""

import functools
import operator
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
"""Words of 16 elements of 16 and of 8 bits."""


@dataclass(frozen=True)
class Stream:
    """Compile-time choices.

    Attributes:
        pdl: whether the launch is a programmatic dependent one.
        loads: of `words_in` by a thread.
        stores: of `words_out` by a thread, three at most.
        words_in, words_out: powers of two up to 8.
    """

    pdl: bool
    loads: int = 1
    stores: int = 1
    words_in: int = WORDS_IN
    words_out: int = WORDS_OUT

    def signature(self) -> tuple:
        n_in = cute.sym_int64(divisibility=self.loads * self.words_in)
        n_out = cute.sym_int64(divisibility=self.stores * self.words_out)
        return (
            make_fake_tensor(Int32, (n_in,), stride=(1,), assumed_align=4 * self.words_in),
            make_fake_tensor(Int32, (n_out,), stride=(1,), assumed_align=4 * self.words_out),
            make_fake_stream(use_tvm_ffi_env_stream=True),
        )

    @cute.jit
    def __call__(
        self,
        mX: cute.Tensor,  # (loads words_in n,) int32
        mY: cute.Tensor,  # (stores words_out n,) int32
        stream: cuda.CUstream,
    ):
        op = cute.nvgpu.CopyUniversalOp()
        threads = cute.make_layout(THREADS_PER_CTA)
        load = cute.make_tiled_copy_tv(
            cute.make_copy_atom(op, Int32, num_bits_per_copy=32 * self.words_in),
            threads,
            cute.make_layout(self.words_in),
        )
        store = cute.make_tiled_copy_tv(
            cute.make_copy_atom(op, Int32, num_bits_per_copy=32 * self.words_out),
            threads,
            cute.make_layout(self.words_out),
        )
        mX, mY = in_parts(mX, self.loads, self.words_in), in_parts(mY, self.stores, self.words_out)
        tiles = cute.ceil_div(mX.shape[0], THREADS_PER_CTA * self.words_in)
        self.kernel(mX, mY, load, store).launch(
            grid=[tiles, 1, 1], block=[THREADS_PER_CTA, 1, 1], stream=stream, use_pdl=self.pdl
        )

    @cute.kernel
    def kernel(
        self,
        mX: cute.Tensor,  # (words_in n, loads)
        mY: cute.Tensor,  # (words_out n, stores)
        load: cute.TiledCopy,
        store: cute.TiledCopy,
    ):
        if const_expr(self.pdl):
            cute.arch.griddepcontrol_launch_dependents()
        thread, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        tXgX = [
            load.get_slice(thread).partition_S(
                cute.local_tile(mX[None, i], (THREADS_PER_CTA * self.words_in,), (block,))
            )
            for i in range(self.loads)
        ]
        tXgY = [
            store.get_slice(thread).partition_D(
                cute.local_tile(mY[None, i], (THREADS_PER_CTA * self.words_out,), (block,))
            )
            for i in range(self.stores)
        ]
        if const_expr(self.pdl):
            cute.arch.griddepcontrol_wait()
        if (block * THREADS_PER_CTA + thread) * self.words_out < mY.shape[0]:
            tXrX = [cute.make_rmem_tensor_like(t) for t in tXgX]
            for i in cutlass.range_constexpr(self.loads):
                cute.copy(load, tXgX[i], tXrX[i])
            words = [joined(tXrX, i) for i in range(self.words_in)]
            results = [folded(words, i, self.words_out) for i in range(self.stores)]
            for i in cutlass.range_constexpr(self.stores):
                tXrY = cute.make_rmem_tensor_like(tXgY[i])
                for j in cutlass.range_constexpr(self.words_out):
                    tXrY[j] = results[i][j]
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


def folded(words: list, store: int, count: int) -> list:
    """Return `count` words for a store: all that were loaded, or of later stores a part of them."""
    parts = [words[i : i + count] for i in range(0, len(words), count)]
    if store:
        return parts[store - 1]
    if len(words) < count:
        return [words[i % len(words)] for i in range(count)]
    return [functools.reduce(operator.xor, some) for some in zip(*parts, strict=True)]


def expected(spec: Stream, x: torch.Tensor) -> torch.Tensor:
    """Return what the kernel writes for the int32 words `x` (loads words_in n,).

    Returns:
        (stores, words_out n).
    """
    words = functools.reduce(torch.bitwise_xor, x.view(spec.loads, -1))
    columns = list(words.view(-1, spec.words_in).unbind(1))
    stores = [torch.stack(folded(columns, i, spec.words_out), 1) for i in range(spec.stores)]
    return torch.stack(stores).flatten(1)


@functools.cache
def function(spec: Stream, arch: str) -> Callable[..., None]:
    """Return the compiled kernel, to be called on torch tensors."""
    return lookup.build(spec, arch)._tvm_ffi_function
