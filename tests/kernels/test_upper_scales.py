"""Upper scales of groups of rows, the better of two scales, and several tiles of a thread."""

import itertools

import numpy as np
import pytest
import torch

from cute_quant import (
    DEEP_GEMM,
    DEEP_GEMM_SM90,
    MXFP4,
    MXFP8,
    NVFP4,
    Format,
    Indexed,
    Masked,
    PrefixSum,
    quantize,
)
from cute_quant.contract.prologues import make_rms_norm
from cute_quant.contract.upper_scales import UpperScale
from cute_quant.kernels.config import Tile
from tests.helpers import ARCHITECTURES, bits, storage_bits
from tests.kernels.cases import special_groups
from tests.kernels.emulated_gpu import Gpu
from tests.oracle import TABLES

BF16 = torch.bfloat16
E2M1 = TABLES[torch.float4_e2m1fn_x2]
E4M3 = TABLES[torch.float8_e4m3fn]

every_arch = pytest.mark.parametrize("arch", ARCHITECTURES)


def int32(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


DOMAINS = {
    "prefix sum": (PrefixSum(int32(5, 5, 20, 40, 33), 8), 5),
    "many groups": (PrefixSum(torch.arange(1, 41, dtype=torch.int32), 1), 40),
    # Rows 3 to 19 belong to groups 0 and 34, rows 12 to 29 to 34 and 36.
    "groups that overlap": (PrefixSum(int32(20, *[3] * 33, 30, 12, 50), 1), 37),
    "no groups": (PrefixSum(int32(), 1), 0),
    "indexed": (Indexed(torch.arange(50, dtype=torch.int32) * 7 % 6 - 1), 3),
}
every_domain = pytest.mark.parametrize("name", DOMAINS)


def group_of_each_row(rows, mn):
    """The first group that has a row, -1 of none."""
    if isinstance(rows, Indexed):
        return rows.m_indices.tolist()
    groups, start = [-1] * mn, 0
    for group, end in enumerate(rows.ends.tolist()):
        for row in range(start, min(end, mn)):
            groups[row] = group if groups[row] < 0 else groups[row]
        start = -(-end // rows.alignment) * rows.alignment
    return groups


def expected_of_groups(x, scales, rows):
    """Each row as its group's scale quantizes it alone; nothing of rows in no group."""
    fmt = NVFP4.replace(scale_layout="row_major")
    q = torch.zeros(x.shape[0], x.shape[1] // 2, dtype=torch.uint8)
    sf = torch.zeros(x.shape[0], fmt.groups(x.shape[1]), dtype=torch.uint8)
    for row, group in enumerate(group_of_each_row(rows, x.shape[0])):
        if group < 0:
            continue
        if group >= len(scales):
            sf[row] = 0x7F
            continue
        results = quantize(x[row : row + 1], fmt, encode_scale=scales[group])
        q[row], sf[row] = (t.view(torch.uint8)[0] for t in results)
    return q, sf


@every_domain
def test_each_group_of_rows_has_a_scale(name):
    (rows, count), k = DOMAINS[name], 80
    x, scales = torch.randn(50, k, dtype=BF16), torch.rand(count) * 100 + 50
    q, sf = quantize(x, NVFP4.replace(scale_layout="row_major"), rows=rows, encode_scale=scales)
    expected = expected_of_groups(x, scales, rows)
    assert torch.equal(q.view(torch.uint8), expected[0])
    assert torch.equal(sf.view(torch.uint8), expected[1])


@every_arch
@every_domain
@pytest.mark.parametrize(
    ("k", "rows_per_thread"), [(80, 1), pytest.param(1040, 2, marks=pytest.mark.slow)]
)
def test_kernels_read_the_scale_of_a_group(kernels, arch, name, k, rows_per_thread):
    rows, count = DOMAINS[name]
    x, scales = torch.randn(50, k, dtype=BF16), torch.rand(count) * 100 + 50
    upper = UpperScale("decode_scale", scales.reciprocal())
    results = Gpu(kernels, arch, rows_per_thread).quantize(
        x, None, None, NVFP4, rows=rows, upper=upper
    )
    expected = quantize(x, NVFP4, rows=rows, decode_scale=upper.tensor)
    for actual, wanted in zip(results, expected, strict=True):
        assert torch.equal(bits(actual), bits(wanted))


def test_norms_read_the_scale_of_a_group(kernels):
    rows, count = DOMAINS["prefix sum"]
    x, scales = torch.randn(50, 80, dtype=BF16), torch.rand(count) * 100 + 50
    norm = make_rms_norm(
        torch.ones(80, dtype=BF16), eps=1e-6, weight_offset=0.0, rounding="unfused"
    )
    gpu = Gpu(kernels, "sm_90a")
    upper = UpperScale("encode_scale", scales)
    results = gpu.quantize(x, None, None, NVFP4, rows=rows, prologue=norm, upper=upper)
    normalized = torch.nn.functional.rms_norm(x.float(), (80,), None, 1e-6).to(BF16)
    expected = quantize(normalized, NVFP4, rows=rows, encode_scale=scales)
    for actual, wanted in zip(results, expected, strict=True):
        assert (bits(actual) != bits(wanted)).float().mean() < 0.01


@pytest.mark.parametrize(("shape", "rows"), [((5,), PrefixSum(int32(3, 6))), ((2,), None)])
def test_scales_that_fit_no_group(shape, rows):
    x = torch.randn(6, 32)
    with pytest.raises(ValueError, match=r"encode_scale: expected shape .*, got \(\d,\)"):
        quantize(x, NVFP4, rows=rows, encode_scale=torch.ones(shape))


def test_check_looks_at_each_group():
    x, rows = torch.randn(6, 32), PrefixSum(int32(3, 6), 1)
    scales = torch.tensor([640.0, 600.0])
    assert len(quantize(x, NVFP4, rows=rows, encode_scale=scales, check=True)) == 2
    scales[1] = 1e-4
    with pytest.raises(ValueError, match=r"encode_scale: expected about 2688 / amax .* mixed up"):
        quantize(x, NVFP4, rows=rows, encode_scale=scales, check=True)


# The better of two scales, in numpy.


def nearest(values, table):
    """The numbers of the table's entries nearest to magnitudes, ties to the even one."""
    middles = (table[1:] + table[:-1]) / 2
    below, through = (np.searchsorted(middles, values, side) for side in ("left", "right"))
    return np.where(below % 2 == 0, below, through)


def float32(values):
    return np.asarray(values, np.float64).astype(np.float32).astype(np.float64)


def expected_of_two(x, encode):
    """Values and scales of groups (n, 16) under an encode scale."""
    decode = float32(1 / encode)
    sixth = float32(encode * float32(1 / 6))
    base = float32(np.abs(x).max(-1) * sixth)
    tried = []
    for quotient in (base, float32(1.5 * base)):
        scale = E4M3[nearest(np.minimum(quotient, 448), E4M3)]
        factor = float32(scale * decode)
        with np.errstate(divide="ignore"):
            multiplier = np.where(scale == 0, 0, float32(1 / factor))
        codes = nearest(np.abs(float32(x * multiplier[:, None])), E2M1)
        products = float32(np.copysign(E2M1[codes], x) * factor[:, None])
        error = np.zeros(len(x))
        for column in np.abs(float32(products - x)).T:
            error = float32(error + column)
        tried.append((codes, scale, error))
    better = tried[1][2] < tried[0][2]
    codes, scales, _ = (
        np.where(better[(...,) + (None,) * (b.ndim - 1)], b, a) for a, b in zip(*tried, strict=True)
    )
    return codes, scales, better


def test_the_better_of_two_scales():
    x = torch.randn(512, 64, dtype=BF16)
    encode = torch.tensor(2688.0) / x.abs().amax().float()
    fmt = NVFP4.replace(four_over_six=True, scale_layout="row_major")
    q, sf = quantize(x, fmt, encode_scale=encode)
    groups = x.double().numpy().reshape(-1, 16)
    codes, scales, better = expected_of_two(groups, np.float64(encode.item()))
    packed = q.view(torch.uint8)
    actual = torch.stack([packed & 7, packed >> 4 & 7], -1).numpy().reshape(-1, 16)
    assert np.array_equal(actual, codes)
    assert np.array_equal(sf.double().numpy().ravel(), scales)
    assert 0.2 < better.mean() < 0.8


@every_arch
@pytest.mark.parametrize("row_scale", [False, True])
def test_kernels_find_the_better_of_two_scales(kernels, arch, row_scale):
    fmt = NVFP4.replace(four_over_six=True, row_scale=row_scale)
    # Rows of special groups are not finite; the others have finite scales of their own.
    finite = torch.randn(8, 560, generator=torch.Generator().manual_seed(1)).to(BF16)
    x = torch.cat([special_groups(24, 560, BF16, 3, fmt), finite])
    upper = None if row_scale else UpperScale("amax", torch.tensor(20.0))
    arguments = {} if upper is None else {"amax": upper.tensor}
    results = Gpu(kernels, arch).quantize(x, None, None, fmt, upper=upper)
    for actual, wanted in zip(results, quantize(x, fmt, **arguments), strict=True):
        assert torch.equal(bits(actual), bits(wanted))


def test_the_smaller_of_two_scales_without_errors(kernels, arch):
    """A group of 6 alone is 6 times 1, and 4 times 1.5."""
    fmt = NVFP4.replace(four_over_six=True, scale_layout="row_major")
    x, amax = torch.full((3, 32), 6.0), torch.tensor(2688.0)
    on_gpu = Gpu(kernels, arch).quantize(x, None, None, fmt, upper=UpperScale("amax", amax))
    for q, sf in (quantize(x, fmt, amax=amax), on_gpu):
        assert bits(sf).eq(0x38).all() and bits(q).eq(0x77).all()


# Several tiles of a thread.

IN_EVERY_RUN = 2
TILED = (
    (NVFP4, Tile(tiles_per_thread=2)),
    (NVFP4.replace(scale_layout="8x4"), Tile(rows_per_thread=2, tiles_per_thread=2)),
    (NVFP4.replace(scale_layout="mn_major_packed"), Tile(tiles_per_thread=3, column_warps=2)),
    (NVFP4.replace(scale_layout="row_major_packed"), Tile(rows_per_thread=2)),
    (NVFP4.replace(scale_layout="row_major"), Tile(rows_per_thread=4, tiles_per_thread=2)),
    (NVFP4, Tile(rows_per_thread=3)),  # does not divide a block
    (MXFP4, Tile(rows_per_thread=2, tiles_per_thread=2)),
    (MXFP8, Tile(tiles_per_thread=2)),
    (DEEP_GEMM, Tile(tiles_per_thread=2)),  # a tile has one word
    (DEEP_GEMM.replace(group_size=256), Tile(tiles_per_thread=2)),  # half of one
    (DEEP_GEMM_SM90, Tile(rows_per_thread=2, tiles_per_thread=2, row_warps=2)),
)


@pytest.mark.parametrize(
    ("fmt", "tile", "arch"),
    [
        pytest.param(*case, arch, marks=() if i < IN_EVERY_RUN else pytest.mark.slow)
        for i, (case, arch) in enumerate(zip(TILED, itertools.cycle(ARCHITECTURES), strict=False))
    ],
)
@pytest.mark.parametrize("k", [544, 2176])
def test_every_tile_of_a_thread(kernels, fmt: Format, tile: Tile, arch, k):
    gpu = Gpu(kernels, arch, tile=tile)
    for mn, rows, batch in ((13, None, ()), (9, Masked(int32(5, 9)), (2,))):
        x = special_groups(mn * max(1, len(batch) * 2), k, BF16, k, fmt).view(*batch, mn, k)
        upper = UpperScale("encode_scale", torch.tensor(3.0)) if fmt.upper_scale else None
        arguments = {} if upper is None else {"encode_scale": upper.tensor}
        given, expected = (
            (
                torch.full((*batch, mn, fmt.value_columns(k)), 0xA5, dtype=torch.uint8),
                fmt.empty_scales(batch, mn, k, "cpu"),
            )
            for _ in range(2)
        )
        for _, sf in (given, expected):
            torch.empty(0, dtype=torch.uint8).set_(sf.untyped_storage()).fill_(0xA5)
        given, expected = ((q.view(fmt.values), sf) for q, sf in (given, expected))
        gpu.quantize(x, *given, fmt, rows=rows, upper=upper)
        quantize(x, fmt, rows=rows, out=expected, **arguments)
        for actual, wanted in zip(given, expected, strict=True):
            assert torch.equal(storage_bits(actual), storage_bits(wanted))
