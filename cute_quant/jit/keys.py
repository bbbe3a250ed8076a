"""Text and digests that identify specs and sources of kernels. Needs no CuTe DSL."""

from __future__ import annotations

import functools
import hashlib
import re
from pathlib import Path
from typing import Any

import torch

from cute_quant.contract.formats import Format
from cute_quant.kernels.config import Spec

SOURCES = (
    "kernels/*.py",
    "contract/dtypes.py",
    "contract/format_choices.py",
    "contract/formats.py",
    "contract/philox.py",
    "contract/prologues.py",
    "contract/readers.py",
    "contract/rows.py",
    "contract/scale_layouts.py",
    "contract/torch_private.py",
    "contract/upper_scales.py",
    "jit/dsl_private.py",
    "jit/shared_objects.py",
)
"""Files that a compiled kernel depends on: the kernels, what they import, and how objects are made
of them."""
NOT_COMPILED = ("heuristics.py",)
"""Files in the folder of the kernels that only choose among them."""


def spec_text(spec: Spec) -> str:
    """All choices of a spec as text; equal specs give equal texts, in every process.

    Raises:
        TypeError: a field holds something whose text may differ from process to process.
    """
    return _text(spec)


def _text(value: Any) -> str:
    if _is_record(value):
        return f"({', '.join(f'{n}={_text(v)}' for n, v in value._asdict().items())})"
    if isinstance(value, tuple):
        return f"[{', '.join(map(_text, value))}]"
    if isinstance(value, Format):
        return value.text
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype)):
        return repr(value)
    raise TypeError(
        f"spec: expected fields that are numbers, strings, dtypes or tuples of these, got "
        f"{type(value).__name__}"
    )


def _is_record(value: Any) -> bool:
    """Return whether a value is a `NamedTuple`."""
    return hasattr(value, "_fields")


def spec_name(spec: Spec) -> str:
    """Return a short name of a spec, such as ``quantize-bfloat16-e4m3_128_e8m0_mn_major_packed``.

    It has the kernel, and those choices that have no default or differ from it.
    """
    module, _ = spec.kernel.split(".")
    return re.sub(r"[^\w-]", "_", "-".join([module, *_distinctive(spec)]))


def _distinctive(record: Any) -> list[str]:
    words = []
    for name, choice in record._asdict().items():
        has_default = name in record._field_defaults
        if _is_record(choice):
            # Two of a kind are told apart, such as `access` and `q_access`.
            prefix = name.removesuffix(type(choice).__name__.lower())
            # One that may be missing is told from none, whatever its choices are.
            words += [name] if has_default and record._field_defaults[name] is None else []
            words += [prefix + word for word in _distinctive(choice)]
        elif isinstance(choice, Format):
            words.append(choice.text)
        elif name == "dtype" or not has_default or choice != record._field_defaults[name]:
            words += _words(name, choice, record._field_defaults.get(name))
    return words


def _words(name: str, choice: Any, default: Any) -> list[str]:
    if isinstance(choice, bool):
        return [name] if choice else [f"no_{name}"] if default is True else []
    text = str(choice).removeprefix("torch.")
    plain = isinstance(choice, str) or name == "dtype"
    return [text] if plain else [f"{name}_{text}"]


@functools.cache
def source_digest() -> str:
    """SHA-256 over the files that kernels are compiled from, by name and content.

    Raises:
        OSError: the package does not lie in plain files.
    """
    package = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for pattern in SOURCES:
        for path in sorted(package.glob(pattern)):
            if path.name in NOT_COMPILED:
                continue
            content = path.read_bytes()
            digest.update(f"{path.relative_to(package)} {len(content)}\n".encode())
            digest.update(content)
    return digest.hexdigest()
