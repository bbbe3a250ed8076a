"""The directory that a conversion writes, which it holds, and which it knows again."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cute_quant.checkpoint.shards import sync_directory

MANIFEST = ".cute_quant_checkpoint.json"
"""What a run was asked for, in its output directory until it is complete."""


def check_outside(directory: Path, output: Path) -> None:
    """Check that an output is, or can become, a directory outside of the source.

    Raises:
        ValueError: it is a file, or lies in the source.
    """
    if output.exists() and not output.is_dir():
        raise ValueError(f"output: expected a directory, got the file {str(output)!r}")
    here, there = directory.resolve(), output.resolve()
    if here == there or here in there.parents:
        raise ValueError(f"output: expected a directory outside of the source, got {str(output)!r}")


@contextlib.contextmanager
def begun(output: Path, request: Mapping[str, Any]) -> Iterator[None]:
    """Hold an output directory that is new, or that the same request began.

    Raises:
        ValueError: it holds something else.
        RuntimeError: another run holds it.
    """
    output.mkdir(parents=True, exist_ok=True)
    path = output / MANIFEST
    if not path.exists():
        _check_empty(output)
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RuntimeError(f"output: another run writes to {str(output)!r}") from error
        text = file.read()
        if not text:
            _check_empty(output)
            json.dump(request, file)
            file.flush()
            os.fsync(file.fileno())
            sync_directory(output)
        else:
            _check_same(output, text, request)
        yield
        path.unlink(missing_ok=True)
        sync_directory(output)


def _check_empty(output: Path) -> None:
    found = sorted(set(os.listdir(output)) - {MANIFEST})
    if found:
        raise ValueError(
            f"output: expected a directory that is new, empty or begun by the same command, got "
            f"{str(output)!r} with {found[0]!r}"
        )


def _check_same(output: Path, text: str, request: Mapping[str, Any]) -> None:
    try:
        found = json.loads(text)
        other = [key for key in request if found.get(key) != request[key]]
    except (ValueError, AttributeError):
        other = [MANIFEST]
    if other:
        raise ValueError(
            f"output: expected a directory that was begun by the same command, got "
            f"{str(output)!r}, begun with another {' and '.join(other)}: remove it"
        )
