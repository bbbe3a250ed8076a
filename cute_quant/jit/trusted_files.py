"""Check who may have written a file that is loaded as code, and hold directories open.

A file or a directory is trusted if root or the user owns it and nobody else may write to it. So is
everything that its path leads through, with one exception: others may write to a parent that has
the sticky bit, such as /tmp, where they cannot rename what is not theirs.

A path may lead elsewhere a moment after it was checked, an open descriptor may not. So a directory
is opened once, component by component, and its entries are reached through the descriptor.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import stat
import weakref
from collections.abc import Callable
from pathlib import Path

MAX_LINKS = 40
"""Symbolic links in a path, as many as Linux follows."""

OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH

Check = Callable[[Path, os.stat_result], None]


class Untrusted(ValueError):
    """A file or directory that somebody else may have written."""


def check_writers(path: Path, status: os.stat_result) -> None:
    """Check that only root or the user may have written a file or directory.

    Raises:
        Untrusted: another user owns it, or other users may write to it.
    """
    if status.st_uid not in (0, os.geteuid()):
        raise Untrusted(f"{path}: expected root or you as its owner, got user {status.st_uid}")
    if status.st_mode & OTHERS_WRITE:
        permissions = stat.S_IMODE(status.st_mode)
        raise Untrusted(
            f"{path}: expected that only its owner may write to it, got mode {permissions:04o}: "
            f"chmod go-w"
        )


def _check_parent(path: Path, parent: Path, status: os.stat_result) -> None:
    if status.st_uid not in (0, os.geteuid()):
        raise Untrusted(
            f"{path} lies in {parent}, which belongs to user {status.st_uid}: use another directory"
        )
    if status.st_mode & OTHERS_WRITE and not status.st_mode & stat.S_ISVTX:
        who = "anybody" if status.st_mode & stat.S_IWOTH else f"group {status.st_gid}"
        raise Untrusted(f"{path} lies in {parent}, which {who} may write to: use another directory")


def _check_link(path: Path, link: Path, owner: int, parent: os.stat_result) -> None:
    # Even one's own in /tmp: when it is removed there, others may make it anew.
    if owner not in (0, os.geteuid()) or parent.st_mode & OTHERS_WRITE:
        raise Untrusted(
            f"{path} leads through {link}, a symbolic link of user {owner} in a directory of mode "
            f"{stat.S_IMODE(parent.st_mode):04o}: name the directory itself"
        )


def _open_checked(path: Path, make: bool) -> int:
    """Open a directory one component at a time, and check each parent on the way.

    Raises:
        Untrusted: others may replace a parent or a symbolic link.
        OSError: there is no such directory, or it cannot be opened or made.
    """
    names, links, reached = _components(str(path)), 0, Path("/")
    descriptor = _open_component("/", None, False)
    try:
        while names:
            parent = os.fstat(descriptor)
            _check_parent(path, reached, parent)
            name = names.pop()
            component = _open_component(name, descriptor, make)
            status = os.fstat(component)
            if not stat.S_ISLNK(status.st_mode):
                os.close(descriptor)
                descriptor = component
                reached = reached.parent if name == ".." else reached / name
                continue
            try:
                _check_link(path, reached / name, status.st_uid, parent)
                target = os.readlink("", dir_fd=component)
            finally:
                os.close(component)
            links += 1
            if links > MAX_LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
            names += _components(target)
            if target.startswith("/"):
                os.close(descriptor)
                descriptor, reached = _open_component("/", None, False), Path("/")
        if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise NotADirectoryError(f"{path} is not a directory")
    except FileNotFoundError:
        os.close(descriptor)
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _components(path: str) -> list[str]:
    """Return the names in a path, the last one first."""
    return [name for name in reversed(path.split("/")) if name not in ("", ".")]


def _open_component(name: str, directory: int | None, make: bool) -> int:
    flags = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        return os.open(name, flags, dir_fd=directory)
    except FileNotFoundError:
        if not make:
            raise
    with contextlib.suppress(FileExistsError):
        os.mkdir(name, 0o700, dir_fd=directory)
    return os.open(name, flags, dir_fd=directory)


def open_file(path: Path, directory: int | None = None) -> io.FileIO:
    """Open a trusted file for reading.

    Args:
        path: the file. With `directory`, only its name is used to open it.
        directory: descriptor of the directory that holds the file, or None.

    Raises:
        Untrusted: the file is not a regular one, or another user may have written it.
        OSError: the file cannot be read.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path if directory is None else path.name, flags, dir_fd=directory)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise Untrusted(f"{path}: expected a regular file, got a symbolic link") from None
        raise
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise Untrusted(f"{path}: expected a regular file")
        check_writers(path, status)
    except BaseException:
        os.close(descriptor)
        raise
    return io.FileIO(descriptor)


