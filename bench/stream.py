"""The ceiling: kernels that move the bytes of an operation and compute nothing.

For 16 elements a thread loads 32 bytes and stores 16, as the quantizer does, or several times
either, each time from or to another part of memory, as an operation of several tensors does. Other
values have other numbers of bytes. All words that it loaded are joined by exclusive ors, only so
that no load can be dropped.

`family` has the kernels that a ceiling is the best of, for each traffic, size and GPU another one:
`bench.ceiling` measures which.
"""

import functools
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
import torch
from cutlass import Int32, Int64, const_expr
from cutlass.cute.nvgpu import cpasync
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from cute_quant.jit import lookup

WORDS_IN = 8
WORDS_OUT = 4
"""Words of 16 elements of 16 and of 8 bits."""

CHUNK = 256
"""Vectors of a bulk copy: 8 KB to be read for 16-bit elements."""
ALIGNMENT = 128
"""Bytes that memory of bulk copies is aligned to, shared or not."""
BYTES_PER_WORD = 4


class Traffic(NamedTuple):
    """Memory traffic for 16 elements.

    Attributes:
        loads: of `words_in`, each from another part of memory.
        stores: of `words_out`, three at most.
        words_in, words_out: powers of two up to 8.
    """

    loads: int = 1
    stores: int = 1
    words_in: int = WORDS_IN
    words_out: int = WORDS_OUT


def fake_words(number: int, words: int) -> cute.Tensor:
    """Return a stand-in for `number` parts of memory, of vectors of so many words.

    Memory that an allocator of torch returns is aligned enough, however long a vector is.
    """
    size = cute.sym_int64(divisibility=number * words)
    alignment = min(max(16, BYTES_PER_WORD * words), ALIGNMENT)
    return make_fake_tensor(Int32, (size,), stride=(1,), assumed_align=alignment)


