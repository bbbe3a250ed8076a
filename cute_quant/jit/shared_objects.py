"""Make shared objects of compiled kernels, and seal them with a record and a digest.

An object holds host code for any processor of a kind, and the machine code of one GPU architecture.
A record of the kernel and a digest over everything follow. The loader ignores bytes behind an ELF
file that no header mentions, so object, record and digest are one file, which a rename puts in
place at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cute_quant.jit import dsl_private
from cute_quant.jit.toolchain import Dsl, Host

_SEAL = struct.Struct("<8sQ32s")
_MAGIC = b"cquant02"

LINK_SECONDS = 60


class CorruptObject(ValueError):
    """Bytes that are not a sealed object, or have changed since they were sealed."""


def shared_object(compiled: Any, symbol: str, host: Host, dsl: Dsl) -> bytes:
    """Return the shared object of a kernel.

    Args:
        compiled: the result of ``cute.compile`` without an execution engine.
        symbol: name of the function, by which tvm-ffi finds it.
        host: the processor that runs the host code.
        dsl: the installed CuTe DSL, whose runtime library is linked.

    Raises:
        RuntimeError: there is no linker, or the linker failed.
    """
    linker = host.linker()
    if linker is None:
        raise RuntimeError(f"no linker for {host.machine}: install binutils or lld")
    exports = f"{{ global: __tvm_ffi_{symbol}; local: *; }};".encode()
    with _memory_file("kernel.o") as relocatable, _memory_file("exports", exports) as script:
        # In memory: LLVM ends the process if it cannot write all of a file.
        dsl_private.emit_object(compiled, symbol, host, _path(relocatable))
        command: list[str | Path] = [linker, "-shared", "-z", "now", "-z", "noexecstack"]
        command += [_path(relocatable), "--version-script", _path(script), "-soname"]
        # The runtime is found beside the object, or is there already under its SONAME.
        command += [f"{symbol}.so", "--enable-new-dtags", "-rpath", "$ORIGIN"]
        return _link([*command, dsl.runtime_to_link(host)], (relocatable, script))


def _link(command: list[str | Path], inputs: tuple[int, ...]) -> bytes:
    """Link objects in memory, and return the result.

    Raises:
        RuntimeError: the linker failed.
    """
    with _memory_file("kernel.so") as result:
        # LLD puts a file beside its output and renames it, which does not work here.
        output = "-" if "lld" in Path(command[0]).resolve().name else _path(result)
        try:
            subprocess.run(
                [*command, "-o", output],
                check=True,
                stdout=result if output == "-" else subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                timeout=LINK_SECONDS,
                pass_fds=(*inputs, result),
            )
        except subprocess.CalledProcessError as error:
            lines = error.stderr.strip().splitlines() or ["no message"]
            raise RuntimeError(f"{command[0]} failed: {lines[0]}") from error
        with open(_path(result), "rb") as file:
            return file.read()


@contextlib.contextmanager
def _memory_file(name: str, content: bytes = b"") -> Iterator[int]:
    """Open a file in memory: no disk can be full, and no name lets other users reach it."""
    descriptor = os.memfd_create(name)
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(content)
        yield descriptor
    finally:
        os.close(descriptor)


def _path(descriptor: int) -> str:
    """Return the path of an open file, for this process and those that inherit the descriptor."""
    return f"/proc/self/fd/{descriptor}"


def seal(content: bytes, record: dict[str, str]) -> bytes:
    """Return an object followed by its record, and by a seal with a digest over all."""
    text = json.dumps(record, sort_keys=True).encode()
    body = content + text
    return body + _SEAL.pack(_MAGIC, len(text), _digest(body, len(text)))


def _digest(body: bytes | memoryview, length: int) -> bytes:
    digest = hashlib.sha256(body)
    digest.update(_MAGIC + length.to_bytes(8, "little"))
    return digest.digest()


def read_record(data: bytes) -> dict[str, str]:
    """Return the record of a sealed object.

    Raises:
        CorruptObject: a byte is missing, or has changed.
    """
    end = len(data) - _SEAL.size
    if end < 0:
        raise CorruptObject(f"expected at least {_SEAL.size} bytes, got {len(data)}")
    magic, length, digest = _SEAL.unpack_from(data, end)
    if magic != _MAGIC:
        raise CorruptObject("expected an object sealed by cute_quant at the end, got other bytes")
    body = memoryview(data)[:end]
    if length > end or _digest(body, length) != digest:
        raise CorruptObject("its digest is not that of its content")
    return _parse(bytes(body[end - length :]))


def _parse(text: bytes) -> dict[str, str]:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        raise CorruptObject("its record is not JSON") from None
    if not isinstance(record, dict):
        raise CorruptObject(f"record: expected a dict, got {type(record).__name__}")
    for name, value in record.items():
        if not isinstance(value, str):
            raise CorruptObject(f"record: expected text for {name}, got {type(value).__name__}")
    return record
