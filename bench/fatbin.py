"""Libraries of CUDA kernels, made small for one GPU.

A library holds its kernels for each architecture in the section ``.nv_fatbin``. The driver reads
those of its GPU alone, so that bytes of all others may be zeros, which compress to nothing.
"""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from bench.vllm_wheel import section_places

MAGIC = 0xBA55ED50
PTX, CUBIN = 1, 2


class Entry(NamedTuple):
    """Code of one translation unit for one architecture.

    Attributes:
        unit: offset of the translation unit.
        kind: PTX or CUBIN.
        arch: such as 90.
        code: where its bytes are.
    """

    unit: int
    kind: int
    arch: int
    code: slice


def entries(elf: bytes) -> Iterator[Entry]:
    """Return all code in a library."""
    place = dict(section_places(elf))[".nv_fatbin"]
    unit = place.start
    while unit < place.stop:
        magic, _, header, size = struct.unpack_from("<IHHQ", elf, unit)
        if magic != MAGIC:  # units are aligned
            unit += 8
            continue
        start, end = unit + header, unit + header + size
        while start < end:
            kind, _, header, size = struct.unpack_from("<HHIQ", elf, start)
            (arch,) = struct.unpack_from("<I", elf, start + 28)
            yield Entry(unit, kind, arch, slice(start + header, start + header + size))
            start += header + size
        unit = end


def shrink(library: Path, target: Path, arch: int, keep: Callable[[bytes], bool]) -> None:
    """Write a library without symbols, and with the code that `without_others` leaves."""
    subprocess.run(["strip", "--strip-all", "-o", target, library], check=True)
    target.write_bytes(without_others(target.read_bytes(), arch, keep))


def without_others(elf: bytes, arch: int, keep: Callable[[bytes], bool]) -> bytes:
    """Return a library whose code for other architectures is zeros.

    Args:
        elf: the library.
        arch: such as 90. A unit without machine code for it keeps the newest PTX that it takes.
        keep: says of code, which may be compressed, whether it is needed.
    """
    found = list(entries(elf))
    chosen: dict[int, tuple[int, int]] = {}
    for entry in found:
        kind = entry.kind, entry.arch
        fits = entry.arch == arch if entry.kind == CUBIN else entry.arch <= arch
        if fits and kind > chosen.get(entry.unit, (0, 0)):
            chosen[entry.unit] = kind
    contents = bytearray(elf)
    for entry in found:
        if (entry.kind, entry.arch) != chosen.get(entry.unit) or not keep(elf[entry.code]):
            contents[entry.code] = bytes(entry.code.stop - entry.code.start)
    return bytes(contents)
