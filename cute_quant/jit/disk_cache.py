"""The disk cache of built objects, which fresh processes load in place of compiling.

What lies in it gets executed. So the directory belongs to the user alone and is held open, objects
carry a digest over all their bytes, and whatever does not look as it should is refused or built
anew. Entries are written under a temporary name and renamed; a lock a key, which the kernel of the
operating system drops when its process ends, lets processes that start together compile once.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from cute_quant.jit import dsl_variables, keys, shared_objects, toolchain
from cute_quant.jit.trusted_files import TrustedDirectory, Untrusted
from cute_quant.kernels.config import Spec

log = logging.getLogger("cute_quant")

DIRECTORY_VARIABLE = "CUTE_QUANT_CACHE_DIR"
MODE_VARIABLE = "CUTE_QUANT_CACHE"
MODES = ("on", "off", "readonly")

MAX_BYTES = 256 * 2**20
"""Bound on the size of all entries together; the least recently used go first."""

NEEDED = ("key", "name", "arch")
"""Fields that every record has."""

SUFFIX = ".so"
LOCK_SUFFIX = ".lock"
TEMPORARY_SUFFIX = ".tmp"
LEFT_BY_CRASHES = (LOCK_SUFFIX, TEMPORARY_SUFFIX)
OURS = (SUFFIX, *LEFT_BY_CRASHES)

LOCK_SECONDS = 30.0
"""How long one process waits for another that compiles the same kernel, which takes 0.2 to 2 s, and
longer where many processes of a node import CuTe DSL at once."""
POLL_SECONDS = 0.01

STALE_SECONDS = 3600.0
"""After which a temporary file or a lock has surely lost its process."""


_locks: set[int] = set()
"""Open files that hold a lock, or wait for one."""


def _close_locks_of_parent() -> None:
    while _locks:
        with contextlib.suppress(OSError):
            os.close(_locks.pop())


os.register_at_fork(after_in_child=_close_locks_of_parent)


class Entry(NamedTuple):
    """An object in the cache.

    Attributes:
        record: of the object, None if it is corrupt.
        used: seconds since the epoch, when it was loaded last.
    """

    path: Path
    bytes: int
    used: float
    record: dict[str, str] | None


def key(spec: Spec, arch: str, options: str) -> str:
    """Return the name of the entry for a kernel: a digest of everything its bytes depend on.

    Args:
        spec: choices of the kernel.
        arch: target of the compiler.
        options: options of ``cute.compile``.

    Raises:
        RuntimeError: CuTe DSL or apache-tvm-ffi is not installed.
        OSError, TypeError: as of `keys.source_digest` and `keys.spec_text`.
    """
    dsl, tvm_ffi = toolchain.installed_dsl(), toolchain.tvm_ffi_version()
    if dsl is None or tvm_ffi is None:
        raise RuntimeError("nvidia-cutlass-dsl and apache-tvm-ffi are not both installed")
    host = toolchain.this_host()
    parts = {
        "sources": keys.source_digest(),
        "spec": keys.spec_text(spec),
        "arch": arch,
        "options": [options, dsl_variables.compiled_in()],
        "dsl": [dsl.version, dsl.flavour],
        "tvm_ffi": tvm_ffi,
        "cpu": [host.triple, host.cpu],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:40]


def default_directory() -> Path:
    """``CUTE_QUANT_CACHE_DIR``, or a directory of the user's cache."""
    if os.environ.get(DIRECTORY_VARIABLE):
        directory = Path(os.environ[DIRECTORY_VARIABLE]).expanduser()
        if not directory.is_absolute():
            raise ValueError(f"{DIRECTORY_VARIABLE}: expected an absolute path, got {directory}")
        return directory
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "cute_quant"


def mode() -> str:
    """``CUTE_QUANT_CACHE``: on, off, or readonly.

    Raises:
        ValueError: it is none of them.
    """
    chosen = os.environ.get(MODE_VARIABLE) or MODES[0]
    if chosen not in MODES:
        raise ValueError(f"{MODE_VARIABLE}: expected one of {MODES}, got {chosen!r}")
    return chosen


def open_cache() -> Cache | None:
    """The cache that the environment asks for; None if that is none.

    Raises:
        Untrusted: others may have written to its directory, or may replace it.
        OSError: it cannot be looked at.
        ValueError: ``CUTE_QUANT_CACHE`` or ``CUTE_QUANT_CACHE_DIR`` makes no sense.
    """
    chosen = mode()
    if chosen == "off":
        return None
    directory = default_directory().absolute()
    try:
        files = open_directory(directory)
    except FileNotFoundError:
        existing = next(parent for parent in directory.parents if parent.exists())
        if chosen == "readonly" or not os.access(existing, os.W_OK | os.X_OK):
            return None
        return Cache(directory, True)
    own = bool(os.fstat(files.descriptor).st_mode & stat.S_IWUSR)
    writable = own and os.access(".", os.W_OK, dir_fd=files.descriptor)
    return Cache(directory, writable and chosen == "on", files)


