"""Commands whose output goes to a file."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import IO

SECONDS = 1800
"""Limit of a command: under QEMU all takes ten times as long."""


def run(command: Sequence[str | Path], log: Path, stdin: IO[bytes] | None = None) -> str:
    """Run a command from the root of the checkout, and add its output to a log.

    Returns:
        Its output.

    Raises:
        subprocess.CalledProcessError: it failed.
        subprocess.TimeoutExpired: it took too long.
    """
    with log.open("a+") as file:
        file.write(f"$ {' '.join(map(str, command))}\n")
        file.flush()
        start = file.tell()
        subprocess.run(
            command,
            check=True,
            stdin=stdin or subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            timeout=SECONDS,
        )
        file.seek(start)
        return file.read()
