"""The disk cache of built objects, which fresh processes load in place of compiling.

What lies in it gets executed. So the directory belongs to the user alone, objects carry a digest
over all their bytes, and whatever does not look as it should is refused or built anew. Entries are
written under a temporary name and renamed; a lock a key, which the kernel of the operating system
drops when its process ends, lets processes that start together compile once.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from cute_quant.jit import keys, shared_objects, toolchain
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

LOCK_SECONDS = 10.0
"""How long one process waits for another that compiles the same kernel, which takes 0.2 to 2 s."""
POLL_SECONDS = 0.01

STALE_SECONDS = 3600.0
"""After which a temporary file or a lock has surely lost its process."""


class CacheRefused(RuntimeError):
    """A directory that code must not be loaded from."""


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
    """The name of the entry for a kernel: a digest of everything that its bytes depend on.

    Args:
        options: of ``cute.compile``.

    Raises:
        RuntimeError: CuTe DSL or apache-tvm-ffi is not installed.
        OSError, TypeError: as of `naming.source_digest` and `naming.spec_text`.
    """
    dsl, tvm_ffi = toolchain.installed_dsl(), toolchain.tvm_ffi_version()
    if dsl is None or tvm_ffi is None:
        raise RuntimeError("nvidia-cutlass-dsl and apache-tvm-ffi are not both installed")
    host = toolchain.this_host()
    parts = {
        "sources": keys.source_digest(),
        "spec": keys.spec_text(spec),
        "arch": arch,
        "options": [options, toolchain.dsl_variables()],
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
        CacheRefused: its directory must not be trusted.
        OSError: it cannot be looked at.
        ValueError: ``CUTE_QUANT_CACHE`` or ``CUTE_QUANT_CACHE_DIR`` makes no sense.
    """
    chosen = mode()
    if chosen == "off":
        return None
    directory = default_directory().absolute()
    if not os.path.lexists(directory):
        existing = next(parent for parent in directory.parents if parent.exists())
        if chosen == "readonly" or not os.access(existing, os.W_OK | os.X_OK):
            return None
        check_parents(directory)
        return Cache(directory, True)
    check_directory(directory)
    writable = bool(directory.stat().st_mode & stat.S_IWUSR) and os.access(directory, os.W_OK)
    return Cache(directory, writable and chosen == "on")


def why_none() -> str:
    """Why `open_cache` gave none."""
    if mode() == "off":
        return f"{MODE_VARIABLE} is off"
    return f"{default_directory()} does not exist, and may not be made"


def check_directory(directory: Path) -> None:
    """Refuse a directory whose content somebody else may have written.

    Raises:
        CacheRefused: which of the rules is broken, and what to do.
        OSError: it cannot be looked at.
    """
    status = directory.lstat()
    if stat.S_ISLNK(status.st_mode):
        raise CacheRefused(f"{directory} is a symbolic link: name the directory itself")
    if not stat.S_ISDIR(status.st_mode):
        raise CacheRefused(f"{directory} is not a directory")
    if status.st_uid != os.geteuid():
        raise CacheRefused(f"{directory} belongs to user {status.st_uid}: use one of your own")
    if status.st_mode & 0o077:
        permissions = stat.S_IMODE(status.st_mode)
        raise CacheRefused(f"{directory} has mode {permissions:04o}: chmod 700 it")
    check_parents(directory)


def check_parents(directory: Path) -> None:
    """Refuse a directory, which need not exist yet, that somebody else may replace.

    Raises:
        CacheRefused, OSError: as of `check_directory`.
    """
    # Both as it was named and as it is: either chain decides what the name will stand for. In a
    # directory with the sticky bit, such as /tmp, others cannot rename what is not theirs.
    for parent in filter(Path.exists, (*directory.resolve().parents, *directory.parents)):
        status = parent.stat()
        if status.st_uid not in (0, os.geteuid()):
            raise CacheRefused(
                f"{directory} lies in {parent}, which belongs to user {status.st_uid}: "
                f"use another directory"
            )
        if status.st_mode & 0o022 and not status.st_mode & stat.S_ISVTX:
            who = "anybody" if status.st_mode & stat.S_IWOTH else f"group {status.st_gid}"
            raise CacheRefused(
                f"{directory} lies in {parent}, which {who} may write to: use another directory"
            )


def make_directory(directory: Path) -> None:
    """Make a directory and its parents for the user alone, whatever the umask is.

    Raises:
        CacheRefused, OSError: as of `check_directory`, or it cannot be made.
    """
    missing = [path for path in (directory, *directory.parents) if not os.path.lexists(path)]
    for path in reversed(missing):
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
    if missing:
        check_directory(directory)


