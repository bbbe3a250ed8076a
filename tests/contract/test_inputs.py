"""Every input: dtypes, groups, formats, batches, short groups, rows and indices.

The expected bytes are those of `oracle`.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cute_quant import (
    DEEP_GEMM,
    DEEP_GEMM_32,
    DEEP_GEMM_SM90,
    GROUPWISE_FP8,
    MXFP4,
    MXFP8,
    NVFP4,
    Indexed,
    Masked,
    PrefixSum,
    dequantize,
    fake_quantize,
    quantize,
)
from cute_quant.contract.formats import Format
from cute_quant.contract.rows import Rows
from cute_quant.contract.upper_scales import UpperScale
from tests import oracle
from tests.exact import E2M1, E4M3, LARGEST
from tests.helpers import (
    BYTE_DTYPES,
    EVERY_DTYPE,
    EVERY_LAYOUT,
    INPUT_DTYPES,
    NVFP4_FORMATS,
    POISON,
    UE8M0,
    all_formats,
    as_arguments,
    assert_same_bits,
    bits,
    check_every_byte,
    decode_arguments,
    on_device,
    poisoned,
    poisoned_scales,
    poisoned_values,
    random_bits,
    storage_bits,
    upper_scale,
    whole_bytes,
)

every_format = pytest.mark.parametrize("fmt", all_formats(), ids=str)
# Each layout, of FP4 all and of other values as many.
FP4_OF_32 = [*all_formats((E2M1,), (32,)), *NVFP4_FORMATS]
formats_of_32 = pytest.mark.parametrize(
    "fmt", [*all_formats(BYTE_DTYPES, (32,)), *FP4_OF_32], ids=str
)
ONE_OF_EACH_LAYOUT = [
    *all_formats((E4M3,), (32,)),
    *(MXFP4, MXFP4.replace(scale_layout="mn_major_packed"), *NVFP4_FORMATS[::3]),
]
every_layout = pytest.mark.parametrize("fmt", ONE_OF_EACH_LAYOUT, ids=str)
every_input_dtype = pytest.mark.parametrize("input_dtype", INPUT_DTYPES, ids=str)


def inputs(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Return rows of five kinds, interleaved.

    They are random bits, finite bits, a normal distribution, zeros of both signs, and a small
    normal distribution with one NaN or Inf.
    """
    x = random_bits(shape, dtype, seed)
    rows = x.view(-1, shape[-1])
    generator = torch.Generator().manual_seed(seed)
    for i, row in enumerate(rows):
        normal = torch.randn(shape[-1], generator=generator)
        match (i + seed) % 6:
            case 1:
                row.copy_(row.where(row.isfinite(), 1.0))
            case 2 | 5:
                row.copy_(normal)
            case 3:
                row.fill_(-0.0)
                row[::3] = 0.0
            case 4:
                row.copy_(normal * 1e-6)
                row[i % shape[-1]] = (math.nan, math.inf, -math.inf)[i % 3]
    return x


def int32(values: object, device: str = "cpu") -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def check_on(
    x: torch.Tensor,
    fmt: Format,
    device: str,
    *,
    rows: Rows | None = None,
    index: torch.Tensor | None = None,
    **places: bool | int,
) -> None:
    """Compare every byte of a call on a device, whose tensors are on the CPU, with the oracle.

    Where values share bytes a last column is added to an odd number.
    """
    x = whole_bytes(x, fmt)
    index = None if index is None else index.to(device)
    check_every_byte(x.to(device), fmt, rows=on_device(rows, device), index=index, **places)


@every_format
def test_every_format(fmt, device):
    """Cover all value dtypes, groups and layouts, with short groups, batches and extra rows."""
    seed = 7 * abs(fmt.group_size)
    check_on(inputs((6, 70), torch.bfloat16, seed), fmt, device)
    check_on(inputs((3, 33), torch.float16, 1), fmt, device, last_padding=False)
    check_on(inputs((2, 3, 290), torch.float32, 2), fmt, device, extra_rows=2)
    check_on(inputs((2, 1, 2, 48), torch.float32, 4), fmt, device, last_padding=False, extra_rows=1)
    floor = 2.0**-9 if fmt.upper_scale else 2.0**-60
    check_on(inputs((5, 1), torch.float32, 5), fmt.replace(min_scale=floor), device)


@every_input_dtype
@pytest.mark.parametrize("dtype", EVERY_DTYPE, ids=str)
@pytest.mark.parametrize("min_scale", [0.0, 2.0**-149, 3e-39, 1e-4, 3.0, 2.0**100])
def test_floors_of_exponents(input_dtype, dtype, min_scale, device):
    fmt = DEEP_GEMM.replace(
        scale_layout="row_major", group_size=16, values=dtype, min_scale=min_scale
    )
    check_on(inputs((12, 70), input_dtype, 3), fmt, device)


