"""The commands of the command line, ``cute-quant`` or ``python -m cute_quant``.

A command is a module with a docstring, its help, and two functions: ``add_arguments(parser)``, and
``run(options) -> int``, the exit code. It is imported when it is asked for.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys

from cute_quant.cli.entry.cute_quant_command import COMMANDS, PROGRAM, main

__all__ = ["COMMANDS", "main", "run"]

FAILURE, WRONG_USAGE = 1, 2


def run(name: str, arguments: list[str]) -> int:
    """Run a command; returns the exit code.

    Args:
        name: one of ``COMMANDS``.
        arguments: of the command line, without the program and the command.
    """
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
    options = parser.parse_args(arguments)
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
