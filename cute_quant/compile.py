"""Functions of specs: compiled once per process, spec and architecture."""

from __future__ import annotations

import functools
import importlib
import threading
from collections.abc import Callable
from typing import Any

import torch

from cute_quant.specs import Spec

ARCHITECTURES = {(9, 0): "sm_90a", (10, 0): "sm_100a", (10, 3): "sm_103a"}
"""Compute capability -> target of the kernels."""

# Two compilations at a time abort the process, or one silently builds for the other's target.
# Kernels that others compile with the DSL, in another thread meanwhile, are not under this lock.
_lock = threading.RLock()
_functions: dict[tuple[Spec, str], Callable[..., None]] = {}


@functools.cache
def architecture(device_index: int) -> str:
    """The target for a CUDA device.

    Raises:
        RuntimeError: no kernel is built for the device.
    """
    capability = torch.cuda.get_device_capability(device_index)
    if capability not in ARCHITECTURES:
        supported = ", ".join(f"{major}.{minor}" for major, minor in ARCHITECTURES)
        raise RuntimeError(
            f"x: expected a tensor on a GPU of compute capability {supported} (Hopper, Blackwell), "
            f"got cuda:{device_index}, {torch.cuda.get_device_name(device_index)}, "
            f"of {capability[0]}.{capability[1]}"
        )
    return ARCHITECTURES[capability]


@functools.cache
def multiprocessors(device_index: int) -> int:
    """Streaming multiprocessors of a CUDA device."""
    return torch.cuda.get_device_properties(device_index).multi_processor_count


def kernel(spec: Spec) -> Any:
    """The kernel that a spec names: `signature()`, stand-ins for its arguments, and a jitted
    `__call__`. Imports CuTe DSL."""
    module, name = spec.kernel.split(".")
    return getattr(importlib.import_module(f"cute_quant.kernels.{module}"), name)(spec)


def build(kernel: Any, arch: str, *options: str) -> Any:
    """Compile a kernel for `arch`, a value of ``ARCHITECTURES``; works without a GPU.

    Args:
        options: further options of ``cute.compile``.
    """
    # It takes a second to import, and who has no GPU need not have it.
    import cutlass.cute as cute

    flags = " ".join(("--enable-tvm-ffi", f"--gpu-arch {arch}", *options))
    with _lock:
        return cute.compile(kernel, *kernel.signature(), options=flags)


def function(spec: Spec, arch: str) -> Callable[..., None]:
    """The compiled kernel of a spec, to be called on torch tensors.

    It runs on the current stream of the tensors' device. Any thread may ask at any time.
    """
    key = (spec, arch)
    if key not in _functions:
        with _lock:
            if key not in _functions:
                compiled = build(kernel(spec), arch)
                # What is wrapped around it sorts keyword arguments, and none are passed.
                _functions[key] = compiled._tvm_ffi_function
    return _functions[key]
