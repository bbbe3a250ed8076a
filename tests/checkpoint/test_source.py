"""Checkpoints that are incomplete or damaged."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cute_quant.checkpoint import plan_checkpoint, source
from tests.checkpoint import made

SHARD = "model-00002-of-00003.safetensors"
INDEX = "model.safetensors.index.json"
NAME = "model.layers.0.mlp.down_proj.weight"


def change_index(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def run(directory: Path) -> None:
        index = json.loads((directory / INDEX).read_text())
        change(index)
        (directory / INDEX).write_text(json.dumps(index))

    return run


def cut(directory: Path) -> None:
    content = (directory / SHARD).read_bytes()
    (directory / SHARD).write_bytes(content[:-10])


CASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "shard": (lambda d: (d / SHARD).unlink(), f"expected the shard {SHARD} in .*, got no such"),
    "cut": (cut, f"expected safetensors, got '{SHARD}': "),
    "garbage": (lambda d: (d / SHARD).write_bytes(b"no"), f"expected safetensors, got '{SHARD}'"),
    "config": (lambda d: (d / "config.json").unlink(), "expected config.json in .*, got no such"),
    "json": (lambda d: (d / "config.json").write_text("{"), "expected JSON in .*config.json"),
    "list": (lambda d: (d / "config.json").write_text("[]"), "expected a JSON object in .*config"),
    "no index": (lambda d: (d / INDEX).unlink(), f"expected model.safetensors or {INDEX} in"),
    "no map": (
        change_index(lambda i: i.pop("weight_map")),
        "expected names of tensors as weight_m",
    ),
    "extra name": (
        change_index(lambda i: i["weight_map"].update(other=SHARD)),
        f"expected other in {SHARD}, as {INDEX} says, got no such",
    ),
    "other shard": (
        change_index(lambda i: i["weight_map"].update({NAME: SHARD})),
        f"expected {INDEX} to place {NAME} in model-00001-of-00003.safetensors, got {SHARD}",
    ),
    "missing name": (
        change_index(lambda i: i["weight_map"].pop(NAME)),
        f"expected {INDEX} to place {NAME} .*, got no such name",
    ),
    "outside": (
        change_index(lambda i: i["weight_map"].update({NAME: "../x.safetensors"})),
        r"expected names of files in .*, got '\.\./x.safetensors'",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_wrong_is_named(tmp_path, case):
    change, match = CASES[case]
    directory = made.save(tmp_path / "in", made.llama())
    change(directory)
    with pytest.raises(ValueError, match=f"source: {match}"):
        plan_checkpoint(directory)


def test_no_directory(tmp_path):
    with pytest.raises(ValueError, match=r"source: expected a directory, got '.*/none', where"):
        plan_checkpoint(tmp_path / "none")


def test_links(tmp_path):
    """The cache of a hub has links to files."""
    made.save(tmp_path / "blobs", made.experts(stacked=False))
    (tmp_path / "in").mkdir()
    for path in (tmp_path / "blobs").iterdir():
        (tmp_path / "in" / path.name).symlink_to(path)
    found = source.open_checkpoint(tmp_path / "in")
    assert found.files == [Path("tokenizer.json")] and len(found.tensors) == 10


def test_sizes(tmp_path):
    shards = made.experts(stacked=True)
    found = source.open_checkpoint(made.save(tmp_path / "in", shards))
    for name, t in shards["model.safetensors"].items():
        assert found.tensors[name].bytes == t.numel() * t.element_size()
        assert found.tensors[name].shape == tuple(t.shape)


def test_every_dtype_has_its_size(tmp_path):
    dtypes = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn]
    dtypes += [torch.float8_e5m2, torch.float8_e8m0fnu, torch.bool, torch.uint8, torch.int8]
    dtypes += [torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64, torch.uint64]
    tensors = {str(dtype): torch.zeros(3).to(dtype) for dtype in [*dtypes, torch.complex64]}
    found = source.open_checkpoint(made.save(tmp_path / "in", {"model.safetensors": tensors}))
    for name, t in tensors.items():
        assert found.tensors[name].bytes == t.numel() * t.element_size()
