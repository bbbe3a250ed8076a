"""Read tensors from the files that people keep them in."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

NamedTensor = tuple[str, torch.Tensor]


def read(path: Path, wanted: str | None = None) -> Iterator[NamedTensor]:
    """Yield the tensors of a file with their names, each loaded when it is its turn.

    Args:
        path: a file whose name ends in one of ``SUFFIXES``.
        wanted: the name of one tensor; None for all.

    Raises:
        ModuleNotFoundError: it is a safetensors file, and safetensors is not installed.
        ValueError: there is no such file, it is malformed, or has no tensor of that name.
    """
    if path.suffix not in _READERS:
        raise ValueError(
            f"file: expected a name that ends in {', '.join(SUFFIXES)}, got {str(path)!r}"
        )
    if not path.is_file():
        raise ValueError(f"file: expected a file, got {str(path)!r}, where there is none")
    try:
        names, load = _READERS[path.suffix](path)
    except (ModuleNotFoundError, PermissionError):
        raise
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise _malformed(path, error) from error
    if wanted is not None and wanted not in names:
        some = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
        raise ValueError(f"tensor: expected one of {some or 'no names'}, got {wanted!r}")
    for name in names if wanted is None else [wanted]:
        yield name, load(name)


Reader = Callable[[Path], tuple[list[str], Callable[[str], torch.Tensor]]]
"""Returns the names of a file's tensors, and the function that loads one."""


def _read_safetensors(path: Path) -> tuple[list[str], Callable[[str], torch.Tensor]]:
    try:
        from safetensors import SafetensorError, safe_open
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"file: expected the package safetensors, which reads {path.name!r}, got none: "
            f"pip install safetensors"
        ) from None
    try:
        file = safe_open(path, "pt")
    except SafetensorError as error:
        raise _malformed(path, error) from error
    return list(file.keys()), file.get_tensor


def _read_torch(path: Path) -> tuple[list[str], Callable[[str], torch.Tensor]]:
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(loaded, torch.Tensor):
        loaded = {path.stem: loaded}
    if not isinstance(loaded, dict):
        raise ValueError(f"neither a tensor nor a dict of tensors but a {type(loaded).__name__}")
    tensors = {str(name): t for name, t in loaded.items() if isinstance(t, torch.Tensor)}
    return list(tensors), lambda name: tensors[name].detach()


def _read_numpy(path: Path) -> tuple[list[str], Callable[[str], torch.Tensor]]:
    import numpy

    array = numpy.load(path, allow_pickle=False)
    return [path.stem], lambda name: torch.from_numpy(array)


_READERS: dict[str, Reader] = {
    ".safetensors": _read_safetensors,
    ".pt": _read_torch,
    ".pth": _read_torch,
    ".bin": _read_torch,
    ".npy": _read_numpy,
}
SUFFIXES = tuple(_READERS)


def _malformed(path: Path, error: Exception) -> ValueError:
    kind = path.suffix.removeprefix(".")
    return ValueError(f"file: expected a {kind} file of tensors, got {str(path)!r}: {error}")
