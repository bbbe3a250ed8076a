"""Libraries of which the code of other architectures is taken out."""

import struct

from bench import fatbin
from bench.fatbin import CUBIN, PTX


def unit(*codes: tuple[int, int, bytes]) -> bytes:
    """Return a translation unit, of kinds, architectures and code."""
    body = b""
    for kind, arch, text in codes:
        code = text.ljust(16, b"\0")
        header = struct.pack("<HHIQ", kind, 0x101, 64, len(code)) + bytes(12)
        body += (header + struct.pack("<I", arch)).ljust(64, b"\1") + code
    return struct.pack("<IHHQ", fatbin.MAGIC, 1, 16, len(body)) + body + bytes(24)


def library(code: bytes) -> bytes:
    """Return an ELF file with a section of code, and one of names."""
    names = b"\0.names\0.nv_fatbin\0"
    table = 64 + len(names) + len(code)
    header = bytearray(64)
    struct.pack_into("<Q", header, 0x28, table)
    struct.pack_into("<HHH", header, 0x3A, 64, 2, 0)
    sections = (1, 64, len(names)), (8, 64 + len(names), len(code))
    entries = (struct.pack("<IIQQQQ", name, 1, 0, 0, *place) for name, *place in sections)
    return bytes(header) + names + code + b"".join(entry.ljust(64, b"\0") for entry in entries)


def left(*units: bytes, keep=lambda code: True) -> list[bytes]:
    """Return the code that is left for compute capability 9.0."""
    elf = library(b"".join(units))
    shrunk = fatbin.without_others(elf, 90, keep)
    assert len(shrunk) == len(elf)
    found = list(fatbin.entries(shrunk))
    assert [entry[:3] for entry in found] == [entry[:3] for entry in fatbin.entries(elf)]
    return [code for entry in found if (code := shrunk[entry.code].rstrip(b"\0"))]


def test_machine_code_of_one_architecture_is_left():
    codes = (CUBIN, 80, b"old"), (PTX, 90, b"text"), (CUBIN, 90, b"hopper"), (CUBIN, 100, b"new")
    assert left(unit(*codes), unit((CUBIN, 90, b"second"))) == [b"hopper", b"second"]


def test_without_machine_code_the_newest_text_is_left():
    codes = (PTX, 75, b"75"), (PTX, 80, b"80"), (PTX, 100, b"100"), (CUBIN, 80, b"cubin")
    assert left(unit(*codes)) == [b"80"]


def test_code_that_is_not_needed_is_taken_out():
    units = (unit((CUBIN, 90, b"head 64")), unit((CUBIN, 90, b"head 128")))
    assert left(*units, keep=lambda code: b"128" in code) == [b"head 128"]
