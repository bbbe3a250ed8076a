"""Plant each fault alone in a copy of the repository, and run the tests that must see it.

    python -m tests.mutants                  # all of them, two at a time
    python -m tests.mutants --part 3/10      # every tenth, from the third on
    python -m tests.mutants --part today     # the tenth of this day of the year
    python -m tests.mutants norm-barrier     # these alone

The exit status is 1 if a fault is not caught, or cannot be planted. That the tests pass without it
is left to the suite.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

import cutlass.cute  # noqa: F401  # for the children
import pytest
import torch  # noqa: F401

from tests.mutants.fault import PACKAGE, Fault
from tests.mutants.faults import FAULTS
from tests.parts import part

ROOT = Path(__file__).parents[2]
COPIED = ("cute_quant", "tests", "pyproject.toml")
"""Tests write to none of the others, which are linked."""
PARTS = 10
SECONDS = 300
"""Limit of the tests of a fault."""

ALL_PASSED, SOME_FAILED, NO_RESULT = 0, 1, 3
"""Exit statuses of pytest."""


class Verdict(NamedTuple):
    """What became of a fault.

    Attributes:
        caught: whether a test failed; one that could not be collected, or hangs, is no verdict.
        by: the first test that failed, or what went wrong.
    """

    fault: Fault
    caught: bool
    by: str
    seconds: float


def copy_repository(directory: Path) -> None:
    """Copy what faults are planted in, and link the rest."""
    for path in ROOT.iterdir():
        target = directory / path.name
        if path.name not in COPIED:
            if path.name != ".git":
                target.symlink_to(path)
        elif path.is_dir():
            shutil.copytree(path, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, target)


class Examination:
    """The tests of a fault, run by a child process in a copy that has the fault planted.

    A child starts with torch and CuTe DSL imported, which takes longer than most of the tests.
    """

    def __init__(self, fault: Fault, directory: Path):
        self.fault = fault
        self.directory = directory
        self.output = directory / "output"
        self.start = time.monotonic()
        path = directory / PACKAGE / fault.file
        self.original = path.read_text()
        path.write_text(fault.planted(self.original))
        self.process = os.fork()
        if self.process == 0:
            self._run()

    def _run(self) -> NoReturn:
        status = NO_RESULT
        try:
            sys.stdout.flush()
            descriptor = os.open(self.output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            os.setpgid(0, 0)
            os.chdir(self.directory)
            # What tests start looks there too.
            os.environ["PYTHONPATH"] = sys.path[0] = str(self.directory)
            for name in list(sys.modules):
                if name.partition(".")[0] in COPIED:
                    del sys.modules[name]
            options = ("-x", "-q", "--tb=no", "-p", "no:cacheprovider")
            status = int(pytest.main([*options, *self.fault.tests]))
            sys.stdout.flush()
        finally:
            os._exit(status)

    def end(self, status: int) -> Verdict:
        """Remove the fault, and return what became of it, by the exit status of pytest."""
        (self.directory / PACKAGE / self.fault.file).write_text(self.original)
        output = self.output.read_text() if self.output.exists() else ""
        by = "SURVIVED"
        if status == SOME_FAILED:
            found = re.search(r"^(?:FAILED|ERROR) (\S+::.*?)(?: - |$)", output, re.MULTILINE)
            by = found[1] if found else "pytest named none"
        elif status != ALL_PASSED:
            lines = output.strip().splitlines() or ["no output"]
            by = f"INVALID: exit status {status}: {lines[-1]}"
        seconds = time.monotonic() - self.start
        return Verdict(self.fault, status == SOME_FAILED, by, seconds)

    def kill_if_late(self) -> None:
        """End a process that takes too long, and all that it started."""
        if time.monotonic() - self.start > SECONDS:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process, signal.SIGKILL)


def examine_all(faults: Sequence[Fault], jobs: int) -> list[Verdict]:
    """Examine faults in as many copies of the repository as there are jobs."""
    verdicts: list[Verdict] = []
    waiting, running = list(reversed(faults)), dict[int, Examination]()

    def report(verdict: Verdict) -> None:
        print(row(verdict), flush=True)
        verdicts.append(verdict)

    with tempfile.TemporaryDirectory(prefix="cute_quant_mutants_") as name:
        copies = [Path(name) / str(i) for i in range(jobs)]
        for copy in copies:
            copy.mkdir()
            copy_repository(copy)
        while waiting or running:
            if waiting and copies:
                fault = waiting.pop()
                try:
                    examination = Examination(fault, copies[-1])
                except ValueError as error:
                    report(Verdict(fault, False, f"INVALID: {error}", 0.0))
                    continue
                copies.pop()
                running[examination.process] = examination
                continue
            process, status = os.waitpid(-1, os.WNOHANG)
            if process in running:
                examination = running.pop(process)
                report(examination.end(os.waitstatus_to_exitcode(status)))
                copies.append(examination.directory)
            else:
                for examination in running.values():
                    examination.kill_if_late()
                time.sleep(0.05)
    return verdicts


def row(verdict: Verdict) -> str:
    """Return a line of the table."""
    fault, _, by, seconds = verdict
    return f"{fault.id:36} {fault.file:30} {seconds:6.1f} s  {by}"


def of_faults(text: str) -> tuple[int, int]:
    """Parse a part of the faults."""
    return part(text, PARTS)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("ids", nargs="*", help="faults to plant, by default all")
    parser.add_argument("--part", type=of_faults, default=(0, 1), help="3/10, or today")
    parser.add_argument("--jobs", type=int, default=2, help="faults at a time")
    arguments = parser.parse_args()
    unknown = set(arguments.ids) - {fault.id for fault in FAULTS}
    if unknown:
        parser.error(f"expected ids of faults, got {', '.join(sorted(unknown))}")
    number, count = arguments.part
    # A fault of the same size in the same second would be taken for what was compiled before.
    sys.dont_write_bytecode = True
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    chosen = [fault for fault in FAULTS if not arguments.ids or fault.id in arguments.ids]
    start = time.monotonic()
    verdicts = examine_all(chosen[number::count], arguments.jobs)
    missed = [verdict for verdict in verdicts if not verdict.caught]
    seconds = time.monotonic() - start
    print(f"{len(verdicts) - len(missed)} of {len(verdicts)} faults caught in {seconds:.0f} s")
    for verdict in missed:
        print(row(verdict))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
