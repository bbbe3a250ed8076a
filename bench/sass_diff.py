"""Machine code of the kernels, compared between a commit and the working tree, without a GPU.

    python -m bench.sass_diff BASE [--all] [--only PATTERN] [--arch ARCH] [--base-dump FILE]

Compiles every kernel of `bench.sass.reported()`, and with ``--all`` every spec of the largest
preset, in both trees. Prints instructions and registers of each kernel before and after, and how
many kernels are identical, shorter and longer. Two kernels are identical if they have the same
opcodes in the same order; operands are not compared.

Exits with 1 if a kernel has more than one instruction more, more registers, or a new spill, if one
is gone, or if there was nothing to compare.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import hashlib
import importlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = 1
"""Instructions by which a kernel may become longer."""

RUN_FILE = "import runpy, sys; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
"""Runs this file with the modules of the directory that the process is in."""

PRESET_MODULES = (
    "cute_quant.dispatch.presets",
    "cute_quant.jit.aot_presets",
    "cute_quant.presets",
)
"""Where the presets are, the newest name first."""

IDENTICAL, EQUAL, SHORTER, LONGER_BY_ONE, LONGER = (
    "identical",
    "equal count",
    "shorter",
    "longer by one",
    "longer",
)


class Code(NamedTuple):
    """Machine code of a kernel, as much as a comparison needs.

    Attributes:
        opcodes: a digest of the mnemonics in order.
        spills: instructions that access local memory, and bytes of the stack.
    """

    instructions: int
    registers: int
    spills: int
    opcodes: str


def format_text(fmt: Any) -> str:
    """Return what a format means for a kernel; fields have other names in other commits."""
    values = fmt.values if hasattr(fmt, "values") else fmt.dtype
    kinds = ("packed", "blocked", "mn_major", "ue8m0", "power_of_two", "reciprocal")
    words = [name for name in kinds if getattr(fmt, name, False)]
    # An older commit has only blocks of 128 rows.
    if (rows := getattr(fmt, "block_rows", 0)) not in (0, 128):
        words.append(f"{rows} rows")
    return " ".join([str(fmt.group_size), str(values), *words])


def spec_text(spec: Any) -> str:
    """Return all choices of a spec as text that is the same in every commit."""
    if hasattr(spec, "group_size"):
        return f"[{format_text(spec)}]"
    if hasattr(spec, "_asdict"):
        return f"({', '.join(f'{n}={spec_text(v)}' for n, v in spec._asdict().items())})"
    return str(spec)


def presets() -> dict[str, Any]:
    for name in PRESET_MODULES:
        try:
            module: Any = importlib.import_module(name)
        except ModuleNotFoundError:
            continue
        found: dict[str, Any] = module.PRESETS
        return found
    raise ModuleNotFoundError(f"no presets in any of {PRESET_MODULES}")


def kernels(every: bool, arch: str) -> Iterator[tuple[str, Any]]:
    """Return names that are stable between commits, and specs, of this process's tree."""
    # That of another commit may have got its names from other modules.
    sass: Any = importlib.import_module("bench.sass")

    for name, _, spec in sass.reported():
        yield name, spec
    if every:
        for spec in presets()["all"](arch):
            yield spec_text(spec), spec


def dump(every: bool, only: str, architectures: str) -> None:
    """Print a line of JSON for each kernel of this process's tree."""
    # That of another commit may have got its names from other modules.
    sass: Any = importlib.import_module("bench.sass")

    def of_any_architecture(spec: Any, arch: str) -> Any:
        made = isinstance(spec, sass.Stream)
        return sass.disassemble(spec, arch) if made else sass.machine_code(spec, arch)

    # The tree of an older commit has not yet a function for it.
    compiled = getattr(sass, "compiled", of_any_architecture)
    for arch in sass.ARCHITECTURES.values():
        if not re.search(architectures, arch):
            continue
        for name, spec in kernels(every, arch):
            if not re.search(only, name):
                continue
            code = compiled(spec, arch)
            opcodes = hashlib.sha256("\n".join(code.opcodes).encode()).hexdigest()
            spills = code.count("LDL", "STL") + code.stack
            record = Code(len(code.opcodes), code.registers, spills, opcodes)
            print(json.dumps([name, arch, *record]), flush=True)


def start(tree: Path, options: list[str]) -> subprocess.Popen[str]:
    """Start a dump of the kernels of a tree."""
    command = [sys.executable, "-c", RUN_FILE, str(Path(__file__).resolve()), "--dump", *options]
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    return subprocess.Popen(command, cwd=tree, env=environment, stdout=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> str:
    """Wait for a dump and return it.

    Raises:
        RuntimeError: it failed.
    """
    text, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"a dump failed with {process.returncode}")
    return text


