"""Plant each fault alone in a copy of the repository, and run the tests that must see it.

    python -m tests.mutants                  # all of them, two at a time
    python -m tests.mutants --part 3/10      # every tenth, from the third on
    python -m tests.mutants --part today     # the tenth of this day of the year
    python -m tests.mutants scales-floor     # these alone

The exit status is 1 if a fault is not caught, or cannot be planted. That the tests pass without it
is left to the suite.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import datetime
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tests.mutants.faults import FAULTS, PACKAGE, Fault

ROOT = Path(__file__).parents[2]
COPIED = ("cute_quant", "tests", "pyproject.toml")
"""Tests write to none of the others, which are linked."""
PARTS = 10
SECONDS = 300
"""Limit of the tests of a fault."""

ALL_PASSED, SOME_FAILED = 0, 1
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


def examine(fault: Fault, directory: Path) -> Verdict:
    """Plant a fault in a copy, run its tests, and remove it."""
    start = time.monotonic()
    path = directory / PACKAGE / fault.file
    original = path.read_text()
    try:
        path.write_text(fault.planted(original))
        caught, by = run_tests(fault.tests, directory)
    except ValueError as error:
        caught, by = False, f"INVALID: {error}"
    finally:
        path.write_text(original)
    return Verdict(fault, caught, by, time.monotonic() - start)


def run_tests(tests: Sequence[str], directory: Path) -> tuple[bool, str]:
    """Run tests in a copy until one fails.

    Returns:
        Whether one did, and which, or what went wrong.
    """
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider"]
    # A fault of the same size in the same second would be taken for what was compiled before.
    environment = os.environ | {"PYTHONPATH": str(directory), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        result = subprocess.run(
            [*command, *tests],
            cwd=directory,
            env=environment,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired:
        return False, f"INVALID: its tests take more than {SECONDS} s"
    if result.returncode == ALL_PASSED:
        return False, "SURVIVED"
    if result.returncode == SOME_FAILED:
        found = re.search(r"^(?:FAILED|ERROR) (\S+::.*?)(?: - |$)", result.stdout, re.MULTILINE)
        return True, found[1] if found else "pytest named none"
    lines = (result.stdout + result.stderr).strip().splitlines() or ["no output"]
    return False, f"INVALID: {lines[-1]}"


def examine_all(faults: Sequence[Fault], jobs: int) -> list[Verdict]:
    """Examine faults in as many copies of the repository as there are jobs."""
    directories: queue.Queue[Path] = queue.Queue()
    verdicts = []

    def examine_in_a_copy(fault: Fault) -> Verdict:
        directory = directories.get()
        try:
            return examine(fault, directory)
        finally:
            directories.put(directory)

    with tempfile.TemporaryDirectory(prefix="cute_quant_mutants_") as name:
        for i in range(jobs):
            directory = Path(name) / str(i)
            directory.mkdir()
            copy_repository(directory)
            directories.put(directory)
        with concurrent.futures.ThreadPoolExecutor(jobs) as threads:
            for verdict in threads.map(examine_in_a_copy, faults):
                print(row(verdict), flush=True)
                verdicts.append(verdict)
    return verdicts


def row(verdict: Verdict) -> str:
    """Return a line of the table."""
    fault, _, by, seconds = verdict
    return f"{fault.id:36} {fault.file:30} {seconds:6.1f} s  {by}"


def part(text: str) -> tuple[int, int]:
    """Parse "3/10", or "today" for the tenth of this day."""
    if text == "today":
        return datetime.date.today().timetuple().tm_yday % PARTS, PARTS
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and int(count) > 0):
        raise argparse.ArgumentTypeError(f"expected today, or such as 3/10, got {text!r}")
    return int(number) % int(count), int(count)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("ids", nargs="*", help="faults to plant, by default all")
    parser.add_argument("--part", type=part, default=(0, 1), help="3/10, or today")
    parser.add_argument("--jobs", type=int, default=2, help="faults at a time")
    arguments = parser.parse_args()
    unknown = set(arguments.ids) - {fault.id for fault in FAULTS}
    if unknown:
        parser.error(f"expected ids of faults, got {', '.join(sorted(unknown))}")
    number, count = arguments.part
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
