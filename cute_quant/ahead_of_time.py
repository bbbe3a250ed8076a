"""Directories of kernels built ahead of time, used without a compiler and without CuTe DSL.

Beside the objects lies what they call CUDA through, and `manifest.json`: what the directory was
built from and for, and which file holds which kernel.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import functools
import hashlib
import io
import json
import logging
import os
import platform
import shutil
import stat
import struct
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from cute_quant import library, naming, objects, toolchain
from cute_quant.specs import Spec

log = logging.getLogger("cute_quant")

DIRECTORY_VARIABLE = "CUTE_QUANT_AOT_DIR"
MANIFEST = "manifest.json"
FORMAT = 2
"""Of the manifest."""
KERNEL_FIELDS = ("name", "spec", "arch", "file", "symbol")
"""Of each kernel in it."""

DIGEST_BYTES = 8 * 2**20
"""Read at once: each time a thread may have to wait for the lock of the interpreter."""

ELF_SHARED = 3
ELF_MACHINES = {"x86_64": 62, "aarch64": 183}
_ELF_KIND = struct.Struct("<HH")


class Directory(NamedTuple):
    """A directory whose manifest was checked.

    Attributes:
        kernels: their entries in the manifest, by the text of the spec and the architecture.
        runtime_digest: SHA-256 of the runtime library in it, None if it was built without.
    """

    path: Path
    kernels: dict[tuple[str, str], dict[str, str]]
    runtime_digest: str | None

    def find(self, spec: Spec, arch: str) -> Callable[..., None] | None:
        """The function of a kernel, None if the directory does not have it."""
        kernel = self.kernels.get((naming.spec_text(spec), arch))
        if kernel is None:
            return None
        path = self.path / kernel["file"]
        record = objects.read_record(_read_trusted(path))
        if record != kernel:
            raise objects.CorruptObject("it holds another kernel than the manifest says")
        if self.runtime_digest is not None:
            _load_runtime(self.path / toolchain.RUNTIME_NAME, self.runtime_digest)
        else:
            _load_installed_runtime()
        return library.load_function(path, kernel["symbol"])


@functools.cache
def _load_runtime(path: Path, digest: str) -> None:
    """Load the runtime library of a directory.

    Raises:
        ValueError: it has another digest.
        OSError: it is not there, or does not load here.
    """
    if _digest_beside_import(path) != digest:
        raise ValueError(f"{path}: expected the digest that the manifest has, got another")
    library.load_runtime(path)


def _digest_beside_import(path: Path) -> str:
    """The SHA-256 of a file that is loaded, whose 43 MB take as long as what is imported for it
    anyway, and need no lock of the interpreter.

    Raises:
        ValueError, OSError: as of `_open_trusted`.
    """
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        try:
            digest = thread.submit(_digest, path)
        except RuntimeError:
            # There are no more threads to be had, or the interpreter is about to end.
            return _digest(path)
        library.import_tvm_ffi()
        return digest.result()


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(DIGEST_BYTES))
    with _open_trusted(path) as file:
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

    Those that it has need no compiler from now on; their objects are read when they are first
    called. A directory that is loaded later is asked first. One that ``CUTE_QUANT_AOT_DIR`` names
    is loaded by itself, and asked last.

    Args:
        directory: with a manifest, objects, and the runtime library.

    Raises:
        FileNotFoundError: there is no manifest in it, or no such directory.
        ValueError: it was built from other sources, for another processor, or with another
            apache-tvm-ffi; its manifest is damaged; or others than root and
            the user may write to it.
        TypeError: it is not a path.
        OSError: it cannot be read.
    """
    path = os.fspath(directory) if isinstance(directory, os.PathLike) else directory
    if not isinstance(path, str):
        raise TypeError(f"directory: expected a path of text, got {type(path).__name__}")
    if not path:
        raise ValueError("directory: expected a path, got nothing")
    _loaded.insert(0, open_directory(Path(path).absolute()))


def loaded() -> list[Directory]:
    """The directories that kernels are looked for in, the first one asked first."""
    own, _ = _of_environment()
    return [*_loaded, *([own] if own is not None else [])]


def find(spec: Spec, arch: str) -> Callable[..., None] | None:
    """The function of a kernel that was built ahead of time, None if there is none."""
    for directory in loaded():
        try:
            function = directory.find(spec, arch)
        except Exception as error:
            name = naming.spec_name(spec)
            log.warning("%s for %s not taken from %s: %s", name, arch, directory.path, error)
            continue
        if function is not None:
            return function
    return None


