"""Functions of shared objects, loaded without CuTe DSL."""

from __future__ import annotations

import ctypes
import functools
import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch


def import_tvm_ffi() -> ModuleType:
    """Import the loader of functions, which takes 25 ms. Without a GPU it need not be installed.

    Raises:
        ImportError: apache-tvm-ffi is not installed.
    """
    return importlib.import_module("tvm_ffi")


def load_function(path: Path, symbol: str) -> Callable[..., None]:
    """The function of a shared object, to be called on torch tensors.

    Raises:
        ImportError: apache-tvm-ffi is not installed.
        RuntimeError, AttributeError: the object does not load here, or has no such function.
    """
    return import_tvm_ffi().load_module(path)[symbol]


@functools.cache
def load_runtime(path: Path) -> ctypes.CDLL:
    """Load what objects call CUDA through. They find it under its SONAME, wherever it came from.

    Raises:
        OSError: it is not there, or does not load here.
    """
    return ctypes.CDLL(str(path))


def as_kernel_arguments(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return arguments of a function with tensors converted, which each of its calls does else.

    The first stays a tensor of torch: from it the function has the current stream.
    """
    first, *others = arguments
    from_dlpack = import_tvm_ffi().from_dlpack
    return (
        first,
        *(from_dlpack(t.detach()) if isinstance(t, torch.Tensor) else t for t in others),
    )
