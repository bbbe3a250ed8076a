"""Load functions of shared objects, without CuTe DSL."""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch


def import_tvm_ffi() -> ModuleType:
    """Import tvm-ffi, which takes 25 ms and need not be installed on a machine without a GPU.

    Raises:
        ImportError: apache-tvm-ffi is not installed.
    """
    return importlib.import_module("tvm_ffi")


def load_function(path: str, symbol: str) -> Callable[..., None]:
    """Return a function of a shared object, to be called on torch tensors.

    Raises:
        ImportError: apache-tvm-ffi is not installed.
        RuntimeError, AttributeError: the object does not load, or has no such function.
    """
    return import_tvm_ffi().load_module(path)[symbol]


def load_bytes(content: bytes, symbol: str) -> Callable[..., None]:
    """Return a function of a shared object that is in memory, without writing to a disk.

    Raises:
        ImportError, RuntimeError, AttributeError: as `load_function`.
        OSError: there is not enough memory.
    """
    # It stays open, as the dynamic linker takes a path that it has loaded before for the same
    # object, and the number of a closed descriptor is given again.
    descriptor = os.memfd_create(f"{symbol}.so")
    with open(descriptor, "wb", closefd=False) as file:
        file.write(content)
    # `load_module` asks for a path that ends in .so.
    load = import_tvm_ffi().get_global_func("ffi.Module.load_from_file.so")
    module = load(f"/proc/self/fd/{descriptor}", "so")
    _in_memory.append(module)
    return module[symbol]


_in_memory: list[Any] = []
"""Modules whose functions must outlive them."""


@functools.cache
def load_runtime(path: str | Path) -> ctypes.CDLL:
    """Load the runtime library, through which shared objects call CUDA.

    The objects find it under its SONAME, wherever it came from.

    Raises:
        OSError: the library is missing, or does not load.
    """
    return ctypes.CDLL(str(path))


def as_kernel_arguments(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return arguments of a function with tensors converted once, not in each call.

    The first argument stays a torch tensor, from which the function takes the current stream.
    """
    first, *others = arguments
    from_dlpack = import_tvm_ffi().from_dlpack
    return (
        first,
        *(from_dlpack(t.detach()) if isinstance(t, torch.Tensor) else t for t in others),
    )
