"""Who may have written what is loaded.

Another user attacks the cache, and directories built ahead of time.
"""

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import cute_quant
from cute_quant.jit import (
    aot_build,
    aot_load,
    disk_cache,
    library,
    lookup,
    shared_objects,
    toolchain,
)
from cute_quant.jit.disk_cache import Cache
from cute_quant.jit.trusted_files import TrustedDirectory, Untrusted
from cute_quant.kernels.config import QuantizeSpec
from tests.helpers import UE8M0, environment

SPEC = QuantizeSpec(torch.bfloat16, UE8M0)
ARCH = "sm_100a"
KEY = "0123456789abcdef"
RECORD = {"name": "some-kernel", "arch": ARCH}
OTHER_USER = 12345

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="plays another user")


@pytest.fixture
def shared() -> Iterator[Path]:
    """A directory such as /tmp, which every user may write to."""
    with tempfile.TemporaryDirectory() as made:
        Path(made).chmod(0o1777)
        yield Path(made)


@pytest.fixture(autouse=True)
def nothing_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(aot_load.DIRECTORY_VARIABLE, raising=False)
    monkeypatch.setattr(aot_load, "_loaded", [])


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Contents that the dynamic linker would be given, in place of loading it."""
    contents: list[bytes] = []

    def load_function(path: str, symbol: str) -> Callable[..., None]:
        contents.append(Path(path).read_bytes())
        return print

    monkeypatch.setattr(library, "load_function", load_function)
    monkeypatch.setattr(library, "load_runtime", lambda path: None)
    return contents


def made_private(path: Path) -> Path:
    path.mkdir(parents=True, mode=0o700)
    return path


def built(path: Path, content: bytes = b"genuine") -> Path:
    """A directory built ahead of time with one object, that is never run."""
    aot_build.write(path, toolchain.this_host(), None, [(SPEC, ARCH, content)])
    return path


OPENERS = {"cache": disk_cache.open_directory, "built ahead": cute_quant.load}
"""Both take a path and refuse what others may have written."""

every_opener = pytest.mark.parametrize("opened", OPENERS.values(), ids=OPENERS)


def usable(opened: Callable, path: Path) -> Path:
    """A directory that an opener takes where nothing is wrong with its parents."""
    return built(path) if opened is cute_quant.load else made_private(path)


def give_to_other_user(path: Path) -> None:
    os.chown(path, OTHER_USER, -1, follow_symlinks=False)


# The way to a directory.


@needs_root
@every_opener
def test_parent_of_another_user(opened, shared):
    parent = made_private(shared / "theirs")
    inner = usable(opened, parent / "kernels")
    opened(inner)
    give_to_other_user(parent)
    parent.chmod(0o755)
    with pytest.raises(Untrusted, match=rf"lies in {parent}, which belongs to user {OTHER_USER}"):
        opened(inner)


@every_opener
@pytest.mark.parametrize("mode", [0o777, 0o775])
def test_parent_that_others_may_write_to(opened, mode, tmp_path):
    inner = usable(opened, tmp_path / "parent" / "kernels")
    inner.parent.chmod(mode)
    with pytest.raises(Untrusted, match=rf"lies in {inner.parent}, which (anybody|group \d+) may"):
        opened(inner)
    inner.parent.chmod(mode | stat.S_ISVTX)
    opened(inner)


@every_opener
@pytest.mark.parametrize("target", ["absolute", "relative", "two links"])
def test_links_in_trusted_directories(opened, target, tmp_path):
    usable(opened, tmp_path / "a" / "real" / "kernels")
    (tmp_path / "b").mkdir()
    link = tmp_path / "b" / "link"
    link.symlink_to(tmp_path / "a" / "real" if target == "absolute" else "../a/./real")
    if target == "two links":
        (tmp_path / "b" / "again").symlink_to("link")
        link = tmp_path / "b" / "again"
    opened(link / "kernels")


@every_opener
def test_link_in_a_directory_that_others_may_write_to(opened, shared, tmp_path):
    inner = usable(opened, tmp_path / "kernels")
    link = shared / "link"
    link.symlink_to(tmp_path)
    with pytest.raises(Untrusted, match=rf"leads through {link}, a symbolic link .* mode 1777: "):
        opened(link / inner.name)


@needs_root
@every_opener
def test_link_of_another_user(opened, tmp_path):
    inner = usable(opened, tmp_path / "mine" / "kernels")
    link = tmp_path / "link"
    link.symlink_to(inner.parent)
    opened(link / inner.name)
    give_to_other_user(link)
    with pytest.raises(Untrusted, match=f"a symbolic link of user {OTHER_USER}"):
        opened(link / inner.name)


@every_opener
def test_link_behind_a_link(opened, shared, tmp_path):
    inner = usable(opened, tmp_path / "mine" / "kernels")
    (shared / "second").symlink_to(inner.parent)
    (tmp_path / "first").symlink_to(shared / "second")
    with pytest.raises(Untrusted, match=f"leads through {shared / 'second'}"):
        opened(tmp_path / "first" / inner.name)


def test_links_in_a_circle(tmp_path):
    (tmp_path / "link").symlink_to("link")
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        TrustedDirectory(tmp_path / "link" / "kernels")
    assert len(os.listdir("/proc/self/fd")) == before


# The cache.


def cached(store: Cache, monkeypatch: pytest.MonkeyPatch) -> Callable | None:
    """Look a kernel up that compiles to some bytes."""
    monkeypatch.setattr(lookup, "_cache", lambda: store)
    monkeypatch.setattr(lookup, "build_object", lambda *_: b"genuine")
    monkeypatch.setattr(toolchain.Host, "linker", lambda _: "ld")
    kept = lookup._using_cache(SPEC, ARCH, lookup._load)
    added = None if kept else lookup._using_cache(SPEC, ARCH, lookup._added)
    return added.function if added else kept


def taken_by_other_user(directory: Path) -> None:
    """A cleaner has removed a directory, and another user makes it anew."""
    shutil.rmtree(directory)
    directory.mkdir()
    give_to_other_user(directory)
    directory.chmod(0o777)


@needs_root
def test_directory_that_another_user_makes_anew(shared, loaded, monkeypatch, caplog):
    store = Cache(made_private(shared / "cq"), True)
    store.store(KEY, b"", RECORD)
    taken_by_other_user(store.directory)
    assert cached(store, monkeypatch) is None
    assert not loaded and not list(store.directory.iterdir())
    assert f"{store.directory} belongs to user {OTHER_USER}: use one of your own" in caplog.text


@needs_root
@pytest.mark.parametrize("point", ["lock", "store"])
def test_entry_that_another_user_replaces_before_it_is_loaded(
    point, shared, loaded, monkeypatch, caplog
):
    store = Cache(made_private(shared / "cq"), True)
    original = getattr(Cache, point)

    def attacked(self, key, *rest):
        result = original(self, key, *rest)
        taken_by_other_user(self.directory)
        record = {**RECORD, "key": key}
        (self.directory / f"{key}.so").write_bytes(shared_objects.seal(b"evil", record))
        return result

    monkeypatch.setattr(Cache, point, attacked)
    assert cached(store, monkeypatch) is None
    assert not any(b"evil" in content for content in loaded)
    assert "belongs to user" in caplog.text


def test_what_is_loaded_is_what_was_checked(tmp_path, loaded, monkeypatch):
    """The path leads elsewhere between the check and the load."""
    store = Cache(made_private(tmp_path / "cq"), True)
    read_record = shared_objects.read_record

    def attacked(data):
        store.directory.rename(tmp_path / "away")
        (entry,) = (tmp_path / "away").glob("*.so")
        made_private(store.directory)
        (store.directory / entry.name).write_bytes(b"evil")
        return read_record(data)

    monkeypatch.setattr(shared_objects, "read_record", attacked)
    assert cached(store, monkeypatch) is not None
    (content,) = loaded
    assert content.startswith(b"genuine")


@pytest.mark.parametrize("lost", ["removed", "closed"])
def test_directory_that_is_lost_is_opened_again(lost, tmp_path):
    store = Cache(made_private(tmp_path / "cq"), True)
    store.store(KEY, b"", RECORD)
    if lost == "removed":
        shutil.rmtree(store.directory)
        assert store.find(KEY) is None
        store.store(KEY, b"", RECORD)
        assert stat.S_IMODE(store.directory.stat().st_mode) == 0o700
    else:
        # As a daemon does. Something else has the number at once.
        descriptor = store._files().descriptor
        os.dup2(os.open("/", os.O_PATH), descriptor)
        assert store._files().descriptor != descriptor
        os.close(descriptor)
    assert store.find(KEY) is not None


def test_descriptor_of_somebody_else_is_not_closed(tmp_path):
    files = TrustedDirectory(tmp_path)
    descriptor = files.descriptor
    os.dup2(os.open("/", os.O_PATH), descriptor)
    del files
    os.close(descriptor)  # is still open


def test_number_of_a_directory_that_was_loaded_from_is_not_given_again(tmp_path):
    """The dynamic linker takes a path that it knows for what it loaded from it before."""
    (tmp_path / "a.so").touch()
    files = TrustedDirectory(tmp_path)
    path = files.loadable("a.so")
    del files
    assert TrustedDirectory(tmp_path).loadable("a.so") != path


def test_directory_is_closed_that_nothing_was_loaded_from(tmp_path):
    before = os.listdir("/proc/self/fd")
    TrustedDirectory(tmp_path)
    assert os.listdir("/proc/self/fd") == before


def test_directory_that_others_may_write_to_since_it_was_opened(tmp_path):
    store = Cache(made_private(tmp_path / "cq"), True)
    store.store(KEY, b"", RECORD)
    store.directory.chmod(0o777)
    with pytest.raises(Untrusted, match="has mode 0777: chmod 700 it"):
        store.find(KEY)
    with pytest.raises(Untrusted, match="has mode 0777: chmod 700 it"):
        store.store(KEY, b"", RECORD)


@needs_root
def test_entry_of_another_user(tmp_path, caplog):
    store = Cache(made_private(tmp_path / "cq"), True)
    give_to_other_user(store.store(KEY, b"", RECORD))
    assert store.find(KEY) is None
    assert f"expected root or you as its owner, got user {OTHER_USER}" in caplog.text


def test_directory_that_others_make_at_the_same_time(tmp_path, monkeypatch):
    mkdir = os.mkdir

    def lose_the_race(name, mode=0o777, *, dir_fd=None):
        mkdir(name, mode, dir_fd=dir_fd)
        os.chmod(name, 0o777, dir_fd=dir_fd)
        raise FileExistsError

    monkeypatch.setattr(os, "mkdir", lose_the_race)
    with pytest.raises(Untrusted, match="has mode 0777: chmod 700 it"):
        Cache(tmp_path / "cq", True).store(KEY, b"", RECORD)
    assert not list((tmp_path / "cq").iterdir())


# Directories built ahead of time.


@pytest.mark.parametrize("point", ["before the check", "after the check"])
def test_directories_that_are_exchanged(point, tmp_path, loaded, monkeypatch):
    directory, evil = built(tmp_path / "kernels"), built(tmp_path / "evil", b"evil")
    cute_quant.load(directory)
    read_record = shared_objects.read_record

    def exchange():
        directory.rename(tmp_path / "away")
        evil.rename(directory)

    def attacked(data):
        exchange()
        return read_record(data)

    if point == "before the check":
        exchange()
    else:
        monkeypatch.setattr(shared_objects, "read_record", attacked)
    assert aot_load.find(SPEC, ARCH) is not None
    (content,) = loaded
    assert content.startswith(b"genuine")


def test_directory_that_is_built_again(tmp_path, loaded):
    cute_quant.load(built(tmp_path / "kernels"))
    built(tmp_path / "kernels", b"newer")
    assert aot_load.find(SPEC, ARCH) is not None
    (content,) = loaded
    assert content.startswith(b"newer")


# What is compiled lies on no disk before it is stored.


def test_lld_links_to_its_output(tmp_path):
    """LLD renames a file to its output, unless that is the standard output."""
    linker = tmp_path / "ld.lld"
    linker.write_text('#!/bin/sh\ntest "$2 $3" = "-o -" && cat "$1"\n')
    linker.chmod(0o755)
    (tmp_path / "kernel.o").write_bytes(b"linked")
    assert shared_objects._link([linker, tmp_path / "kernel.o"], ()) == b"linked"


FULL = """
import torch, sys
from cute_quant import DEEP_GEMM
from cute_quant.jit import lookup
from cute_quant.kernels.config import QuantizeSpec
lookup.function(QuantizeSpec(torch.bfloat16, DEEP_GEMM), "sm_100a")
"""


def mounts() -> bool:
    if shutil.which("unshare") is None:
        return False
    return subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode == 0


@pytest.mark.skipif(not mounts(), reason="may not mount a file system")
@pytest.mark.parametrize("full", ["TMPDIR", "CUTE_QUANT_CACHE_DIR"])
def test_full_disk_ends_no_process(full, tmp_path):
    directories = {
        name: made_private(tmp_path / name) for name in ("TMPDIR", "CUTE_QUANT_CACHE_DIR")
    }
    mount = f"mount -t tmpfs -o size=16k,mode=0700 none {directories[full]}"
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", f'{mount} && exec "$0" -c "$1"', sys.executable, FULL],
        env=environment(
            CUTE_QUANT_CACHE="on", **{name: str(path) for name, path in directories.items()}
        ),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    entries = [path.name for path in directories["CUTE_QUANT_CACHE_DIR"].iterdir()]
    if full == "TMPDIR":
        assert len(entries) == 1 and not done.stderr
    else:
        (line,) = done.stderr.splitlines()
        assert line.startswith(f"nothing more is written to {directories[full]}: ")
