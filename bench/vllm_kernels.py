"""Launch vLLM's packed quantizers from their machine code, as vLLM launches them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cuda.bindings.driver as cuda
import torch

from bench import vllm_wheel
from bench.shapes import GROUP_SIZE
from cute_quant.contract.dtypes import (
    BYTES_PER_WORD,
    E4M3_MAX,
    SCALE_ROW_ALIGNMENT,
    align,
    ceil_div,
)

MIN_AMAX = 1e-10
DTYPE_NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}

GROUPS_PER_BLOCK = 16
REGISTER_THREADS_PER_GROUP = 8
SHARED_THREADS_PER_GROUP = 16

POINTER, INT, LONG, FLOAT = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_float
REGISTER_PARAMETERS = (*[POINTER] * 3, *[INT] * 5, LONG, *[FLOAT] * 3)
SHARED_PARAMETERS = (*[POINTER] * 3, *[INT] * 8, *[FLOAT] * 3)


class Module:
    """The kernels of one version, loaded into the current CUDA context.

    Attributes:
        version: of vLLM.
        waits: whether every kernel waits for the grid before it; only then may it be launched as
            a programmatic dependent one.
    """

    def __init__(self, source: Path, arch: str):
        found = vllm_wheel.load(source, arch)
        self.version = found.version
        self.waits = all(kernel.waits for kernel in found.kernels)
        self._kernels = [k for k in found.kernels if not k.sizes or k.sizes[0] == GROUP_SIZE]
        # The driver loads into torch's context, which torch makes current when it first needs it.
        torch.zeros((), device="cuda")
        self._module = _checked(cuda.cuModuleLoadData(found.cubin))

    def bind(
        self, x: torch.Tensor, q: torch.Tensor, sf: torch.Tensor, pdl: bool
    ) -> Callable[[], None]:
        """Return a launch on torch's current stream.

        Args:
            x: (mn, k), bf16 or fp16, contiguous.
            q: (mn, k), e4m3, contiguous.
            sf: packed UE8M0 scales, MN-major.
            pdl: launch with programmatic stream serialization.
        """
        mn, k = x.shape
        groups = k // GROUP_SIZE
        words = ceil_div(groups, BYTES_PER_WORD)
        padded_groups = words * BYTES_PER_WORD
        padded_mn = align(mn, SCALE_ROW_ALIGNMENT)
        scale_words = mn + (words - 1) * padded_mn
        kernels = [k for k in self._kernels if k.input == DTYPE_NAMES[x.dtype]]
        pointers = (x.data_ptr(), q.data_ptr(), sf.data_ptr())
        floats = (MIN_AMAX, -E4M3_MAX, E4M3_MAX)
        if kernels[0].kind == "register":
            block_groups = next(n for n in (16, 8, 4) if padded_groups % n == 0)
            block_rows = GROUPS_PER_BLOCK // block_groups
            kernel = next(k for k in kernels if k.sizes[1:] == (block_groups, block_rows))
            grid = (ceil_div(padded_mn, block_rows), padded_groups // block_groups)
            threads, shared = GROUPS_PER_BLOCK * REGISTER_THREADS_PER_GROUP, 0
            integers: tuple[int, ...] = (padded_groups, groups, mn, mn, padded_mn, scale_words)
            types: tuple[type[Any], ...] = REGISTER_PARAMETERS
        else:
            # Rows and groups of the padding are counted too, so their number divides by 16.
            (kernel,) = kernels
            count = padded_mn * padded_groups
            grid = (count // GROUPS_PER_BLOCK, 1)
            threads = GROUPS_PER_BLOCK * SHARED_THREADS_PER_GROUP
            shared = GROUPS_PER_BLOCK * GROUP_SIZE * x.element_size()
            integers = (
                *(GROUP_SIZE, count, GROUPS_PER_BLOCK, padded_groups),
                *(groups, mn, padded_mn, scale_words),
            )
            types = SHARED_PARAMETERS
        _check_parameters(kernel, types)
        function = _checked(cuda.cuModuleGetFunction(self._module, kernel.symbol.encode()))
        values = (*pointers, *integers, *floats)
        storage = [type_(value) for type_, value in zip(types, values, strict=True)]
        addresses = (POINTER * len(storage))(*map(ctypes.addressof, storage))
        config = cuda.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = *grid, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        config.sharedMemBytes = shared
        if pdl:
            attribute = cuda.CUlaunchAttribute()
            attribute.id = (
                cuda.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            )
            attribute.value.programmaticStreamSerializationAllowed = 1
            config.attrs = [attribute]
            config.numAttrs = 1

        def launch(keep_alive: tuple[object, ...] = (storage, x, q, sf)) -> None:
            config.hStream = cuda.CUstream(torch.cuda.current_stream().cuda_stream)
            _checked(cuda.cuLaunchKernelEx(config, function, ctypes.addressof(addresses), 0))

        return launch


def _check_parameters(kernel: vllm_wheel.Kernel, types: tuple[type[Any], ...]) -> None:
    """Check that the machine code takes what we are about to pass."""
    offset, expected = 0, []
    for type_ in types:
        size = ctypes.sizeof(type_)
        offset = align(offset, size)
        expected.append((offset, size))
        offset += size
    if kernel.parameters != tuple(expected):
        raise RuntimeError(
            f"{kernel.symbol}: this version takes parameters {kernel.parameters}, "
            f"known are {tuple(expected)}"
        )


def _checked(result: tuple[Any, ...]) -> object:
    status, *values = result
    if status != cuda.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"vLLM's kernel: {status.name}")
    return values[0] if values else None
