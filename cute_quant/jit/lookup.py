"""Resolve a spec to a compiled function: memory, ahead-of-time directory, disk cache, compiler.

Only the last imports CuTe DSL.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch

from cute_quant.jit import (
    aot_load,
    compilation,
    disk_cache,
    dsl_private,
    dsl_variables,
    keys,
    library,
    progress,
    shared_objects,
    toolchain,
)
from cute_quant.kernels import architectures
from cute_quant.kernels.config import Spec

log = logging.getLogger("cute_quant")

ARCHITECTURES = {a.capability: a.name for a in architectures.ARCHITECTURES}
"""Compute capability -> target of the kernels."""

SYMBOL = "kernel"
"""Name of the function in objects of the disk cache."""

MEMORY, AHEAD_OF_TIME, DISK_CACHE, COMPILED = SOURCES = (
    "in memory",
    "built ahead of time",
    "from the disk cache",
    "compiled",
)
"""Where the function of a kernel comes from."""

_functions: dict[tuple[Spec, str], Callable[..., None]] = {}


class NotBuilt(RuntimeError):
    """A kernel is missing where nothing may be compiled."""


class Resolved(NamedTuple):
    """A compiled function, and which of ``SOURCES`` it came from."""

    function: Callable[..., None]
    source: str


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
    """Return the kernel that a spec names. Imports CuTe DSL.

    It has a `signature()`, which describes its arguments, and a jitted `__call__`.
    """
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

    Raises:
        TypeError: `kernel` is no such object, a class for instance.
        ValueError: `arch` is no such target.
    """
    if isinstance(kernel, type) or not (callable(kernel) and hasattr(kernel, "signature")):
        raise TypeError(f"kernel: expected an object with signature and __call__, got {kernel!r}")
    architectures.named(arch)
    with compilation.alone():
        # The DSL imports it too, and a child that is forked meanwhile still has to load with it.
        with compilation.load_lock, contextlib.suppress(ImportError):
            library.import_tvm_ffi()
        # It takes a second to import, and who has no GPU need not have it.
        import cutlass.cute as cute

        flags = " ".join((compile_options(arch), *options))
        with dsl_private.arguments_hidden():
            return cute.compile(
                kernel, *kernel.signature(), options=flags, no_jit_engine=not engine
            )


def build_object(spec: Spec, arch: str, symbol: str, host: toolchain.Host) -> bytes:
    """Compile the kernel of a spec to a shared object.

    Args:
        spec: choices of the kernel.
        arch: target of the compiler.
        symbol: name of its function.
        host: machine that runs its host code.

    Raises:
        RuntimeError: CuTe DSL is not installed, or there is no linker, or it failed.
    """
    dsl = toolchain.installed_dsl()
    if dsl is None:
        raise RuntimeError(missing_dsl(spec, arch))
    with compilation.alone():
        return shared_objects.shared_object(
            build(kernel(spec), arch, engine=False), symbol, host, dsl
        )


def function(spec: Spec, arch: str) -> Callable[..., None]:
    """Return the compiled kernel of a spec, to be called on torch tensors.

    It runs on the current stream of the tensors' device. Any thread may ask at any time.

    Raises:
        NotBuilt: it is not built yet, and nothing may be compiled now.
        RuntimeError: it is not built yet, and CuTe DSL is not installed or cannot compile it.
    """
    found = _functions.get((spec, arch))
    return resolve(spec, arch).function if found is None else found


def resolve(spec: Spec, arch: str) -> Resolved:
    """Return the compiled kernel of a spec as :func:`function` does, and where it came from."""
    key = spec, arch
    if key not in _functions and compilation.is_capturing():
        # The first launch of a function that was loaded loads its module, which a capture refuses.
        raise NotBuilt(f"{_missing(spec, arch)}, and the current stream is captured")
    if key not in _functions:
        with compilation.lock:
            if key not in _functions:
                found = _found(spec, arch) or _made(spec, arch)
                _functions[key] = found.function
                return found
    return Resolved(_functions[key], MEMORY)


def find(spec: Spec, arch: str) -> Resolved | None:
    """Return the kernel if it is built, None if it had to be compiled."""
    key = spec, arch
    if key in _functions:
        return Resolved(_functions[key], MEMORY)
    return _found(spec, arch)


def keep(spec: Spec, arch: str) -> str:
    """Have a kernel in the disk cache; return which of ``SOURCES`` it came from."""
    return resolve(spec, arch).source


