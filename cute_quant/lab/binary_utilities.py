"""Run NVIDIA's binary utilities, cuobjdump and nvdisasm."""

from __future__ import annotations

import subprocess
import sysconfig
from pathlib import Path


def run(tool: str, *arguments: str | Path, directory: Path | None = None) -> str:
    """Run a tool, from its PyPI package or else from the search path, and return its output.

    Args:
        tool: name of the tool.
        arguments: its arguments.
        directory: working directory, by default the current one.

    Raises:
        FileNotFoundError: the tool is not installed.
        subprocess.CalledProcessError: the tool failed.
    """
    path = Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "bin" / tool
    command = [path if path.exists() else tool, *arguments]
    try:
        return subprocess.run(
            command, check=True, capture_output=True, text=True, cwd=directory
        ).stdout
    except FileNotFoundError:
        raise FileNotFoundError(f"{tool}: not found; pip install nvidia-cuda-{tool}") from None
