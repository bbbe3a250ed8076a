"""More elements, bytes, rows, columns and experts than 32 bits or one dimension of a grid count.

Too much for the reference, so it sees some rows: the first, the last, and those beside each power
of two that an index could overflow. All others are compared with what the same kernel makes of
small pieces. Results lie in poisoned memory, with guards where an overflow downward would write.
"""

from __future__ import annotations

import pytest
import torch

from cute_quant import (
    DEEP_GEMM,
    DEEP_GEMM_SM90,
    GROUPWISE_FP8,
    INT8,
    MXFP8,
    NVFP4,
    ROWWISE_FP8,
    Indexed,
    Masked,
    PrefixSum,
    dequantize,
    fake_quantize,
    quantize,
)
from cute_quant.contract.dtypes import SCALE_ROW_ALIGNMENT, align
from cute_quant.contract.format_choices import MAX_COLUMNS
from cute_quant.contract.formats import Format
from cute_quant.contract.tensors import MAX_SIZE
from tests.helpers import (
    FLOAT32,
    POISON,
    UE8M0,
    assert_same_bits,
    check_every_byte,
    on_device,
    poisoned_scales,
    poisoned_values,
)

pytestmark = pytest.mark.gpu

PIECE_ROWS = 1024 * MXFP8.block_rows
"""Rows of a piece: with 16 to 8192 columns less than 2^31 elements."""

ROW_MAJOR = INT8.replace(group_size=64)
ROW_MAJOR_BYTES = DEEP_GEMM.replace(
    scale_layout="row_major", group_size=256, values=torch.float8_e5m2
)
WHOLE_ROW = ROWWISE_FP8
FORMATS = (UE8M0, FLOAT32, MXFP8, NVFP4, ROW_MAJOR, ROW_MAJOR_BYTES, WHOLE_ROW)


def needs(gigabytes: float) -> None:
    """Skip where so much memory is not free."""
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / 1e9
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes} GB of free memory, {free:.0f} are")


@pytest.fixture(autouse=True)
def give_back():
    yield
    torch.cuda.empty_cache()


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.empty(shape, dtype=dtype, device="cuda").normal_()


def upper_scale(fmt: Format, device: str = "cuda") -> dict[str, torch.Tensor]:
    """Return the argument of a call that is the upper scale, if the format has one."""
    return {"encode_scale": torch.full((), 500.0, device=device)} if fmt.upper_scale else {}


def scales_of(sf: torch.Tensor, fmt: Format, k: int, start: int, end: int) -> torch.Tensor:
    """Return the scales of rows `start` to `end`, where `start` is the first row of a block."""
    if fmt.blocked:
        return sf[start * fmt.columns(k) : fmt.scale_rows(end) * fmt.columns(k)]
    return sf[start:end]


