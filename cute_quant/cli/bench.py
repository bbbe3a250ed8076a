"""Measure on a GPU, with the benchmark of the repository, which takes all options:
python -m bench --help lists them.

examples:
  cute-quant bench --quick
  cute-quant bench --rows 4096 --columns 7168
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(passed_on=[])


def run(options: argparse.Namespace) -> int:
    if not _is_here() and not _is_installed():
        raise RuntimeError(
            "the benchmark is not installed: run this in a checkout of the repository"
        )
    return subprocess.call([sys.executable, "-m", "bench", *options.passed_on])


def _is_here() -> bool:
    """Whether ``python -m bench`` finds it in the working directory, where the installed script,
    unlike ``python -m cute_quant``, does not look for modules."""
    # `bench` is a common name.
    return all((Path("bench") / name).is_file() for name in ("__main__.py", "stream.py"))


def _is_installed() -> bool:
    try:
        return importlib.util.find_spec("bench.stream") is not None
    except ModuleNotFoundError:
        return False