@dataclass(frozen=True)
class Stream:
    """Compile-time choices of a kernel whose threads load and store vectors.

    Attributes:
        pdl: whether the launch is a programmatic dependent one.
        loads, stores, words_in, words_out: as of a `Traffic`, for each vector of a thread.
        in_flight: vectors of a thread, whose loads are in flight at once.
        threads: of a CTA.
        no_allocate: whether loads leave the L1 cache alone.
    """

    pdl: bool
    loads: int = 1
    stores: int = 1
    words_in: int = WORDS_IN
    words_out: int = WORDS_OUT
    in_flight: int = 1
    threads: int = 128
    no_allocate: bool = False

    def fits(self, vectors: int) -> bool:
        """Return whether the kernel takes so many vectors."""
        return vectors > 0

    def signature(self) -> tuple:
        return (
            fake_words(self.loads, self.words_in),
            fake_words(self.stores, self.words_out),
            make_fake_stream(use_tvm_ffi_env_stream=True),
        )

    @cute.jit
    def __call__(
        self,
        mX: cute.Tensor,  # (loads words_in n,) int32
        mY: cute.Tensor,  # (stores words_out n,) int32
        stream: cuda.CUstream,
    ):
        op, hint = cute.nvgpu.CopyUniversalOp(), {}
        if const_expr(self.no_allocate):
            op = cute.nvgpu.CopyG2ROp()
            hint = {"l1c_evict_priority": cute.nvgpu.CacheEvictionPriority.NO_ALLOCATE}
        threads = cute.make_layout(self.threads)
        load = cute.make_tiled_copy_tv(
            cute.make_copy_atom(op, Int32, num_bits_per_copy=32 * self.words_in, **hint),
            threads,
            cute.make_layout(self.words_in),
        )
        store = cute.make_tiled_copy_tv(
            cute.make_copy_atom(
                cute.nvgpu.CopyUniversalOp(), Int32, num_bits_per_copy=32 * self.words_out
            ),
            threads,
            cute.make_layout(self.words_out),
        )
        mX, mY = in_parts(mX, self.loads, self.words_in), in_parts(mY, self.stores, self.words_out)
        tiles = cute.ceil_div(mX.shape[0], self.threads * self.words_in)
        self.kernel(mX, mY, load, store).launch(
            grid=[cute.ceil_div(tiles, self.in_flight), 1, 1],
            block=[self.threads, 1, 1],
            stream=stream,
            use_pdl=self.pdl,
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
        tiles = [block * self.in_flight + i for i in range(self.in_flight)]
        tXgX = [
            [self.part(load, mX[None, i], tile, self.words_in) for i in range(self.loads)]
            for tile in tiles
        ]
        tXgY = [
            [self.part(store, mY[None, i], tile, self.words_out) for i in range(self.stores)]
            for tile in tiles
        ]
        exists = [(tile * self.threads + thread) * self.words_out < mY.shape[0] for tile in tiles]
        if const_expr(self.pdl):
            cute.arch.griddepcontrol_wait()
        tXrX = [[cute.make_rmem_tensor_like(t) for t in parts] for parts in tXgX]
        for i in cutlass.range_constexpr(self.in_flight):
            if exists[i]:
                for j in cutlass.range_constexpr(self.loads):
                    cute.copy(load, tXgX[i][j], tXrX[i][j])
        for i in cutlass.range_constexpr(self.in_flight):
            if exists[i]:
                words = [joined(tXrX[i], j) for j in range(self.words_in)]
                for j in cutlass.range_constexpr(self.stores):
                    result = folded(words, j, self.words_out)
                    tXrY = cute.make_rmem_tensor_like(tXgY[i][j])
                    for k in cutlass.range_constexpr(self.words_out):
                        tXrY[k] = result[k]
                    cute.copy(store, tXrY, tXgY[i][j])

    def part(self, copy: cute.TiledCopy, m: cute.Tensor, tile: Int32, words: int) -> cute.Tensor:
        """Return a thread's vector of a tile, which has one for each thread of a CTA."""
        thread, _, _ = cute.arch.thread_idx()
        gTile = cute.local_tile(m, (self.threads * words,), (tile,))
        return copy.get_slice(thread).partition_S(gTile)

    def expected(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the kernel writes for the int32 words `x` (loads words_in n,).

        Returns:
            (stores, words_out n).
        """
        words = functools.reduce(torch.bitwise_xor, x.view(self.loads, -1))
        columns = list(words.view(-1, self.words_in).unbind(1))
        stores = [torch.stack(folded(columns, i, self.words_out), 1) for i in range(self.stores)]
        return torch.stack(stores).flatten(1)


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


@dataclass(frozen=True)
class BulkStream:
    """Compile-time choices of a kernel that copies chunks to shared memory and from there.

    As many CTAs as fit walk the chunks. One thread of each issues all copies: a chunk of every part
    of x comes to a stage of shared memory, and its first words go to every part of y.

    Attributes:
        pdl, loads, stores, words_in, words_out: as of a `Stream`; words_in >= words_out.
        stages: chunks of a CTA in flight.
        sms: of the GPU.
    """

    pdl: bool
    loads: int = 1
    stores: int = 1
    words_in: int = WORDS_IN
    words_out: int = WORDS_OUT
    stages: int = 4
    sms: int = 1

    @property
    def stage_bytes(self) -> int:
        """Return the bytes of shared memory that a stage takes."""
        return CHUNK * self.words_in * BYTES_PER_WORD * self.loads

    def fits(self, vectors: int) -> bool:
        """Return whether the kernel takes so many vectors: whole chunks."""
        return vectors > 0 and vectors % CHUNK == 0 and self.words_out <= self.words_in

    def signature(self) -> tuple:
        return (
            fake_words(self.loads, CHUNK * self.words_in),
            fake_words(self.stores, CHUNK * self.words_out),
            make_fake_stream(use_tvm_ffi_env_stream=True),
        )

    @cute.jit
    def __call__(
        self,
        mX: cute.Tensor,  # (loads words_in n,) int32
        mY: cute.Tensor,  # (stores words_out n,) int32
        stream: cuda.CUstream,
    ):
        mX = in_parts(mX, self.loads, CHUNK * self.words_in)
        mY = in_parts(mY, self.stores, CHUNK * self.words_out)
        chunks = Int32(mX.shape[0] // (CHUNK * self.words_in))
        ctas = self.sms * max(1, SHARED_BYTES // (self.stages * self.stage_bytes))
        self.kernel(mX, mY, chunks).launch(
            grid=[cutlass.min(chunks, ctas), 1, 1],
            block=[32, 1, 1],
            stream=stream,
            use_pdl=self.pdl,
        )

    @cute.kernel
    def kernel(
        self,
        mX: cute.Tensor,  # (words_in n, loads)
        mY: cute.Tensor,  # (words_out n, stores)
        chunks: Int32,
    ):
        if const_expr(self.pdl):
            cute.arch.griddepcontrol_launch_dependents()
        thread, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        ctas, _, _ = cute.arch.grid_dim()
        words = CHUNK * self.words_in
        allocator = cutlass.memory.SmemAllocator()
        layout = cute.make_layout((words, self.loads, self.stages))
        staged = allocator.allocate_tensor(Int32, layout, byte_alignment=ALIGNMENT)
        barriers = allocator.allocate_array(Int64, self.stages)
        if thread == 0:
            for stage in cutlass.range_constexpr(self.stages):
                cute.arch.mbarrier_init(barriers + stage, 1)
            cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()
        if const_expr(self.pdl):
            cute.arch.griddepcontrol_wait()
        if thread == 0:
            for stage in cutlass.range_constexpr(self.stages):
                self.load(mX, staged, barriers, block + stage * ctas, stage, chunks)
            step = Int32(0)
            for chunk in cutlass.range(block, chunks, ctas, unroll=1):
                stage = step % self.stages
                cute.arch.mbarrier_wait(barriers + stage, (step // self.stages) % 2)
                self.store(mY, staged, chunk, stage)
                cute.arch.cp_async_bulk_commit_group()
                if step > 0:
                    # The stage before may be overwritten as soon as its stores have read it.
                    cute.arch.cp_async_bulk_wait_group(1, read=True)
                    free = (step - 1) % self.stages
                    later = chunk + (self.stages - 1) * ctas
                    self.load(mX, staged, barriers, later, free, chunks)
                step += 1
            cute.arch.cp_async_bulk_wait_group(0)

    @cute.jit
    def load(
        self,
        mX: cute.Tensor,
        staged: cute.Tensor,
        barriers: cute.Pointer,
        chunk: Int32,
        stage: Int32,
        chunks: Int32,
    ):
        """Issue the copies of a chunk to a stage, if there is such a chunk."""
        words = CHUNK * self.words_in
        copy = cute.make_copy_atom(cpasync.CopyBulkG2SOp(), Int32, num_bits_per_copy=32 * words)
        if chunk < chunks:
            cute.arch.mbarrier_arrive_and_expect_tx(barriers + stage, self.stage_bytes)
            for i in cutlass.range_constexpr(self.loads):
                gX = cute.local_tile(mX[None, i], (words,), (chunk,))
                cute.copy(copy, gX, staged[None, i, stage], mbar_ptr=barriers + stage)

    @cute.jit
    def store(self, mY: cute.Tensor, staged: cute.Tensor, chunk: Int32, stage: Int32):
        """Issue the copies of a stage to every part of y."""
        words = CHUNK * self.words_out
        copy = cute.make_copy_atom(cpasync.CopyBulkS2GOp(), Int32, num_bits_per_copy=32 * words)
        for i in cutlass.range_constexpr(self.stores):
            gY = cute.local_tile(mY[None, i], (words,), (chunk,))
            first = cute.local_tile(staged[None, i % self.loads, stage], (words,), (0,))
            cute.copy(copy, first, gY)

    def expected(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the kernel writes for the int32 words `x`, as `Stream.expected` does."""
        chunks = x.view(self.loads, -1, CHUNK * self.words_in)[..., : CHUNK * self.words_out]
        return torch.stack([chunks[i % self.loads].flatten() for i in range(self.stores)])


SHARED_BYTES = 200 * 1024
"""Of an SM's shared memory, what the CTAs of a `BulkStream` take in all."""


def family(pdl: bool, traffic: Traffic, sms: int) -> Iterator[Stream | BulkStream]:
    """Yield the kernels that the ceiling of a traffic is the best of."""
    shapes = ((1, 128), (1, 256), (1, 512), (2, 128), (2, 256), (2, 512), (4, 128), (4, 256))
    for in_flight, threads in (*shapes, (8, 128)):
        yield Stream(pdl, *traffic, in_flight, threads)
    for in_flight, threads in ((1, 128), (1, 256), (2, 256)):
        yield Stream(pdl, *traffic, in_flight, threads, no_allocate=True)
    if min(traffic.words_in, traffic.words_out) > 1:
        # Where no instruction loads 32 bytes, half of them let a warp load contiguous memory.
        half = traffic._replace(words_in=traffic.words_in // 2, words_out=traffic.words_out // 2)
        for in_flight, threads in ((1, 256), (2, 128), (2, 256), (4, 128)):
            yield Stream(pdl, *half, in_flight, threads)
    for stages in (4, 8):
        yield BulkStream(pdl, *traffic, stages, sms)


@functools.cache
def function(spec: Stream | BulkStream, arch: str) -> Callable[..., None]:
    """Return the compiled kernel, to be called on words to read and to write."""
    return lookup.build(spec, arch)._tvm_ffi_function