def interesting_rows(mn: int, k: int) -> list[int]:
    """Return first rows of blocks: near 2^31 and 2^32 elements and bytes, and at both ends."""
    beside = (0, 2**30 // k, 2**31 // k, mn - 1)
    return sorted({row // MXFP8.block_rows * MXFP8.block_rows for row in beside if row < mn})


def check_rows(
    x: torch.Tensor, q: torch.Tensor, sf: torch.Tensor, fmt: Format, starts: list[int], rows: int
) -> None:
    """Compare some rows of the results with the reference; in blocks, all rows of a block."""
    mn, k = x.shape
    for start in starts:
        end = min(start + (MXFP8.block_rows if fmt.blocked else rows), mn)
        expected_q, expected_sf = quantize(x[start:end].cpu(), fmt, **upper_scale(fmt, "cpu"))
        assert_same_bits(q[start:end], expected_q)
        assert_same_bits(scales_of(sf, fmt, k, start, end), expected_sf)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return whether all bytes are equal, without a copy to the CPU."""
    return torch.equal(flat_bytes(a), flat_bytes(b))


def flat_bytes(t: torch.Tensor) -> torch.Tensor:
    # A contiguous tensor of one element has any stride, also after `flatten`.
    return t.contiguous().as_strided((t.numel(),), (1,)).view(torch.uint8)


def check_pieces(x: torch.Tensor, q: torch.Tensor, sf: torch.Tensor, fmt: Format) -> None:
    """Compare all rows of the results with those of pieces of the input."""
    mn, k = x.shape
    for start in range(0, mn, PIECE_ROWS):
        end = min(start + PIECE_ROWS, mn)
        piece_q, piece_sf = quantize(x[start:end], fmt, **upper_scale(fmt))
        assert same(q[start:end], piece_q)
        assert same(scales_of(sf, fmt, k, start, end), piece_sf)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_many_elements(fmt):
    """2.3e9 of them, 4.6 GB in and 2.3 GB out."""
    needs(20)
    mn, k = 300_000, 7680
    x = random(mn, k)
    q = poisoned_values(mn + 3, k, "cuda", fmt.values)
    sf = poisoned_scales(fmt, mn, k, "cuda")
    quantize(x, fmt, **upper_scale(fmt), out=(q, sf))
    assert q[mn:].view(torch.uint8).eq(0).all()
    check_rows(x, q, sf, fmt, interesting_rows(mn, k), 5)
    check_pieces(x, q[:mn], sf, fmt)


def test_many_float32_elements():
    """8.9 GB, with more than 2^33 bytes between the first and the last."""
    needs(25)
    mn, k = 290_000, 7690
    x = random(mn, k, dtype=torch.float32)
    for fmt in (UE8M0, MXFP8):
        q, sf = quantize(x, fmt)
        check_rows(x, q, sf, fmt, interesting_rows(mn, k), 3)
        check_pieces(x, q, sf, fmt)


@pytest.mark.parametrize("fmt", [UE8M0, MXFP8, NVFP4, ROW_MAJOR], ids=str)
def test_multiplied_back(fmt):
    needs(30)
    mn, k = 300_000, 7680
    x, upper = random(mn, k), upper_scale(fmt)
    q, sf = quantize(x, fmt, **upper)
    y = dequantize(q, sf, fmt, **upper)
    for start in interesting_rows(mn, k):
        end = min(start + 5, mn)
        assert_same_bits(
            y[start:end], fake_quantize(x[start:end].cpu(), fmt, **upper_scale(fmt, "cpu"))
        )
    for start in range(0, mn, PIECE_ROWS):
        end = start + PIECE_ROWS
        assert same(y[start:end], fake_quantize(x[start:end], fmt, **upper))
    del q, sf
    assert same(fake_quantize(x, fmt, **upper), y)


@pytest.mark.parametrize("kind", ["index", "prefix_sum", "indexed"])
def test_rows_beyond_32_bits(kind):
    """Address rows of x and of the results whose offsets, row times k, exceed 2^31."""
    needs(25)
    mn, k = 300_000, 7680
    x = random(mn, k)
    rows = index = None
    generator = torch.Generator().manual_seed(1)
    if kind == "index":
        index = torch.randint(-1, mn, (4001,), generator=generator, dtype=torch.int32)
        index[-3:] = torch.tensor([mn - 1, 2**31 // k + 1, mn])
        q, sf = quantize(x, index=index.cuda())
        live = (index >= 0) & (index < mn)
        source = x[index.where(live, 0).cuda()].cpu()
        expected_q, expected_sf = quantize(source, rows=Indexed(live.int() - 1))
        assert_same_bits(q, expected_q)
        assert_same_bits(sf, expected_sf)
        return
    if kind == "indexed":
        rows = Indexed(torch.randint(-1, 3, (mn,), generator=generator, dtype=torch.int32).cuda())
        live = rows.m_indices >= 0
    else:
        ends = torch.tensor([5, 100_000, 279_600, 279_700, 299_990], dtype=torch.int32)
        rows = PrefixSum(ends.cuda())
        live = torch.zeros(mn, dtype=torch.bool, device="cuda")
        start = 0
        for end in ends.tolist():
            live[start:end] = True
            start = -(-end // 128) * 128
    q = poisoned_values(mn, k, "cuda")
    sf = poisoned_scales(UE8M0, mn, k, "cuda")
    quantize(x, rows=rows, out=(q, sf))
    for start in range(0, mn, PIECE_ROWS):
        part = slice(start, start + PIECE_ROWS)
        dense_q, dense_sf = quantize(x[part])
        dense_q.view(torch.uint8)[~live[part]] = 0
        dense_sf[~live[part]] = 0
        assert same(q[part], dense_q)
        assert torch.equal(sf[part], dense_sf)


@pytest.mark.parametrize(
    "fmt",
    [DEEP_GEMM.replace(group_size=16), WHOLE_ROW, WHOLE_ROW.replace(scale_layout="mn_major")],
    ids=str,
)
def test_most_rows(fmt):
    """2^31 - 1 rows of one column: 4.3 GB in, 2.1 and 8.6 GB out."""
    needs(25)
    mn = MAX_SIZE
    x = random(mn, 1)
    q = poisoned_values(mn, 1, "cuda", fmt.values)
    sf = poisoned_scales(fmt, mn, 1, "cuda")
    quantize(x, fmt, out=(q, sf))
    starts = [0, 2**16 * 4, 2**16 * 8, 2**29, 2**30, 2**31 - MXFP8.block_rows]
    check_rows(x, q, sf, fmt, starts, 1000)
    if fmt.mn_major:
        padding = torch.empty(0, dtype=sf.dtype, device="cuda").set_(sf.untyped_storage())[mn:]
        assert padding.tolist() == [0]
    for start in range(0, mn, 2**28):
        part = slice(start, start + 2**28)
        piece_q, piece_sf = quantize(x[part], fmt)
        assert same(q[part], piece_q)
        assert torch.equal(sf[part], piece_sf)


@pytest.mark.parametrize("group_size", [16, 32, 128, 256, -1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("k", [MAX_COLUMNS, MAX_COLUMNS - 129])
def test_most_columns(k, dtype, group_size):
    for layout in (DEEP_GEMM, GROUPWISE_FP8):
        x = random(3, k, dtype=dtype)
        check_every_byte(x, layout.replace(group_size=group_size), extra_rows=1)
    if group_size == 32:
        check_every_byte(random(3, k, dtype=dtype), MXFP8)


@pytest.mark.parametrize("k", [512, 1024, 1032, 7168, 16384, 16392, 32768, 32776, 100_000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("fmt", [WHOLE_ROW, DEEP_GEMM.replace(group_size=-1)], ids=str)
def test_rows_that_are_one_group(fmt, dtype, k):
    """On both sides of each number of columns at which another kernel takes them."""
    check_every_byte(random(37, k, dtype=dtype), fmt, extra_rows=3)


@pytest.mark.parametrize("fmt", [UE8M0, MXFP8, WHOLE_ROW], ids=str)
def test_most_columns_of_many_rows(fmt):
    """Few rows reach 2^31 elements."""
    needs(15)
    mn, k = 2051, MAX_COLUMNS
    x = random(mn, k)
    q = poisoned_values(mn, k, "cuda", fmt.values)
    sf = poisoned_scales(fmt, mn, k, "cuda")
    quantize(x, fmt, out=(q, sf))
    # A whole block of so many columns takes the reference too long; the last one has three rows.
    check_rows(x, q, sf, fmt, [2048] if fmt.blocked else [0, 1024, 1920, 2048], 3)
    for start in range(0, mn, 2 * MXFP8.block_rows):
        end = min(start + 2 * MXFP8.block_rows, mn)
        piece_q, piece_sf = quantize(x[start:end], fmt)
        assert same(q[start:end], piece_q)
        assert same(scales_of(sf, fmt, k, start, end), piece_sf)


def test_most_bytes_between_rows():
    """2^31 - 32 bytes: rows of 11 GB in, and rows as many bytes apart of 11 GB out."""
    needs(30)
    mn, k = 5, 130
    stride = (2**31 - 32) // 2
    x = torch.empty((mn - 1) * stride + k, dtype=torch.bfloat16, device="cuda")
    x = x.as_strided((mn, k), (stride, 1))
    x.copy_(random(mn, k))
    size = (mn - 1) * (2**31 - 32) + k
    storage = torch.full((size,), POISON, dtype=torch.uint8, device="cuda")
    q = storage.view(torch.float8_e4m3fn).as_strided((mn, k), (2**31 - 32, 1))
    for fmt in (UE8M0, DEEP_GEMM_SM90.replace(group_size=-1)):
        _, sf = quantize(x, fmt, out=(q, None))
        expected_q, expected_sf = quantize(x.cpu(), fmt)
        assert_same_bits(q, expected_q)
        assert_same_bits(sf, expected_sf)
        for row in range(mn - 1):
            between = storage[row * (2**31 - 32) + k : (row + 1) * (2**31 - 32)]
            assert between.eq(POISON).all()


@pytest.mark.parametrize("fmt", [UE8M0, MXFP8, ROW_MAJOR], ids=str)
def test_matrices_far_apart(fmt):
    """More than 2^32 elements from a matrix to the next, in and out."""
    needs(40)
    batch, mn, k, stride = 3, 7, 150, 2**32 + 64
    x = torch.empty((batch - 1) * stride + mn * k, dtype=torch.bfloat16, device="cuda")
    x = x.as_strided((batch, mn, k), (stride, k, 1))
    x.copy_(random(batch, mn, k))
    size = (batch - 1) * stride + mn * k
    storage = torch.full((size,), POISON, dtype=torch.uint8, device="cuda")
    q = storage.view(fmt.values).as_strided((batch, mn, k), (stride, k, 1))
    expected_q, expected_sf = quantize(x.cpu(), fmt)
    for matrices in (slice(None), slice(0, 3, 2)):
        _, sf = quantize(x[matrices], fmt, out=(q[matrices], None))
        assert_same_bits(q[matrices], expected_q[matrices])
        assert_same_bits(sf, expected_sf[matrices])
    for matrix in range(batch - 1):
        between = storage[matrix * stride + mn * k : (matrix + 1) * stride]
        assert between.eq(POISON).all()
    expected = dequantize(expected_q, expected_sf, fmt)
    _, sf = quantize(x, fmt)
    assert_same_bits(dequantize(q, sf, fmt), expected)
    assert_same_bits(fake_quantize(x, fmt), expected)


@pytest.mark.parametrize("fmt", [UE8M0, MXFP8], ids=str)
def test_large_batch(fmt):
    """2.4e9 elements in nine matrices."""
    needs(20)
    batch, mn, k = 9, 32_770, 8192
    x = random(batch, mn, k)
    q = poisoned_values(mn, k, "cuda", fmt.values, (batch,))
    sf = poisoned_scales(fmt, mn, k, "cuda", batch_shape=(batch,))
    quantize(x, fmt, out=(q, sf))
    for matrix in range(batch):
        one_q, one_sf = quantize(x[matrix], fmt)
        assert same(q[matrix], one_q)
        assert same(sf[matrix], one_sf)
    check_rows(x[-1], q[-1], sf[-1], fmt, [0, mn // MXFP8.block_rows * MXFP8.block_rows], 5)


@pytest.mark.parametrize("fmt", [UE8M0, FLOAT32, MXFP8, WHOLE_ROW], ids=str)
def test_many_experts_of_many_rows(fmt):
    """256 of up to 4096, 2.4e9 elements in all; the counts of a skewed router, and senseless ones.

    Rows that do not exist hold NaN, and their results keep what they held.
    """
    needs(20)
    experts, max_m, k = 256, 4096, 2304
    generator = torch.Generator().manual_seed(0)
    counts = (6000 / torch.arange(1, experts + 1) ** 1.2).int()
    counts = counts[torch.randperm(experts, generator=generator)]
    counts[:6] = torch.tensor([0, max_m, -5, 2**31 - 1, -(2**31), 1])
    counts[-1] = max_m - 1
    masked = Masked(counts.to(torch.int32).cuda())
    x = random(experts, max_m, k)
    for expert, count in enumerate(counts.clamp(0, max_m).tolist()):
        x[expert, count:] = torch.nan
    q = poisoned_values(max_m, k, "cuda", fmt.values, (experts,))
    sf = poisoned_scales(fmt, max_m, k, "cuda", batch_shape=(experts,))
    quantize(x, fmt, rows=masked, out=(q, sf))
    for expert, count in enumerate(counts.clamp(0, max_m).tolist()):
        assert q[expert, count:].view(torch.uint8).eq(POISON).all()
        one_q, one_sf = quantize(x[expert, :count], fmt)
        assert same(q[expert, :count], one_q)
        if not fmt.blocked:
            assert same(sf[expert, :count], one_sf)
            beyond = sf[expert, align(count, SCALE_ROW_ALIGNMENT) :]
            assert flat_bytes(beyond).eq(POISON).all()
    # Scales of every kind, and what lies beyond them, of some experts.
    for expert in (0, 1, 2, 5, 100):
        own_q = poisoned_values(max_m, k, "cpu", fmt.values, (1,))
        own_sf = poisoned_scales(fmt, max_m, k, "cpu", batch_shape=(1,))
        own = on_device(Masked(masked.masked_m[expert : expert + 1]), "cpu")
        one = x[expert : expert + 1].cpu()
        quantize(one, fmt, rows=own, out=(own_q, own_sf))
        assert_same_bits(q[expert], own_q[0])
        assert_same_bits(sf[expert], own_sf[0])
