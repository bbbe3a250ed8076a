"""Runs that end early: killed, out of room, or refused; and what goes on from there."""

import fcntl
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cute_quant.checkpoint import conversion, quantize_checkpoint
from cute_quant.checkpoint.output_directory import MANIFEST
from cute_quant.jit import progress
from tests.checkpoint import made
from tests.helpers import environment

SHARDS = list(made.llama())

STOPS_AT = """
import sys, time
from cute_quant.checkpoint import quantize_checkpoint
from cute_quant.jit import progress

def bar(done, total, label):
    if done == {done}:
        print("here", flush=True)
        time.sleep(600)

progress.bar = bar
quantize_checkpoint(sys.argv[1], sys.argv[2])
"""


class Stop(Exception):
    pass


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return made.save(tmp_path / "in", made.llama())


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def whole(directory: Path, tmp_path: Path) -> dict[str, bytes]:
    """What a run writes that nothing interrupts."""
    quantize_checkpoint(directory, tmp_path / "whole")
    return made.contents(tmp_path / "whole")


def stop_at(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Have a conversion raise before its tensor of this number."""

    def bar(done: int, total: int, label: str) -> None:
        if done == count:
            raise Stop

    monkeypatch.setattr(progress, "bar", bar)


def interrupt(directory: Path, out: Path, **options) -> None:
    """Begin a conversion, and stop in the second shard."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        stop_at(patch, 12)
        quantize_checkpoint(directory, out, **options)


def kill_at(directory: Path, out: Path, done: int) -> None:
    """Kill a process that converts, without a warning, before its tensor of this number."""
    process = subprocess.Popen(
        [sys.executable, "-c", STOPS_AT.format(done=done), str(directory), str(out)],
        stdout=subprocess.PIPE,
        env=environment(),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"here\n"
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on(directory, out, whole):
    kill_at(directory, out, done=12)
    assert (out / f"{SHARDS[1]}.partial").exists()
    assert sorted(out.glob("*.safetensors")) == [out / SHARDS[0]]
    assert (out / SHARDS[0]).read_bytes() == whole[SHARDS[0]]
    assert not (out / "config.json").exists()
    done = quantize_checkpoint(directory, out)
    assert done.resumed == 1
    assert made.contents(out) == whole


@pytest.mark.parametrize("count", [0, 9, 12, 24])
def test_a_run_that_is_interrupted_goes_on(directory, out, whole, monkeypatch, count):
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_at(patch, count)
        quantize_checkpoint(directory, out)
    complete = [shard for shard in SHARDS if (out / shard).exists()]
    assert complete == SHARDS[: count // 10]
    assert not list(out.glob("*.partial")) and not (out / "config.json").exists()
    assert quantize_checkpoint(directory, out).resumed == len(complete)
    assert made.contents(out) == whole


def test_complete_shards_are_not_quantized_again(directory, out, whole, monkeypatch):
    interrupt(directory, out)
    read: list[str] = []
    reader = conversion.source.reader

    def spy(checkpoint, shard):
        read.append(shard)
        return reader(checkpoint, shard)

    monkeypatch.setattr(conversion.source, "reader", spy)
    quantize_checkpoint(directory, out)
    assert read == SHARDS[1:]
    assert made.contents(out) == whole


def test_config_comes_last(directory, out, monkeypatch):
    written = []
    replace = os.replace

    def noted(partial, path):
        written.append(Path(path).name)
        replace(partial, path)

    monkeypatch.setattr(os, "replace", noted)
    quantize_checkpoint(directory, out)
    assert written[:3] == SHARDS
    assert written[-2:] == ["model.safetensors.index.json", "config.json"]


def test_a_choice_to_go_on_is_no_other_command(directory, out):
    """What --allow-non-finite changes, no complete shard has."""
    shards = made.llama()
    shards[SHARDS[1]]["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    shutil.rmtree(directory)
    made.save(directory, shards)
    with pytest.raises(ValueError, match="Inf or NaN"):
        quantize_checkpoint(directory, out)
    assert quantize_checkpoint(directory, out, allow_non_finite=True).resumed == 1


# Directories that are not taken


@pytest.mark.parametrize(
    ("fmt", "keep", "other"), [("mxfp8", (), "format"), ("fp8", ("o_proj",), "keep")]
)
def test_another_command(directory, out, fmt, keep, other):
    interrupt(directory, out)
    before = made.contents(out)
    with pytest.raises(ValueError, match=f"output: expected .* begun with another {other}: remove"):
        quantize_checkpoint(directory, out, fmt, keep=keep)
    assert made.contents(out) == before


def test_another_source(directory, out, tmp_path):
    interrupt(directory, out)
    shutil.copytree(directory, tmp_path / "copy")
    with pytest.raises(ValueError, match="begun with another source"):
        quantize_checkpoint(tmp_path / "copy", out)


def test_a_source_that_changed(directory, out):
    interrupt(directory, out)
    os.utime(directory / SHARDS[2])
    with pytest.raises(ValueError, match="begun with another source"):
        quantize_checkpoint(directory, out)


def test_another_version(directory, out, monkeypatch):
    interrupt(directory, out)
    monkeypatch.setattr(conversion.cute_quant, "__version__", "0.0.0")
    with pytest.raises(ValueError, match="begun with another version"):
        quantize_checkpoint(directory, out)


@pytest.mark.parametrize("text", ["{", "[]", "null"])
def test_a_damaged_manifest(directory, out, text):
    interrupt(directory, out)
    (out / MANIFEST).write_text(text)
    with pytest.raises(ValueError, match=f"begun with another {MANIFEST}: remove"):
        quantize_checkpoint(directory, out)


def test_a_shard_that_changed(directory, out):
    interrupt(directory, out)
    with (out / SHARDS[0]).open("ab") as file:
        file.write(b"more")
    with pytest.raises(
        ValueError, match=f"output: expected the shard that was written as {SHARDS[0]}"
    ):
        quantize_checkpoint(directory, out)


def test_a_directory_with_something_else(directory, out):
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"output: expected .* new, empty or begun .*'thesis.txt'"):
        quantize_checkpoint(directory, out)
    assert made.contents(out) == {"thesis.txt": b"mine"}


def test_a_directory_that_is_complete(directory, out, whole):
    quantize_checkpoint(directory, out)
    with pytest.raises(ValueError, match="output: expected a directory that is new"):
        quantize_checkpoint(directory, out)
    assert made.contents(out) == whole


@pytest.mark.parametrize("where", [".", "inner", "../in", "link"])
def test_the_source_itself(directory, where):
    if where == "link":
        (directory.parent / "link").symlink_to(directory)
        output = directory.parent / "link"
    else:
        output = directory / where
    before = made.contents(directory)
    with pytest.raises(ValueError, match="output: expected a directory outside of the source"):
        quantize_checkpoint(directory, output)
    assert made.contents(directory) == before and not (directory / "inner").exists()


def test_a_file(directory, out):
    out.write_text("a file")
    with pytest.raises(ValueError, match="output: expected a directory, got the file"):
        quantize_checkpoint(directory, out)


@pytest.mark.parametrize("device", ["meta", "nonsense", "cuda:x"])
def test_devices(directory, out, device):
    with pytest.raises(ValueError, match="device: expected cpu or cuda, got"):
        quantize_checkpoint(directory, out, device=device)
    assert not out.exists()


def test_two_runs_at_once(directory, out):
    interrupt(directory, out)
    with (out / MANIFEST).open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(RuntimeError, match="output: another run writes to"):
            quantize_checkpoint(directory, out)
    assert quantize_checkpoint(directory, out).resumed == 1


# No room


def test_no_room(directory, out, whole):
    """A file system refuses more; the command goes on when it is given again."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    largest = max(len(whole[shard]) for shard in SHARDS)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest - 1, limit[1]))
    try:
        with pytest.raises(OSError, match=rf"File too large: '.*/{SHARDS[0]}'"):
            quantize_checkpoint(directory, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert [path.name for path in out.iterdir()] == [MANIFEST]
    quantize_checkpoint(directory, out)
    assert made.contents(out) == whole


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system")
@pytest.mark.slow
def test_a_full_disk(directory, out, whole):
    out.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(out)])
    if mounted.returncode:
        pytest.skip("may not mount")
    try:
        with pytest.raises(OSError, match=r"No space left on device: '.*\.safetensors'"):
            quantize_checkpoint(directory, out)
        assert not list(out.glob("*.partial"))
        for shard in out.glob("*.safetensors"):
            assert load_file(shard)
        subprocess.run(["mount", "-o", "remount,size=8m", str(out)], check=True)
        assert quantize_checkpoint(directory, out).resumed == 1
        assert made.contents(out) == whole
    finally:
        subprocess.run(["umount", str(out)], check=True)