class TrustedDirectory:
    """A directory that was checked, held open.

    Args:
        path: an absolute path.
        check: the check of the directory itself.
        make: whether to make the directory and its parents, for the user alone, where they are
            missing.

    Attributes:
        path: the path that the directory was opened by, for messages. It may lead elsewhere since.

    Raises:
        Untrusted: other users may write to the directory, or replace it or a parent.
        OSError: there is no such directory, or it cannot be opened or made.
    """

    def __init__(self, path: Path, check: Check = check_writers, make: bool = False):
        self.path = path
        self._check = check
        self._descriptor = _open_checked(path, make)
        status = os.fstat(self._descriptor)
        self._identity = _identity(status)
        self._close = weakref.finalize(self, _close_same, self._descriptor, self._identity)
        self._close.atexit = False
        check(path, status)

    @property
    def descriptor(self) -> int:
        """Return the descriptor of the directory, for ``dir_fd``, after checking it again.

        Raises:
            Untrusted: other users may write to the directory by now.
            OSError: the process has closed the descriptor.
        """
        status = os.fstat(self._descriptor)
        if _identity(status) != self._identity:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF), str(self.path))
        self._check(self.path, status)
        return self._descriptor

    def is_lost(self) -> bool:
        """Return whether the directory was removed, or the process has closed its descriptor."""
        try:
            status = os.fstat(self._descriptor)
        except OSError:
            return True
        return _identity(status) != self._identity or status.st_nlink == 0

    def open(self, name: str) -> io.FileIO:
        """Open a trusted file of the directory, as `open_file` does."""
        return open_file(self.path / name, self.descriptor)

    def read(self, name: str) -> bytes:
        """Return the content of a trusted file of the directory, opened as by `open_file`."""
        with self.open(name) as file:
            return file.read()

    def entries(self) -> list[tuple[str, os.stat_result]]:
        """Return the names in the directory, each with its status.

        Entries that vanish meanwhile are left out.
        """
        found = []
        listed = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self.descriptor)
        try:
            for name in os.listdir(listed):
                with contextlib.suppress(FileNotFoundError):
                    found.append((name, os.stat(name, dir_fd=listed, follow_symlinks=False)))
        finally:
            os.close(listed)
        return found

    def loadable(self, name: str) -> str:
        """Return a path to an entry for the dynamic linker, which takes no descriptor.

        The path leads through the open directory, even where `path` leads elsewhere by now.

        Raises:
            Untrusted, OSError: as `descriptor`, or /proc is not mounted.
        """
        path = f"/proc/self/fd/{self.descriptor}/{name}"
        os.stat(path)
        # The linker takes a path that it has loaded before for the same object, so that this number
        # must not stand for another directory as long as the process lives.
        self._close.detach()
        return path


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _close_same(descriptor: int, identity: tuple[int, int]) -> None:
    # A process that has closed all of its descriptors may use the number for something else.
    with contextlib.suppress(OSError):
        if _identity(os.fstat(descriptor)) == identity:
            os.close(descriptor)