@every_input_dtype
@pytest.mark.parametrize("dtype", EVERY_DTYPE, ids=str)
@pytest.mark.parametrize("round_scale", [False, True])
@pytest.mark.parametrize("min_scale", [2.0**-126, 1e-4, 3.0, 2.0**100])
def test_floors_of_floats(input_dtype, dtype, round_scale, min_scale, device):
    fmt = GROUPWISE_FP8.replace(
        group_size=16, values=dtype, round_scale=round_scale, min_scale=min_scale
    )
    check_on(inputs((12, 70), input_dtype, 3), fmt, device)


@pytest.mark.parametrize("dtype", EVERY_DTYPE, ids=str)
def test_all_values_and_all_ties(dtype, device):
    """Quantize with scale 1 each code, each midpoint of two codes, and the floats beside it."""
    largest = float(LARGEST[dtype])
    if dtype is torch.int8:
        values = torch.arange(0.0, 128.0)
    elif dtype is E2M1:
        values = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    else:
        codes = torch.arange(256, dtype=torch.uint8).view(dtype).float()
        values = codes[(codes.isfinite()) & (codes >= 0)].unique()
    middles = (values[1:] + values[:-1]) / 2
    up, down = torch.tensor(math.inf), torch.tensor(0.0)
    x = torch.cat([values, middles, middles.nextafter(up), middles.nextafter(down)])
    x = torch.cat([x, -x])
    x = torch.nn.functional.pad(x, (0, -len(x) % 15)).view(-1, 15)
    x = torch.cat([x, torch.full((len(x), 1), largest)], 1)
    for fmt in (DEEP_GEMM.replace(scale_layout="row_major"), GROUPWISE_FP8):
        check_on(x, fmt.replace(values=dtype, group_size=16), device)
    if dtype is E2M1:
        check_on(x, NVFP4, device, upper=UpperScale("encode_scale", torch.ones((), device=device)))


@every_input_dtype
@pytest.mark.parametrize("dtype", EVERY_DTYPE, ids=str)
def test_amax_beside_each_step_of_the_scale(input_dtype, dtype, device):
    """Quantize groups with amax M * 2^n, where the exponent steps, and the floats beside it."""
    largest = float(LARGEST[dtype])
    limits = torch.finfo(input_dtype)
    steps = (largest * 2.0 ** torch.arange(-165.0, 122.0, dtype=torch.float64)).to(input_dtype)
    steps = steps[steps.isfinite() & (steps > 0)]
    up, down = torch.tensor(math.inf, dtype=input_dtype), torch.tensor(0.0, dtype=input_dtype)
    extremes = torch.tensor(
        [limits.max, limits.tiny, limits.smallest_normal, 0.0], dtype=input_dtype
    )
    amax = torch.cat([steps, steps.nextafter(up), steps.nextafter(down), extremes])
    amax = torch.cat([amax, down.nextafter(up)[None]])
    x = amax[:, None] * torch.tensor([1.0, -0.5, 0.3, 0.0], dtype=input_dtype)
    fmt = DEEP_GEMM.replace(scale_layout="row_major", group_size=16, values=dtype, min_scale=0.0)
    check_on(x, fmt, device)
    fmt = GROUPWISE_FP8.replace(group_size=16, values=dtype, min_scale=2.0**-126)
    check_on(x, fmt, device)


@every_input_dtype
@formats_of_32
def test_random_bits(input_dtype, fmt, device):
    check_on(random_bits((2, 131, 333), input_dtype, 1), fmt, device)


ROWS = {
    "masked": (Masked(int32([0, 4, 9])), (3, 6, 33), None),
    "masked-clamped": (Masked(int32([-3, 2, 6])), (3, 6, 33), None),
    "masked-short": (Masked(int32([1, 3, 5])), (3, 5, 20), None),
    "masked-index": (Masked(int32([2, 5])), (4, 33), int32([[3, 9, 1, 1, 0], [2, -1, 4, 0, 3]])),
    "psum": (PrefixSum(int32([3, 5, 4, 12]), 4), (15, 33), None),
    "psum-clamped": (PrefixSum(int32([-2, 3, 99]), 2), (7, 33), None),
    "psum-overlapping": (PrefixSum(int32([5, 2, 4]), 1), (7, 33), None),
    "psum-128": (PrefixSum(int32([5, 130])), (133, 16), None),
    "psum-none": (PrefixSum(int32([])), (3, 33), None),
    "psum-index": (PrefixSum(int32([1, 6]), 4), (3, 33), int32([2, 2, 0, 1, 0, -7, 0])),
    "indexed": (Indexed(int32([0, 3, -1, 3, -5, 0])), (6, 33), None),
    "indexed-index": (Indexed(int32([0, -1, 7])), (4, 33), int32([3, 1, 4])),
    "index": (None, (4, 33), int32([3, 3, -1, 0, 4, 2**31 - 1, -(2**31)])),
    "index-2d": (None, (4, 33), int32([[3, 1, 9], [0, -1, 2]])),
    "index-of-nothing": (None, (0, 33), int32([0, -1, 2])),
}


