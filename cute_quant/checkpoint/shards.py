"""Write files of safetensors piece by piece, under their names only when they are complete.

A file starts with the length of its header, 8 bytes, little-endian, and the header, JSON with the
dtype, shape and place of each tensor. The places are known before the first byte of data is.
"""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch

from cute_quant.checkpoint.source import ITEM_BYTES

PARTIAL_SUFFIX = ".partial"
HEADER_ALIGNMENT = 8


class Layout:
    """Where the tensors of a file lie.

    Attributes:
        header: the first bytes of the file.
        sizes: bytes of each tensor, by name.
        size: bytes of the file.
    """

    def __init__(
        self,
        tensors: Mapping[str, tuple[str, Sequence[int]]],
        metadata: Mapping[str, str],
    ) -> None:
        # Wide dtypes first, as the library does it, so that every tensor is aligned.
        names = sorted(tensors, key=lambda name: (-ITEM_BYTES[tensors[name][0]], name))
        fields: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
        self.sizes: dict[str, int] = {}
        end = 0
        starts = {}
        for name in names:
            dtype, shape = tensors[name]
            self.sizes[name] = torch.Size(shape).numel() * ITEM_BYTES[dtype]
            starts[name], end = end, end + self.sizes[name]
            offsets = [starts[name], end]
            fields[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
        text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % HEADER_ALIGNMENT)
        self.header = len(text).to_bytes(8, "little") + text
        self.size = len(self.header) + end
        self._starts = starts

    def start(self, name: str) -> int:
        """Return the place of a tensor's first byte in the file."""
        return len(self.header) + self._starts[name]

    def is_at(self, path: Path) -> bool:
        """Return whether a file has this header and this size."""
        with path.open("rb") as file:
            return file.read(len(self.header)) == self.header and path.stat().st_size == self.size


class AtomicFile:
    """A file that stands under its name only when the block that writes it ends without an error.

    Until then it lies beside it, under a name that ends in ``.partial``.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._partial = path.with_name(path.name + PARTIAL_SUFFIX)

    def __enter__(self) -> BinaryIO:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._partial.open("wb")
        return self._file

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            with self._file:
                if error is None:
                    self._file.flush()
                    os.fsync(self._file.fileno())
        except OSError as found:
            # What is buffered is written once more when the file is closed.
            error = error or found
        if error is None:
            os.replace(self._partial, self._path)
            sync_directory(self._path.parent)
            return
        self._partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            # Such as a full disk.
            raise OSError(error.errno, error.strerror, str(self._path)) from error
        if kind is None:
            raise error


def write_tensor(file: BinaryIO, place: int, tensor: torch.Tensor) -> int:
    """Write the bytes of a tensor at a place of a file; return how many."""
    stored = tensor.detach().cpu().contiguous()
    size = stored.numel() * stored.element_size()
    if size:
        file.seek(place)
        # Without numpy, which torch does not need either.
        file.write(memoryview((ctypes.c_char * size).from_address(stored.data_ptr())))
    return size


def write_json(path: Path, content: object) -> None:
    """Write a file of JSON at once."""
    with AtomicFile(path) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())


def sync_directory(path: Path) -> None:
    """Have the names in a directory survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
