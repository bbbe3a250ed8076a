"""Conversions of scales: emulated kernels against the CPU path, and the CPU path against formulas.

The numbers are random bytes, so that every bit of a scale is moved.
"""

import itertools
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import cute_quant as cq
from cute_quant.contract.calls import ResultShape
from cute_quant.contract.rows import Indexed, Masked, PrefixSum
from cute_quant.contract.scale_conversion import Conversion
from cute_quant.dispatch import convert_scales
from cute_quant.jit import lookup
from tests.helpers import assert_same_bits, bits, storage_bits
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
        assert torch.equal(storage_bits(out), memory)
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
        assert torch.equal(storage_bits(out), memory), shape


ROW_MAJOR, PACKED_ROWS, PACKED, BLOCKED, BLOCKED_8 = BYTES
FLOAT_ROWS, FLOAT_COLUMNS = FLOATS


def strided_sources():
    """Return names, and makers of scales of unusual strides from those of a format."""
    spread = {
        "as it is": lambda sf: sf,
        "rows apart": lambda sf: _copied(sf, 3, 0),
        "columns apart": lambda sf: _copied(sf, 0, 5),
        "transposed": lambda sf: sf.mT.contiguous().mT,
        "odd address": lambda sf: _copied(sf, 1, 0, offset=1),
        "broadcast": lambda sf: sf[..., :1, :].expand(sf.shape),
        "batch in between": lambda sf: sf.transpose(0, -2).contiguous().transpose(0, -2),
    }
    return spread


def _copied(sf, row_gap, column_gap, offset=0):
    *batch, rows, columns = sf.shape
    shape = (*batch, rows, columns + row_gap, 1 + column_gap)
    memory = torch.empty(offset + torch.Size(shape).numel(), dtype=sf.dtype)
    return memory[offset:].view(shape)[..., :columns, 0].copy_(sf)


@pytest.mark.parametrize("name", strided_sources())
@pytest.mark.parametrize("fmt", [f for f in FORMATS if not f.blocked], ids=str)
def test_strides_of_the_source(name, fmt, emulated):
    """Also the CPU path; results in a layout of vectors and one of single scales."""
    shape = (3, 6, 8 * 32) if name != "columns apart" else (2, 5, 7 * 32)
    numbers = scale_bytes(shape)
    sf, _ = by_hand(numbers, fmt, shape[-1])
    sf = strided_sources()[name](sf)
    if name == "broadcast":
        numbers = numbers[..., :1, :].expand(numbers.shape)
    for to in (PACKED, FLOAT_ROWS):
        expected, memory = by_hand(numbers, to, shape[-1])
        assert torch.equal(storage_bits(emulated.convert(sf, fmt, to, shape)), memory)
        assert_same_bits(cq.convert_scales(sf, fmt, to, shape), expected)