def keeps() -> bool:
    """Return whether kernels that are compiled are kept in the disk cache."""
    store = _cache()
    return (
        toolchain.installed_dsl() is not None
        and not dsl_variables.asks_for_output()
        and store is not None
        and store.writable
        and toolchain.this_host().linker() is not None
    )


def check_may_compile(spec: Spec, arch: str) -> None:
    """Check that a kernel that is missing may be compiled.

    Raises:
        NotBuilt: nothing may be compiled now.
        RuntimeError: CuTe DSL is not installed.
    """
    reason = compilation.why_refused()
    if reason is not None:
        raise NotBuilt(f"{_missing(spec, arch)}, and {reason}")
    if toolchain.installed_dsl() is None:
        raise RuntimeError(missing_dsl(spec, arch))


def _found(spec: Spec, arch: str) -> Resolved | None:
    """Look a kernel up on disk."""
    with compilation.load_lock:
        built = aot_load.find(spec, arch)
        if built is not None:
            return Resolved(built, AHEAD_OF_TIME)
        kept = _using_cache(spec, arch, _load)
        return None if kept is None else Resolved(kept, DISK_CACHE)


def _made(spec: Spec, arch: str) -> Resolved:
    """Return the kernel compiled by this process, or by another that has its lock.

    Raises:
        NotBuilt: nothing may be compiled now.
        RuntimeError: CuTe DSL is not installed, or cannot compile it.
    """
    check_may_compile(spec, arch)
    # Else what goes wrong in it would be taken for a failure of the cache.
    with compilation.alone():
        return _using_cache(spec, arch, _added) or Resolved(_compiled(spec, arch), COMPILED)


def _compiled(spec: Spec, arch: str) -> Callable[..., None]:
    with _shown(spec, arch):
        compiled = build(kernel(spec), arch)
    return dsl_private.raw_function(compiled)


def _shown(spec: Spec, arch: str) -> contextlib.AbstractContextManager[None]:
    return progress.elapsed(f"cute_quant: compiling {keys.spec_name(spec)} for {arch}")


def _missing(spec: Spec, arch: str) -> str:
    directories = [str(directory.path) for directory in aot_load.loaded()]
    where = f"not among those of {', '.join(directories)}" if directories else "not built yet"
    return f"{keys.spec_name(spec)} for {arch} is {where}"


def missing_dsl(spec: Spec, arch: str) -> str:
    """Return the message for a kernel that cannot be compiled."""
    return (
        f"{_missing(spec, arch)}, and CuTe DSL is not installed to compile it: "
        f"pip install nvidia-cutlass-dsl"
    )


_Found = TypeVar("_Found")


def _using_cache(
    spec: Spec, arch: str, ask: Callable[[disk_cache.Cache, str, Spec, str], _Found | None]
) -> _Found | None:
    """Return what the disk cache answers.

    None if there is no cache or it fails: it must not be what breaks a call.
    """
    dsl = toolchain.installed_dsl()
    if dsl is None or dsl_variables.asks_for_output():
        return None
    try:
        store = _cache()
        if store is None:
            return None
        library.load_runtime(dsl.runtime)
        return ask(store, disk_cache.key(spec, arch, compile_options(arch)), spec, arch)
    except Exception as error:
        log.warning("disk cache not used for %s: %s", keys.spec_name(spec), error)
        return None


def _load(store: disk_cache.Cache, key: str, spec: Spec, arch: str) -> Callable[..., None] | None:
    path = store.find(key)
    if path is None:
        return None
    try:
        with compilation.load_lock:
            return library.load_function(path, SYMBOL)
    except (AttributeError, RuntimeError) as error:
        store.discard(key, error)
        return None


def _added(store: disk_cache.Cache, key: str, spec: Spec, arch: str) -> Resolved | None:
    """Return the function of an entry that this process adds, or another meanwhile.

    None where the cache is not written, or there is no lock to be had.
    """
    if not store.writable or toolchain.this_host().linker() is None:
        return None
    with contextlib.ExitStack() as held:
        held.enter_context(_shown(spec, arch))
        try:
            held.enter_context(store.lock(key))
        except TimeoutError:
            return None
        except OSError as error:
            store.stop_writing(error)
            return None
        kept = _load(store, key, spec, arch)
        if kept is not None:
            return Resolved(kept, DISK_CACHE)
        return Resolved(_stored(store, key, spec, arch), COMPILED)


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
        found = _load(store, key, spec, arch)
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