def why_not_used() -> str | None:
    """Why the directory that ``CUTE_QUANT_AOT_DIR`` names is not used, None if it is or if there
    is none."""
    _, reason = _of_environment()
    return reason


@functools.cache
def _of_environment() -> tuple[Directory | None, str | None]:
    """The directory that the environment names, or why it is not used, which is said once."""
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
    """Check the manifest of a directory.

    Raises:
        FileNotFoundError, ValueError: as :func:`load`.
    """
    manifest = _read_manifest(path)
    _check_trusted(path, path.stat())
    _check_parents(path)
    for name, expected in _identity(platform.machine(), naming.source_digest()).items():
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
    return Directory(path, kernels, manifest.get("runtime"))


def _check_trusted(path: Path, status: os.stat_result) -> None:
    """Refuse what somebody else may have written: it gets executed.

    Raises:
        ValueError: it belongs to somebody else, or others may write to it.
    """
    if status.st_uid not in (0, os.geteuid()):
        raise ValueError(f"{path}: expected root or you as its owner, got user {status.st_uid}")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        permissions = stat.S_IMODE(status.st_mode)
        raise ValueError(
            f"{path}: expected that only its owner may write to it, got mode {permissions:04o}: "
            f"chmod go-w"
        )


def _check_parents(path: Path) -> None:
    # Both as it was named and as it is: either chain decides what the name will stand for. In a
    # directory with the sticky bit, such as /tmp, others cannot rename what is not theirs.
    for parent in (*path.resolve().parents, *path.parents):
        status = parent.stat()
        shared = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if shared and not status.st_mode & stat.S_ISVTX:
            raise ValueError(f"{path}: expected no parent that others may write to, got {parent}")


def _open_trusted(path: Path) -> io.FileIO:
    """A file that is loaded, to be read.

    Raises:
        ValueError: it is no regular file, or somebody else may have written it.
        OSError: it cannot be read.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ValueError(f"{path}: expected a regular file, got a symbolic link") from None
        raise
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path}: expected a regular file")
        _check_trusted(path, status)
    except BaseException:
        os.close(descriptor)
        raise
    return io.FileIO(descriptor)


def _read_trusted(path: Path) -> bytes:
    """The content of a file that is loaded.

    Raises:
        ValueError, OSError: as of `_open_trusted`.
    """
    with _open_trusted(path) as file:
        return file.read()


def _read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a directory, whatever it was built from and for.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not one that `write` made.
    """
    file = path / MANIFEST
    try:
        content = _read_trusted(file)
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(
            f"{path}: expected a directory made by python -m cute_quant build, got no {MANIFEST}"
        ) from None
    try:
        manifest = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not a manifest: {error}") from error
    wrong = _wrong_in_manifest(manifest)
    if wrong is not None:
        raise ValueError(f"{file}: not a manifest: {wrong}")
    return manifest


def _wrong_in_manifest(manifest: Any) -> str | None:
    """What keeps a value from being a manifest, None if nothing does."""
    if not isinstance(manifest, dict):
        return f"expected an object, got {type(manifest).__name__}"
    types = {"format": int, "machine": str, "sources": str, "versions": dict, "kernels": list}
    for name, expected in types.items():
        # A bool is an int to isinstance.
        if type(manifest.get(name)) is not expected:
            return f"{name}: expected {expected.__name__}, got {manifest.get(name)!r:.80}"
    tvm_ffi = manifest["versions"].get("apache-tvm-ffi")
    if not isinstance(tvm_ffi, str):
        return f"versions: expected one of apache-tvm-ffi, got {tvm_ffi!r:.80}"
    if not isinstance(manifest.get("runtime"), str | None):
        return f"runtime: expected a digest, got {manifest['runtime']!r:.80}"
    for kernel in manifest["kernels"]:
        if not _is_kernel(kernel):
            return f"kernels: expected strings {', '.join(KERNEL_FIELDS)}, got {kernel!r:.80}"
    return None


def _is_kernel(kernel: Any) -> bool:
    return (
        isinstance(kernel, dict)
        and kernel.keys() == set(KERNEL_FIELDS)
        and all(isinstance(text, str) for text in kernel.values())
        # Nothing outside of the directory; pathlib takes ".." for a name.
        and Path(kernel["file"]).name == kernel["file"]
        and kernel["file"] not in ("", "..")
    )


