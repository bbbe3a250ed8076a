"""Functions of specs, from where they come soonest: this process, a directory that was built ahead
of time, the disk cache, the compiler. Only the last imports CuTe DSL."""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import threading
from collections.abc import Callable
from typing import Any

import torch

from cute_quant.jit import aot_load, disk_cache, keys, library, progress, shared_objects, toolchain
from cute_quant.kernels import architectures
from cute_quant.kernels.config import Spec

log = logging.getLogger("cute_quant")

ARCHITECTURES = {a.capability: a.name for a in architectures.ARCHITECTURES}
"""Compute capability -> target of the kernels."""

SYMBOL = "kernel"
"""Name of the function in objects of the disk cache."""

# Two compilations at a time abort the process, or one silently builds for the other's target.
# Kernels that others compile with the DSL, in another thread meanwhile, are not under this lock.
_lock = threading.RLock()
_functions: dict[tuple[Spec, str], Callable[..., None]] = {}


@functools.cache
def find_architecture(device_index: int) -> str | None:
    """Return the target of kernels for a CUDA device, None if no kernel is built for it."""
    return ARCHITECTURES.get(torch.cuda.get_device_capability(device_index))


def architecture(device_index: int) -> str:
    """Return the target of kernels for a CUDA device.

    Raises:
        RuntimeError: no kernel is built for the device.
    """
    arch = find_architecture(device_index)
    if arch is None:
        raise RuntimeError(
            f"x: expected a tensor on a GPU of compute capability {architectures.supported()}, "
            f"got {describe_device(device_index)}"
        )
    return arch


def describe_device(device_index: int) -> str:
    """Return index, name and compute capability of a CUDA device, for messages."""
    major, minor = torch.cuda.get_device_capability(device_index)
    name = torch.cuda.get_device_name(device_index)
    return f"cuda:{device_index}, {name}, of {major}.{minor}"


@functools.cache
def multiprocessors(device_index: int) -> int:
    """Streaming multiprocessors of a CUDA device."""
    return torch.cuda.get_device_properties(device_index).multi_processor_count


def kernel(spec: Spec) -> Any:
    """The kernel that a spec names: `signature()`, stand-ins for its arguments, and a jitted
    `__call__`. Imports CuTe DSL."""
    module, name = spec.kernel.split(".")
    return getattr(importlib.import_module(f"cute_quant.kernels.{module}"), name)(spec)


def compile_options(arch: str) -> str:
    """Options of ``cute.compile`` for a target of `architectures`."""
    return f"--enable-tvm-ffi --gpu-arch {arch}"


def build(kernel: Any, arch: str, *options: str, engine: bool = True) -> Any:
    """Compile a kernel for an architecture; works without a GPU.

    Args:
        kernel: an object whose ``signature()`` returns stand-ins for the arguments, and whose
            jitted ``__call__`` launches.
        arch: a target of `architectures`, such as "sm_90a" or "sm_100f".
        options: further options of ``cute.compile``.
        engine: whether the result is to be called in this process, or only to be written.
    """
    # It takes a second to import, and who has no GPU need not have it.
    import cutlass.cute as cute

    flags = " ".join((compile_options(arch), *options))
    with _lock:
        return cute.compile(kernel, *kernel.signature(), options=flags, no_jit_engine=not engine)


def build_object(spec: Spec, arch: str, symbol: str, host: toolchain.Host) -> bytes:
    """Compile the kernel of a spec to a shared object.

    Args:
        symbol: of its function.
        host: what runs its host code.

    Raises:
        RuntimeError: CuTe DSL is not installed, or there is no linker, or it failed.
    """
    dsl = toolchain.installed_dsl()
    if dsl is None:
        raise RuntimeError(missing_dsl(spec, arch))
    with _lock:
        return shared_objects.shared_object(
            build(kernel(spec), arch, engine=False), symbol, host, dsl
        )


