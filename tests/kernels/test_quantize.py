"""The quantizer's kernels against the oracle, every byte, for both architectures."""

import itertools
import math

import pytest
import torch

from cute_quant import (
    DEEP_GEMM,
    DEEP_GEMM_SM90,
    GROUPWISE_FP8,
    MXFP4,
    MXFP8,
    NVFP4,
    ROWWISE_FP8,
    ROWWISE_INT8,
    convert_scales,
    quantize,
)
from cute_quant.contract.dtypes import ceil_div
from cute_quant.contract.formats import Format
from cute_quant.contract.rows import Indexed, Masked, PrefixSum, PrefixSumWithGaps
from cute_quant.contract.upper_scales import KINDS, UpperScale
from cute_quant.kernels.config import DOWN, MAX_GRID_Y, ONE_ROW, Domain, QuantizeSpec, Tile
from tests import oracle
from tests.helpers import (
    ARCHITECTURES,
    EVERY_DTYPE,
    EVERY_GROUP_SIZE,
    EVERY_LAYOUT,
    FLOAT32,
    INPUT_DTYPES,
    NVFP4_FORMATS,
    POISON,
    UE8M0,
    all_formats,
    poisoned,
    poisoned_row_scales,
    poisoned_scales,
    poisoned_values,
    random_bits,
    storage_bits,
    upper_scale,
)
from tests.kernels.cases import (
    DTYPES,
    EVERY_FORMAT,
    assert_same_storage,
    check,
    check_dequantize,
    check_fake,
    quantized,
    special_groups,
    strided,
)
from tests.kernels.emulated_gpu import Gpu

BF16, FP16, FP32 = INPUT_DTYPES
E4M3, E5M2, INT8, E2M1 = EVERY_DTYPE

# Of each dtype, group size and layout some, of k that are and are not multiples of everything.
MIXED = (
    (BF16, DEEP_GEMM.replace(values=E4M3), 640),
    (FP32, NVFP4, 130),
    (FP16, DEEP_GEMM_SM90.replace(group_size=16, values=INT8, round_scale=True), 100),
    (BF16, NVFP4.replace(scale_layout="row_major_packed", row_scale=True), 544),
    (FP16, MXFP4.replace(scale_layout="8x4"), 100),
    (BF16, DEEP_GEMM.replace(scale_layout="row_major", group_size=256, values=E4M3), 544),
    (FP32, MXFP8.replace(values=E5M2), 130),
    (FP32, ROWWISE_FP8.replace(values=INT8), 1000),
    (BF16, DEEP_GEMM.replace(group_size=-1, values=E5M2), 7),
    (FP16, DEEP_GEMM.replace(group_size=64, values=E4M3), 520),
    (FP32, DEEP_GEMM_SM90.replace(values=E5M2), 513),
    (BF16, NVFP4.replace(scale_layout="8x4"), 512),
    (FP16, GROUPWISE_FP8.replace(values=E2M1), 1000),
)
BYTE_MIXED = tuple(mixed for mixed in MIXED if mixed[1].values is not E2M1)
PER_ROW = NVFP4.replace(row_scale=True)

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_format = pytest.mark.parametrize("fmt", EVERY_FORMAT, ids=str)


def mixed_id(mixed: tuple) -> str:
    dtype, fmt, k = mixed
    return f"{str(dtype).removeprefix('torch.')}-{fmt!s}-{k}"


def on_mixed(first: int, mixed: tuple = MIXED):
    """Half of `mixed` for an architecture, the other half for the other."""
    cases = [(ARCHITECTURES[(i + first) % 2], case) for i, case in enumerate(mixed)]
    ids = [f"{arch}-{mixed_id(case)}" for arch, case in cases]
    return pytest.mark.parametrize(("arch", "mixed"), cases, ids=ids)


@pytest.fixture(params=[1, 2], ids=["one row a thread", "two rows a thread"])
def any_rows_gpu(request, kernels, arch) -> Gpu:
    return Gpu(kernels, arch, request.param)


def batch(shape: tuple[int, ...], k: int, dtype: torch.dtype, fmt: Format, seed=1) -> torch.Tensor:
    return special_groups(math.prod(shape), k, dtype, seed, fmt).view(*shape, k)


def numbers(shape: tuple[int, ...], low: int, high: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high + 1, shape, generator=generator, dtype=torch.int32)


# Dense rows


@pytest.mark.parametrize(("dtype", "rows_per_thread"), [(BF16, 1), (BF16, 2), (FP16, 1)], ids=str)
@every_format
def test_shapes(kernels, arch, dtype, rows_per_thread, fmt):
    gpu = Gpu(kernels, arch, rows_per_thread)
    for mn, groups in ((1, 1), (3, 2), (4, 4), (5, 5), (31, 8), (33, 9), (6, 3)):
        x = special_groups(mn, 128 * groups, dtype, groups)
        check(gpu, x, fmt, last_padding=groups > 3)


@pytest.mark.slow
@every_format
def test_more_rows_of_q(any_rows_gpu, fmt):
    for mn, extra in ((1, 1), (1, 4), (3, 1), (4, 1), (5, 3), (5, 32), (33, 7)):
        x = special_groups(mn, 640, BF16, extra)
        check(any_rows_gpu, x, fmt, extra_rows=extra)
        check(any_rows_gpu, x, fmt, extra_rows=extra, last_padding=False)


