"""Describe where a measurement was taken: the GPU, its driver, and versions."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path

import torch

PACKAGES = (
    "torch",
    "nvidia-cutlass-dsl",
    "apache-tvm-ffi",
    "cuda-bindings",
    "triton",
    "deep_gemm",
)


def describe(program: str, commit: str | None) -> dict[str, object]:
    """Return the current GPU and everything else that a number depends on.

    Args:
        program: command line of the benchmark without its arguments.
        commit: name of the measured version, where there is no git to ask.
    """
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "gpu": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": getattr(properties, "L2_cache_size", None),
        "driver": driver_version(),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "versions": {name: package_version(name) for name in PACKAGES},
        "commit": commit or current_commit(),
        # Paths on the machine are not part of the measurement.
        "command": " ".join([program, *(Path(word).name for word in sys.argv[1:])]),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def package_version(name: str) -> str | None:
    if name == "torch":
        return torch.__version__
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def driver_version() -> str | None:
    versions = _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    return versions.splitlines()[0] if versions else None


def current_commit() -> str | None:
    """Return the commit of this checkout, marked where files differ from it."""
    root = Path(__file__).parent
    head = _output(["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"])
    changed = _output(["git", "-C", str(root), "status", "--porcelain", "--untracked-files=no"])
    return f"{head} and changes" if head and changed else head


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
