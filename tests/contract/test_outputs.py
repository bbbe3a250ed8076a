"""Shapes, strides, padding and ownership of the results."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cute_quant import quantize
from tests.helpers import (
    FORMATS,
    POISON,
    UE8M0,
    assert_same_bits,
    bits,
    check_every_byte,
    poisoned,
    poisoned_scales,
    poisoned_values,
    random_bits,
    storage_bits,
)

every_format = pytest.mark.parametrize("fmt", FORMATS, ids=str)
ROWS = [0, 1, 2, 3, 4, 5, 31, 33, 130]
COLUMNS = [128, 256, 384, 512, 640, 1536]


@every_format
@pytest.mark.parametrize("k", COLUMNS)
@pytest.mark.parametrize("mn", ROWS)
def test_shapes_and_strides(fmt, mn, k, device):
    q, sf = quantize(torch.ones(mn, k, dtype=torch.float16, device=device), fmt)
    aligned = -(-mn // 4) * 4
    columns = -(-k // 512) if fmt.packed else k // 128
    assert (q.shape, q.stride(), q.dtype) == ((mn, k), (k, 1), torch.float8_e4m3fn)
    assert (sf.shape, sf.stride()) == ((mn, columns), (1, aligned))
    assert sf.dtype == (torch.int32 if fmt.packed else torch.float32)
    assert q.device == sf.device and q.device.type == device
    # The padding rows of every column are there, and defined.
    words = storage_bits(sf).view(torch.int32)
    assert words.numel() == aligned * columns
    if mn:
        assert words.view(columns, aligned)[:, mn:].eq(0).all()


@every_format
@pytest.mark.parametrize("last_padding", [True, False], ids=["padded", "vllm"])
@pytest.mark.parametrize("extra_rows", [0, 1, 3, 70])
@pytest.mark.parametrize("k", COLUMNS)
@pytest.mark.parametrize("mn", ROWS)
def test_every_byte_of_caller_memory(fmt, mn, k, extra_rows, last_padding, device):
    if mn == 0 and not last_padding:
        last_padding = True  # nothing to leave out
    x = random_bits((mn, k), torch.bfloat16, seed=mn * k).to(device)
    check_every_byte(x, fmt, extra_rows=extra_rows, last_padding=last_padding)


@pytest.mark.parametrize("k", COLUMNS)
def test_bytes_past_the_last_group_are_zero(k, device):
    x = torch.ones(5, k, dtype=torch.bfloat16, device=device)
    _, sf = check_every_byte(x, UE8M0)
    groups = k // 128
    by_group = bits(sf).view(5, -1)
    assert by_group[:, :groups].eq(119).all() and by_group[:, groups:].eq(0).all()


@every_format
@pytest.mark.parametrize("mn", [1, 3, 4, 33])
def test_nothing_outside_is_touched(fmt, mn, device):
    """Write results inside of larger memory: bytes before, between and after the rows stay."""
    k, gap = 640, 48
    x = random_bits((mn, k), torch.float16, seed=mn).to(device)
    arena = poisoned((mn + 2) * (k + gap), device).view(mn + 2, k + gap)
    q = arena[1:-1, 16 : 16 + k].view(torch.float8_e4m3fn)
    sf_guard = 64
    aligned = fmt.scale_strides((), mn, k)[1]
    _, columns = fmt.scale_shape((), mn, k)
    sf_arena = poisoned(4 * (aligned * columns + 2 * sf_guard), device).view(fmt.sf_dtype)
    # Between two guards, with room for the padding rows.
    sf = sf_arena[sf_guard : sf_guard + aligned * columns].as_strided(
        (mn, columns), (1, aligned), sf_guard
    )
    quantize(x, fmt, out=(q, sf))
    expected_q, expected_sf = quantize(x.cpu(), fmt)
    assert_same_bits(q, expected_q)
    assert_same_bits(sf, expected_sf)
    outside = arena.cpu().clone()
    outside[1:-1, 16 : 16 + k] = POISON
    assert outside.eq(POISON).all()
    guarded = sf_arena.cpu().view(torch.uint8)
    assert guarded[: 4 * sf_guard].eq(POISON).all() and guarded[-4 * sf_guard :].eq(POISON).all()


@every_format
def test_either_output_may_be_given(fmt, device):
    x = torch.randn(7, 384, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    x = x.to(device)
    q, sf = quantize(x, fmt)
    own_q = poisoned_values(9, 384, device)
    own_sf = poisoned_scales(fmt, 7, 384, device)
    q1, sf1 = quantize(x, fmt, out=(own_q, None))
    q2, sf2 = quantize(x, fmt, out=(None, own_sf))
    assert q1 is own_q and sf2 is own_sf
    assert_same_bits(q1[:7], q)
    assert bits(q1[7:]).eq(0).all()
    assert_same_bits(q2, q)
    for other in (sf1, sf2):
        assert_same_bits(other, sf)
        assert other.stride() == sf.stride()


def test_input_is_left_alone(device):
    x = random_bits((5, 256), torch.bfloat16, seed=9).to(device)
    before = bits(x).clone()
    quantize(x)
    assert torch.equal(bits(x), before)


@every_format
@pytest.mark.parametrize("row_stride", [0, 1024 + 16, 4096])
def test_strided_rows(fmt, row_stride, device):
    storage = random_bits((40 * 4096,), torch.bfloat16, seed=10).to(device)
    x = storage.as_strided((37, 1024), (row_stride, 1), 32)
    check_every_byte(x, fmt, extra_rows=2)


def test_one_row_has_no_row_stride(device):
    x = random_bits((2048,), torch.bfloat16, seed=11).to(device).as_strided((1, 1024), (7, 1))
    check_every_byte(x, UE8M0)


@pytest.mark.parametrize("extra_rows", [0, 3])
def test_no_rows(extra_rows, device):
    x = torch.empty(0, 256, dtype=torch.bfloat16, device=device)
    q, sf = check_every_byte(x, UE8M0, extra_rows=extra_rows)
    assert q.shape == (extra_rows, 256) and sf.shape == (0, 1)
    assert bits(q).eq(0).all()


def test_no_columns(device):
    q, sf = quantize(torch.empty(5, 0, dtype=torch.bfloat16, device=device))
    assert q.shape == (5, 0) and sf.shape == (5, 0) and sf.stride() == (1, 8)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_hypothesis_shapes(data):
    hypothesis_shapes(data, "cpu")


@pytest.mark.gpu
@settings(max_examples=500, deadline=None)
@given(data=st.data())
def test_hypothesis_shapes_on_gpu(data):
    hypothesis_shapes(data, "cuda")


def hypothesis_shapes(data, device):
    fmt = data.draw(st.sampled_from(FORMATS))
    dtype = data.draw(st.sampled_from([torch.bfloat16, torch.float16]))
    mn = data.draw(st.integers(0, 70))
    k = 128 * data.draw(st.integers(1, 18))
    row_stride = k + 16 * data.draw(st.integers(0, 5))
    offset = 16 * data.draw(st.integers(0, 4))
    storage = random_bits((mn * row_stride + offset + 1,), dtype, data.draw(st.integers(0, 2**31)))
    x = storage.to(device).as_strided((mn, k), (row_stride, 1), offset)
    check_every_byte(
        x,
        fmt,
        extra_rows=data.draw(st.integers(0, 9)),
        last_padding=mn == 0 or data.draw(st.booleans()),
    )


@pytest.mark.gpu
@pytest.mark.parametrize("k", [128, 7168])
def test_more_than_2_to_31_elements(k):
    mn = (2**31 // k + 2**28 // k) // 4 * 4 + 1
    x = torch.empty(mn, k, dtype=torch.bfloat16, device="cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    for part in x.split(2**28 // k):
        part.copy_(torch.randn(part.shape, device="cuda", generator=generator))
    q, sf = quantize(x)
    assert x.numel() > 2**31
    for rows in (slice(0, 64), slice(2**31 // k - 32, 2**31 // k + 32), slice(mn - 64, mn)):
        expected_q, expected_sf = quantize(x[rows].cpu())
        assert_same_bits(q[rows], expected_q)
        assert_same_bits(sf[rows], expected_sf)
    # The whole of it, against two halves whose offsets stay below 2^31.
    half = mn // 2 // 4 * 4
    for rows in (slice(0, half), slice(half, mn)):
        part_q, part_sf = quantize(x[rows])
        assert torch.equal(q[rows].view(torch.uint8), part_q.view(torch.uint8))
        assert torch.equal(sf[rows], part_sf)


@pytest.mark.gpu
def test_more_rows_than_a_grid_has_in_y():
    mn = 4 * 65535 * 2 + 5
    row = random_bits((1, 128), torch.bfloat16, seed=12).cuda()
    x = row.repeat(mn, 1)
    x[-1] = 3.0
    q, sf = quantize(x)
    expected_q, expected_sf = quantize(row.cpu())
    assert torch.equal(
        q[:-1].view(torch.uint8), expected_q.cuda().view(torch.uint8).expand(mn - 1, -1)
    )
    assert torch.equal(sf[:-1], expected_sf.cuda().expand(mn - 1, -1))
    assert sf[-1].item() == 120 and q[-1].float().eq(3.0 * 2**7).all()