class Cache:
    """A directory of objects."""

    def __init__(self, directory: Path, writable: bool):
        """
        Args:
            directory: that `check_directory` has found to be safe.
            writable: whether entries may be added and removed.
        """
        self.directory = directory
        self.writable = writable
        self._patience = LOCK_SECONDS

    def path(self, key: str) -> Path:
        """Where the entry of a key is, if there is one."""
        return self.directory / (key + SUFFIX)

    def find(self, key: str) -> Path | None:
        """An entry that was checked, None if there is none that is good."""
        path = self.path(key)
        try:
            record = _record(path)
            if record.get("key") != key:
                raise shared_objects.CorruptObject("it was built under another key")
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            self.discard(path, error)
            return None
        if self.writable:
            with contextlib.suppress(OSError):
                os.utime(path)
        return path

    def discard(self, path: Path, reason: Exception) -> None:
        """Remove an entry that is no good, with a line in the log."""
        log.warning("%s is discarded and built anew: %s", path, " ".join(str(reason).split()))
        if self.writable:
            with contextlib.suppress(OSError):
                path.unlink()

    def stop_writing(self, reason: Exception) -> None:
        """Only read from now on, with a line in the log."""
        self.writable = False
        log.warning("nothing more is written to %s: %s", self.directory, reason)

    def store(self, key: str, content: bytes, record: dict[str, str]) -> Path:
        """Add an entry; returns where it is.

        Raises:
            OSError: it cannot be written.
        """
        sealed = shared_objects.seal(content, {**record, "key": key})
        make_directory(self.directory)
        descriptor, name = tempfile.mkstemp(TEMPORARY_SUFFIX, key + ".", self.directory)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(sealed)
            os.replace(name, self.path(key))
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise
        self._trim(keep=self.path(key))
        return self.path(key)

    @contextlib.contextmanager
    def lock(self, key: str, wait: bool = True) -> Iterator[None]:
        """Hold the lock of a key; others who ask for it wait.

        Who has waited in vain does not wait again, for any key: what holds one lock, a process that
        is stopped for instance, may hold others.

        Raises:
            TimeoutError: another process holds it for too long.
            OSError: the file system has no locks.
        """
        make_directory(self.directory)
        path = self.directory / (key + LOCK_SUFFIX)
        deadline = time.monotonic() + (self._patience if wait else 0.0)
        while True:
            flags = os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(path, flags, 0o600)
            try:
                self._wait(descriptor, path, deadline, wait)
                # Whoever held it may have removed the file, and a third made another.
                if os.fstat(descriptor).st_nlink:
                    for left in self.directory.glob(f"{key}.*{TEMPORARY_SUFFIX}"):
                        left.unlink(missing_ok=True)
                    try:
                        yield
                    finally:
                        with contextlib.suppress(OSError):
                            path.unlink()
                    return
            finally:
                os.close(descriptor)

    def _wait(self, descriptor: int, path: Path, deadline: float, wait: bool) -> None:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    waited, self._patience = self._patience, 0.0 if wait else self._patience
                    message = f"another process held {path} for {waited:.0f} s"
                    if waited and wait:
                        log.warning("compiled without the disk cache: %s", message)
                    raise TimeoutError(message) from None
                time.sleep(POLL_SECONDS)

    def entries(self) -> list[Entry]:
        """All of them, the one that was used last first."""
        found = []
        for path in self.directory.glob("*" + SUFFIX):
            try:
                status = path.lstat()
                record = _record(path)
            except FileNotFoundError:
                continue
            except (OSError, ValueError):
                record = None
            found.append(Entry(path, status.st_size, status.st_mtime, record))
        return sorted(found, key=lambda entry: entry.used, reverse=True)

    def clear(self) -> int:
        """Remove all entries, and what crashed processes left; returns how many entries.

        Those that another process is about to write stay, and so does what is no regular file.

        Raises:
            OSError: it cannot be written.
        """
        names = [entry.name for entry in self._files() if entry.name.endswith(OURS)]
        return sum(self._remove(key) for key in sorted({name.split(".")[0] for name in names}))

    def _remove(self, key: str) -> bool:
        """Remove the files of a key unless its lock is held; returns whether there was an entry."""
        try:
            with self.lock(key, wait=False):
                path = self.path(key)
                if not path.is_file() or path.is_symlink():
                    return False
                path.unlink()
                return True
        except (TimeoutError, FileNotFoundError, IsADirectoryError):
            return False

    def _files(self) -> list[os.DirEntry]:
        """The regular files."""
        try:
            with os.scandir(self.directory) as entries:
                return [entry for entry in entries if entry.is_file(follow_symlinks=False)]
        except FileNotFoundError:
            return []

    def _trim(self, keep: Path) -> None:
        """Remove what was not used for longest, as far as there is too much."""
        total, files = 0, []
        stale = time.time() - STALE_SECONDS
        for entry in self._files():
            with contextlib.suppress(OSError):
                status = entry.stat(follow_symlinks=False)
                if entry.name.endswith(SUFFIX):
                    total += status.st_size
                    files.append((status.st_mtime, status.st_size, entry.name))
                elif entry.name.endswith(LEFT_BY_CRASHES) and status.st_mtime < stale:
                    self._remove_stale(entry.name)
        for _, size, name in sorted(files):
            if total <= MAX_BYTES:
                break
            if name != keep.name:
                with contextlib.suppress(OSError):
                    total -= size * self._remove(name.split(".")[0])

    def _remove_stale(self, name: str) -> None:
        # Who takes the lock removes what the last one left, and at the end the lock.
        with self.lock(name.split(".")[0], wait=False):
            pass


def _record(path: Path) -> dict[str, str]:
    record = shared_objects.read_record(_read(path))
    missing = [name for name in NEEDED if name not in record]
    if missing:
        raise shared_objects.CorruptObject(f"record: expected {NEEDED}, got none of {missing}")
    return record


def _read(path: Path) -> bytes:
    """The content of a file that belongs to the user alone.

    Raises:
        CorruptObject: it is no such file.
        OSError: it cannot be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise shared_objects.CorruptObject("it is a symbolic link") from None
        raise
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise shared_objects.CorruptObject("it is no regular file")
        if status.st_uid != os.geteuid() or status.st_mode & 0o022:
            raise shared_objects.CorruptObject("others may write to it")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(descriptor)