@pytest.mark.slow
@every_dtype
@every_format
@pytest.mark.parametrize("min_scale", [2.0**-126, 2.0**-40, 1.0, 2.0**100])
def test_min_scale(gpu, dtype, fmt, min_scale):
    check(gpu, special_groups(13, 512, dtype, 3), fmt.replace(min_scale=min_scale))


@every_dtype
def test_no_min_scale(gpu, dtype):
    check(gpu, special_groups(13, 512, dtype, 3), UE8M0.replace(min_scale=0.0))


@pytest.mark.slow
@every_dtype
@every_format
def test_every_pattern_as_amax(gpu, dtype, fmt):
    magnitudes = torch.arange(2**15, dtype=torch.int32).to(torch.int16)
    x = torch.zeros(2**15, 128, dtype=torch.int16)
    lanes = torch.arange(128)
    # Neighbours below the amax, of all magnitudes and both signs; amax moves along the group.
    x[:] = magnitudes[:, None] * lanes // 128
    x[torch.arange(2**15), torch.arange(2**15) % 128] = magnitudes
    x[:, ::3] |= -(2**15)
    check(gpu, x.view(dtype).view(-1, 1024), fmt)


@pytest.mark.parametrize("fmt", all_formats(group_sizes=[16])[::5], ids=str)
def test_every_exponent_of_float32(gpu, fmt):
    """As amax, with the mantissas at which a scale or the rounding to the float32 scale steps."""
    exponents = torch.arange(256, dtype=torch.int32).view(-1, 1) << 23
    largest = torch.tensor(fmt.value_type.max).view(torch.int32) & 0x7FFFFF
    mantissas = [0, 1, largest - 1, largest, largest + 1, 0x7FFFFF, 0x555555, 0x400001]
    amax = (exponents | torch.tensor(mantissas)).to(torch.int32).view(128, -1, 1)
    x = random_bits((128, amax.shape[1], 16), FP32, seed=4).view(torch.int32)
    x = torch.minimum(x & 0x7FFFFFFF, amax) | x & -(2**31)
    x[:, :, 5] = amax[:, :, 0]
    check(gpu, x.view(FP32).flatten(1), fmt)


@every_dtype
@every_format
def test_random_bits(gpu, dtype, fmt):
    check(gpu, random_bits((130, 1536), dtype, seed=5), fmt)


# Two values a byte


FP4 = (NVFP4, MXFP4.replace(scale_layout="8x4"), PER_ROW)
every_fp4 = pytest.mark.parametrize("fmt", FP4, ids=str)


@every_fp4
def test_fp4(gpu, fmt):
    """Rows, short groups, batches, gathered and masked rows; what k is a multiple of changes."""
    for mn, k in ((1, 16), (5, 544), (9, 130)):
        check(gpu, special_groups(mn, k, BF16, k, fmt), fmt, extra_rows=mn % 3)
    x = batch((3, 9), 96, BF16, fmt)
    check(gpu, x, fmt, rows=Masked(torch.tensor([9, 0, 5], dtype=torch.int32)))
    check(gpu, x[0], fmt, index=numbers((7,), -2, 10, 3))


@pytest.mark.parametrize("turn", range(9))
def test_upper_scales(gpu, turn):
    """Each kind of argument, of each shape."""
    x = batch((2, 5), 160, BF16, NVFP4) * torch.tensor([1.0, 2.0**-12], dtype=BF16).view(2, 1, 1)
    upper = upper_scale(x, NVFP4, turn=turn)
    check(gpu, x, NVFP4, upper=upper)
    check(gpu, x, NVFP4.replace(min_scale=2.0**-9), upper=upper)
    if turn < 3 or turn == 7:
        check_fake(gpu, x, NVFP4, upper=upper)
        (q, sf), _ = quantized(x, NVFP4)
        check_dequantize(gpu, q, sf, NVFP4, BF16, upper)


@pytest.mark.parametrize("kind", KINDS)
def test_every_upper_scale(gpu, kind):
    """At the edges of its range, beyond it, and no numbers, for groups of all magnitudes."""
    values = [2.0**e for e in (-149, -126, -118, -117, -116, 0, 1, 116, 117, 118, 127)]
    values += [0.0, -0.0, -1.0, torch.inf, -torch.inf, torch.nan, 2688 * 2.0**-117, 3.0, 1e-30]
    given = torch.tensor(values)
    x = torch.randn(len(values), 3, 160, generator=torch.Generator().manual_seed(1))
    exponents = torch.arange(len(values) * 30).view(-1, 3, 10, 1) % 250 - 140
    x = torch.ldexp(x.unflatten(2, (10, 16)), exponents)
    check(gpu, x.flatten(2), NVFP4, upper=UpperScale(kind, given))