def function(spec: Spec, arch: str) -> Callable[..., None]:
    """The compiled kernel of a spec, to be called on torch tensors.

    It runs on the current stream of the tensors' device. Any thread may ask at any time.

    Raises:
        RuntimeError: it is not built yet, and CuTe DSL is not installed.
    """
    key = (spec, arch)
    if key not in _functions:
        with _lock:
            if key not in _functions:
                _functions[key] = (
                    aot_load.find(spec, arch) or _cached(spec, arch) or _compiled(spec, arch)
                )
    return _functions[key]


def _compiled(spec: Spec, arch: str) -> Callable[..., None]:
    if toolchain.installed_dsl() is None:
        raise RuntimeError(missing_dsl(spec, arch))
    with _shown(spec, arch):
        compiled = build(kernel(spec), arch)
    # What is wrapped around it sorts keyword arguments, and none are passed.
    return compiled._tvm_ffi_function


def _shown(spec: Spec, arch: str) -> contextlib.AbstractContextManager[None]:
    return progress.elapsed(f"cute_quant: compiling {keys.spec_name(spec)} for {arch}")


def missing_dsl(spec: Spec, arch: str) -> str:
    """Return the message for a kernel that cannot be compiled."""
    directories = [str(directory.path) for directory in aot_load.loaded()]
    where = f"not among those of {', '.join(directories)}" if directories else "not built yet"
    return (
        f"{keys.spec_name(spec)} for {arch} is {where}, and CuTe DSL is not installed to compile "
        f"it: pip install nvidia-cutlass-dsl"
    )


def _cached(spec: Spec, arch: str) -> Callable[..., None] | None:
    """The function from the disk cache, added to it if need be.

    None if there is no cache or it fails: it must not be what breaks a call.
    """
    dsl = toolchain.installed_dsl()
    if dsl is None or toolchain.asks_for_output():
        return None
    try:
        store = _cache()
        if store is None:
            return None
        library.load_runtime(dsl.runtime)
        key = disk_cache.key(spec, arch, compile_options(arch))
        found = _load(store, key)
        if found is None and store.writable and toolchain.this_host().linker() is not None:
            found = _added(store, key, spec, arch)
        return found
    except Exception as error:
        log.warning("disk cache not used for %s: %s", keys.spec_name(spec), error)
        return None


def _load(store: disk_cache.Cache, key: str) -> Callable[..., None] | None:
    path = store.find(key)
    if path is None:
        return None
    try:
        return library.load_function(path, SYMBOL)
    except (AttributeError, RuntimeError) as error:
        store.discard(key, error)
        return None


def _added(store: disk_cache.Cache, key: str, spec: Spec, arch: str) -> Callable[..., None] | None:
    """The function of an entry that this process adds, or another meanwhile.

    None where there is no lock to be had.
    """
    with contextlib.ExitStack() as held:
        held.enter_context(_shown(spec, arch))
        try:
            held.enter_context(store.lock(key))
        except TimeoutError:
            return None
        except OSError as error:
            store.stop_writing(error)
            return None
        return _load(store, key) or _stored(store, key, spec, arch)


def _stored(store: disk_cache.Cache, key: str, spec: Spec, arch: str) -> Callable[..., None]:
    content = build_object(spec, arch, SYMBOL, toolchain.this_host())
    record = {"name": keys.spec_name(spec), "spec": keys.spec_text(spec), "arch": arch}
    record |= {name: version for name, version in toolchain.versions().items() if version}
    try:
        store.store(key, content, record)
    except OSError as error:
        store.stop_writing(error)
    else:
        # Loaded as any entry is: checked, from the open directory.
        found = _load(store, key)
        if found is not None:
            return found
    return library.load_bytes(content, SYMBOL)


@functools.cache
def _cache() -> disk_cache.Cache | None:
    """The cache of this process; None, said once, where it is refused."""
    try:
        return disk_cache.open_cache()
    except (OSError, RuntimeError, ValueError) as error:
        log.warning("disk cache not used: %s", error)
        return None
