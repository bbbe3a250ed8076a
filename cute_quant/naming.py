"""What identifies a spec and the sources its kernel is compiled from. Needs no CuTe DSL."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
from pathlib import Path
from typing import Any

import torch

from cute_quant.formats import WHOLE_ROW
from cute_quant.specs import Spec

SOURCES = ("kernels/*.py", "formats.py", "launch.py", "objects.py", "rows.py", "specs.py")
"""What a compiled kernel depends on, in this package: the kernels, what they import, and how
objects are made of them."""


def spec_text(spec: Spec) -> str:
    """All choices of a spec as text; equal specs give equal texts, in every process.

    Raises:
        TypeError: a field holds something whose text may differ from process to process.
    """
    return f"{spec.kernel}{_text(spec)}"


def _text(value: Any) -> str:
    if dataclasses.is_dataclass(value):
        fields = (f"{f.name}={_text(getattr(value, f.name))}" for f in dataclasses.fields(value))
        return f"({', '.join(fields)})"
    if isinstance(value, tuple):
        return f"[{', '.join(map(_text, value))}]"
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype)):
        return repr(value)
    raise TypeError(
        f"spec: expected fields that are numbers, strings, dtypes, tuples or dataclasses of these, "
        f"got {type(value).__name__}"
    )


def spec_name(spec: Spec) -> str:
    """A short name of a spec, such as ``quantize-bfloat16-128-ue8m0-float8_e4m3fn``: its kernel
    and those choices that have no default or differ from it."""
    module, _ = spec.kernel.split(".")
    return re.sub(r"[^\w-]", "_", "-".join([module, *_distinctive(spec)]))


def _distinctive(value: Any) -> list[str]:
    words = []
    for field in dataclasses.fields(value):
        choice = getattr(value, field.name)
        if dataclasses.is_dataclass(choice):
            words += _distinctive(choice)
        elif field.name == "dtype" or choice != field.default:
            words += _words(field, choice)
    return words


def _words(field: dataclasses.Field, choice: Any) -> list[str]:
    if isinstance(choice, bool):
        return [field.name] if choice else [f"no_{field.name}"] if field.default is True else []
    if field.name == "group_size":
        return ["row" if choice == WHOLE_ROW else str(choice)]
    text = str(choice).removeprefix("torch.")
    plain = isinstance(choice, str) or field.name == "dtype"
    return [text] if plain else [f"{field.name}_{text}"]


@functools.cache
def source_digest() -> str:
    """SHA-256 over the files that kernels are compiled from, by name and content.

    Raises:
        OSError: the package does not lie in plain files.
    """
    package = Path(__file__).parent
    digest = hashlib.sha256()
    for pattern in SOURCES:
        for path in sorted(package.glob(pattern)):
            content = path.read_bytes()
            digest.update(f"{path.relative_to(package)} {len(content)}\n".encode())
            digest.update(content)
    return digest.hexdigest()
