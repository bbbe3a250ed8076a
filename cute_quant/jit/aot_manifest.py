"""Parse the manifest of a directory of built kernels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
FORMAT = 2
"""Version of the manifest."""
KERNEL_FIELDS = ("name", "spec", "arch", "file", "symbol")
"""Fields of each kernel in the manifest."""


def parse_manifest(content: bytes, file: Path) -> dict[str, Any]:
    """Return the manifest of a directory, for any sources and any processor.

    Args:
        content: the bytes of the file.
        file: the path of the file, for messages.

    Raises:
        ValueError: the content is not a manifest that `aot_build.write` made.
    """
    try:
        manifest = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not a manifest: {error}") from error
    wrong = _wrong_in_manifest(manifest)
    if wrong is not None:
        raise ValueError(f"{file}: not a manifest: {wrong}")
    return manifest


def _wrong_in_manifest(manifest: Any) -> str | None:
    """Return the reason why a value is not a manifest, or None if it is one."""
    if not isinstance(manifest, dict):
        return f"expected an object, got {type(manifest).__name__}"
    types = {"format": int, "machine": str, "sources": str, "versions": dict, "kernels": list}
    for name, expected in types.items():
        # A bool is an int to isinstance.
        if type(manifest.get(name)) is not expected:
            return f"{name}: expected {expected.__name__}, got {manifest.get(name)!r:.80}"
    tvm_ffi = manifest["versions"].get("apache-tvm-ffi")
    if not isinstance(tvm_ffi, str):
        return f"versions: expected one of apache-tvm-ffi, got {tvm_ffi!r:.80}"
    if not isinstance(manifest.get("runtime"), str | None):
        return f"runtime: expected a digest, got {manifest['runtime']!r:.80}"
    for kernel in manifest["kernels"]:
        if not _is_kernel(kernel):
            return f"kernels: expected strings {', '.join(KERNEL_FIELDS)}, got {kernel!r:.80}"
    return None


def _is_kernel(kernel: Any) -> bool:
    return (
        isinstance(kernel, dict)
        and kernel.keys() == set(KERNEL_FIELDS)
        and all(isinstance(text, str) for text in kernel.values())
        # Nothing outside of the directory; pathlib takes ".." for a name.
        and Path(kernel["file"]).name == kernel["file"]
        and kernel["file"] not in ("", "..")
    )


def identity(machine: str, sources: str) -> dict[str, Any]:
    """Return the fields that a manifest shares with a package that may load its kernels."""
    return {"format": FORMAT, "machine": machine, "sources": sources}