@pytest.mark.parametrize("to", FORMATS, ids=str)
def test_addresses_that_are_not_aligned(to, emulated):
    """Vectors become words, and words single scales, where the memory does not allow them."""
    shape = (2, 10, 8 * 32)
    numbers = scale_bytes(shape)
    expected, _ = by_hand(numbers, to, shape[-1])
    widths = set()
    for offset in (0, 1, 4):
        pad = offset if to.byte_scales and not to.packed else offset // 4 * (offset % 4 == 0)
        storage = torch.zeros(expected.untyped_storage().nbytes() // expected.itemsize + 16)
        storage = storage.to(torch.uint8).repeat_interleave(expected.itemsize).view(expected.dtype)
        out = storage.as_strided(expected.shape, expected.stride(), pad)
        for fmt in (BLOCKED, ROW_MAJOR):
            sf, _ = by_hand(numbers, fmt, shape[-1])
            moved = torch.empty(sf.numel() + 4, dtype=torch.uint8)[offset % 4 :][: sf.numel()]
            moved = moved.view(fmt.scale_dtype).view(sf.shape).copy_(sf)
            assert emulated.convert(moved, fmt, to, shape, out=out) is out
            assert_same_bits(out, expected)
            widths.add((emulated.specs[-1].load_bytes, emulated.specs[-1].store_bytes))
    assert {load for load, _ in widths} == {1, 4}
    stores = {store for _, store in widths}
    assert stores == ({4} if to is PACKED_ROWS else {1, 4} if to is ROW_MAJOR else stores)
    assert len(stores) > 1 or to is PACKED_ROWS


@pytest.mark.parametrize("to", [PACKED, FLOAT_COLUMNS], ids=str)
@pytest.mark.parametrize("batch", [(), (2,)])
def test_a_last_column_without_padding_rows(batch, to, emulated):
    """As vLLM allocates: nothing past the storage is written."""
    shape = (*batch, 5, 10 * 32)
    numbers = scale_bytes(shape)
    expected, memory = by_hand(numbers, to, shape[-1])
    sf, _ = by_hand(numbers, BLOCKED, shape[-1])
    short = torch.empty_strided(expected.shape, expected.stride(), dtype=expected.dtype)
    short.untyped_storage().fill_(0x5A)
    assert short.untyped_storage().nbytes() < expected.untyped_storage().nbytes()
    for convert in (emulated.convert, cq.convert_scales):
        convert(sf, BLOCKED, to, shape, out=short)
        found = storage_bits(short)
        assert torch.equal(found, memory[: len(found)])
        short.untyped_storage().fill_(0x5A)


@pytest.mark.parametrize("to", [PACKED, ROW_MAJOR, FLOAT_COLUMNS, BLOCKED], ids=str)
@pytest.mark.parametrize("kind", ["masked", "prefix_sum", "indexed"])
def test_rows_that_do_not_exist_have_the_scale_0(kind, to, emulated):
    shape = (3, 20, 5 * 32) if kind == "masked" else (60, 5 * 32)
    numbers = scale_bytes(shape)
    exists = torch.zeros(shape[:-1], dtype=torch.bool)
    if kind == "masked":
        rows = Masked(torch.tensor([3, -1, 99], dtype=torch.int32))
        exists[0, :3], exists[2] = True, True
    elif kind == "prefix_sum":
        rows = PrefixSum(torch.tensor([3, 3, 17, 55], dtype=torch.int32), 8)
        exists[:3], exists[8:17], exists[24:55] = True, True, True
    else:
        indices = torch.arange(60, dtype=torch.int32) % 7 - 2
        rows, exists = Indexed(indices), indices >= 0
    for fmt in (FLOAT_ROWS, BLOCKED_8):
        sf, _ = by_hand(numbers, fmt, shape[-1])
        expected, memory = by_hand(numbers * exists.unsqueeze(-1), to, shape[-1])
        assert torch.equal(storage_bits(emulated.convert(sf, fmt, to, shape, rows)), memory)
        assert_same_bits(cq.convert_scales(sf, fmt, to, shape, rows=rows, check=False), expected)


def test_more_matrices_than_a_grid_counts(kernels, arch, monkeypatch):
    from cute_quant.kernels import convert_scales as kernel

    monkeypatch.setattr(kernel, "MAX_GRID_Z", 2)
    monkeypatch.setattr(kernels, "_kernels", {})
    shape = (5, 3, 64)
    numbers = scale_bytes(shape)
    sf, _ = by_hand(numbers, ROW_MAJOR, 64)
    out = EmulatedGpu(kernels, arch).convert(sf, ROW_MAJOR, PACKED, shape)
    assert torch.equal(storage_bits(out), by_hand(numbers, PACKED, 64)[1])


def test_padding_of_the_source_is_not_read(emulated):
    """It may hold anything: groups past the last are 0 in the result."""
    shape = (5, 3 * 32)
    numbers = scale_bytes(shape)
    for fmt, to in itertools.product((PACKED, PACKED_ROWS, BLOCKED, BLOCKED_8), BYTES):
        sf, memory = by_hand(numbers, fmt, shape[-1])
        marked, _ = by_hand(torch.ones_like(numbers), fmt, shape[-1])
        storage = torch.empty(0, dtype=torch.uint8).set_(sf.untyped_storage())
        storage.copy_(memory.where(storage_bits(marked) == 1, 0x77))
        expected, memory = by_hand(numbers, to, shape[-1])
        assert torch.equal(storage_bits(emulated.convert(sf, fmt, to, shape)), memory)
        assert_same_bits(cq.convert_scales(sf, fmt, to, shape), expected)


SPECIAL = {
    0x00000000: 0,
    0x00400000: 0,
    0x00800000: 1,
    0x3F800000: 127,
    0x7F000000: 254,
    0x7F800000: 255,
    0x7FC00000: 255,
    0x80000000: 255,
    0xBF800000: 255,
    0x3F800001: 255,
    0x3FC00000: 255,
    0x00200000: 255,
    0x00000001: 255,
    0xFF800000: 255,
    0x7F800001: 255,
}
"""Bits of a float32 and their byte."""


@pytest.mark.parametrize("to", BYTES, ids=str)
def test_float32_that_are_no_powers_of_two(to, emulated):
    count = len(SPECIAL)
    floats = torch.tensor([bits - (bits >> 31 << 32) for bits in SPECIAL], dtype=torch.int32)
    sf = floats.view(torch.float32).repeat(4, 1)
    numbers = torch.tensor(list(SPECIAL.values()), dtype=torch.uint8).repeat(4, 1)
    shape = (4, 32 * count)
    expected, memory = by_hand(numbers, to, shape[-1])
    assert_same_bits(cq.convert_scales(sf, FLOAT_ROWS, to, shape), expected)
    assert torch.equal(storage_bits(emulated.convert(sf, FLOAT_ROWS, to, shape)), memory)


@pytest.mark.parametrize("emulate", [False, True])
def test_the_byte_0(emulate, emulated):
    """It is 2^-127 where a format has that scale, and that of no row elsewhere."""
    sf = torch.zeros(1, 1, dtype=torch.uint8).view(E8M0)
    for floor, bits_of_zero in (("ocp", 0x00400000), (2.0**-127, 0x00400000), ("vllm", 0)):
        fmt = ROW_MAJOR.replace(min_scale=floor)
        call = sf, fmt, FLOAT_ROWS, (1, 32)
        found = emulated.convert(*call) if emulate else cq.convert_scales(*call)
        assert found.view(torch.int32).item() == bits_of_zero
        # There and back again.
        assert cq.convert_scales(found, FLOAT_ROWS, fmt, (1, 32), check=True).view(torch.uint8) == 0


def test_padding_rows_are_0_where_the_byte_0_is_a_scale(emulated):
    shape = (5, 64)
    numbers = scale_bytes(shape).clamp(min=1)
    sf, _ = by_hand(numbers, PACKED, 64)
    _, memory = by_hand(numbers, FLOAT_COLUMNS, 64)
    call = sf, PACKED.replace(min_scale="ocp"), FLOAT_COLUMNS, shape
    for found in (emulated.convert(*call), cq.convert_scales(*call)):
        assert torch.equal(storage_bits(found), memory)


@pytest.mark.parametrize("rows", [None, "masked"])
def test_check_names_place_and_value(rows, device):
    sf = torch.ones(2, 3, 4, 8, device=device)
    shape = (2, 3, 4, 256)
    good = torch.tensor([1.0, 0.0, torch.inf, torch.nan, 2.0**-127, 2.0**127, 2.0**-126, 0.5])
    sf[0, 0, 0] = good.to(device)
    call = {"fmt": FLOAT_ROWS, "to": PACKED, "shape": shape, "check": True}
    cq.convert_scales(sf, **call)
    sf[1, 2, 3, 5] = 0.3
    match = r"sf: expected powers of two, got 0.30.* at \(1, 2, 3, 5\), in 1 of 192 places"
    with pytest.raises(ValueError, match=match):
        cq.convert_scales(sf, **call)
    assert (cq.convert_scales(sf, **(call | {"check": False}))[1, 2, 3, 1] >> 8 & 0xFF) == 255
    if rows:
        counts = torch.full((3,), 3, dtype=torch.int32, device=device)
        flat = sf[1]
        call |= {"shape": shape[1:], "rows": Masked(counts)}
        cq.convert_scales(flat, **call)
        with pytest.raises(ValueError, match=r"rows.masked_m: expected 0 to 4, got 5 at 1"):
            counts[1] = 5
            cq.convert_scales(flat, **call)


@pytest.mark.parametrize("values", [torch.float4_e2m1fn_x2, E4M3, torch.int8], ids=str)
def test_values_do_not_matter(values, device):
    x = torch.randn(9, 512).to(device)
    for layout in BYTE_LAYOUTS:
        fmt, to = ROW_MAJOR.replace(values=values), ROW_MAJOR.replace(values=values)
        to = to.replace(scale_layout=layout)
        _, sf = cq.quantize(x, fmt)
        assert_same_bits(cq.convert_scales(sf, fmt, to, x.shape), cq.quantize(x, to)[1])


@pytest.mark.parametrize(("one", "other"), list(itertools.product(BYTE_LAYOUTS, BYTE_LAYOUTS)))
def test_e4m3_scales(one, other, device):
    x = torch.randn(2, 9, 160).to(device)
    fmt, to = cq.NVFP4.replace(scale_layout=one), cq.NVFP4.replace(scale_layout=other)
    amax = cq.tensor_amax(x)
    q, sf = cq.quantize(x, fmt, amax=amax)
    found = cq.convert_scales(sf, fmt, to, x.shape)
    assert_same_bits(found, cq.quantize(x, to, amax=amax)[1])
    assert_same_bits(cq.dequantize(q, found, to, amax=amax), cq.dequantize(q, sf, fmt, amax=amax))


sizes = st.tuples(st.integers(1, 3), st.integers(1, 140), st.integers(1, 40))


@given(sizes, st.permutations(FORMATS), st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_round_trip_over_all_layouts(size, formats, seed):
    batch, mn, groups = size
    shape = (batch, mn, 32 * groups)
    first = formats[0]
    start, _ = by_hand(scale_bytes(shape, seed), first, shape[-1])
    sf = start
    for fmt, to in itertools.pairwise([*formats, first]):
        sf = cq.convert_scales(sf, fmt, to, shape, check=True)
    assert_same_bits(sf, start)


@pytest.mark.parametrize("shape", [(0, 64), (5, 0), (0, 4, 64), (3, 0, 64)])
@pytest.mark.parametrize("to", FORMATS, ids=str)
def test_no_scales(to, shape, device):
    sf = cq.empty_scales(FLOAT_ROWS, shape, device=device)
    found = cq.convert_scales(sf, FLOAT_ROWS, to, shape, check=True)
    expected = cq.empty_scales(to, shape, device=device)
    assert found.shape == expected.shape and found.stride() == expected.stride()


def test_bad_arguments():
    shape = (6, 256)
    sf = torch.ones(6, 8)
    good = {"sf": sf, "fmt": FLOAT_ROWS, "to": PACKED, "shape": shape}

    def refused(kind, match, **wrong):
        with pytest.raises(kind, match=match):
            cq.convert_scales(**(good | wrong))

    plain = FLOAT_ROWS.replace(round_scale=False)
    refused(TypeError, "sf: expected a torch.Tensor, got None", sf=None)
    refused(TypeError, "sf: expected a tensor of float32, got a tensor of float64", sf=sf.double())
    refused(TypeError, "fmt: expected a Format", fmt="row_major")
    refused(TypeError, "to: expected a Format", to="row_major")
    refused(TypeError, "check: expected a bool, got 1", check=1)
    refused(TypeError, "out: expected a tensor or None, got 3", out=3)
    refused(TypeError, "rows: expected None or one of", rows=3)
    refused(TypeError, r"shape: expected ints \(..., mn, k\), got 6", shape=6)
    refused(ValueError, "shape: expected", shape=(6,))
    refused(ValueError, r"sf: expected shape \(6, 9\)", shape=(6, 257))
    refused(ValueError, "to: expected values float8_e4m3fn", to=cq.MXFP4)
    refused(ValueError, "to: expected group_size 32", to=cq.DEEP_GEMM)
    refused(ValueError, r"to: expected float32 scales of any value.*round_scale=True", fmt=plain)
    refused(
        ValueError,
        "got scales rounded to powers of two, which would lose",
        fmt=plain,
        to=FLOAT_COLUMNS,
    )
    masked = Masked(torch.zeros(3, dtype=torch.int32))
    refused(ValueError, r"shape: expected shape \(E, max_m, k\) for rows=Masked", rows=masked)
    out = PACKED.empty_scales((), 6, 256, "cpu")
    refused(ValueError, r"out: expected strides \(1, 8\)", out=out.contiguous())
    refused(ValueError, r"out: expected shape \(6, 2\)", out=out[1:])
    refused(TypeError, "out: expected a tensor of int32", out=out.float())
    nvfp4 = cq.NVFP4.replace(scale_layout="row_major")
    floats = cq.Format(torch.float4_e2m1fn_x2, 16, torch.float32, "row_major", round_scale=True)
    refused(ValueError, "to: expected float8_e4m3fn scales", fmt=nvfp4, to=floats, shape=(6, 128))
    memory = torch.zeros(64, dtype=torch.float32)
    refused(
        ValueError,
        "out: expected memory of its own, got memory that overlaps sf",
        sf=memory[:48].view(6, 8),
        to=FLOAT_COLUMNS,
        out=memory[:64].as_strided((6, 8), (1, 8)),
    )
    # float32 scales of any value keep their numbers in the other layout.
    any_value = torch.rand(6, 8)
    found = cq.convert_scales(any_value, plain, FLOAT_COLUMNS.replace(round_scale=False), shape)
    assert torch.equal(found, any_value)


@pytest.mark.parametrize(("fmt", "to"), [(FLOAT_ROWS, PACKED), (BLOCKED, ROW_MAJOR)], ids=str)
def test_in_a_graph(fmt, to, device):
    shape = (6, 256)
    sf = moved(by_hand(scale_bytes(shape), fmt, 256)[0], device)
    expected = cq.convert_scales(sf, fmt, to, shape)
    rows = Indexed(torch.tensor([0, 1, -1, 0, 0, -1], dtype=torch.int32, device=device))

    def converted(sf):
        return cq.convert_scales(sf, fmt, to, shape)

    def into(sf, out):
        return cq.convert_scales(sf, fmt, to, shape, rows=rows, out=out)

    found = torch.compile(converted, fullgraph=True)(sf)
    assert found.stride() == expected.stride()
    assert_same_bits(found, expected)
    out = cq.empty_scales(to, shape, device=device)
    # Inductor has no code to write to a tensor of float8_e8m0fnu.
    backend = "aot_eager" if out.dtype is E8M0 else "inductor"
    torch.compile(into, fullgraph=True, backend=backend)(sf, out)
    assert_same_bits(out, cq.convert_scales(sf, fmt, to, shape, rows=rows))
    with FakeTensorMode() as mode:
        fake = converted(mode.from_tensor(sf))
        assert fake.shape == expected.shape and fake.dtype is expected.dtype
        with pytest.raises(ValueError, match="check: expected False under a tracer"):
            cq.convert_scales(mode.from_tensor(sf), fmt, to, shape, check=True)


def test_the_operator():
    sf = by_hand(scale_bytes((6, 256)), FLOAT_ROWS, 256)[0]
    arguments = (sf, FLOAT_ROWS.text, PACKED.text, [6, 256], "dense", None, 1)
    torch.library.opcheck(torch.ops.cute_quant.convert_scales, arguments)
    with pytest.raises(RuntimeError, match="convert_scales is not differentiable"):
        cq.convert_scales(sf.requires_grad_(), FLOAT_ROWS, PACKED, (6, 256))


@pytest.mark.gpu
def test_captured_in_a_cuda_graph():
    shape = (300, 4096)
    sf = moved(by_hand(scale_bytes(shape), FLOAT_ROWS, 4096)[0], "cuda")
    out = cq.empty_scales(PACKED, shape, device="cuda")
    expected = cq.convert_scales(sf, FLOAT_ROWS, PACKED, shape)
    cq.convert_scales(sf, FLOAT_ROWS, PACKED, shape, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cq.convert_scales(sf, FLOAT_ROWS, PACKED, shape, out=out)
    out.fill_(0)
    graph.replay()
    assert_same_bits(out, expected)


@pytest.mark.gpu
@pytest.mark.slow
def test_more_than_2_31_bytes():
    """Rows whose offsets exceed 32 bits, read and written."""
    mn, k = 2**22 + 3, 1024 * 32
    sf = torch.zeros(mn, 1024, dtype=torch.uint8, device="cuda")
    sf[-2:] = scale_bytes((2, k)).cuda()
    for to in (PACKED, PACKED_ROWS):
        found = cq.convert_scales(sf.view(E8M0), ROW_MAJOR, to, (mn, k))
        back = cq.convert_scales(found, to, ROW_MAJOR, (mn, k))
        assert torch.equal(bits(back[-2:]), bits(sf[-2:]))
        del found, back


def test_offsets_past_32_bits(emulated):
    """A view of rows that lie far apart, most of which is never touched."""
    numbers = scale_bytes((3, 8 * 32))
    memory = torch.empty(2 * (2**31 + 64) + 8, dtype=torch.uint8)
    sf = memory.as_strided((3, 8), (2**31 + 64, 1))
    sf.copy_(numbers)
    out = emulated.convert(sf.view(E8M0), ROW_MAJOR, BLOCKED, (3, 256))
    assert torch.equal(storage_bits(out), by_hand(numbers, BLOCKED, 256)[1])
