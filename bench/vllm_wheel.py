"""Find vLLM's packed quantizer in a wheel or an installation, and take its machine code out.

    pip download --no-deps vllm==0.33.0
    python -m bench.vllm_wheel vllm-0.33.0-*.whl                 # lists the kernels
    python -m bench.vllm_wheel vllm-0.33.0-*.whl -o vllm-0.33    # and extracts them
    python -m bench --vllm vllm-0.33

vLLM does not have to be installed or importable, and no GPU is needed. `cuobjdump`, from the PyPI
package nvidia-cuda-cuobjdump, unpacks the libraries. An extracted directory holds one compressed
cubin and ``kernels.json``: what `bench.vllm_kernels` launches, on any machine.
"""

from __future__ import annotations

import argparse
import json
import lzma
import re
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from cute_quant.lab import binary_utilities

SYMBOL = b"per_token_group_quant_8bit_packed"
MANIFEST = "kernels.json"
CUBIN = "per_token_group_quant_8bit_packed.{arch}.cubin.xz"
DEFAULT_ARCH = "sm_90"

INPUTS = {"N3c108BFloat16E": "bfloat16", "N3c104HalfE": "float16", "f": "float32"}
OUTPUTS = {"13__nv_fp8_e4m3": "e4m3", "NS0_13Float8_e4m3fnE": "e4m3", "a": "int8"}
MANGLED = re.compile(
    rf"_Z\d+{SYMBOL.decode()}_(?P<register>register_)?kernelI"
    rf"(?P<input>{'|'.join(INPUTS)})"
    rf"(?P<output>{'|'.join(OUTPUTS)})"
    r"(?P<sizes>(?:Li\d+E)*)EvPKT"
)

KERNEL_PARAMETER_INFO = 0x17
"""EIATTR_KPARAM_INFO: the attribute of a cubin that gives a kernel parameter's place and size."""


@dataclass(frozen=True)
class Kernel:
    """One instantiation of the packed quantizer.

    Attributes:
        symbol: mangled name.
        kind: "register" or "shared", by where it keeps a group between its two passes.
        input, output: element types.
        sizes: integer template arguments: group size, groups and rows of a block.
        parameters: byte offset and size of each.
        waits: whether the code waits for the grid before it, as programmatic dependent launch asks.
    """

    symbol: str
    kind: str
    input: str
    output: str
    sizes: tuple[int, ...]
    parameters: tuple[tuple[int, int], ...]
    waits: bool

    def __str__(self) -> str:
        sizes = " x ".join(map(str, self.sizes)) or "any group size"
        pdl = "waits for the grid before it" if self.waits else "no programmatic dependent launch"
        return (
            f"{self.input} -> {self.output}, {self.kind} kernel, {sizes}, "
            f"{len(self.parameters)} parameters, {pdl}"
        )


@dataclass(frozen=True)
class Found:
    """A cubin that holds the quantizer.

    Attributes:
        version: of vLLM, or "unknown".
        library: path in the wheel.
        cubin: file contents.
    """

    version: str
    library: str
    arch: str
    cubin: bytes
    kernels: tuple[Kernel, ...]


def find(source: Path, arch: str) -> Found:
    """Return the quantizer for `arch` in a wheel, an installed or unpacked package, or a library.

    Raises:
        FileNotFoundError: it is not there, for any architecture or for this one.
    """
    with tempfile.TemporaryDirectory() as directory:
        holders = []
        for name, library in _libraries(source, Path(directory)):
            if SYMBOL not in library.read_bytes():
                continue
            holders.append(name)
            for cubin in _cubins(library, arch, Path(directory)):
                kernels = tuple(_kernels(cubin))
                if kernels:
                    return Found(_version(source), name, arch, cubin.read_bytes(), kernels)
    if holders:
        raise FileNotFoundError(f"{source}: {', '.join(holders)} has no packed kernel for {arch}")
    raise FileNotFoundError(f"{source}: no library of it has {SYMBOL.decode()}")


def extract(found: Found, directory: Path) -> list[Path]:
    """Write what the benchmark needs to `directory`, and return the files."""
    directory.mkdir(parents=True, exist_ok=True)
    cubin = directory / CUBIN.format(arch=found.arch)
    cubin.write_bytes(lzma.compress(found.cubin, preset=9 | lzma.PRESET_EXTREME))
    manifest = directory / MANIFEST
    contents = {
        "version": found.version,
        "library": found.library,
        "arch": found.arch,
        "cubin": cubin.name,
        "kernels": [asdict(kernel) for kernel in found.kernels],
    }
    manifest.write_text(json.dumps(contents, indent=1) + "\n")
    return [manifest, cubin]


