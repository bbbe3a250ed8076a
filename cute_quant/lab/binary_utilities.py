"""NVIDIA's binary utilities: cuobjdump and nvdisasm."""

from __future__ import annotations

import subprocess
import sysconfig
from pathlib import Path


def run(tool: str, *arguments: str | Path, directory: Path | None = None) -> str:
    """Return the output of a tool, from its PyPI package or else from the search path.

    Raises:
        FileNotFoundError: it is in neither place.
        subprocess.CalledProcessError: it failed.
    """
    path = Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "bin" / tool
    command = [path if path.exists() else tool, *arguments]
    try:
        return subprocess.run(
            command, check=True, capture_output=True, text=True, cwd=directory
        ).stdout
    except FileNotFoundError:
        raise FileNotFoundError(f"{tool}: not found; pip install nvidia-cuda-{tool}") from None
