"""The disk cache: its key, its permissions, crashes and races."""

import ast
import json
import logging
import multiprocessing
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import cute_quant
from cute_quant.jit import disk_cache, dsl_variables, keys, lookup, shared_objects, toolchain
from cute_quant.jit.disk_cache import Cache
from cute_quant.jit.trusted_files import Untrusted
from cute_quant.kernels.config import Access, Domain, QuantizeSpec, SiluMulSpec, Tile
from tests.helpers import FLOAT32, UE8M0

SPEC = QuantizeSpec(torch.bfloat16, UE8M0)
ARCH = lookup.architecture(0) if torch.cuda.is_available() else "sm_100a"
"""The architecture that the compiler detects: kernels of others cannot be called here."""

OPTIONS = lookup.compile_options(ARCH)
KEY = "0123456789abcdef"
RECORD = {"name": "some-kernel", "arch": "sm_90a"}
PACKAGE = Path(cute_quant.__file__).parent

ASK = f"""
import torch, sys, json
from cute_quant import DEEP_GEMM
from cute_quant.jit import lookup
from cute_quant.kernels.config import QuantizeSpec
spec = QuantizeSpec(torch.bfloat16, DEEP_GEMM)
function = lookup.function(spec, "{ARCH}")
try:
    function()
except TypeError as error:
    print(json.dumps(dict(compiled="cutlass" in sys.modules, message=str(error)[:80])))
"""
"""Request a kernel in a process of its own, and call it with too few arguments."""


