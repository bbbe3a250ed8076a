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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(passed_on=[])


def run(options: argparse.Namespace) -> int:
    # `bench` is a common name.
    if importlib.util.find_spec("bench") is None or not importlib.util.find_spec("bench.stream"):
        raise RuntimeError(
            "the benchmark is not installed: run this in a checkout of the repository"
        )
    return subprocess.call([sys.executable, "-m", "bench", *options.passed_on])
