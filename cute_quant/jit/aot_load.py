"""Load directories of kernels built ahead of time, without a compiler and without CuTe DSL.

A directory holds shared objects, the runtime library through which they call CUDA, and
`manifest.json`. The manifest names the sources and the processor of the build, and the file of each
kernel.
"""

from __future__ import annotations

import concurrent.futures
import functools
import hashlib
import logging
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from cute_quant.jit import keys, library, shared_objects, toolchain
from cute_quant.jit.aot_manifest import MANIFEST, identity, parse_manifest
from cute_quant.jit.trusted_files import TrustedDirectory
from cute_quant.kernels import architectures
from cute_quant.kernels.config import Spec

log = logging.getLogger("cute_quant")

DIRECTORY_VARIABLE = "CUTE_QUANT_AOT_DIR"
DIGEST_BYTES = 8 * 2**20
"""Bytes of a read, large because a thread may wait for the interpreter's lock before each."""


class Directory(NamedTuple):
    """A directory whose manifest was checked.

    Attributes:
        files: the directory itself, held open.
        kernels: entries of the manifest, by the text of the spec and the architecture.
        runtime_digest: SHA-256 of the runtime library, None if the directory has none.
    """

    files: TrustedDirectory
    kernels: dict[tuple[str, str], dict[str, str]]
    runtime_digest: str | None

    @property
    def path(self) -> Path:
        """Return the path that the directory was opened by."""
        return self.files.path

    def find(self, spec: Spec, arch: str) -> Callable[..., None] | None:
        """Return the function of a kernel, or None if the directory does not have it.

        An object for the architecture comes before one for its family.
        """
        if self.files.is_lost():  # As where it was built again.
            return open_directory(self.path).find(spec, arch)
        text = keys.spec_text(spec)
        found = (self.kernels.get((text, target)) for target in architectures.targets(arch))
        kernel = next(filter(None, found), None)
        if kernel is None:
            return None
        record = shared_objects.read_record(self.files.read(kernel["file"]))
        if record != kernel:
            raise shared_objects.CorruptObject("it holds another kernel than the manifest says")
        if self.runtime_digest is not None:
            _load_runtime(self.files, self.runtime_digest)
        else:
            _load_installed_runtime()
        return library.load_function(self.files.loadable(kernel["file"]), kernel["symbol"])


@functools.cache
def _load_runtime(files: TrustedDirectory, digest: str) -> None:
    """Load the runtime library of a directory.

    Raises:
        ValueError: the library has another digest.
        OSError: the library is missing, or does not load.
    """
    if _digest_beside_import(files) != digest:
        path = files.path / toolchain.RUNTIME_NAME
        raise ValueError(f"{path}: expected the digest that the manifest has, got another")
    library.load_runtime(files.loadable(toolchain.RUNTIME_NAME))


def _digest_beside_import(files: TrustedDirectory) -> str:
    """Return the SHA-256 of the runtime library, computed while tvm-ffi is imported.

    To hash 43 MB takes as long as the import, which is needed anyway, and releases the
    interpreter's lock.

    Raises:
        ValueError, OSError: as `TrustedDirectory.open`.
    """
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        try:
            digest = thread.submit(_digest, files)
        except RuntimeError:
            # There are no more threads to be had, or the interpreter is about to end.
            return _digest(files)
        library.import_tvm_ffi()
        return digest.result()


def _digest(files: TrustedDirectory) -> str:
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(DIGEST_BYTES))
    with files.open(toolchain.RUNTIME_NAME) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def _load_installed_runtime() -> None:
    dsl = toolchain.installed_dsl()
    if dsl is None:
        raise FileNotFoundError(f"it was built without {toolchain.RUNTIME_NAME}: see --runtime")
    library.load_runtime(dsl.runtime)


_loaded: list[Directory] = []


def load(directory: str | os.PathLike) -> None:
    """Use the kernels of a directory that ``python -m cute_quant build`` made.

    From now on its kernels need no compiler. An object is read when its kernel is first called.
    The directory that was loaded last is searched first. The one that ``CUTE_QUANT_AOT_DIR`` names
    is loaded automatically, and searched last.

    Args:
        directory: a directory with a manifest, objects, and the runtime library.

    Raises:
        FileNotFoundError: there is no such directory, or it has no manifest.
        ValueError: the directory was built from other sources, for another processor, or with
            another apache-tvm-ffi. Or its manifest is damaged. Or users other than root and the
            current one may write to the directory or replace it.
        TypeError: `directory` is not a path.
        OSError: the directory cannot be read.
    """
    path = os.fspath(directory) if isinstance(directory, os.PathLike) else directory
    if not isinstance(path, str):
        raise TypeError(f"directory: expected a path of text, got {type(path).__name__}")
    if not path:
        raise ValueError("directory: expected a path, got nothing")
    _loaded.insert(0, open_directory(Path(path).absolute()))


def loaded() -> list[Directory]:
    """Return the directories in which kernels are looked up, in the order of the search."""
    own, _ = _of_environment()
    return [*_loaded, *([own] if own is not None else [])]


def find(spec: Spec, arch: str) -> Callable[..., None] | None:
    """Return the function of a kernel that was built ahead of time, or None if there is none."""
    for directory in loaded():
        try:
            function = directory.find(spec, arch)
        except Exception as error:
            name = keys.spec_name(spec)
            log.warning("%s for %s not taken from %s: %s", name, arch, directory.path, error)
            continue
        if function is not None:
            return function
    return None


def why_not_used() -> str | None:
    """Return why the directory of ``CUTE_QUANT_AOT_DIR`` is not used.

    Returns:
        The reason, or None if the directory is used or the variable is not set.
    """
    _, reason = _of_environment()
    return reason


@functools.cache
def _of_environment() -> tuple[Directory | None, str | None]:
    """Return the directory that the environment names, or the reason not to use it, logged once."""
    path = os.environ.get(DIRECTORY_VARIABLE)
    if not path:
        return None, None
    try:
        return open_directory(Path(path).absolute()), None
    except Exception as error:  # Whatever is wrong with it must not be what breaks a call.
        reason = " ".join(str(error).split())
        log.warning("%s not used: %s", DIRECTORY_VARIABLE, reason)
        return None, reason


def open_directory(path: Path) -> Directory:
    """Open a directory, check who may have written it, and check its manifest.

    Raises:
        FileNotFoundError, ValueError: as :func:`load`.
    """
    try:
        files = TrustedDirectory(path)
        content = files.read(MANIFEST)
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(
            f"{path}: expected a directory made by python -m cute_quant build, got no {MANIFEST}"
        ) from None
    manifest = parse_manifest(content, path / MANIFEST)
    for name, expected in identity(platform.machine(), keys.source_digest()).items():
        if manifest[name] != expected:
            raise ValueError(
                f"{path}: expected kernels built for {name} {expected}, got {manifest[name]}: "
                f"build them again with this version of cute_quant"
            )
    tvm_ffi = manifest["versions"]["apache-tvm-ffi"]
    own = toolchain.tvm_ffi_version()
    if own is not None and _minor(own) != _minor(tvm_ffi):
        raise ValueError(
            f"{path}: expected kernels built with apache-tvm-ffi {_minor(own)}, got {tvm_ffi}"
        )
    kernels = {(kernel["spec"], kernel["arch"]): kernel for kernel in manifest["kernels"]}
    return Directory(files, kernels, manifest.get("runtime"))


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])