def environment(directory: Path, **variables: str) -> dict[str, str]:
    return {
        **{k: v for k, v in os.environ.items() if not k.startswith("CUTE_QUANT_")},
        "PYTHONPATH": os.pathsep.join([str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")]),
        "CUTE_QUANT_CACHE_DIR": str(directory),
        **variables,
    }


def start(directory: Path, code: str = ASK, **variables: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment(directory, **variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen) -> tuple[bool, str]:
    """Return whether the process compiled, and its log."""
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    answer = json.loads(out)
    assert answer["message"].startswith("Expects 11 parameters when calling")
    return answer["compiled"], err


def ask(directory: Path, **variables: str) -> tuple[bool, str]:
    return finish(start(directory, **variables))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    made = tmp_path / "cache"
    made.mkdir(mode=0o700)
    return made


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with one entry; tests must not change it."""
    made = tmp_path_factory.mktemp("warm") / "cache"
    compiled, log = ask(made)
    assert compiled and not log
    return made


@pytest.fixture
def copy(warm: Path, tmp_path: Path) -> Path:
    return shutil.copytree(warm, tmp_path / "copy")


def only_entry(directory: Path) -> Path:
    (entry,) = directory.iterdir()
    return entry


# A fresh process.


def test_cold_then_warm(warm):
    entry = only_entry(warm)
    assert entry.suffix == ".so" and stat.S_IMODE(entry.stat().st_mode) == 0o600
    assert stat.S_IMODE(warm.stat().st_mode) == 0o700
    assert ask(warm) == (False, "")


@pytest.mark.slow
def test_record(warm):
    record = shared_objects.read_record(only_entry(warm).read_bytes())
    assert record["key"] == only_entry(warm).stem == disk_cache.key(SPEC, ARCH, OPTIONS)
    assert record["spec"] == keys.spec_text(SPEC) and record["arch"] == ARCH


@pytest.mark.slow
def test_off(directory):
    assert ask(directory, CUTE_QUANT_CACHE="off") == (True, "")
    assert not list(directory.iterdir())


@pytest.mark.slow
def test_mode_that_makes_no_sense(directory):
    compiled, log = ask(directory, CUTE_QUANT_CACHE="of")
    expected = "CUTE_QUANT_CACHE: expected one of ('on', 'off', 'readonly'), got 'of'"
    assert compiled and log.strip() == f"disk cache not used: {expected}"


@pytest.mark.slow
def test_this_suite_leaves_the_cache_of_the_user_alone(tmp_path):
    variables = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "HOME": str(tmp_path)}
    variables.pop("CUTE_QUANT_CACHE_DIR", None)
    process = subprocess.run(
        [sys.executable, "-c", ASK], env=variables, capture_output=True, text=True, check=True
    )
    assert json.loads(process.stdout)["compiled"] and not process.stderr
    assert not list(tmp_path.rglob("*.so")) and not (tmp_path / "cute_quant").exists()
    assert disk_cache.open_cache() is None


@pytest.mark.slow
@pytest.mark.parametrize("how", ["mode", "variable"])
def test_readonly(copy, how):
    before = only_entry(copy).stat().st_mtime_ns
    if how == "mode":
        copy.chmod(0o500)
    variables = {"CUTE_QUANT_CACHE": "readonly"} if how == "variable" else {}
    assert ask(copy, **variables) == (False, "")
    other = ASK.replace("bfloat16", "float16")
    compiled, log = finish(start(copy, other, **variables))
    assert compiled and not log
    assert only_entry(copy).stat().st_mtime_ns == before


@pytest.mark.slow
def test_no_linker(directory):
    compiled, log = ask(directory, PATH="")
    assert compiled and not log and not list(directory.iterdir())


@pytest.mark.slow
def test_refused_directory_does_not_break_a_call(copy):
    copy.chmod(0o755)
    compiled, log = ask(copy)
    assert compiled
    assert log.splitlines() == [f"disk cache not used: {copy} has mode 0755: chmod 700 it"]


# Somebody else's bytes.


def corrupted(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


DAMAGES = {
    "tampered": corrupted,
    "truncated": lambda data: data[:-1],
    "empty": lambda data: b"",
    "foreign": lambda data: b"\x7fELF" + bytes(1000),
    "another key": lambda data: shared_objects.seal(b"\x7fELF", {**RECORD, "key": "other"}),
    "name in the record": lambda data: data.replace(b"some-kernel", b"same-kernel"),
    "record": lambda data: shared_objects.seal(data, {}),
    "record without a name": lambda data: shared_objects.seal(data, {"key": KEY}),
    "record of numbers": lambda data: shared_objects.seal(data, {**RECORD, "key": KEY, "name": 1}),
    "record that is a list": lambda data: shared_objects.seal(data, [KEY]),
    "length of the record": lambda data: data[:-40] + bytes([data[-40] ^ 1]) + data[-39:],
    "tampered at its start": lambda data: bytes([data[0] ^ 1]) + data[1:],
    "another version": lambda data: data[:-48] + bytes([data[-48] ^ 1]) + data[-47:],
    "far too long a record": lambda data: data[:-40] + b"\xff" * 8 + data[-32:],
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_entries_are_discarded(directory, damage, caplog):
    store = Cache(directory, True)
    path = store.store(KEY, b"content", RECORD)
    assert store.find(KEY) is not None and not caplog.records
    path.write_bytes(damage(path.read_bytes()))
    assert store.find(KEY) is None
    (record,) = caplog.records
    assert record.name == "cute_quant" and record.levelno == logging.WARNING
    assert record.getMessage().startswith(f"{path} is discarded and built anew: ")
    assert not path.exists()


@pytest.mark.slow
def test_damaged_entry_is_rebuilt(copy):
    entry = only_entry(copy)
    good = entry.read_bytes()
    entry.write_bytes(corrupted(good))
    compiled, log = ask(copy)
    assert compiled and len(log.splitlines()) == 1
    assert log.startswith(f"{entry} is discarded and built anew: its digest is not that of")
    assert entry.read_bytes() == good  # the compiler gives the same bytes again
    assert ask(copy) == (False, "")


@pytest.mark.slow
def test_sealed_but_not_loadable(copy):
    entry = only_entry(copy)
    entry.write_bytes(shared_objects.seal(b"no ELF file", {**RECORD, "key": entry.stem}))
    compiled, log = ask(copy)
    assert compiled and len(log.splitlines()) == 1
    assert log.startswith(f"{entry} is discarded and built anew: ")
    assert ask(copy) == (False, "")


@pytest.mark.slow
def test_entries_that_others_may_write(directory, caplog):
    store = Cache(directory, True)
    store.store(KEY, b"content", RECORD).chmod(0o620)
    assert store.find(KEY) is None
    assert "expected that only its owner may write to it, got mode 0620" in caplog.text


def test_entries_that_are_links(directory, tmp_path, caplog):
    store = Cache(directory, True)
    path = store.store(KEY, b"content", RECORD)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert store.find(KEY) is None
    assert "expected a regular file, got a symbolic link" in caplog.text
    assert (tmp_path / "elsewhere").exists()


@pytest.mark.slow
@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_entries_that_are_no_files(directory, make, caplog):
    store = Cache(directory, False)
    make(store.path(KEY))
    assert store.find(KEY) is None
    assert "discarded" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("mode", [0o755, 0o770, 0o701, 0o1777])
def test_directories_of_others_are_refused(directory, mode):
    directory.chmod(mode)
    with pytest.raises(Untrusted, match=f"has mode {mode:04o}: chmod 700 it"):
        disk_cache.open_directory(directory)


def test_directory_of_another_user(directory, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(Untrusted, match=f"belongs to user {os.getuid()}: use one of your own"):
        disk_cache.open_directory(directory)


@pytest.mark.slow
def test_link_to_a_directory(directory, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(directory)
    with pytest.raises(Untrusted, match="is a symbolic link: name the directory itself"):
        disk_cache.open_directory(link)


@pytest.mark.slow
def test_file_instead_of_a_directory(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(NotADirectoryError, match="is not a directory"):
        disk_cache.open_directory(tmp_path / "file")


@pytest.mark.parametrize("through_link", [False, True])
def test_parents_that_anybody_may_write_to(tmp_path, through_link):
    parent = tmp_path / "shared"
    inner = parent / "mine"
    inner.mkdir(parents=True, mode=0o700)
    named = inner
    if through_link:
        (tmp_path / "link").symlink_to(parent)
        named = tmp_path / "link" / "mine"
    disk_cache.open_directory(named)
    parent.chmod(0o777)
    with pytest.raises(Untrusted, match=f"lies in {parent}, which anybody may write to"):
        disk_cache.open_directory(named)
    parent.chmod(0o1777)
    disk_cache.open_directory(named)


@pytest.mark.slow
def test_default_directory(monkeypatch, tmp_path):
    for name in ("CUTE_QUANT_CACHE", "CUTE_QUANT_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    store = disk_cache.open_cache()
    assert store.directory == tmp_path / "xdg" / "cute_quant" and store.writable
    # Reading does not create the directory.
    assert not store.entries() and store.clear() == 0 and not (tmp_path / "xdg").exists()
    store.store(KEY, b"content", RECORD)
    for made in (store.directory, store.directory.parent):
        assert stat.S_IMODE(made.stat().st_mode) == 0o700


@pytest.mark.slow
def test_directory_variable(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CUTE_QUANT_CACHE_DIR", "~/mine")
    assert disk_cache.default_directory() == tmp_path / "mine"
    monkeypatch.setenv("CUTE_QUANT_CACHE_DIR", "mine")
    with pytest.raises(ValueError, match="CUTE_QUANT_CACHE_DIR: expected an absolute path"):
        disk_cache.default_directory()


@pytest.mark.parametrize("change", [lambda p: p.chmod(0o770), lambda p: os.chown(p, 12345, -1)])
def test_parents_that_others_may_change(tmp_path, change):
    inner = tmp_path / "shared" / "mine"
    inner.mkdir(parents=True, mode=0o700)
    if os.geteuid():
        pytest.skip("needs root")
    change(inner.parent)
    with pytest.raises(Untrusted, match=f"lies in {inner.parent}, which"):
        disk_cache.open_directory(inner)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["CUTE_DSL_KEEP", "CUTE_DSL_KEEP_PTX", "CUTE_DSL_PRINT_IR"])
def test_output_asked_of_the_compiler_bypasses_the_cache(monkeypatch, name):
    monkeypatch.setattr(lookup, "_cache", lambda: pytest.fail("asked for the cache"))
    monkeypatch.setenv(name, "1")
    assert lookup._using_cache(SPEC, ARCH, lookup._load) is None
    monkeypatch.setenv(name, "0")
    assert not dsl_variables.asks_for_output()


# Crashes and races.


@pytest.mark.slow
def test_two_processes_compile_once(directory):
    processes = [start(directory) for _ in range(2)]
    outcomes = [finish(process) for process in processes]
    assert sorted(compiled for compiled, _ in outcomes) == [False, True]
    assert not any(log for _, log in outcomes)
    assert only_entry(directory).suffix == ".so"


@pytest.mark.slow
def test_ranks_compile_once(directory, tmp_path):
    """Each rank has directories of CuTe DSL of its own, as launchers set them."""
    own = [str(tmp_path / f"rank-{rank}") for rank in range(4)]
    processes = [start(directory, CUTE_DSL_CACHE_DIR=path, CUTE_DSL_DUMP_DIR=path) for path in own]
    outcomes = [finish(process) for process in processes]
    assert [compiled for compiled, _ in outcomes].count(True) == 1
    assert not any(log for _, log in outcomes)
    assert only_entry(directory).suffix == ".so"


@pytest.mark.slow
@pytest.mark.parametrize("point", ["seal", "replace", "after"])
def test_killed_while_it_stores(directory, point):
    kill = "import os, signal; die = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)\n"
    patch = {
        "seal": "from cute_quant.jit import shared_objects; shared_objects.seal = die\n",
        "replace": "os.replace = die\n",
        "after": "from cute_quant.jit import disk_cache; disk_cache.Cache._trim = die\n",
    }[point]
    process = start(directory, kill + patch + ASK)
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    names = {path.suffix for path in directory.iterdir()}
    assert ".lock" in names
    assert (".tmp" in names) == (point == "replace") and (".so" in names) == (point == "after")
    assert ask(directory) == (point != "after", "")
    # The lock of an entry that is there is not asked for any more.
    left = {".so", ".lock"} if point == "after" else {".so"}
    assert {path.suffix for path in directory.iterdir()} == left


def store_forever(directory: Path, content: bytes) -> None:
    store = Cache(directory, True)
    while True:
        with store.lock(KEY):
            store.store(KEY, content, RECORD)


@pytest.mark.slow
def test_killed_at_any_time(directory, caplog):
    content = os.urandom(2**20)
    store = Cache(directory, True)
    context = multiprocessing.get_context("fork")
    for turn in range(20):
        process = context.Process(target=store_forever, args=(directory, content))
        process.start()
        time.sleep(0.01 + 0.003 * turn)
        process.kill()
        process.join()
        if store.find(KEY) is not None:
            assert store.path(KEY).read_bytes().startswith(content)
        with store.lock(KEY):
            store.store(KEY, content, RECORD)
        assert store.find(KEY) is not None
    assert not caplog.records
    assert only_entry(directory) == store.path(KEY)


def count_under_lock(directory: Path, turns: int) -> None:
    store = Cache(directory, True)
    for _ in range(turns):
        with store.lock(KEY):
            counter = directory / "counter"
            seen = int(counter.read_text())
            time.sleep(0.0005)
            counter.write_text(str(seen + 1))


@pytest.mark.slow
def test_lock_excludes(directory):
    (directory / "counter").write_text("0")
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=count_under_lock, args=(directory, 50)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert (directory / "counter").read_text() == "200"


@pytest.mark.slow
def test_lock_ends_while_a_child_lives(directory, monkeypatch):
    """A child that is forked under a lock has its file open, and is no holder of the lock."""
    monkeypatch.setattr(disk_cache, "LOCK_SECONDS", 1.0)
    store = Cache(directory, True)
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    try:
        with store.lock(KEY):
            os.link(directory / f"{KEY}.lock", directory / "same.lock")
            child.start()
        with store.lock("same"):
            pass
    finally:
        child.kill()
        child.join()


@pytest.mark.slow
def test_lock_that_is_never_given_back(directory, monkeypatch):
    monkeypatch.setattr(disk_cache, "LOCK_SECONDS", 0.05)
    store = Cache(directory, True)
    with store.lock(KEY), pytest.raises(TimeoutError, match=KEY), store.lock(KEY):
        pass


@pytest.mark.slow
def test_who_waited_in_vain_does_not_wait_again(directory, monkeypatch, caplog):
    monkeypatch.setattr(disk_cache, "LOCK_SECONDS", 0.5)
    store = Cache(directory, True)
    with store.lock(KEY), store.lock("other"):
        with pytest.raises(TimeoutError), store.lock(KEY):
            pass
        start = time.monotonic()
        with pytest.raises(TimeoutError), store.lock("other"):
            pass
    assert time.monotonic() - start < 0.3
    (record,) = caplog.records
    assert record.getMessage().startswith("compiled without the disk cache: another process held")
    with store.lock("other"):  # is free again
        pass


COUNT_BUILDS = """
from cute_quant.jit import disk_cache, lookup
disk_cache.LOCK_SECONDS = 0.2
build, built = lookup.build, []
lookup.build = lambda *a, **k: (built.append(1), build(*a, **k))[1]
"""
COUNTED = ASK + "assert len(built) == 1, built\n"


@pytest.mark.slow
def test_held_lock_stalls_no_call(directory):
    store = Cache(directory, True)
    with store.lock(disk_cache.key(SPEC, ARCH, OPTIONS)):
        compiled, log = finish(start(directory, COUNT_BUILDS + COUNTED))
    assert compiled and len(log.splitlines()) == 1
    assert log.startswith("compiled without the disk cache: another process held ")
    assert not list(directory.glob("*.so"))


def test_failed_store_compiles_once(directory):
    full = """
import errno, os
def no_space(*arguments, **directories):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
os.replace = no_space
"""
    again = """
lookup.function(QuantizeSpec(torch.float16, DEEP_GEMM), "%s")
assert len(built) == 2, built
"""
    code = COUNT_BUILDS + full + COUNTED + again % ARCH
    compiled, log = finish(start(directory, code))
    assert compiled and log.splitlines() == [
        f"nothing more is written to {directory}: [Errno 28] No space left on device"
    ]
    assert not list(directory.iterdir())


@pytest.mark.slow
def test_lock_that_cannot_be_made(directory):
    (directory / (disk_cache.key(SPEC, ARCH, OPTIONS) + ".lock")).mkdir()
    compiled, log = finish(start(directory, COUNT_BUILDS + COUNTED))
    assert compiled and len(log.splitlines()) == 1
    assert log.startswith(f"nothing more is written to {directory}: ")


# Size.


def test_size_is_bounded(directory, monkeypatch):
    monkeypatch.setattr(disk_cache, "MAX_BYTES", 5000)
    store = Cache(directory, True)
    now = time.time()
    for i in range(4):
        os.utime(store.store(f"{KEY}{i}", bytes(1000), RECORD), (now + i - 100, now + i - 100))
    assert store.find(f"{KEY}0")  # used, so it is not the oldest any more
    store.store(f"{KEY}4", bytes(1000), RECORD)
    assert [i for i in range(5) if store.path(f"{KEY}{i}").exists()] == [0, 2, 3, 4]
    assert sum(entry.bytes for entry in store.entries()) <= 5000


@pytest.mark.slow
def test_entry_larger_than_the_bound_stays_until_the_next(directory, monkeypatch):
    monkeypatch.setattr(disk_cache, "MAX_BYTES", 100)
    store = Cache(directory, True)
    assert store.store(KEY, bytes(1000), RECORD).exists()


@pytest.mark.slow
def test_what_crashed_long_ago_is_removed(directory):
    store = Cache(directory, True)
    old = directory / "a.1.tmp", directory / "a.lock"
    young = directory / "b.1.tmp", directory / "b.lock"
    for path in (*old, *young):
        path.write_bytes(b"")
    for path in old:
        os.utime(path, (time.time() - 7200,) * 2)
    store.store(KEY, b"", RECORD)
    assert not any(path.exists() for path in old) and all(path.exists() for path in young)


@pytest.mark.slow
def test_entries_and_clear(directory):
    store = Cache(directory, True)
    store.store(KEY, b"content", {"name": "a", "arch": "b"})
    (directory / "broken.so").write_bytes(b"")
    (directory / "left.1.tmp").write_bytes(b"")
    (directory / "not ours").write_bytes(b"")
    records = {entry.path.stem: entry.record for entry in store.entries()}
    assert records == {KEY: {"name": "a", "arch": "b", "key": KEY}, "broken": None}
    assert store.clear() == 2
    assert [path.name for path in directory.iterdir()] == ["not ours"]


@pytest.mark.slow
def test_clear_leaves_what_is_in_use_or_no_file(directory):
    store = Cache(directory, True)
    for name in ("a", "b"):
        store.store(name, b"content", RECORD)
    (directory / "dir.so").mkdir()
    with store.lock("a"):
        assert store.clear() == 1
        assert {path.name for path in directory.iterdir()} == {"a.so", "a.lock", "dir.so"}


@pytest.mark.slow
def test_trimming_leaves_what_is_in_use(directory, monkeypatch):
    monkeypatch.setattr(disk_cache, "MAX_BYTES", 100)
    store = Cache(directory, True)
    store.store("a", bytes(1000), RECORD)
    with store.lock("a"):
        store.store("b", bytes(1000), RECORD)
        assert store.path("a").exists()
    store.store("c", bytes(1000), RECORD)
    assert [path.name for path in directory.iterdir()] == ["c.so"]


# The key.

OTHER_SPECS = (
    QuantizeSpec(torch.float16, UE8M0),
    QuantizeSpec(torch.bfloat16, FLOAT32),
    QuantizeSpec(torch.bfloat16, UE8M0.replace(values=torch.int8)),
    QuantizeSpec(torch.bfloat16, UE8M0, Tile(rows_per_thread=2)),
    QuantizeSpec(torch.bfloat16, UE8M0, domain=Domain(batched=True)),
    QuantizeSpec(torch.bfloat16, UE8M0, access=Access(16)),
    QuantizeSpec(torch.bfloat16, UE8M0, fake=True),
    QuantizeSpec(torch.bfloat16, UE8M0, pdl=False),
    SiluMulSpec(torch.bfloat16, UE8M0),
)


def test_specs_differ_in_text_key_and_name():
    specs = (SPEC, *OTHER_SPECS)
    assert len({keys.spec_text(spec) for spec in specs}) == len(specs)
    assert len({keys.spec_name(spec) for spec in specs}) == len(specs)
    assert len({disk_cache.key(spec, ARCH, OPTIONS) for spec in specs}) == len(specs)
    assert keys.spec_text(SPEC) == keys.spec_text(QuantizeSpec(torch.bfloat16, UE8M0))


@pytest.mark.slow
def test_names_are_plain():
    for spec in (SPEC, *OTHER_SPECS):
        assert re.fullmatch(r"[a-z0-9_-]+", keys.spec_name(spec))


@pytest.mark.slow
def test_text_of_what_has_no_stable_text():
    class Odd(NamedTuple):
        field: object

    with pytest.raises(TypeError, match=r"spec: expected fields that are numbers.*got object"):
        keys.spec_text(Odd(object()))


CHANGES = {
    "sources": lambda patch: patch.setattr(keys, "source_digest", lambda: "other"),
    "dsl version": lambda patch: change_dsl(patch, version="4.7.0"),
    "dsl flavour": lambda patch: change_dsl(patch, flavour="cu12"),
    "tvm-ffi": lambda patch: patch.setattr(toolchain, "tvm_ffi_version", lambda: "0.1.0"),
    "cpu": lambda patch: patch.setattr(
        toolchain, "this_host", lambda: toolchain.HOSTS["x86_64"]._replace(cpu="zen")
    ),
    "variable": lambda patch: patch.setenv("CUTE_DSL_COMPILER_OPT", "x"),
}


def change_dsl(patch: pytest.MonkeyPatch, **changes: str) -> None:
    changed = toolchain.installed_dsl()._replace(**changes)
    patch.setattr(toolchain, "installed_dsl", lambda: changed)


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_key_depends_on(change, monkeypatch):
    before = disk_cache.key(SPEC, ARCH, OPTIONS)
    change(monkeypatch)
    assert disk_cache.key(SPEC, ARCH, OPTIONS) != before


@pytest.mark.slow
def test_key_depends_on_architecture_and_options_and_nothing_else(monkeypatch):
    before = disk_cache.key(SPEC, ARCH, OPTIONS)
    assert disk_cache.key(SPEC, "sm_103a", OPTIONS) != before
    assert disk_cache.key(SPEC, ARCH, OPTIONS + " --opt-level 2") != before
    monkeypatch.setenv("CUTE_DSL_LOG_LEVEL", "10")
    monkeypatch.setenv("CUTE_QUANT_CACHE_DIR", "/elsewhere")
    monkeypatch.setenv("HOME", "/elsewhere")
    assert disk_cache.key(SPEC, ARCH, OPTIONS) == before


KERNEL_SOURCES = [
    *sorted(
        f"kernels/{path.name}"
        for path in (PACKAGE / "kernels").glob("*.py")
        if path.name != "heuristics.py"
    ),
    "contract/dtypes.py",
    "contract/format_choices.py",
    "contract/formats.py",
    "contract/rows.py",
    "contract/scale_layouts.py",
    "contract/torch_private.py",
    "jit/dsl_private.py",
    "jit/shared_objects.py",
]


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the package, of which the key is taken."""
    copied = shutil.copytree(PACKAGE, tmp_path / "cute_quant")
    monkeypatch.setattr(keys, "__file__", str(copied / "jit" / "keys.py"))
    monkeypatch.setattr(keys, "source_digest", keys.source_digest.__wrapped__)
    return copied


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNEL_SOURCES)
def test_editing_a_source_changes_the_key(name, sources):
    before = disk_cache.key(SPEC, ARCH, OPTIONS)
    path = sources / name
    content = path.read_text()
    path.write_text(content + "\n")
    assert disk_cache.key(SPEC, ARCH, OPTIONS) != before
    path.write_text(content)
    assert disk_cache.key(SPEC, ARCH, OPTIONS) == before
    path.rename(path.with_name("renamed.py"))
    assert disk_cache.key(SPEC, ARCH, OPTIONS) != before


def test_adding_a_kernel_changes_the_key(sources):
    before = disk_cache.key(SPEC, ARCH, OPTIONS)
    (sources / "kernels" / "new.py").write_text("")
    assert disk_cache.key(SPEC, ARCH, OPTIONS) != before


@pytest.mark.slow
def test_editing_anything_else_does_not_change_the_key(sources):
    before = disk_cache.key(SPEC, ARCH, OPTIONS)
    others = (
        "ops/rows.py",
        "contract/checks.py",
        "contract/contents.py",
        "contract/reference/quantize.py",
        "dispatch/launch.py",
        "cli/check.py",
        "kernels/heuristics.py",
        "lab/command.py",
    )
    for name in others:
        (sources / name).write_text("# not part of a kernel")
    assert disk_cache.key(SPEC, ARCH, OPTIONS) == before


def imports(path: Path) -> set[Path]:
    """Return the files of the package that a file imports from."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cute_quant"):
            module = PACKAGE.parent / node.module.replace(".", "/")
            names = [module / alias.name for alias in node.names] if module.is_dir() else [module]
            found |= {name.with_suffix(".py") for name in names}
    return found


def test_sources_are_all_that_kernels_import():
    named = {path for pattern in keys.SOURCES for path in PACKAGE.glob(pattern)}
    named = {path for path in named if path.name not in keys.NOT_COMPILED}
    # What these import is in the key by itself.
    objects = {PACKAGE / "jit" / "shared_objects.py", PACKAGE / "jit" / "dsl_private.py"}
    names = PACKAGE / "kernels" / "__init__.py"  # It only names what others import.
    imported = {path: imports(path) for path in named - objects - {names}}
    for path, others in imported.items():
        assert others <= named, f"{path} imports {others - named}"
    kernels = set((PACKAGE / "kernels").glob("*.py")) - {PACKAGE / "kernels" / "heuristics.py"}
    assert named == kernels | objects | set().union(*imported.values())


@pytest.mark.slow
@pytest.mark.gpu
def test_warm_start_gives_the_same_bytes(directory):
    code = """
import torch, sys, hashlib
from cute_quant import quantize
x = torch.randn(64, 512, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0))
q, sf = quantize(x.cuda())
reference, scales = quantize(x)
assert torch.equal(q.cpu().view(torch.uint8), reference.view(torch.uint8))
assert torch.equal(sf.cpu(), scales)
print("cutlass" in sys.modules)
"""
    for compiled in ("True", "False"):
        process = start(directory, code)
        out, err = process.communicate(timeout=120)
        # What the object does when its process ends must not fail either.
        assert process.returncode == 0, err
        assert out.strip() == compiled and not err