def load(source: Path, arch: str) -> Found:
    """Load what `find` returns from an extracted directory, or call `find`."""
    manifest = source / MANIFEST
    if not manifest.is_file():
        return find(source, arch)
    contents = json.loads(manifest.read_text())
    if contents["arch"] != arch:
        raise FileNotFoundError(f"{source}: extracted for {contents['arch']}, not for {arch}")
    kernels = (
        Kernel(
            **{
                **kernel,
                "sizes": tuple(kernel["sizes"]),
                "parameters": tuple(map(tuple, kernel["parameters"])),
            }
        )
        for kernel in contents["kernels"]
    )
    cubin = lzma.decompress((source / contents["cubin"]).read_bytes())
    return Found(contents["version"], contents["library"], arch, cubin, tuple(kernels))


def _libraries(source: Path, directory: Path) -> Iterator[tuple[str, Path]]:
    """Return names and files of the libraries that may hold kernels of vLLM's own."""
    if source.suffix == ".whl":
        with zipfile.ZipFile(source) as wheel:
            for name in wheel.namelist():
                if re.fullmatch(r"vllm/_C\w*(\.\w+)*\.so", name):
                    yield name, Path(wheel.extract(name, directory))
    elif source.is_dir():
        package = source / "vllm" if (source / "vllm").is_dir() else source
        for path in sorted(package.glob("_C*.so")):
            yield f"vllm/{path.name}", path.resolve()
    elif source.is_file():
        yield source.name, source.resolve()
    else:
        raise FileNotFoundError(f"{source}: no such file or directory")


def _version(source: Path) -> str:
    if source.suffix == ".whl":
        return source.name.split("-")[1]
    parent = source.parent if source.name == "vllm" else source
    dist_info = sorted(parent.glob("vllm-*.dist-info"))
    return dist_info[0].name.split("-")[1].removesuffix(".dist") if dist_info else "unknown"


def _cubins(library: Path, arch: str, directory: Path) -> Iterator[Path]:
    """Return files of a library's machine code for one architecture that name the kernel."""
    with tempfile.TemporaryDirectory(dir=directory) as target:
        arguments = ("-arch", arch, "-xelf", "all", library)
        binary_utilities.run("cuobjdump", *arguments, directory=Path(target))
        for path in sorted(Path(target).glob(f"*.{arch}.cubin")):
            if SYMBOL in path.read_bytes():
                yield path


def _kernels(cubin: Path) -> Iterator[Kernel]:
    elf = cubin.read_bytes()
    sections = {name: elf[place] for name, place in section_places(elf)}
    for name in sections:
        symbol = name.removeprefix(".text.")
        match = MANGLED.match(symbol)
        if name == symbol or not match or OUTPUTS[match["output"]] != "e4m3":
            continue
        code = binary_utilities.run("cuobjdump", "-sass", "-fun", symbol, cubin)
        yield Kernel(
            symbol,
            "register" if match["register"] else "shared",
            INPUTS[match["input"]],
            OUTPUTS[match["output"]],
            tuple(map(int, re.findall(r"Li(\d+)E", match["sizes"]))),
            _parameters(sections[f".nv.info.{symbol}"]),
            "ACQBULK" in code,
        )


def section_places(elf: bytes) -> Iterator[tuple[str, slice]]:
    """Return names and places of the sections of a 64-bit ELF file."""
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    entry_size, count, names = struct.unpack_from("<HHH", elf, 0x3A)
    headers = [
        struct.unpack_from("<IIQQQQ", elf, table + i * entry_size)  # name, type, _, _, offset, size
        for i in range(count)
    ]
    strings = headers[names][4]
    for name, _, _, _, offset, size in headers:
        start = strings + name
        yield elf[start : elf.index(b"\0", start)].decode(), slice(offset, offset + size)


def _parameters(info: bytes) -> tuple[tuple[int, int], ...]:
    """Return byte offset and size of each parameter, from the attributes of a kernel."""
    parameters = {}
    i = 0
    while i < len(info):
        form, attribute, size = struct.unpack_from("<BBH", info, i)
        i += 4
        if form != 4:  # the value is in place of the size
            continue
        if attribute == KERNEL_PARAMETER_INFO:
            _, ordinal, offset, flags = struct.unpack_from("<IHHI", info, i)
            parameters[ordinal] = (offset, flags >> 18)
        i += size
    return tuple(parameters[ordinal] for ordinal in sorted(parameters))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.vllm_wheel", description=__doc__.split("\n")[0]
    )
    parser.add_argument("source", type=Path, help="a wheel, site-packages, or a library")
    parser.add_argument("--arch", default=DEFAULT_ARCH, help=f"default: {DEFAULT_ARCH}")
    parser.add_argument("-o", "--output", type=Path, metavar="DIR", help="extract to DIR")
    arguments = parser.parse_args()
    try:
        found = find(arguments.source, arguments.arch)
    except (FileNotFoundError, zipfile.BadZipFile, subprocess.CalledProcessError) as error:
        sys.exit(f"bench.vllm_wheel: {error}")
    print(f"vLLM {found.version}, {found.library}, {found.arch}")
    for kernel in found.kernels:
        print(f"  {kernel}\n    {kernel.symbol}")
    if arguments.output:
        for path in extract(found, arguments.output):
            print(f"{path}: {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
