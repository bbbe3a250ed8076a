"""Files of safetensors, as the library reads them back."""

import errno
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from cute_quant.checkpoint.shards import AtomicFile, Layout, write_tensor

TENSORS = {
    "b": torch.arange(3, dtype=torch.uint8),
    "a": torch.randn(2, 3, 5),
    "ü": torch.randn(4, 4).to(torch.float8_e4m3fn),
    "scalar": torch.tensor(2.0, dtype=torch.float64),
    "empty": torch.empty(0, 3, dtype=torch.bfloat16),
    "strided": torch.arange(12, dtype=torch.int64).view(3, 4).t(),
}
DTYPES = {"b": "U8", "a": "F32", "ü": "F8_E4M3", "scalar": "F64", "empty": "BF16", "strided": "I64"}


@pytest.fixture
def layout() -> Layout:
    return Layout({n: (DTYPES[n], t.shape) for n, t in TENSORS.items()}, {"format": "pt"})


def test_a_file(tmp_path, layout):
    path = tmp_path / "x.safetensors"
    with AtomicFile(path) as file:
        file.write(layout.header)
        for name in reversed(TENSORS):
            assert write_tensor(file, layout.start(name), TENSORS[name]) == layout.sizes[name]
        assert not path.exists()
    assert path.stat().st_size == layout.size and layout.is_at(path)
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]
    loaded = load_file(path)
    assert loaded.keys() == TENSORS.keys()
    for name, t in TENSORS.items():
        assert loaded[name].dtype is t.dtype and loaded[name].shape == t.shape
        assert torch.equal(loaded[name].view(-1).view(torch.uint8), t.reshape(-1).view(torch.uint8))
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_tensors_are_aligned(layout):
    for name, t in TENSORS.items():
        assert layout.start(name) % t.element_size() == 0


@pytest.mark.parametrize("change", ["header", "longer", "shorter"])
def test_another_file_is_not_taken_for_it(tmp_path, layout, change):
    content = layout.header + bytes(layout.size - len(layout.header))
    path = tmp_path / "x"
    path.write_bytes(content)
    assert layout.is_at(path)
    changed = {"header": b"\1" + content[1:], "longer": content + b"x", "shorter": content[:-1]}
    path.write_bytes(changed[change])
    assert not layout.is_at(path)


def test_what_fails_leaves_nothing(tmp_path):
    (tmp_path / "x").write_text("before")
    with pytest.raises(ZeroDivisionError), AtomicFile(tmp_path / "x") as file:
        file.write(b"after")
        raise ZeroDivisionError
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_text() == "before"


def test_a_name_stands_after_the_bytes(tmp_path, monkeypatch):
    """A file is on the disk before it has its name, and the name before the next step."""
    steps = []
    replace, fsync = os.replace, os.fsync

    def noted_replace(*paths):
        steps.append("replace")
        replace(*paths)

    def noted_fsync(descriptor):
        steps.append("directory" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")
        fsync(descriptor)

    monkeypatch.setattr(os, "replace", noted_replace)
    monkeypatch.setattr(os, "fsync", noted_fsync)
    with AtomicFile(tmp_path / "x") as file:
        file.write(b"after")
    assert steps == ["file", "replace", "directory"]


def test_an_error_of_the_disk_names_the_file(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with (
        pytest.raises(OSError, match=r"No space left on device: '.*/x'"),
        AtomicFile(tmp_path / "x") as file,
    ):
        file.write(b"after")
    assert not list(tmp_path.iterdir())
