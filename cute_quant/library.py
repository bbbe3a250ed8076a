"""Functions of shared objects, loaded without CuTe DSL."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path


def load_function(path: Path, symbol: str, runtime: Path) -> Callable[..., None]:
    """The function of a shared object, to be called on torch tensors.

    Args:
        runtime: the library that the object calls CUDA through; the first one that is loaded
            serves the whole process.

    Raises:
        ImportError, OSError, RuntimeError, AttributeError: what it needs is missing, or the object
            does not load here.
    """
    # It takes 25 ms to import, and who only has CPUs need not have it.
    import tvm_ffi

    _load_runtime(runtime)
    return tvm_ffi.load_module(path)[symbol]


@functools.cache
def _load_runtime(path: Path) -> ctypes.CDLL:
    """Objects find it under its SONAME once it is loaded from anywhere."""
    return ctypes.CDLL(str(path))
