"""The command line: ``python -m cute_quant COMMAND``, installed as ``cute-quant``.

A command is a module with a docstring, its help, and two functions: ``add_arguments(parser)``, and
``run(options) -> int``, the exit code. It is imported when it is asked for.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys

from cute_quant import __version__

PROGRAM = "cute-quant"
COMMANDS = {
    "info": ("cute_quant.cli.info", "versions, GPUs, and what is supported and why not"),
    "check": ("cute_quant.cli.check", "hold every kernel against the reference"),
    "build": ("cute_quant.cli.build", "compile kernels ahead of time into a directory"),
    "warm-up": ("cute_quant.cli.warm_up", "compile kernels into the disk cache"),
    "layout": ("cute_quant.lab.command", "draw layouts, try others"),
    "cache": ("cute_quant.cli.cache", "list, size and clear the disk cache"),
}
"""Modules and what they do, by the name of the command."""

FAILURE, WRONG_USAGE = 1, 2

EPILOG = """exit codes: 0 done, 1 something failed, 2 wrong usage

examples:
  cute-quant info
  cute-quant check
  cute-quant build --preset deepgemm --arch sm_90a -o kernels
"""


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit code.

    Args:
        arguments: of the command line, without the program.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    overview = argparse.ArgumentParser(
        PROGRAM,
        description="The quantizer in front of an FP8 GEMM.",
        epilog=EPILOG,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    overview.add_argument("--version", action="version", version=f"cute_quant {__version__}")
    lines = "\n".join(f"{name:8} {text}" for name, (_, text) in COMMANDS.items())
    overview.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=lines)
    name = overview.parse_args(arguments[:1]).command
    module, _ = COMMANDS[name]
    try:
        command = importlib.import_module(module)
    except ModuleNotFoundError as error:
        return _fail(name, f"not part of this installation: {error}")
    parser = argparse.ArgumentParser(
        f"{PROGRAM} {name}",
        description=command.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_arguments(parser)
    options = parser.parse_args(arguments[1:])
    try:
        status = command.run(options)
        # What is still buffered may not be wanted either.
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # Who reads has seen enough; nothing is left to be flushed at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILURE
    except KeyboardInterrupt:
        return _fail(name, "interrupted")
    except ValueError as error:
        # Says what an argument is expected to be.
        return _fail(name, str(error), WRONG_USAGE)
    except (ImportError, OSError, RuntimeError, TypeError) as error:
        return _fail(name, str(error))


def _fail(name: str, text: str, status: int = FAILURE) -> int:
    print(f"{PROGRAM} {name}: {' '.join(text.split())}", file=sys.stderr)
    return status