def test_groups_beside_each_step_of_an_e4m3_scale(gpu):
    """All e4m3 scales, the ties between them, and the floats beside those; underflow among them."""
    codes = torch.arange(0x7F, dtype=torch.uint8).view(E4M3).double()
    steps = torch.cat([codes, (codes[1:] + codes[:-1]) / 2])
    encode = torch.tensor([1.0, 1.7, 3.3e5, 0.01])
    amax = (steps * 6 / encode.double()[:, None]).float()
    amax = torch.cat([amax, *(amax.nextafter(torch.tensor(v)) for v in (0.0, torch.inf))], 1)
    x = amax.unsqueeze(2) * torch.linspace(-1, 1, 16)
    x = torch.nn.functional.pad(x, (0, 0, 0, -x.shape[1] % 4)).view(4, -1, 64)
    check(gpu, x, NVFP4, upper=UpperScale("encode_scale", encode))


def test_rows_of_several_tiles_a_thread(kernels, arch):
    """The amax of each row lies in another tile."""
    x = torch.randn(4, 1040, generator=torch.Generator().manual_seed(1)).to(BF16)
    for row, column in enumerate((3, 520, 1000, 1039)):
        x[row, column] = 30.0
    gpu = Gpu(kernels, arch)
    check(gpu, x, PER_ROW)
    assert gpu.launched[-1].kernel.spec.tile.tiles_per_thread == 2


@pytest.mark.parametrize("fmt", [PER_ROW, ROWWISE_FP8], ids=str)
def test_scales_of_rows_of_several_matrices(kernels, arch, fmt):
    """A CTA of several warps goes round a loop with its barriers for them."""
    x = torch.randn(5, 3, 1040, generator=torch.Generator().manual_seed(1)).to(BF16)
    check(Gpu(kernels, arch, max_grid=2), x, fmt)


# Rows that are one group


def rows_with_amax_at(columns: tuple[int, ...], k: int) -> torch.Tensor:
    """Return rows, each with its amax in another column."""
    x = torch.randn(len(columns), k, generator=torch.Generator().manual_seed(1)).to(BF16)
    for row, column in enumerate(columns):
        x[row, column] = -30.0 - row
    return x


@pytest.mark.parametrize(
    ("fmt", "shape"),
    [
        (ROWWISE_FP8, {}),
        (DEEP_GEMM.replace(group_size=-1), {"held": False, "max_warps": 2}),
        pytest.param(
            ROWWISE_INT8, {"held": False, "max_warps": 2}, marks=pytest.mark.slow, id="int8"
        ),
    ],
    ids=["held", "two passes", None],
)
def test_a_row_that_is_one_group(kernels, arch, fmt, shape):
    """Its amax lies in any tile of any warp, and in any pass over the tiles of a long row."""
    x = rows_with_amax_at((3, 600, 1500, 2000, 2570, 3000), 3001)
    gpu = Gpu(kernels, arch, tile=ONE_ROW._replace(tiles_per_thread=2), **shape)
    check(gpu, x, fmt)
    check(gpu, special_groups(9, 3001, BF16, 2, fmt), fmt, extra_rows=1)


@pytest.mark.parametrize("held", [True, False])
def test_experts_whose_rows_are_one_group(kernels, arch, held):
    fmt = DEEP_GEMM.replace(group_size=-1)
    x = batch((3, 9), 1200, BF16, fmt)
    tile = ONE_ROW._replace(tiles_per_thread=2)
    gpu = Gpu(kernels, arch, tile=tile, max_grid=4, held=held, max_warps=2)
    check(gpu, x, fmt, rows=Masked(torch.tensor([9, 0, 5], dtype=torch.int32)))
    check(gpu, x[0], fmt, index=numbers((7,), -2, 10, 3))


