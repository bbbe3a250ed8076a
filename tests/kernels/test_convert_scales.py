"""Conversions of scales: emulated kernels against the CPU path, and the CPU path against formulas.

The numbers are random bytes, so that every bit of a scale is moved.
"""

import itertools
import math
from unittest import mock

import pytest
import torch

import cute_quant as cq
from cute_quant.contract import scale_conversion
from cute_quant.contract.calls import ResultShape
from cute_quant.contract.rows import Indexed, Masked, PrefixSum
from cute_quant.contract.scale_conversion import Conversion
from cute_quant.dispatch import convert_scales
from cute_quant.jit import lookup
from tests.helpers import assert_same_bits
from tests.kernels.emulated_gpu import OnGpu

E4M3, E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu
BYTE_LAYOUTS = ("row_major", "row_major_packed", "mn_major_packed", "128x4", "8x4")
BYTES = [cq.Format(E4M3, 32, E8M0, layout) for layout in BYTE_LAYOUTS]
FLOATS = [
    cq.Format(E4M3, 32, torch.float32, layout, round_scale=True)
    for layout in ("row_major", "mn_major")
]
FORMATS = [*BYTES, *FLOATS]
PAIRS = list(itertools.product(FORMATS, FORMATS))
SHAPES = [(1, 32), (3, 5 * 32), (2, 9, 3 * 32), (133, 8 * 32), (3, 130, 4 * 32 + 7), (8, 64 * 32)]


def scale_bytes(shape, seed=0):
    """Return random UE8M0 bytes of the groups of values of a shape."""
    *leading, k = shape
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (*leading, -(-k // 32)), generator=generator, dtype=torch.uint8)


def by_hand(numbers, fmt, k):
    """Return scales as a format has them, and what their storage holds, by loops over numbers.

    Args:
        numbers: (..., mn, groups), UE8M0 bytes.
        fmt: the format.
        k: columns of the values.
    """
    *batch, mn, groups = numbers.shape
    sf = fmt.empty_scales(batch, mn, k, "cpu")
    memory = torch.zeros(sf.untyped_storage().nbytes(), dtype=torch.uint8)
    size = 1 if fmt.byte_scales else 4
    rows, columns = fmt.scale_rows(mn), fmt.columns(k)
    per_matrix = rows * columns * (4 if fmt.packed or size == 4 else 1)
    row, group = torch.meshgrid(torch.arange(mn), torch.arange(groups), indexing="ij")
    if fmt.scale_layout == "row_major":
        place = (row * groups + group) * size
    elif fmt.scale_layout == "mn_major":
        place = (group * rows + row) * size
    elif fmt.scale_layout == "row_major_packed":
        place = row * columns * 4 + group
    elif fmt.scale_layout == "mn_major_packed":
        place = (group // 4 * rows + row) * 4 + group % 4
    else:
        tall = fmt.scale_layout == "128x4"
        block = row // (128 if tall else 8) * (columns // 4) + group // 4
        place = block * 512 + row % 32 * 16 + row % 128 // 32 * 4 if tall else block * 32
        place = place + group % 4 + (0 if tall else row % 8 * 4)
    for i, matrix in enumerate(numbers.reshape(-1, mn, groups)):
        start = i * per_matrix
        if fmt.byte_scales:
            memory[start + place] = matrix
        else:
            bits = torch.tensor([0, *(e << 23 for e in range(1, 255)), 0x7FC00000])
            bits = bits[matrix.long()]
            for byte in range(4):
                memory[start + place + byte] = (bits >> 8 * byte & 0xFF).to(torch.uint8)
    sf.untyped_storage().copy_(memory.untyped_storage())
    return sf, memory


def storage_bytes(sf):
    return torch.empty(0, dtype=torch.uint8).set_(sf.untyped_storage())


def filled(sf):
    """Return scales of memory that held something."""
    storage_bytes(sf).fill_(0x5A)
    return sf


class EmulatedGpu:
    """An emulated GPU on which conversions run."""

    def __init__(self, kernels, arch):
        self.kernels, self.arch = kernels, arch
        self.specs = []

    def convert(self, sf, fmt, to, shape, rows=None, out=None):
        *batch, mn, k = shape
        if out is None:
            out = to.empty_scales(batch, mn, k, "cpu")
        shape = ResultShape(tuple(batch), mn, k)
        call = Conversion(sf.as_subclass(OnGpu), fmt, to, shape, rows, out)
        with mock.patch.multiple(
            lookup,
            architecture=lambda device: self.arch,
            find_architecture=lambda device: self.arch,
            function=self.function,
        ):
            return convert_scales.run(call)

    def function(self, spec, arch):
        def run(source, result, *arguments):
            self.specs.append(spec)
            self.kernels.get(spec, arch)(source, result, *arguments, outputs=[result])

        return run


@pytest.fixture
def emulated(kernels, arch):
    return EmulatedGpu(kernels, arch)


@pytest.mark.parametrize(("fmt", "to"), PAIRS, ids=str)
def test_every_pair_of_layouts_by_hand(fmt, to, device):
    for shape in SHAPES:
        numbers = scale_bytes(shape)
        sf, _ = by_hand(numbers, fmt, shape[-1])
        expected, memory = by_hand(numbers, to, shape[-1])
        out = cq.empty_scales(to, shape, device=device)
        out.untyped_storage().fill_(0x5A)
        sf = moved(sf, device)
        found = cq.convert_scales(sf, fmt, to, shape, out=out)
        assert found is out
        assert torch.equal(storage_bytes(out.cpu()) if device == "cpu" else memory, memory)
        allocated = cq.convert_scales(sf, fmt, to, shape, check=True)
        assert allocated.stride() == expected.stride()
        assert_same_bits(allocated.cpu(), expected)


def moved(sf, device):
    """Return scales with the same strides on a device."""
    if device == "cpu":
        return sf
    storage = sf.untyped_storage().cuda()
    return torch.empty(0, dtype=sf.dtype, device=device).set_(storage, 0, sf.shape, sf.stride())


@pytest.mark.parametrize(("fmt", "to"), PAIRS, ids=str)
def test_every_pair_of_layouts_on_an_emulated_gpu(fmt, to, emulated):
    for shape in SHAPES[:-1]:
        numbers = scale_bytes(shape)
        sf, _ = by_hand(numbers, fmt, shape[-1])
        _, memory = by_hand(numbers, to, shape[-1])
        out = emulated.convert(sf, fmt, to, shape)
        assert torch.equal(storage_bytes(out), memory), shape
