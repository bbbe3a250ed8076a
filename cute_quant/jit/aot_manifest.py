"""The manifest of a directory of built kernels, and files that nobody else may have written."""

from __future__ import annotations

import errno
import io
import json
import os
import stat
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
FORMAT = 2
"""Version of the manifest."""
KERNEL_FIELDS = ("name", "spec", "arch", "file", "symbol")
"""Fields of each kernel in the manifest."""


def check_trusted(path: Path, status: os.stat_result) -> None:
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


def check_parents(path: Path) -> None:
    """Refuse a directory that somebody else may replace.

    Raises:
        ValueError: others may write to a parent.
    """
    # Both as it was named and as it is: either chain decides what the name will stand for. In a
    # directory with the sticky bit, such as /tmp, others cannot rename what is not theirs.
    for parent in (*path.resolve().parents, *path.parents):
        status = parent.stat()
        shared = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if shared and not status.st_mode & stat.S_ISVTX:
            raise ValueError(f"{path}: expected no parent that others may write to, got {parent}")


def open_trusted(path: Path) -> io.FileIO:
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
        check_trusted(path, status)
    except BaseException:
        os.close(descriptor)
        raise
    return io.FileIO(descriptor)


def read_trusted(path: Path) -> bytes:
    """The content of a file that is loaded.

    Raises:
        ValueError, OSError: as of `open_trusted`.
    """
    with open_trusted(path) as file:
        return file.read()


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a directory, whatever it was built from and for.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not one that `write` made.
    """
    file = path / MANIFEST
    try:
        content = read_trusted(file)
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
    """Return why a value is no manifest, None if it is one."""
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


def identity(machine: str, sources: str) -> dict[str, Any]:
    return {"format": FORMAT, "machine": machine, "sources": sources}
