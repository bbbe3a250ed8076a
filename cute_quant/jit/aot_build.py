"""Write directories of kernels for `aot_load`, whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import stat
import struct
import tempfile
from collections.abc import Iterable
from pathlib import Path

from cute_quant.jit import keys, shared_objects, toolchain, trusted_files
from cute_quant.jit.aot_manifest import MANIFEST, identity, parse_manifest
from cute_quant.kernels.config import Spec

ELF_SHARED = 3
ELF_MACHINES = {"x86_64": 62, "aarch64": 183}
_ELF_KIND = struct.Struct("<HH")


def symbol(spec: Spec, arch: str) -> str:
    """Return the name of a kernel's function, which is unique in a directory."""
    return f"{keys.spec_name(spec)}_{arch}".replace("-", "_")


def write(
    path: Path,
    host: toolchain.Host,
    runtime: Path | None,
    built: Iterable[tuple[Spec, str, bytes]],
) -> None:
    """Make a directory of kernels, or replace one that was built before.

    An error leaves the kernels that were built before in place.

    Args:
        path: the directory.
        host: the processor that runs the host code.
        runtime: the runtime library to copy into the directory, or None.
        built: spec, architecture and shared object of each kernel, whose function has the name
            that `symbol` gives.

    Raises:
        ValueError: the directory holds other files, or the runtime is not a library for the host.
        OSError: the directory cannot be written.
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
            "name": keys.spec_name(spec),
            "spec": keys.spec_text(spec),
            "arch": arch,
            "file": f"{keys.spec_name(spec)}-{arch}.so",
            "symbol": symbol(spec, arch),
        }
        (path / kernel["file"]).write_bytes(shared_objects.seal(content, kernel))
        kernels.append(kernel)
    manifest = {
        **identity(host.machine, keys.source_digest()),
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
    """Rename a new directory to `path`, after the one there is moved to `old`, and remove that."""
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
    """Return the content of a runtime library.

    Raises:
        ValueError: the file is not a shared library for the host.
        OSError: the file cannot be read.
    """
    content = file.read_bytes()
    # 64 bits, little-endian; a shared object; its machine.
    expected = (b"\x7fELF\x02\x01", ELF_SHARED, ELF_MACHINES[host.machine])
    if (content[:6], *_ELF_KIND.unpack(content[16:20].ljust(4, b"\0"))) != expected:
        raise ValueError(f"runtime: expected a shared library for {host.machine}, got {file}")
    return content


def _files_built(path: Path) -> list[Path]:
    """Return the files that an earlier build wrote to a directory, and so may be removed from it.

    Raises:
        ValueError: the directory holds other files.
    """
    files = sorted(path.iterdir()) if path.exists() else []
    if not files:
        return []
    manifest = path / MANIFEST
    try:
        with trusted_files.open_file(manifest) as file:
            kernels = parse_manifest(file.read(), manifest)["kernels"]
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