def parse(text: str) -> dict[tuple[str, str], Code]:
    """Return the kernels of a dump, by name and architecture."""
    records = map(json.loads, text.splitlines())
    return {(name, arch): Code(*code) for name, arch, *code in records}


def extract(base: str, directory: Path) -> None:
    """Extract the files of a commit.

    Raises:
        RuntimeError: there is no such commit.
    """
    archive = subprocess.run(
        ["git", "archive", "--format=tar", base], cwd=ROOT, capture_output=True, check=False
    )
    if archive.returncode:
        raise RuntimeError(archive.stderr.decode().strip())
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
        tar.extractall(directory)


def dumps(base: str, options: list[str], saved: Path | None) -> tuple[str, str]:
    """Dump both trees at the same time; the base's dump may be saved, and is then read."""
    if saved is not None and saved.exists():
        return saved.read_text(), finish(start(ROOT, options))
    with tempfile.TemporaryDirectory() as directory:
        extract(base, Path(directory))
        trees = Path(directory), ROOT
        with concurrent.futures.ThreadPoolExecutor(len(trees)) as threads:
            # Each is read while it runs, so that no pipe fills up.
            before, after = threads.map(lambda tree: finish(start(tree, options)), trees)
    if saved is not None:
        saved.write_text(before)
    return before, after


def verdict(before: Code, after: Code) -> str:
    difference = after.instructions - before.instructions
    if difference == 0:
        return IDENTICAL if after.opcodes == before.opcodes else EQUAL
    if difference < 0:
        return SHORTER
    return LONGER_BY_ONE if difference == 1 else LONGER


def exceeds(before: Code, after: Code) -> bool:
    """Return whether a kernel became worse by more than is allowed."""
    return (
        after.instructions > before.instructions + ALLOWED
        or after.registers > before.registers
        or after.spills > before.spills
    )


def report(
    before: dict[tuple[str, str], Code], after: dict[tuple[str, str], Code], brief: bool
) -> int:
    """Print the comparison and return the exit code.

    Args:
        before: kernels of the base.
        after: kernels of the working tree.
        brief: whether identical kernels are left out.
    """
    counts = dict.fromkeys((IDENTICAL, EQUAL, SHORTER, LONGER_BY_ONE, LONGER), 0)
    worse = removed = 0
    print(f"{'arch':8}  {'instructions':>14}  {'registers':>10}  {'':13}  kernel")
    for key, old in before.items():
        name, arch = key
        new = after.get(key)
        if new is None:
            print(f"{arch:8}  {old.instructions:6} -> {'':4}  {'':10}  {'removed':13}  {name}")
            removed += 1
            continue
        found = verdict(old, new)
        counts[found] += 1
        failed = exceeds(old, new)
        worse += failed
        if brief and found == IDENTICAL and not failed:
            continue
        note = "  EXCEEDS THE BOUND" if failed else ""
        print(
            f"{arch:8}  {old.instructions:6} -> {new.instructions:4}  "
            f"{old.registers:3} -> {new.registers:3}  {found:13}  {name}{note}"
        )
    for (name, arch), new in after.items():
        if (name, arch) not in before:
            print(f"{arch:8}  {'':6} -> {new.instructions:4}  {'':10}  {'added':13}  {name}")
    summary = ", ".join(f"{count} {name}" for name, count in counts.items())
    compared = sum(counts.values())
    print(f"{compared} kernels: {summary}; {worse} exceed the bound, {removed} are gone")
    return 1 if worse or removed or not compared else 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Compare machine code between a commit and the working tree."
    )
    parser.add_argument("base", nargs="?", help="the commit to compare with")
    parser.add_argument("--all", action="store_true", help="also all specs of the largest preset")
    parser.add_argument("--only", default="", metavar="PATTERN", help="kernels whose names match")
    parser.add_argument("--arch", default="", metavar="PATTERN", help="architectures that match")
    parser.add_argument(
        "--base-dump",
        type=Path,
        metavar="FILE",
        help="read the base's machine code from this file; write it if there is none",
    )
    parser.add_argument("--brief", action="store_true", help="leave out identical kernels")
    parser.add_argument("--dump", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.dump:
        dump(arguments.all, arguments.only, arguments.arch)
        return 0
    if arguments.base is None:
        parser.error("base: expected a commit")
    options = ["--only", arguments.only, "--arch", arguments.arch]
    options += ["--all"] if arguments.all else []
    before, after = map(parse, dumps(arguments.base, options, arguments.base_dump))
    wanted = {
        key: code
        for key, code in before.items()
        if re.search(arguments.only, key[0]) and re.search(arguments.arch, key[1])
    }
    return report(wanted, after, arguments.brief)


if __name__ == "__main__":
    sys.exit(main())
