"""Read a checkpoint of safetensors: its config, the headers of its shards, and rows of a tensor."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
FOREIGN_CONFIGS = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
"""Files in which other quantizers keep their configs."""
WEIGHT_SUFFIXES = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".ot", ".gguf", ".h5", ".msgpack", ".onnx",
    ".index.json",
)  # fmt: skip
"""Ends of the names of files that hold weights, in this format or another; they are not copied."""

ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4,
    "I64": 8, "U64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
"""Bytes of an element by the dtype's name in safetensors."""


class StoredTensor(NamedTuple):
    """A tensor of the checkpoint.

    Attributes:
        shard: name of the file.
        dtype: as safetensors names it.
    """

    name: str
    shard: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Return its size."""
        return torch.Size(self.shape).numel() * ITEM_BYTES[self.dtype]

    def __str__(self) -> str:
        return f"{self.name} in {self.shard}"


@dataclass(frozen=True)
class Checkpoint:
    """A directory of safetensors, with all headers read.

    Attributes:
        config: of config.json.
        index: of the index file, None where there is one shard without it.
        tensors: by name.
        metadata: of each shard's header.
        files: everything else that belongs to the model, relative to the directory.
        left_out: files with weights that are none of the shards.
    """

    directory: Path
    config: Mapping[str, Any]
    index: Mapping[str, Any] | None
    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, dict[str, str]]
    files: Sequence[Path]
    left_out: Sequence[Path]

    @property
    def shards(self) -> list[str]:
        """Return the names of the files."""
        return list(self.metadata)

    def identity(self) -> dict[str, Any]:
        """Return what tells it from another checkpoint, and from itself after a change."""
        stats = {name: (self.directory / name).stat() for name in self.shards}
        return {
            "directory": str(self.directory.resolve()),
            "shards": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()},
            "config": self.config,
        }


def open_checkpoint(directory: Path) -> Checkpoint:
    """Read config, index and headers of a checkpoint.

    Raises:
        ValueError: a file is missing, malformed, or says other things than another.
    """
    if not directory.is_dir():
        raise ValueError(
            f"source: expected a directory, got {str(directory)!r}, where there is none"
        )
    config = _read_json(directory / CONFIG)
    index = _read_json(directory / INDEX) if (directory / INDEX).exists() else None
    weight_map = None if index is None else _weight_map(index, directory / INDEX)
    if weight_map is None and not (directory / SINGLE).exists():
        raise ValueError(f"source: expected {SINGLE} or {INDEX} in {str(directory)!r}, got neither")
    shards = [SINGLE] if weight_map is None else sorted(set(weight_map.values()))
    tensors: dict[str, StoredTensor] = {}
    metadata: dict[str, dict[str, str]] = {}
    for shard in shards:
        found, metadata[shard] = _read_header(directory, shard)
        for tensor in found:
            if weight_map is not None and weight_map.get(tensor.name) != shard:
                raise ValueError(
                    f"source: expected {INDEX} to place {tensor}, got "
                    f"{weight_map.get(tensor.name, 'no such name')}"
                )
            tensors[tensor.name] = tensor
    for name, shard in (weight_map or {}).items():
        if name not in tensors:
            raise ValueError(
                f"source: expected {name} in {shard}, as {INDEX} says, got no such tensor"
            )
    files, left_out = _other_files(directory, shards)
    return Checkpoint(directory, config, index, tensors, metadata, files, left_out)


def reader(checkpoint: Checkpoint, shard: str) -> Any:
    """Return the open file of a shard, whose ``get_slice`` reads rows of a tensor."""
    from safetensors import safe_open

    return safe_open(checkpoint.directory / shard, "pt")


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"source: expected {path.name} in {str(path.parent)!r}, got no such file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"source: expected JSON in {str(path)!r}: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"source: expected a JSON object in {str(path)!r}")
    return content


def _weight_map(index: Mapping[str, Any], path: Path) -> dict[str, str]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"source: expected names of tensors as weight_map in {str(path)!r}")
    for shard in weight_map.values():
        if not isinstance(shard, str) or Path(shard).name != shard or shard in ("", ".", ".."):
            raise ValueError(f"source: expected names of files in {str(path)!r}, got {shard!r}")
    if not isinstance(index.get("metadata") or {}, dict):
        raise ValueError(f"source: expected a JSON object as metadata in {str(path)!r}")
    return weight_map


def _read_header(directory: Path, shard: str) -> tuple[list[StoredTensor], dict[str, str]]:
    try:
        from safetensors import SafetensorError, safe_open
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "source: expected the package safetensors, which reads checkpoints, got none: "
            "pip install 'cute_quant[checkpoint]'"
        ) from None
    if not (directory / shard).is_file():
        raise ValueError(
            f"source: expected the shard {shard} in {str(directory)!r}, got no such file"
        )
    tensors = []
    try:
        with safe_open(directory / shard, "pt") as file:
            for name in file.keys():  # noqa: SIM118  # It is no dict.
                header = file.get_slice(name)
                tensors.append(
                    StoredTensor(name, shard, header.get_dtype(), tuple(header.get_shape()))
                )
            metadata = file.metadata()
    except SafetensorError as error:
        raise ValueError(f"source: expected safetensors, got {shard!r}: {error}") from None
    for tensor in tensors:
        if tensor.dtype not in ITEM_BYTES:
            raise ValueError(f"source: expected a known dtype of {tensor}, got {tensor.dtype}")
    return tensors, metadata or {}


def _other_files(directory: Path, shards: Sequence[str]) -> tuple[list[Path], list[Path]]:
    """Return files to copy, and files with weights that are not copied."""
    files: list[Path] = []
    left_out: list[Path] = []
    for path in _walk(directory):
        relative = path.relative_to(directory)
        if relative.name.endswith(WEIGHT_SUFFIXES):
            if str(relative) not in (*shards, INDEX):
                left_out.append(relative)
        elif str(relative) != CONFIG:
            files.append(relative)
    return files, left_out


def _walk(directory: Path) -> Iterator[Path]:
    """Yield all files but hidden ones, which are of tools, such as .git and .cache."""
    for path in sorted(directory.iterdir()):
        if path.name.startswith("."):
            continue
        # Files may be links, as in the cache of a hub; directories may not, so that it ends.
        if path.is_dir() and not path.is_symlink():
            yield from _walk(path)
        elif path.is_file():
            yield path
