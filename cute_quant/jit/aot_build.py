"""Writing directories of kernels that `ahead_of_time` loads, whole or not at all."""

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
    """The name of a kernel's function, distinct among those of a directory."""
    return f"{keys.spec_name(spec)}_{arch}".replace("-", "_")


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
