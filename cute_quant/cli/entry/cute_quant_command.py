"""The console script ``cute-quant``, which imports the package only for its commands.

It lies beside the package, since to import anything inside of it is to import torch.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import sys
from pathlib import Path

PROGRAM = "cute-quant"
COMMANDS = {
    "info": ("cute_quant.cli.info", "versions, GPUs, and what is supported and why not"),
    "check": ("cute_quant.cli.check", "hold every kernel against the reference"),
    "build": ("cute_quant.cli.build", "compile kernels ahead of time into a directory"),
    "warm-up": ("cute_quant.cli.warm_up", "compile kernels into the disk cache"),
    "checkpoint": ("cute_quant.cli.checkpoint", "quantize a Hugging Face checkpoint"),
    "engines": ("cute_quant.cli.engines", "calls of inference engines that are taken over"),
    "diff": ("cute_quant.cli.diff", "where two libraries' numerics differ, and why"),
    "layout": ("cute_quant.lab.command", "draw layouts, try others"),
    "cache": ("cute_quant.cli.cache", "list, size and clear the disk cache"),
}
"""Modules and what they do, by the name of the command."""

EPILOG = """exit codes: 0 done, 1 something failed, 2 wrong usage

examples:
  cute-quant info
  cute-quant check
  cute-quant build --preset deepgemm --arch sm_90a -o kernels
"""


class _Version(argparse.Action):
    """Print the version of the package, without importing it."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        spec = importlib.util.find_spec("cute_quant")
        assert spec is not None and spec.origin is not None
        version = re.search(r'__version__ = "(.*)"', Path(spec.origin).read_text())
        assert version is not None
        print(f"cute_quant {version[1]}")
        parser.exit()


def command(arguments: list[str]) -> str:
    """Return the name of the command, or answer and exit."""
    overview = argparse.ArgumentParser(
        PROGRAM,
        description="The quantizer in front of a low-precision GEMM.",
        epilog=EPILOG,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    overview.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    width = max(map(len, COMMANDS))
    lines = "\n".join(f"{name:{width}} {text}" for name, (_, text) in COMMANDS.items())
    overview.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=lines)
    name: str = overview.parse_args(arguments[:1]).command
    return name


def main(arguments: list[str] | None = None) -> int:
    """Run a command; return the exit code.

    Args:
        arguments: of the command line, without the program.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    name = command(arguments)
    from cute_quant.cli.main import run

    return run(name, arguments[1:])


if __name__ == "__main__":
    sys.exit(main())