def why_none() -> str:
    """Why `open_cache` gave none."""
    if mode() == "off":
        return f"{MODE_VARIABLE} is off"
    return f"{default_directory()} does not exist, and may not be made"


def open_directory(directory: Path, make: bool = False) -> TrustedDirectory:
    """Open a directory that is the user's alone.

    Args:
        directory: an absolute path.
        make: whether it is made if it is missing, whatever the umask is.

    Raises:
        Untrusted: which of the rules is broken, and what to do.
        OSError: there is no such directory, or it cannot be opened or made.
    """
    if directory.is_symlink():
        raise Untrusted(f"{directory} is a symbolic link: name the directory itself")
    return TrustedDirectory(directory, _check_private, make)


def _check_private(directory: Path, status: os.stat_result) -> None:
    if status.st_uid != os.geteuid():
        raise Untrusted(f"{directory} belongs to user {status.st_uid}: use one of your own")
    if status.st_mode & 0o077:
        permissions = stat.S_IMODE(status.st_mode)
        raise Untrusted(f"{directory} has mode {permissions:04o}: chmod 700 it")


class Cache:
    """A directory of objects.

    Args:
        directory: an absolute path; it is made when something is written.
        writable: whether entries may be added and removed.
        files: the directory if it is open by now.
    """

    def __init__(self, directory: Path, writable: bool, files: TrustedDirectory | None = None):
        self.directory = directory
        self.writable = writable
        self._held = files
        self._patience = LOCK_SECONDS

    def _files(self, make: bool = False) -> TrustedDirectory:
        """The open directory, opened anew if it was removed.

        Raises:
            Untrusted, OSError: as of `open_directory`.
        """
        if self._held is None or self._held.is_lost():
            self._held = None
            self._held = open_directory(self.directory, make)
        return self._held

    def path(self, key: str) -> Path:
        """Where the entry of a key is, if there is one."""
        return self.directory / (key + SUFFIX)

    def find(self, key: str) -> str | None:
        """Check the entry of a key, and return a path to load it by.

        None if there is no entry, or it is no good and was discarded.

        Raises:
            Untrusted, OSError: the directory is not to be trusted any more.
        """
        name = key + SUFFIX
        try:
            files = self._files()
        except FileNotFoundError:
            return None
        try:
            record = _record(files, name)
            if record["key"] != key:
                raise shared_objects.CorruptObject("it was built under another key")
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            self.discard(key, error)
            return None
        if self.writable:
            with contextlib.suppress(OSError):
                os.utime(name, dir_fd=files.descriptor, follow_symlinks=False)
        return files.loadable(name)

    def try_out(self) -> None:
        """Write an entry, read it and remove it.

        Raises:
            Untrusted, OSError: it cannot be written or removed, or the directory is not trusted.
            RuntimeError: it is not found again.
        """
        key = f"try-{os.urandom(8).hex()}"
        with self.lock(key):
            self.store(key, b"", dict.fromkeys(NEEDED, ""))
            if self.find(key) is None:
                raise RuntimeError(f"{self.path(key)} was written and is not found")
            os.unlink(key + SUFFIX, dir_fd=self._files().descriptor)

    def discard(self, key: str, reason: Exception) -> None:
        """Remove an entry that is no good, with a line in the log."""
        path, text = self.path(key), " ".join(str(reason).split())
        log.warning("%s is discarded and built anew: %s", path, text)
        if self.writable:
            with contextlib.suppress(OSError):
                os.unlink(path.name, dir_fd=self._files().descriptor)

    def stop_writing(self, reason: Exception) -> None:
        """Only read from now on, with a line in the log."""
        self.writable = False
        log.warning("nothing more is written to %s: %s", self.directory, reason)

    def store(self, key: str, content: bytes, record: dict[str, str]) -> Path:
        """Add an entry; returns where it is.

        Raises:
            Untrusted: the directory is not to be trusted any more.
            OSError: it cannot be written.
        """
        sealed = shared_objects.seal(content, {**record, "key": key})
        directory = self._files(make=True).descriptor
        name = f"{key}.{os.urandom(8).hex()}{TEMPORARY_SUFFIX}"
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC
        try:
            with open(os.open(name, flags, 0o600, dir_fd=directory), "wb") as file:
                file.write(sealed)
            os.replace(name, key + SUFFIX, src_dir_fd=directory, dst_dir_fd=directory)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name, dir_fd=directory)
            raise
        self._trim(keep=key + SUFFIX)
        return self.path(key)

    @contextlib.contextmanager
    def lock(self, key: str, wait: bool = True) -> Iterator[None]:
        """Hold the lock of a key; others who ask for it wait.

        Who has waited in vain does not wait again, for any key: what holds one lock, a process that
        is stopped for instance, may hold others.

        Raises:
            TimeoutError: another process holds it for too long.
            Untrusted: the directory is not to be trusted any more.
            OSError: the file system has no locks.
        """
        files, name = self._files(make=True), key + LOCK_SUFFIX
        deadline = time.monotonic() + (self._patience if wait else 0.0)
        while True:
            flags = os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(name, flags, 0o600, dir_fd=files.descriptor)
            _locks.add(descriptor)
            try:
                self._wait(descriptor, name, deadline, wait)
                # Whoever held it may have removed the file, and a third made another.
                if os.fstat(descriptor).st_nlink:
                    for left, _ in files.entries():
                        if left.startswith(f"{key}.") and left.endswith(TEMPORARY_SUFFIX):
                            _unlink(files, left)
                    try:
                        yield
                    finally:
                        _unlink(files, name)
                    return
            finally:
                _locks.discard(descriptor)
                # A child that was forked meanwhile has the same lock, if it did not close it yet.
                with contextlib.suppress(OSError):
                    fcntl.flock(descriptor, fcntl.LOCK_UN)
                os.close(descriptor)

    def _wait(self, descriptor: int, name: str, deadline: float, wait: bool) -> None:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    waited, self._patience = self._patience, 0.0 if wait else self._patience
                    message = f"another process held {self.directory / name} for {waited:.0f} s"
                    if waited and wait:
                        log.warning("compiled without the disk cache: %s", message)
                    raise TimeoutError(message) from None
                time.sleep(POLL_SECONDS)

    def entries(self) -> list[Entry]:
        """All of them, the one that was used last first."""
        found = []
        for name, status in self._entries():
            if not name.endswith(SUFFIX):
                continue
            try:
                record = _record(self._files(), name)
            except FileNotFoundError:
                continue
            except (OSError, ValueError):
                record = None
            path = self.directory / name
            found.append(Entry(path, status.st_size, status.st_mtime, record))
        return sorted(found, key=lambda entry: entry.used, reverse=True)

    def clear(self) -> int:
        """Remove all entries, and what crashed processes left; returns how many entries.

        Those that another process is about to write stay, and so does what is no regular file.

        Raises:
            OSError: it cannot be written.
        """
        names = [name for name, _ in self._regular_files() if name.endswith(OURS)]
        return sum(self._remove(key) for key in sorted({name.split(".")[0] for name in names}))

    def _remove(self, key: str) -> bool:
        """Remove the files of a key unless its lock is held; returns whether there was an entry."""
        try:
            with self.lock(key, wait=False):
                name, directory = key + SUFFIX, self._files().descriptor
                status = os.stat(name, dir_fd=directory, follow_symlinks=False)
                if not stat.S_ISREG(status.st_mode):
                    return False
                os.unlink(name, dir_fd=directory)
                return True
        except (TimeoutError, FileNotFoundError, IsADirectoryError):
            return False

    def _entries(self) -> list[tuple[str, os.stat_result]]:
        try:
            return self._files().entries()
        except FileNotFoundError:
            return []

    def _regular_files(self) -> list[tuple[str, os.stat_result]]:
        return [(name, status) for name, status in self._entries() if stat.S_ISREG(status.st_mode)]

    def _trim(self, keep: str) -> None:
        """Remove what was not used for longest, as far as there is too much."""
        total, files = 0, []
        stale = time.time() - STALE_SECONDS
        for name, status in self._regular_files():
            with contextlib.suppress(OSError):
                if name.endswith(SUFFIX):
                    total += status.st_size
                    files.append((status.st_mtime, status.st_size, name))
                elif name.endswith(LEFT_BY_CRASHES) and status.st_mtime < stale:
                    self._remove_stale(name)
        for _, size, name in sorted(files):
            if total <= MAX_BYTES:
                break
            if name != keep:
                with contextlib.suppress(OSError):
                    total -= size * self._remove(name.split(".")[0])

    def _remove_stale(self, name: str) -> None:
        # Who takes the lock removes what the last one left, and at the end the lock.
        with self.lock(name.split(".")[0], wait=False):
            pass


def _unlink(files: TrustedDirectory, name: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(name, dir_fd=files.descriptor)


def _record(files: TrustedDirectory, name: str) -> dict[str, str]:
    record = shared_objects.read_record(files.read(name))
    missing = [field for field in NEEDED if field not in record]
    if missing:
        raise shared_objects.CorruptObject(f"record: expected {NEEDED}, got none of {missing}")
    return record