def _identity(machine: str, sources: str) -> dict[str, Any]:
    return {"format": FORMAT, "machine": machine, "sources": sources}


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def symbol(spec: Spec, arch: str) -> str:
    """The name of a kernel's function, distinct among those of a directory."""
    return f"{naming.spec_name(spec)}_{arch}".replace("-", "_")


def write(
    path: Path,
    host: toolchain.Host,
    runtime: Path | None,
    built: Iterable[tuple[Spec, str, bytes]],
) -> None:
    """Make a directory, or replace what was built into it before.

    Args:
        host: what runs the host code.
        runtime: the runtime library to put beside the objects, if any.
        built: spec, architecture and shared object of each kernel, whose function has the name
            that `symbol` gives.

    Raises:
        ValueError: there is something else in the directory, or the runtime is none for the host.
        OSError: it cannot be written.

    Whatever is raised, what was built before is still there.
    """
    path = path.resolve()
    content = None if runtime is None else _read_runtime(runtime, host)
    _files_built(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Beside it, as a rename does not leave a file system.
    workspace = Path(tempfile.mkdtemp(".tmp", f".{path.name}.", path.parent))
    try:
        new = workspace / "new"
        new.mkdir()
        _fill(new, host, content, built)
        _swap(new, path, workspace / "old")
    finally:
        shutil.rmtree(workspace / "new", ignore_errors=True)
        # What could not be removed or put back stays in it.
        with contextlib.suppress(OSError):
            workspace.rmdir()


def _fill(
    path: Path,
    host: toolchain.Host,
    runtime: bytes | None,
    built: Iterable[tuple[Spec, str, bytes]],
) -> None:
    if runtime is not None:
        (path / toolchain.RUNTIME_NAME).write_bytes(runtime)
    kernels = []
    for spec, arch, content in built:
        kernel = {
            "name": naming.spec_name(spec),
            "spec": naming.spec_text(spec),
            "arch": arch,
            "file": f"{naming.spec_name(spec)}-{arch}.so",
            "symbol": symbol(spec, arch),
        }
        (path / kernel["file"]).write_bytes(objects.seal(content, kernel))
        kernels.append(kernel)
    manifest = {
        **_identity(host.machine, naming.source_digest()),
        "cpu": host.cpu,
        "versions": toolchain.versions(),
        "runtime": None if runtime is None else hashlib.sha256(runtime).hexdigest(),
        "kernels": kernels,
    }
    (path / MANIFEST).write_text(json.dumps(manifest, indent=1))
    # Under a umask such as 002 it would be refused when it is loaded.
    for made in (path, *path.iterdir()):
        made.chmod(made.stat().st_mode & ~(stat.S_IWGRP | stat.S_IWOTH))


def _swap(new: Path, path: Path, old: Path) -> None:
    """Put a new directory in place of another, which is moved away and emptied."""
    # Compiling took a while, in which somebody may have put something there.
    names = [file.name for file in _files_built(path)]
    if not names:
        new.replace(path)
        return
    path.replace(old)
    try:
        new.replace(path)
    except BaseException:
        old.replace(path)
        raise
    for name in names:
        (old / name).unlink()
    old.rmdir()


def _read_runtime(file: Path, host: toolchain.Host) -> bytes:
    """A runtime library for a host.

    Raises:
        ValueError: it is something else.
        OSError: it cannot be read.
    """
    content = file.read_bytes()
    # 64 bits, little-endian; a shared object; its machine.
    expected = (b"\x7fELF\x02\x01", ELF_SHARED, ELF_MACHINES[host.machine])
    if (content[:6], *_ELF_KIND.unpack(content[16:20].ljust(4, b"\0"))) != expected:
        raise ValueError(f"runtime: expected a shared library for {host.machine}, got {file}")
    return content


def _files_built(path: Path) -> list[Path]:
    """The files of what was built into a directory before: all that may be removed from it.

    Raises:
        ValueError: there is something else in it.
    """
    files = sorted(path.iterdir()) if path.exists() else []
    if not files:
        return []
    try:
        kernels = _read_manifest(path)["kernels"]
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(
            f"{path}: expected a new directory or one built before, got "
            f"{[file.name for file in files]}: {error}"
        ) from error
    known = {MANIFEST, toolchain.RUNTIME_NAME, *(kernel["file"] for kernel in kernels)}
    others = [file.name for file in files if file.name not in known]
    if others:
        raise ValueError(f"{path}: expected a new directory or one built before, got {others}")
    return files