@pytest.mark.parametrize("name", ROWS)
@formats_of_32
def test_rows(name, fmt, device):
    rows, shape, index = ROWS[name]
    x = inputs(shape, torch.bfloat16, 2) if shape[0] else torch.empty(shape)
    extra_rows = 0 if isinstance(rows, Masked) else 3
    check_on(x, fmt, device, rows=rows, index=index, extra_rows=extra_rows)
    check_on(x, fmt, device, rows=rows, index=index, last_padding=False)


@pytest.mark.parametrize("group_size", [16, 128, 256, -1])
@pytest.mark.parametrize("name", ["masked", "psum", "indexed", "index-2d"])
@pytest.mark.parametrize("layout", [fmt for fmt in EVERY_LAYOUT if not fmt.blocked], ids=str)
def test_rows_of_other_groups(name, layout, group_size, device):
    rows, shape, index = ROWS[name]
    fmt = layout.replace(group_size=group_size)
    x = inputs((*shape[:-1], 150), torch.float32, 1)
    check_on(x, fmt, device, rows=rows, index=index)


@every_layout
@pytest.mark.parametrize("mn", [1, 127, 128, 129, 300])
@pytest.mark.parametrize("k", [32, 127, 129, 160])
def test_more_than_a_block(mn, k, fmt, device):
    """Give each row and group a scale of its own, so that a scale in a wrong place shows."""
    x = torch.ones(2, mn, k) * 2.0 ** (torch.arange(mn)[:, None] % 97 - 40)
    x *= 2.0 ** (torch.arange(k) // 32)
    masked = Masked(int32([mn // 2, mn - mn // 3]))
    if fmt.upper_scale and not fmt.row_scale:
        x = x * 2.0**-20  # e4m3 scales have 18 binades
    for rows in (None, masked):
        check_on(x, fmt, device, rows=rows)


BLOCKED_OF_TORCH = [*(MXFP8.replace(values=dtype) for dtype in EVERY_DTYPE), NVFP4]


@pytest.mark.parametrize(("mn", "k"), [(1, 32), (5, 34), (128, 128), (130, 130), (300, 700)])
@pytest.mark.parametrize("fmt", BLOCKED_OF_TORCH, ids=str)
def test_blocked_scales_are_those_that_torch_makes(mn, k, fmt, device):
    """Rearrange row-major scales as torch documents for ``_scaled_mm``."""
    x = inputs((mn, k), torch.bfloat16).to(device)
    scale = as_arguments(upper_scale(x, fmt))
    _, row_major = quantize(x, fmt.replace(scale_layout="row_major"), **scale)
    _, blocked = quantize(x, fmt, **scale)
    groups = row_major.shape[1]
    row_blocks, column_blocks = -(-mn // 128), -(-groups // 4)
    padded = torch.zeros(128 * row_blocks, 4 * column_blocks, dtype=torch.uint8)
    padded[:mn, :groups] = row_major.view(torch.uint8).cpu()
    blocks = padded.view(row_blocks, 128, column_blocks, 4).permute(0, 2, 1, 3)
    expected = blocks.reshape(-1, 4, 32, 4).transpose(1, 2).reshape(-1)
    assert blocked.shape == expected.shape and blocked.is_contiguous()
    assert torch.equal(bits(blocked), expected)


@pytest.mark.parametrize("fmt", [MXFP8, MXFP4, NVFP4], ids=str)
def test_blocks_of_8_rows(fmt, device):
    """Blocks along k first, rows of a block in their order, four groups of a row together."""
    x = inputs((21, 330), torch.bfloat16).to(device)
    scale = as_arguments(upper_scale(x, fmt))
    _, row_major = quantize(x, fmt.replace(scale_layout="row_major"), **scale)
    _, blocked = quantize(x, fmt.replace(scale_layout="8x4"), **scale)
    padded = torch.zeros(24, -(-row_major.shape[1] // 4) * 4, dtype=torch.uint8)
    padded[:21, : row_major.shape[1]] = row_major.view(torch.uint8).cpu()
    expected = padded.view(3, 8, -1, 4).permute(0, 2, 1, 3).flatten()
    assert torch.equal(bits(blocked), expected)


@every_format
@pytest.mark.parametrize("shape", [(5, 70), (1, 70), (4, 1, 300), (2, 3, 5, 33), (1, 7, 1, 16)])
def test_shapes_and_strides(fmt, shape, device):
    x = whole_bytes(torch.ones(shape, device=device), fmt)
    *batch, mn, k = x.shape
    q, sf, *row_scales = quantize(x, fmt, **as_arguments(upper_scale(x, fmt)))
    columns = k // 2 if fmt.values is E2M1 else k
    assert q.shape == (*batch, mn, columns) and q.is_contiguous() and q.dtype is fmt.values
    assert [tuple(t.shape) for t in row_scales] == [(*batch, mn)] * fmt.row_scale
    groups = 1 if fmt.group_size == -1 else -(-k // fmt.group_size)
    aligned = -(-mn // 4) * 4
    packed = fmt.scale_layout in ("mn_major_packed", "row_major_packed")
    if fmt.scale_layout in ("128x4", "8x4"):
        size = int(fmt.scale_layout.removesuffix("x4"))
        expected = (*batch, -(-mn // size) * size * (-(-groups // 4) * 4))
    else:
        expected = (*batch, mn, -(-groups // 4) if packed else groups)
    assert sf.shape == expected and sf.dtype is (torch.int32 if packed else fmt.scale_dtype)
    if fmt.scale_layout in ("mn_major", "mn_major_packed"):
        assert sf.stride()[-2:] == (1, aligned)
        stride = aligned * expected[-1]
        for size, actual in zip(reversed(batch), reversed(sf.stride()[:-2]), strict=True):
            assert actual == stride
            stride *= size
        assert sf.untyped_storage().nbytes() == 4 * stride
    else:
        assert sf.is_contiguous() and sf.untyped_storage().nbytes() == sf.nbytes


def test_formats_share_their_values_and_numbers(device):
    x = inputs((3, 37, 300), torch.float32).to(device)
    for dtype in EVERY_DTYPE:
        row_major = DEEP_GEMM.replace(scale_layout="row_major", group_size=32, values=dtype)
        q, sf = quantize(x, row_major)
        exponents = bits(sf).view(3, 37, 10)
        for fmt in (DEEP_GEMM_32.replace(values=dtype), MXFP8.replace(values=dtype)):
            other_q, other_sf = quantize(x, fmt)
            assert_same_bits(q, other_q)
            for out in (torch.float32, torch.bfloat16):
                expected = dequantize(q, sf, row_major, dtype=out)
                assert_same_bits(dequantize(other_q, other_sf, fmt, dtype=out), expected)
        packed = quantize(x, DEEP_GEMM_32.replace(values=dtype))[1]
        assert torch.equal(bits(packed).view(3, 37, 12)[..., :10], exponents)
        rounded_q, rounded = quantize(
            x, GROUPWISE_FP8.replace(group_size=32, values=dtype, round_scale=True)
        )
        assert_same_bits(rounded_q, q)
        finite = exponents != 255
        wanted = 2.0 ** (exponents.float() - 127)
        assert torch.equal(rounded.cpu()[finite], wanted[finite])
        assert rounded.cpu()[~finite].isnan().all()
        for round_scale in (False, True):
            choices = {"group_size": 32, "values": dtype, "round_scale": round_scale}
            q, sf = quantize(x, DEEP_GEMM_SM90.replace(**choices))
            other_q, other_sf = quantize(x, GROUPWISE_FP8.replace(**choices))
            assert_same_bits(q, other_q)
            assert_same_bits(sf, other_sf)


# Strides, alignment, ownership.


def strided_views(device: str) -> list[torch.Tensor]:
    storage = inputs((40, 1000), torch.bfloat16, 1).flatten().to(device)
    shapes_strides_offsets = [
        ((5, 70), (70, 1), 1),
        ((5, 70), (71, 1), 3),
        ((5, 70), (0, 1), 5),
        ((5, 70), (33, 1), 0),  # rows that overlap
        ((3, 5, 70), (0, 70, 1), 2),
        ((3, 5, 70), (70, 210, 1), 0),  # the batch inside of the rows
        ((3, 5, 70), (1, 0, 1), 0),
        ((2, 3, 4, 33), (3 * 501, 501, 41, 1), 7),
        ((2, 1, 4, 33), (500, 99, 41, 1), 7),
        ((1, 5, 70), (12345, 70, 1), 1),
        ((4, 1, 70), (77, 12345, 1), 1),
        ((5, 1), (9, 9), 1),
        ((5, 1), (9, 0), 1),
    ]
    return [storage.as_strided(*arguments) for arguments in shapes_strides_offsets]


@every_layout
@pytest.mark.parametrize("case", range(13))
def test_any_strides_of_the_input(case, fmt, device):
    x = strided_views(device)[case]
    x = x[..., : x.shape[-1] // 2 * 2] if fmt.values is E2M1 and x.shape[-1] > 1 else x
    x = whole_bytes(x, fmt)
    before = bits(x)
    upper = upper_scale(x, fmt)
    results = quantize(x, fmt, **as_arguments(upper))
    expected = quantize(x.contiguous(), fmt, **as_arguments(upper))
    for result, wanted in zip(results, expected, strict=True):
        assert_same_bits(result, wanted)
        assert result.stride() == wanted.stride()
    y = dequantize(*expected[:2], fmt, dtype=x.dtype, **decode_arguments(upper, expected))
    assert_same_products(fake_quantize(x, fmt, **as_arguments(upper)), y)
    assert torch.equal(bits(x), before)


@pytest.mark.parametrize(
    ("shape", "strides"),
    [
        ((5, 33), (33, 1)),
        ((5, 33), (40, 1)),
        ((3, 5, 33), (165, 33, 1)),
        ((3, 5, 33), (400, 77, 1)),
        ((3, 5, 33), (35, 106, 1)),
        ((2, 3, 5, 33), (3 * 171, 171, 34, 1)),
        ((3, 1, 33), (50, 1, 1)),
        ((1, 5, 33), (1, 33, 1)),
        ((5, 1), (3, 1)),
        ((5, 1), (3, 7)),
    ],
)
@pytest.mark.parametrize("dtype", EVERY_DTYPE, ids=str)
def test_any_strides_of_the_values(shape, strides, dtype, device):
    """Write rows to a strided q: bytes before, between and after the rows stay."""
    extra_rows = 2 if shape[-2] == 5 else 0
    k = 2 * shape[-1] if dtype is E2M1 else shape[-1]
    storage = poisoned(4000, device)
    q = storage.view(dtype).as_strided(shape, strides, 13)
    x = inputs((*shape[:-2], shape[-2] - extra_rows, k), torch.float16).to(device)
    quantize(x, DEEP_GEMM.replace(group_size=16, values=dtype), out=(q, None))
    values, _ = quantize(x, DEEP_GEMM.replace(group_size=16, values=dtype))
    expected = poisoned(4000, "cpu")
    expected_q = expected.view(dtype).as_strided(shape, strides, 13)
    expected_q.view(torch.uint8).zero_()
    expected_q[..., : shape[-2] - extra_rows, :].view(torch.uint8).copy_(
        values.view(torch.uint8).cpu()
    )
    assert torch.equal(storage.cpu(), expected)


@formats_of_32
@pytest.mark.parametrize("batch_shape", [(), (3,), (2, 1, 2)])
@pytest.mark.parametrize("kind", ["dense", "masked"])
def test_nothing_outside_of_the_scales_is_touched(fmt, batch_shape, kind, device):
    mn, k, guard = 6, 150, 16
    rows = None
    if kind == "masked":
        batch_shape, rows = (3,), Masked(int32([0, 5, 6], device))
    x = inputs((*batch_shape, mn, k), torch.bfloat16).to(device)
    scale = as_arguments(upper_scale(x, fmt))
    own = poisoned_scales(fmt, mn, k, device, batch_shape=batch_shape)
    size = own.untyped_storage().nbytes() // own.element_size()
    arena = poisoned((size + 2 * guard) * own.element_size(), device)
    sf = arena.view(own.dtype).as_strided(own.shape, own.stride(), guard)
    further = [None] * fmt.row_scale
    quantize(x, fmt, rows=rows, out=(None, own, *further), **scale)
    quantize(x, fmt, rows=rows, out=(None, sf, *further), **scale)
    at = guard * own.element_size()
    assert torch.equal(arena.cpu()[at:-at], storage_bits(own))
    assert arena[:at].eq(POISON).all() and arena[-at:].eq(POISON).all()


@pytest.mark.parametrize("kind", ["dense", "masked"])
def test_nothing_outside_of_the_scales_of_rows_is_touched(kind, device):
    fmt, guard = NVFP4.replace(row_scale=True), 5
    x = inputs((3, 6, 150), torch.bfloat16).to(device)
    rows = Masked(int32([0, 5, 6], device)) if kind == "masked" else None
    arena = poisoned(4 * (18 + 2 * guard), device).view(torch.float32)
    own = arena[guard:-guard].view(3, 6)
    assert quantize(x, fmt, rows=rows, out=(None, None, own))[2] is own
    written = torch.zeros(18 + 2 * guard, dtype=torch.bool)
    counts = [0, 5, 6] if kind == "masked" else [6, 6, 6]
    for matrix, count in enumerate(counts):
        written[guard + 6 * matrix : guard + 6 * matrix + count] = True
    stored = arena.cpu().view(torch.uint8).view(-1, 4).eq(POISON).all(1)
    assert torch.equal(stored, ~written)


@pytest.mark.parametrize(
    "layout", [DEEP_GEMM, DEEP_GEMM_SM90, DEEP_GEMM.replace(scale_layout="row_major")], ids=str
)
@pytest.mark.parametrize(
    ("shape", "strides"), [((3, 1, 1), (4, 9, 9)), ((1, 6, 1), (5, 1, 77)), ((1, 1, 1), (3, 5, 7))]
)
def test_dimensions_of_size_one_have_any_stride(layout, shape, strides, device):
    fmt = layout.replace(group_size=32)
    if fmt.scale_layout == "row_major" and shape[0] > 1:
        strides = (1, 9, 9)
    sf = poisoned(400, device).view(fmt.sf_dtype).as_strided(shape, strides)
    x = inputs((*shape[:-1], 32), torch.bfloat16).to(device)
    quantize(x, fmt, out=(None, sf))
    assert_same_bits(sf, quantize(x, fmt)[1])


def test_outputs_overlap_nothing(device):
    arena = torch.zeros(4096, dtype=torch.uint8, device=device)
    x = torch.ones(4, 3, 32, device=device)
    q = arena[:384].view(torch.float8_e4m3fn).view(4, 3, 32)
    masked = Masked(arena[400:416].view(torch.int32))
    index = arena[416:464].view(torch.int32).view(4, 3)
    sf = arena[512:576].view(torch.int32).as_strided((4, 3, 1), (4, 1, 4))
    quantize(x, DEEP_GEMM_32, rows=masked, out=(q, sf))
    quantize(x[0], DEEP_GEMM_32, rows=masked, index=index, out=(q, sf))
    moved = arena[32:416].view(q.dtype).view(q.shape)
    with pytest.raises(ValueError, match=r"out q: .*overlaps rows.masked_m"):
        quantize(x, DEEP_GEMM_32, rows=masked, out=(moved, sf))
    moved = arena[448:512].view(torch.int32).as_strided((4, 3, 1), (4, 1, 4))
    with pytest.raises(ValueError, match=r"out sf: .*overlaps index"):
        quantize(x[0], DEEP_GEMM_32, rows=masked, index=index, out=(q, moved))
    # The padding rows of the last matrix count as well.
    ends = arena[572:576].view(torch.int32)
    with pytest.raises(ValueError, match=r"out sf: .*overlaps rows.ends"):
        sf = arena[560:572].view(torch.int32).as_strided((3, 1), (1, 4))
        quantize(x[0], DEEP_GEMM_32, rows=PrefixSum(ends), out=(None, sf))


# Empty inputs.

EMPTY = [(0, 70), (5, 0), (0, 0), (0, 5, 70), (2, 0, 70), (2, 5, 0), (3, 0, 2, 16), (0, 4, 0, 16)]


@every_format
@pytest.mark.parametrize("shape", EMPTY)
def test_nothing(fmt, shape, device):
    *batch, mn, k = shape
    x = torch.empty(shape, dtype=torch.bfloat16, device=device)
    upper = upper_scale(x, fmt, turn=0)
    results = quantize(x, fmt, **as_arguments(upper))
    q, sf = results[:2]
    groups = min(k, 1) if fmt.group_size == -1 else -(-k // fmt.group_size)
    columns = k // 2 if fmt.values is E2M1 else k
    assert q.shape == (*batch, mn, columns) and q.dtype is fmt.values
    assert all(t.shape == (*batch, mn) for t in results[2:])
    if fmt.blocked:
        size = int(fmt.scale_layout.removesuffix("x4"))
        assert sf.shape == (*batch, -(-mn // size) * size * (-(-groups // 4) * 4))
    else:
        assert sf.shape == (*batch, mn, -(-groups // 4) if fmt.packed else groups)
    y = dequantize(q, sf, fmt, **decode_arguments(upper, results))
    assert y.shape == shape and y.dtype == torch.bfloat16
    assert fake_quantize(x, fmt, **as_arguments(upper)).shape == shape
    own_q = poisoned_values(mn + 3, k, device, fmt.values, tuple(batch))
    own_sf = fmt.empty_scales(batch, mn, k, x.device)
    quantize(x, fmt, out=(own_q, own_sf, *results[2:]), **as_arguments(upper))
    assert bits(own_q).eq(0).all()


@every_layout
def test_no_rows_of_a_kind(fmt, device):
    def empty(*shape):
        return torch.empty(shape, dtype=torch.int32, device=device)

    x = torch.empty(0, 6, 70, device=device)
    cases = [
        (x, Masked(empty(0)), None),
        (torch.ones(2, 0, 70, device=device), Masked(int32([3, -1], device)), None),
        (x[:, 0], PrefixSum(empty(0)), None),
        (x[:, 0], PrefixSum(int32([0, 5], device)), None),
        (x[:, 0], Indexed(empty(0)), None),
        (x[:, 0], None, empty(0)),
        (torch.ones(3, 70, device=device), None, empty(0)),
        (torch.ones(3, 70, device=device), None, empty(0, 4)),
        (torch.ones(3, 70, device=device), Masked(empty(0)), empty(0, 4)),
        (torch.ones(3, 0, device=device), None, int32([1, 1], device)),
    ]
    for x, rows, index in cases:
        upper = upper_scale(x, fmt, index, turn=0)
        results = quantize(x, fmt, rows=rows, index=index, **as_arguments(upper))
        q, sf = results[:2]
        shape = x.shape if index is None else (*index.shape, x.shape[-1])
        assert q.shape == (*shape[:-1], fmt.value_columns(shape[-1])) and q.numel() == 0
        assert dequantize(q, sf, fmt, **decode_arguments(upper, results)).shape == shape


# Multiplying back.


def assert_same_products(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Compare all bits but those of NaN."""
    assert_same_bits(actual.nan_to_num(7.0, 8.0, 9.0), expected.nan_to_num(7.0, 8.0, 9.0))
    assert torch.equal(actual.isnan(), expected.isnan())


@every_format
@every_input_dtype
def test_fake_quantize(fmt, input_dtype, device):
    x = inputs((2, 6, 290), input_dtype).to(device)
    upper = upper_scale(x, fmt, turn=abs(fmt.group_size) + len(fmt.text))
    scale = as_arguments(upper)
    for min_scale in (2.0**-9 if fmt.upper_scale else 1e-10, 1.0, "deepgemm"):
        fmt = fmt.replace(min_scale=min_scale)
        y = fake_quantize(x, fmt, **scale)
        results = quantize(x, fmt, **scale)
        further = decode_arguments(upper, results)
        assert_same_products(y, dequantize(*results[:2], fmt, dtype=input_dtype, **further))
        assert_same_products(y.cpu(), oracle.fake_quantize(x, fmt, upper))
        assert y.is_contiguous()
    storage = torch.zeros(2, 7, 300, dtype=input_dtype, device=device)
    out = storage[:, :6, :290]
    assert fake_quantize(x, fmt, out=out, **scale) is out
    assert_same_products(out, y)
    assert storage[:, 6].eq(0).all() and storage[:, :, 290:].eq(0).all()


@formats_of_32
def test_dequantize_any_strides(fmt, device):
    x = inputs((2, 1, 6, 150), torch.float32).to(device)
    upper = upper_scale(x, fmt)
    results = quantize(x, fmt, **as_arguments(upper))
    q, sf = results[:2]
    further = {"dtype": torch.float32, **decode_arguments(upper, results)}
    expected = dequantize(q, sf, fmt, **further)
    strided_q = torch.empty(6, 2, q.shape[-1], 1, dtype=torch.uint8, device=device)
    strided_q = strided_q.permute(1, 3, 0, 2).view(q.dtype)
    strided_q.view(torch.uint8).copy_(q.view(torch.uint8))
    strided_sf = torch.empty((*sf.shape, 3), dtype=sf.dtype, device=device)[..., 1]
    strided_sf.copy_(sf)
    if fmt.blocked:
        with pytest.raises(ValueError, match="sf: expected the bytes of blocks to be contiguous"):
            dequantize(q, strided_sf, fmt, **further)
        strided_sf = sf
    assert_same_products(dequantize(strided_q, strided_sf, fmt, **further), expected)
    assert_same_products(expected.cpu(), oracle.dequantize(*_on_cpu(q, sf, fmt, upper, results)))


def _on_cpu(q, sf, fmt, upper, results):
    if fmt.row_scale:
        upper = UpperScale("decode_scale", results[2])
    return q.cpu(), sf.cpu(), fmt, torch.float32, upper


@pytest.mark.parametrize("fmt", NVFP4_FORMATS, ids=str)
def test_dequantize_takes_any_decode_scale(fmt, device):
    """Also 0, NaN and numbers beyond the range of a quantizer's."""
    x = inputs((3, 5, 70), torch.float32).to(device)
    q, sf = quantize(x, fmt, **as_arguments(upper_scale(x, fmt)))[:2]
    given = torch.tensor([0.0, 2.0**-149, 3.0, -1.0, math.nan, math.inf, 1e38, 1.0, 2.0])
    given = given.repeat(2)[:15].view(3, 5) if fmt.row_scale else given[[0, 3, 4]]
    given = given.to(device)
    y = dequantize(q, sf, fmt, decode_scale=given, dtype=torch.float32)
    upper = UpperScale("decode_scale", given)
    assert_same_products(y.cpu(), oracle.dequantize(q.cpu(), sf.cpu(), fmt, torch.float32, upper))


@pytest.mark.parametrize("dtype", BYTE_DTYPES, ids=str)
@pytest.mark.parametrize("out", [torch.bfloat16, torch.float16, torch.float32])
def test_dequantize_every_code_and_scale(dtype, out, device):
    """Compare all 256 x 256 products of values and UE8M0 bytes with those in float64."""
    q = torch.arange(256, dtype=torch.uint8).view(dtype).expand(256, 256)
    sf = torch.arange(256, dtype=torch.uint8).view(torch.float8_e8m0fnu)[:, None]
    fmt = DEEP_GEMM.replace(values=dtype, group_size=-1, scale_layout="row_major")
    y = dequantize(q.to(device), sf.to(device), fmt, dtype=out).cpu()
    scales = 2.0 ** (torch.arange(256, dtype=torch.float64) - 127)
    scales[255] = torch.nan
    expected = (q.double() * scales[:, None]).float().to(out)
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("scales", [UE8M0, NVFP4.replace(scale_layout="row_major")], ids=str)
@pytest.mark.parametrize("out", [torch.bfloat16, torch.float16, torch.float32])
def test_dequantize_every_nibble_and_scale(scales, out, device):
    """Compare the products of all pairs of codes and all bytes of scales with those in float64."""
    content = torch.arange(256, dtype=torch.uint8).repeat(256, 1)
    fmt = scales.replace(values=E2M1, scale_layout="row_major")
    size = 128 if scales is UE8M0 else 16
    sf = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, 512 // size)
    sf = sf.view(fmt.sf_dtype)
    magnitudes = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float64)
    values = torch.cat([magnitudes, -magnitudes])[
        torch.stack([content & 15, content >> 4], 2).int()
    ]
    scale = {} if size == 128 else {"encode_scale": torch.tensor(3.0, device=device)}
    y = dequantize(content.view(E2M1).to(device), sf.to(device), fmt, dtype=out, **scale).cpu()
    multipliers = sf[:, :1].double()
    if size == 16:
        multipliers = (multipliers * torch.tensor(1 / 3, dtype=torch.float32)).float().double()
    expected = (values.flatten(1) * multipliers).float().to(out)
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)


@every_input_dtype
@pytest.mark.parametrize("dtype", EVERY_DTYPE, ids=str)
def test_dead_rows_multiply_back_to_zero(input_dtype, dtype, device):
    x = inputs((6, 70), input_dtype, 1).where(torch.tensor(True), 0).to(device)
    rows = Indexed(int32([0, -1, -1, 0, -1, 0], device))
    for layout in (DEEP_GEMM, DEEP_GEMM_SM90):
        fmt = layout.replace(group_size=32, values=dtype)
        q, sf = quantize(x, fmt, rows=rows)
        y = dequantize(q, sf, fmt, dtype=input_dtype)
        assert y[[1, 2, 4]].eq(0).all()


@formats_of_32
@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf])
@every_input_dtype
def test_one_special_value_poisons_its_group_alone(special, input_dtype, fmt, device):
    x = torch.randn(4, 150, generator=torch.Generator().manual_seed(0)).to(device, input_dtype)
    upper = upper_scale(x, fmt)
    clean = fake_quantize(x, fmt, **as_arguments(upper)).cpu()
    x[0, 0], x[1, 149], x[2, 40] = special, special, special
    results = quantize(x, fmt, **as_arguments(upper))
    q, sf = results[:2]
    y = dequantize(q, sf, fmt, dtype=input_dtype, **decode_arguments(upper, results)).cpu()
    nan_byte = 0 if fmt.values in (torch.int8, E2M1) else 0x7F
    size = abs(fmt.group_size)
    for row, column in ((0, 0), (1, 149), (2, 40)):
        group = slice(column // size * size, min(column // size * size + size, 150))
        if fmt.row_scale:
            group = slice(0, 150)  # the row has one scale, which is NaN
        columns = slice(group.start // 2, group.stop // 2) if fmt.values is E2M1 else group
        assert bits(q[row, columns]).eq(nan_byte).all()
        clean[row, group] = math.nan
    torch.testing.assert_close(y, clean, rtol=0, atol=0, equal_nan=True)


@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_hypothesis(data):
    hypothesis_inputs(data, "cpu")


@pytest.mark.gpu
@settings(max_examples=500, deadline=None)
@given(data=st.data())
def test_hypothesis_on_gpu(data):
    hypothesis_inputs(data, "cuda")


def hypothesis_inputs(data, device):
    fmt = data.draw(st.sampled_from(all_formats()))
    floors = [0.0, 2.0**-6, 448.0] if fmt.upper_scale else [1e-10, 2.0**-126, 1.0]
    fmt = fmt.replace(min_scale=data.draw(st.sampled_from(floors)))
    dtype = data.draw(st.sampled_from(INPUT_DTYPES))
    k = data.draw(st.integers(1, 70))
    kind = data.draw(st.sampled_from(["dense", "masked", "psum", "indexed"]))
    indexed = data.draw(st.booleans())
    mn = data.draw(st.integers(1, 9))
    batch = data.draw(st.integers(1, 3)) if kind == "masked" or data.draw(st.booleans()) else None
    batch = None if kind in ("psum", "indexed") else batch
    shape = (mn,) if batch is None else (batch, mn)

    def numbers(count: int, low: int, high: int) -> torch.Tensor:
        drawn = st.lists(st.integers(low, high), min_size=count, max_size=count)
        return int32(data.draw(drawn))

    rows = None
    if kind == "masked":
        rows = Masked(numbers(batch, -2, mn + 2))
    elif kind == "psum":
        count = data.draw(st.integers(0, 4))
        rows = PrefixSum(numbers(count, -2, mn + 2), data.draw(st.integers(1, 6)))
    elif kind == "indexed":
        rows = Indexed(numbers(mn, -3, 3))
    index = None
    seed = data.draw(st.integers(0, 2**31))
    x = inputs((*shape, k), dtype, seed)
    if indexed:
        tokens = data.draw(st.integers(1, 5))
        index = numbers(math.prod(shape), -2, tokens + 1).view(shape)
        x = inputs((tokens, k), dtype, seed)
    check_on(
        x,
        fmt,
        device,
        extra_rows=0 if kind == "masked" else data.draw(st.integers(0, 3)),
        last_padding=data.draw(st.booleans()),
        rows=rows,
        index=index,
    )


def test_rows_that_do_not_exist_may_hold_anything(device):
    """NaN and Inf in dead rows show in no result; masked rows of q and sf keep their bytes."""
    x = torch.ones(2, 4, 64, device=device)
    x[0, 2:] = math.nan
    x[1] = math.inf
    rows = Masked(int32([2, 0], device))
    q, sf = check_every_byte(x, UE8M0, rows=rows)
    assert bits(q[0, 2:]).eq(POISON).all() and bits(q[1]).eq(POISON).all()
    assert bits(sf[1]).eq(POISON).all()