@pytest.mark.slow
@pytest.mark.parametrize("k", [16385, 32768, 32769])
def test_longest_rows_of_each_kernel(kernels, arch, k):
    gpu = Gpu(kernels, arch)
    check(gpu, rows_with_amax_at((0, k // 2, k - 1), k), ROWWISE_FP8)
    assert gpu.launched[-1].kernel.spec.held == (k <= 32768)


def test_every_tie_of_two_codes(gpu):
    values = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    middles = (values[1:] + values[:-1]) / 2
    x = torch.cat([values, middles, *(middles.nextafter(torch.tensor(v)) for v in (0.0, 9.0))])
    x = torch.cat([x, -x, torch.zeros(2)]).view(-1, 15)
    x = torch.cat([x, torch.full((len(x), 1), 6.0)], 1)
    check(gpu, x, NVFP4, upper=UpperScale("encode_scale", torch.ones(())))
    check(gpu, x, MXFP4)


@every_fp4
def test_multiplying_fp4_back(gpu, fmt):
    x = special_groups(5, 160, FP16, 1, fmt)
    check_fake(gpu, x, fmt)
    (q, sf), upper = quantized(x, fmt)
    check_dequantize(gpu, q, sf, fmt, FP16, upper)


# Every format


def _rotated() -> list[tuple]:
    """Each group size with each layout; dtypes, results, k and architectures take turns."""
    aligned, ragged = (512, 1040, 2064, 96, 16), (1, 7, 100, 130, 513, 1000, 2047)
    cases = []
    for (g, size), (i, layout) in itertools.product(
        enumerate(EVERY_GROUP_SIZE), enumerate(EVERY_LAYOUT)
    ):
        if layout.blocked and size != 32:
            continue
        ks = (aligned, ragged)[(g + i) % 2]
        fmt = layout.replace(group_size=size, values=EVERY_DTYPE[(3 * g + i) % 4])
        mixed = INPUT_DTYPES[(g + i) % 3], fmt, ks[(g + 3 * i) % len(ks)]
        cases.append((ARCHITECTURES[(g + i // 2) % 2], mixed))
    for i, fmt in enumerate(NVFP4_FORMATS):
        mixed = INPUT_DTYPES[i % 3], fmt, (1040, 2, 130, 512, 18)[i // 2]
        cases.append((ARCHITECTURES[(i + i // 2) % 2], mixed))
    return cases


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "mixed"), _rotated(), ids=lambda v: mixed_id(v) if isinstance(v, tuple) else v
)
def test_formats(gpu, mixed):
    dtype, fmt, k = mixed
    for mn, extra_rows in ((1, 0), (5, 2), (12, 0)):
        x = special_groups(mn, k, dtype, mn, fmt)
        check(gpu, x, fmt, extra_rows=extra_rows, last_padding=mn != 5)


TWO_ROWS_FORMATS = all_formats([E4M3], [32, 256])  # FP4 takes two tiles instead
TWO_ROWS = [(INPUT_DTYPES[i % 3], fmt, 0) for i, fmt in enumerate(TWO_ROWS_FORMATS)]


@pytest.mark.slow
@on_mixed(0, TWO_ROWS)
def test_two_rows_a_thread(kernels, arch, mixed):
    dtype, fmt, _ = mixed
    gpu = Gpu(kernels, arch, rows_per_thread=2)
    for mn, k in ((1, 32), (5, 544), (12, 1280), (7, 96)):
        check(gpu, special_groups(mn, k, dtype, mn, fmt), fmt, last_padding=False)
        assert gpu.launched[-1].kernel.spec.tile.rows_per_thread == 2


BYTE_TILES, FP4_TILES = (Tile(8, 8), Tile(row_warps=8)), (Tile(8, 8), Tile(8, 4))
HOPPER_TILES = [
    (tile, *mixed)
    for mixed in MIXED
    if not mixed[1].by_row
    for tile in (FP4_TILES if mixed[1].values is E2M1 else BYTE_TILES)
]


@pytest.mark.parametrize(
    ("tile", "dtype", "fmt", "k"),
    [
        case if i < 4 else pytest.param(*case, marks=pytest.mark.slow)
        for i, case in enumerate(HOPPER_TILES)
    ],
    ids=lambda v: f"{v.values_per_thread}x{v.row_warps}" if isinstance(v, Tile) else str(v),
)
def test_tiles_of_hopper(kernels, tile, dtype, fmt, k):
    """Of 8 warps, or of half a word of packed scales."""
    gpu = Gpu(kernels, "sm_90a", tile=tile)
    for mn, extra_rows in ((1, 0), (5, 2), (33, 0)):
        x = special_groups(mn, k, dtype, mn, fmt)
        check(gpu, x, fmt, extra_rows=extra_rows, last_padding=mn != 5)
        assert gpu.launched[-1].kernel.spec.tile == tile


# Addresses


@pytest.mark.parametrize("fmt", [UE8M0, FLOAT32], ids=str)
def test_strided_rows(any_rows_gpu, fmt):
    rows = special_groups(5, 640, BF16, seed=0)
    for x_stride, q_stride in ((656, 640), (640, 656), (1280, 1024), (704, 768)):
        check(any_rows_gpu, strided(rows, x_stride), fmt, q_strides=(q_stride,))


@pytest.mark.slow
@on_mixed(0, BYTE_MIXED[:4])
def test_every_width_of_access(gpu, mixed):
    """Rows that start at multiples of fewer bytes, for their stride or the first one's place."""
    dtype, fmt, k = mixed
    rows = special_groups(5, k, dtype, 2, fmt)
    k = 2 * k if k % 16 else k
    widest = 32 // dtype.itemsize
    seen = set()
    for i in range(6):
        step = 1 << i
        for x_offset, x_stride, q_offset, q_stride in (
            (step, 32, 16, step),
            (32, step, step, 16),
        ):
            x = strided(rows, k // 32 * 32 + 32 + x_stride % 32, x_offset % (2 * widest))
            q_row = k // 32 * 32 + 32 + q_stride % 16
            check(gpu, x, fmt, q_strides=(q_row,), q_offset=q_offset % 32)
            access = gpu.launched[-1].kernel.spec.access
            seen |= {("load", access.load_bytes), ("store", access.store_bytes)}
    loads = {("load", dtype.itemsize << i) for i in range(6) if dtype.itemsize << i <= 32}
    assert seen == loads | {("store", 1 << i) for i in range(5)}


def test_offsets_past_32_bits(any_rows_gpu):
    """Rows and matrices gigabytes apart: offsets in elements do not fit 32 bits, signed or not."""
    stride = 2**30 - 16
    rows = special_groups(6, 128, BF16, 1)
    for shape, strides in (((6, 128), (stride, 1)), ((2, 3, 128), (3 * stride, stride, 1))):
        x = torch.empty(5 * stride + 128, dtype=BF16).as_strided(shape, strides)
        x.copy_(rows.view(shape))
        batch_shape, mn = shape[:-2], shape[-2]
        q, expected_q = (poisoned_values(mn, 128, "cpu", E4M3, batch_shape) for _ in range(2))
        sf, expected_sf = (
            poisoned_scales(UE8M0, mn, 128, "cpu", batch_shape=batch_shape) for _ in range(2)
        )
        any_rows_gpu.quantize(x, q, sf, UE8M0)
        oracle.quantize_into(x.clone(), expected_q, expected_sf, UE8M0)
        assert torch.equal(q.view(torch.uint8), expected_q.view(torch.uint8))
        assert torch.equal(storage_bits(sf), storage_bits(expected_sf))


ROW_MAJOR_16 = DEEP_GEMM.replace(group_size=16, scale_layout="row_major")
FLOAT32_16 = DEEP_GEMM_SM90.replace(group_size=16)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fmt", "batches", "mn", "k", "tiles_per_thread"),
    [
        (ROW_MAJOR_16, 1, 2**26 + 32, 512, 1),
        (ROW_MAJOR_16, 3, 2**25, 512, 1),
        (FLOAT32_16, 1, 2**26 + 32, 512, 1),
        (FLOAT32_16, 1, 2**26 + 32, 528, 2),
        (FLOAT32_16, 1, 2**25 + 32, 1040, 2),
    ],
    ids=["row-major", "batch", "mn-major", "from tile to tile", "first tile"],
)
def test_scales_past_32_bits(kernels, arch, fmt, batches, mn, k, tiles_per_thread):
    """More than 2^31 scales: run the blocks that have the last rows.

    An index makes one row of all, and q has so few rows that they hardly need memory.
    """
    row = special_groups(1, k, BF16, 1, fmt)
    index = torch.zeros(batches, mn, dtype=torch.int32)
    q = poisoned_values(4, k, "cpu", batch_shape=(batches,))
    sf = fmt.empty_scales((batches,), mn, k, "cpu")
    assert sf.numel() > 2**31
    # Has no loop over rows.
    tile = Tile(cta_order=DOWN, tiles_per_thread=tiles_per_thread)
    spec = QuantizeSpec(BF16, fmt, tile, Domain(gathered=True, batched=True))
    column_ctas = ceil_div(k, tile.columns * tile.column_warps * tiles_per_thread)
    kernels.get(spec, arch)(
        *(row, q, sf, None, None, index, None, 0, 1, 1, fmt.floor),
        outputs=(q, sf),
        only=[(mn // tile.rows - 1, column, batches - 1) for column in range(column_ctas)],
    )
    _, expected = quantize(row, fmt)
    written = sf[batches - 1, -tile.rows :].contiguous().view(torch.uint8)
    assert (written == expected.contiguous().view(torch.uint8)).all()


# Batches


@pytest.mark.slow
@on_mixed(1, MIXED[:6])
def test_batches(kernels, arch, mixed):
    dtype, fmt, k = mixed
    for rows_per_thread in (1, 2) if k % 32 == 0 else (1,):
        gpu = Gpu(kernels, arch, rows_per_thread)
        x = batch((3, 9), k, dtype, fmt)
        check(gpu, x, fmt)
        check(gpu, x, fmt, extra_rows=3, last_padding=False)
        check(gpu, x[:, :5], fmt, last_padding=False)
        check(gpu, x[1:2, :1], fmt)
        check(gpu, batch((9, 3), k, dtype, fmt).transpose(0, 1), fmt)
        check(gpu, batch((2, 2, 3), k, dtype, fmt), fmt)
        step = k + -k % 16
        check(gpu, x, fmt, q_strides=(10 * step, step))


@pytest.mark.slow
@on_mixed(0, (MIXED[1], *MIXED[4:7]))
def test_more_rows_and_matrices_than_the_grid_counts(kernels, arch, mixed):
    dtype, fmt, k = mixed
    gpu = Gpu(kernels, arch, rows_per_thread=1, max_grid=2)
    check(gpu, special_groups(21, k, dtype, 1, fmt), fmt, extra_rows=1, last_padding=False)
    assert gpu.launched[-1].host.launches[-1].grid[1:] == (2, 1)
    check(gpu, batch((5, 9), k, dtype, fmt), fmt)
    assert gpu.launched[-1].host.launches[-1].grid[1:] == (2, 2)
    check(gpu, special_groups(9, k, dtype, 1, fmt), fmt, index=numbers((21,), -3, 12, seed=1))


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "rows_per_thread"), [("sm_100a", 2), ("sm_90a", 1)])
def test_more_rows_than_the_grid_counts(kernels, arch, rows_per_thread):
    """The limit that is: run blocks whose rows lie at the edges."""
    gpu = Gpu(kernels, arch, rows_per_thread)
    rows_per_cta = 4 * rows_per_thread
    mn = MAX_GRID_Y * rows_per_cta + 5
    x = random_bits((mn, 128), BF16, seed=2)
    q, expected_q = (poisoned_values(mn, 128, "cpu") for _ in range(2))
    sf, expected_sf = (poisoned_scales(UE8M0, mn, 128, "cpu", False) for _ in range(2))
    blocks = [(0, y, 0) for y in (0, 1, 2, MAX_GRID_Y - 1)]
    gpu.quantize(x, q, sf, UE8M0, only=blocks)
    oracle.quantize_into(x, expected_q, expected_sf, UE8M0)
    ran = torch.zeros(mn, dtype=torch.bool)
    for first in (rows_per_cta * (y + more) for _, y, _ in blocks for more in (0, MAX_GRID_Y)):
        ran[first : first + rows_per_cta] = True
    for actual, expected in ((q, expected_q), (sf, expected_sf)):
        actual, expected = (storage_bits(t).view(mn, -1) for t in (actual, expected))
        assert torch.equal(actual[ran], expected[ran])
        assert (actual[~ran] == POISON).all()


# Rows that a tensor names


@pytest.mark.slow
@on_mixed(1, MIXED[:6])
def test_gathered(gpu, mixed):
    """Indices that repeat, that are negative, and that are past the rows of x."""
    dtype, fmt, k = mixed
    x = special_groups(11, k, dtype, 1, fmt)
    extremes = torch.tensor([-1, 0, 10, 11, -(2**31), 2**31 - 1, 5], dtype=torch.int32)
    for index in (extremes, numbers((9,), -2, 13, 1), extremes[:1]):
        check(gpu, x, fmt, index=index, extra_rows=2, last_padding=False)
    check(gpu, x, fmt, index=numbers((3, 5), -2, 13, 2))
    check(gpu, x[:0], fmt, index=extremes)


@pytest.mark.slow
@on_mixed(0)
def test_masked(kernels, arch, mixed):
    """With one CTA for each expert, which walk over all of them, and with many."""
    dtype, fmt, k = mixed
    gathered = MIXED.index(mixed) % 4 > 1
    extremes = torch.tensor([9, -(2**31), 1, 2**31 - 1, 0], dtype=torch.int32)
    for turn, (experts, max_m, counts) in enumerate(
        (
            (5, 9, extremes),
            (1, 9, extremes[:1]),
            (2, 4, extremes[1:3]),
            (40, 3, numbers((40,), -1, 4, seed=1)),
            (5, 2, extremes.new_zeros(5)),
        )
    ):
        index = numbers((experts, max_m), -2, 12, turn) if gathered else None
        x = batch((11,) if gathered else (experts, max_m), k, dtype, fmt)
        for gpu in (Gpu(kernels, arch, row_ctas=experts), Gpu(kernels, arch, sms=132)):
            check(gpu, x, fmt, rows=Masked(counts), index=index, last_padding=bool(turn % 2))


@pytest.mark.slow
def test_masked_experts_of_several_chunks(kernels, arch):
    counts = numbers((600,), -1, 6, seed=3).where(numbers((600,), 0, 3, seed=4) == 0, 0)
    x = batch((600, 5), 128, BF16, UE8M0)
    for row_ctas in (600, 1200):
        check(Gpu(kernels, arch, row_ctas=row_ctas), x, UE8M0, rows=Masked(counts))
    for last in (256, 257, 512):
        counts[last - 1] = 5  # has tiles to be shared
        check(Gpu(kernels, arch, row_ctas=last), x[:last], UE8M0, rows=Masked(counts[:last]))


def test_ctas_that_are_no_multiple_of_the_experts(kernels, arch):
    """The last CTA has no tile to itself, and shares the others."""
    counts = torch.tensor([9, 2, 9], dtype=torch.int32)
    gpu = Gpu(kernels, arch, row_ctas=4)
    check(gpu, batch((3, 9), 128, BF16, UE8M0), UE8M0, rows=Masked(counts))


@pytest.mark.slow
@on_mixed(1)
def test_prefix_sums(kernels, arch, mixed):
    """Ends that are in no order, negative, or past the rows; none at all, and more than a warp."""
    dtype, fmt, k = mixed
    gathered = MIXED.index(mixed) % 4 < 2
    m = 21
    x = batch((11 if gathered else m,), k, dtype, fmt)
    index = numbers((m,), -2, 12, 5) if gathered else None
    gpu = Gpu(kernels, arch, rows_per_thread=2)
    for alignment, ends in (
        (1, numbers((40,), 0, m, 1).sort()[0]),
        (4, torch.tensor([3, 3, 9, 14], dtype=torch.int32)),
        (8, torch.tensor([2, 17, -3, 40, 9, -(2**31), 2**31 - 1], dtype=torch.int32)),
        (128, torch.tensor([5, 21], dtype=torch.int32)),
        (4, numbers((40,), -2, m + 5, 2)),
        (2**31 - 1, torch.tensor([5, 21], dtype=torch.int32)),
        (1, numbers((0,), 0, 1, 1)),
    ):
        rows = PrefixSum(ends, alignment)
        check(gpu, x, fmt, rows=rows, index=index, extra_rows=3, last_padding=False)


@pytest.mark.slow
@on_mixed(0)
def test_indexed(kernels, arch, mixed):
    dtype, fmt, k = mixed
    gathered = MIXED.index(mixed) % 4 < 2
    x = batch((11 if gathered else 21,), k, dtype, fmt)
    index = numbers((21,), -2, 12, 5) if gathered else None
    gpu = Gpu(kernels, arch, rows_per_thread=2)
    for indices in (numbers((21,), -1, 1, 1), numbers((21,), -(2**31), 2**31 - 1, 2)):
        check(gpu, x, fmt, rows=Indexed(indices), index=index, extra_rows=1, last_padding=False)


# Values times scales


@pytest.mark.slow
@on_mixed(1)
def test_fake_quantize(kernels, arch, mixed):
    dtype, fmt, k = mixed
    gpu = Gpu(kernels, arch, rows_per_thread=2)
    check_fake(gpu, special_groups(7, k, dtype, 1, fmt), fmt)
    row = k + k % 2 + 1
    check_fake(gpu, batch((3, 5), k, dtype, fmt), fmt, strides=(6 * row, row), offset=1)
    check_fake(gpu, batch((5, 3), k, dtype, fmt).transpose(0, 1), fmt.replace(min_scale=1.0))


@pytest.mark.slow
@on_mixed(0)
def test_dequantize(kernels, arch, mixed):
    """Rows that are aligned and that are not, columns of scales without their padding."""
    dtype, fmt, k = mixed
    for shape, max_grid in (((5,), 65535), ((2, 3, 9), 2)):
        gpu = Gpu(kernels, arch, max_grid=max_grid)
        x = batch(shape, k, dtype, fmt)
        (q, sf), upper = quantized(x, fmt)
        check_dequantize(gpu, q, sf, fmt, dtype, upper)
        check_dequantize(gpu, strided(q, k + 3, offset=1), sf, fmt, FP32, upper)


def test_fake_quantize_smallest_scales(gpu):
    """Scales of 2^-127, which is no normal float32."""
    x = special_groups(5, 512, FP32, 1)
    for exponent in (-120, -122, -126):
        small = torch.randn(5, 512, generator=torch.Generator().manual_seed(1)) * 2.0**exponent
        check_fake(gpu, small, UE8M0.replace(min_scale=0.0))
    check_fake(gpu, x, UE8M0.replace(min_scale=0.0))


def test_dequantize_every_scale(gpu):
    """The byte 0 is 2^-127, which is no normal float32, and 255 is NaN."""
    q = torch.ones(256, 128).to(E4M3)
    bytes_of_rows = torch.arange(256, dtype=torch.int32)
    for fmt in (UE8M0, UE8M0.replace(scale_layout="row_major")):
        sf = bytes_of_rows.view(256, 1)
        if not fmt.packed:
            sf = sf.to(torch.uint8).view(fmt.sf_dtype)
        check_dequantize(gpu, q, sf, fmt, FP32)


def test_dequantize_scales_past_32_bits(gpu):
    """Scales of two matrices gigabytes apart."""
    q, sf = quantize(batch((2, 4), 128, BF16, UE8M0), UE8M0)
    step = 2**29 + 4
    far = torch.empty(step + 4, dtype=torch.int32).as_strided((2, 4, 1), (step, 1, 4))
    far.copy_(sf)
    check_dequantize(gpu, q, far, UE8M0, BF16)


def test_several_blocks_of_scales(gpu):
    """Two blocks along M, and two along k of which the second is one group wide."""
    x = special_groups(130, 160, BF16, 1, MXFP8)
    check(gpu, x, MXFP8)
    check_dequantize(gpu, *quantize(x, MXFP8), MXFP8, BF16)


# Columns of scales without padding rows


def dense_scales(fmt, batch_shape, mn, k):
    """Return scales whose columns follow each other in poisoned memory, and that memory."""
    columns, guard = fmt.columns(k), 7
    count = math.prod(batch_shape) * mn * columns
    storage = poisoned((count + guard) * fmt.sf_dtype.itemsize, "cpu").view(fmt.sf_dtype)
    sf = storage[:count].view(*batch_shape, columns, mn).mT
    return sf, storage[count:]


@pytest.mark.parametrize("fmt", [UE8M0, FLOAT32], ids=str)
def test_columns_without_padding_rows(gpu, fmt):
    """The scales of dense, masked, stacked and batched rows; nothing is written beside them."""
    k, ends = 640, torch.tensor([3, 7], dtype=torch.int32)
    for batch_shape, mn, rows in (
        ((), 7, None),
        ((), 10, PrefixSum(ends, 4)),
        ((3,), 5, Masked(torch.tensor([5, 0, 2], dtype=torch.int32))),
        ((2,), 6, None),
    ):
        x = batch((*batch_shape, mn), k, BF16, fmt)
        found = []
        for run in (
            gpu.quantize,
            lambda x, q, sf, fmt, rows: quantize(x, fmt, rows=rows, out=(q, sf)),
        ):
            q = poisoned(x.numel(), "cpu").view(fmt.values).view(x.shape)
            sf, guard = dense_scales(fmt, batch_shape, mn, k)
            before = guard.clone()
            run(x, q, sf, fmt, rows)
            assert torch.equal(guard, before)
            found.append((q, sf))
        for name, actual, expected in zip(("q", "sf"), *found, strict=True):
            assert_same_storage(name, actual, expected)
        q, sf = quantize(x, fmt, rows=rows)
        live = torch.ones(x.shape[:-1], dtype=torch.bool)
        if isinstance(rows, Masked):
            live = torch.arange(mn) < rows.masked_m[:, None]
        assert torch.equal(
            sf[live].contiguous().view(torch.int32), found[0][1][live].view(torch.int32)
        )


@pytest.mark.parametrize("fmt", [UE8M0, FLOAT32, MXFP4, PER_ROW], ids=str)
def test_gaps_that_are_kept(gpu, fmt):
    """Rows between groups hold what they held, on the CPU too; those past the last are zeros."""
    mn, k, ends = 22, 640, torch.tensor([3, 9, 9, 18], dtype=torch.int32)
    live = torch.tensor([*[1] * 3, 0, *[1] * 5, *[0] * 3, *[1] * 6, *[0] * 4], dtype=torch.bool)
    x = special_groups(mn, k, BF16, 4, fmt)
    x = x.where(x.isfinite(), 1.0)

    def on_cpu(x, q, sf, fmt, rows, row_scales):
        quantize(x, fmt, rows=rows, out=(q, sf, *([] if row_scales is None else [row_scales])))

    def on_gpu(x, q, sf, fmt, rows, row_scales):
        gpu.quantize(x, q, sf, fmt, rows, row_scales=row_scales)

    found = []
    for run, kind in (
        (on_gpu, PrefixSumWithGaps),
        (on_cpu, PrefixSumWithGaps),
        (on_cpu, PrefixSum),
    ):
        q = poisoned_values(mn + 2, fmt.value_columns(k), "cpu").view(fmt.values)
        sf = poisoned_scales(fmt, mn, k, "cpu")
        row_scales = poisoned_row_scales((mn,), "cpu") if fmt.row_scale else None
        run(x, q, sf, fmt, kind(ends, 4), row_scales)
        found.append((q, sf, *([] if row_scales is None else [row_scales])))
    for on_gpu_, on_cpu_ in zip(*found[:2], strict=True):
        assert_same_storage("gaps", on_gpu_, on_cpu_)
    q, zeroed = found[1][0].view(torch.uint8), found[2][0].view(torch.uint8)
    assert q[:mn][~live].eq(POISON).all() and not q[mn:].any()
    assert torch.equal(q[:mn][live], zeroed[:mn][live]) and not zeroed[:mn][~live].any()
    if not fmt.blocked:
        sf, zeroed = (t[1].contiguous().view(torch.uint8) for t in found[1:])
        assert sf[~live].eq(POISON).all() and torch.equal(sf[live], zeroed[live])
    if fmt.row_scale:
        assert found[1][2][~live].contiguous().view(torch.uint8).eq(POISON).all()


def test_a_gap_that_is_kept_and_a_group_in_the_rows_of_a_thread(kernels):
    """Also where rows of padding of blocks are skipped."""
    x = special_groups(22, 640, BF16, 4, MXFP8)
    rows = PrefixSumWithGaps(torch.tensor([2, 9, 9, 17], dtype=torch.int32), 3)
    x = x.where(x.isfinite(), 1.0)
    found = []
    for run in (
        Gpu(kernels, "sm_90a", rows_per_thread=2).quantize,
        lambda x, q, sf, fmt, rows: quantize(x, fmt, rows=rows, out=(q, sf)),
    ):
        q = poisoned_values(22, 640, "cpu").view(MXFP8.values)
        sf = poisoned_scales(MXFP8, 22, 640, "cpu")
        run(x, q, sf, MXFP8, rows)
        found.append((q, sf))
    for actual, expected in zip(*found, strict=True):
        assert_same_storage("gaps", actual, expected)


def test_gaps_that_are_kept_have_no_index():
    rows = PrefixSumWithGaps(torch.tensor([3], dtype=torch.int32))
    x, index = torch.ones(4, 128, dtype=BF16), torch.arange(4, dtype=torch.int32)
    with pytest.raises(ValueError, match="index: expected None for rows=PrefixSumWithGaps"):
        quantize(x, rows=rows, index=index)
    sf = quantize(x)[1]
    with pytest.raises(ValueError, match="rows: expected PrefixSum, got PrefixSumWithGaps"):
        convert_scales(sf, DEEP_GEMM, DEEP_GEMM, (4, 128), rows=rows)


@pytest.mark.parametrize("fmt", [MXFP8, NVFP4.replace(row_scale=True)], ids=str)
def test_padding_of_a_block_needs_no_arithmetic(kernels, fmt, capsys):
    """A thread of a row that x has not stores a scale of 0, and looks for no amax."""
    x = batch((2,), 512, BF16, fmt)
    shuffles = []
    for row in (0, 100):
        check(Gpu(kernels, "sm_90a", tile=ONE_ROW), x, fmt, watch=((row, 0, 0), (0, 0, 0)))
        shuffles.append(capsys.readouterr().out.count("shfl"))
    assert shuffles[0] > 0 and not shuffles[1]
