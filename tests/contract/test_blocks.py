"""Weights in square blocks on each device: every byte against the oracle, and what is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cute_quant as cq
from cute_quant import (
    DEEP_GEMM,
    DEEP_GEMM_SM90,
    GROUPWISE_FP8,
    MXFP4,
    MXFP8,
    NVFP4,
    ROWWISE_FP8,
)
from cute_quant.contract.upper_scales import UpperScale
from tests import oracle
from tests.helpers import as_arguments, assert_same_bits, poisoned_values, storage_bits
from tests.helpers import poisoned_results as rows_of_poison
from tests.weights import (
    DTYPES,
    E2M1,
    FORMATS,
    GROUPS,
    checkpoint,
    expect_requantized,
    poisoned_results,
    special_weights,
    views,
)


def on(device, t):
    """Return a tensor with the same strides on a device."""
    extent = sum((size - 1) * step for size, step in zip(t.shape, t.stride(), strict=True)) + 1
    memory = torch.as_strided(t, (extent,), (1,)).to(device)
    return memory.as_strided(t.shape, t.stride())


def check(w, fmt, device, last_padding=True):
    given, expected = (poisoned_results(fmt, w.shape, d, last_padding) for d in (device, "cpu"))
    w_on_device = on(device, w) if w.numel() else w.to(device)
    results = cq.quantize_blocks(w_on_device, fmt, out=given)
    assert all(result is own for result, own in zip(results, given, strict=True))
    oracle.quantize_blocks_into(w, *expected, fmt)
    assert_same_bits(given[0].cpu(), expected[0])
    assert torch.equal(storage_bits(given[1]), storage_bits(expected[1]))
    q, sf = cq.quantize_blocks(w_on_device, fmt)
    assert q.is_contiguous() and sf.stride() == given[1].stride() and sf.dtype is fmt.sf_dtype
    assert_same_bits(q, given[0])
    assert_same_bits(sf, given[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_every_format(fmt, dtype, device):
    for seed, shape in enumerate([(128, 256), (2, 133, 302), (1, 2), (2, 3, 40, 6)]):
        check(special_weights(shape, dtype, fmt.group_size, seed), fmt, device, seed % 2 == 0)


@pytest.mark.parametrize("name", views(torch.zeros(1, 1)))
@pytest.mark.parametrize("fmt", [DEEP_GEMM, DEEP_GEMM_SM90, MXFP8, MXFP4], ids=str)
def test_every_stride(fmt, name, device):
    w = special_weights((3, 150, 262), torch.bfloat16, fmt.group_size, 3)
    check(views(w)[name], fmt, device)


def hypothesis_shapes(data, device):
    fmt, dtype = data.draw(st.sampled_from(FORMATS)), data.draw(st.sampled_from(DTYPES))
    n, k = data.draw(st.integers(0, 300)), data.draw(st.integers(0, 300))
    k -= k % fmt.value_type.per_byte
    leading = data.draw(st.sampled_from([(), (1,), (2,), (0,), (2, 2)]))
    w = special_weights((*leading, n, k), dtype, fmt.group_size, data.draw(st.integers(0, 99)))
    if w.numel():
        w = views(w)[data.draw(st.sampled_from(sorted(views(torch.zeros(1, 1)))))]
    check(w, fmt, device, data.draw(st.booleans()))


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_hypothesis_shapes(data):
    hypothesis_shapes(data, "cpu")


@pytest.mark.gpu
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_hypothesis_shapes_on_gpu(data):
    hypothesis_shapes(data, "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_dequantize(fmt, dtype, device):
    w = special_weights((2, 133, 302), torch.bfloat16, fmt.group_size, 5)
    q, sf = poisoned_results(fmt, w.shape)
    oracle.quantize_blocks_into(w, q, sf, fmt)
    y = cq.dequantize_blocks(q.to(device), on(device, sf), fmt, dtype=dtype).cpu()
    if fmt.scale_dtype is torch.float32:
        expected = oracle.products_of_blocks(q, sf, fmt, dtype, fmt.group_size)
    else:
        expected = oracle.dequantize(q, sf, fmt, dtype)
    assert torch.equal(y.isnan(), expected.isnan())
    assert_same_bits(y.nan_to_num(), expected.nan_to_num())


def sources():
    """Yield checkpoints of either size of blocks."""
    for seed, shape in enumerate([(128, 256), (2, 261, 300), (20, 30)]):
        for size in (128, 32):
            yield shape, *checkpoint(shape, seed, size)


@pytest.mark.parametrize("fmt", [f for f in FORMATS if f.values is not E2M1], ids=str)
def test_requantize_in_blocks(fmt, device):
    for shape, w8, w_sf in sources():
        given, expected = (poisoned_results(fmt, shape, d) for d in (device, "cpu"))
        along_n = w8.to(device).mT.contiguous().mT
        cq.requantize_blocks(along_n, w_sf.to(device), fmt, out=given)
        again = cq.requantize_blocks(w8.to(device), w_sf.to(device), fmt)
        assert_same_bits(again[0], given[0])
        expect_requantized(expected, w8, w_sf, fmt)
        assert_same_bits(given[0].cpu(), expected[0])
        assert torch.equal(storage_bits(given[1]), storage_bits(expected[1]))


@pytest.mark.parametrize("fmt", GROUPS, ids=str)
def test_requantize_in_groups_of_rows(fmt, device):
    for shape, w8, w_sf in sources():
        upper = UpperScale("amax", torch.tensor(0.7)) if fmt.upper_scale else None
        *leading, n, k = shape
        given, expected = (
            rows_of_poison(fmt, n, k, d, batch_shape=tuple(leading)) for d in (device, "cpu")
        )
        arguments = {name: t.to(device) for name, t in as_arguments(upper).items()}
        cq.requantize_blocks(w8.to(device), w_sf.to(device), fmt, out=given, **arguments)
        expect_requantized(expected, w8, w_sf, fmt, upper)
        assert_same_bits(given[0].cpu(), expected[0])
        assert torch.equal(storage_bits(given[1]), storage_bits(expected[1]))


def test_values_are_those_of_quantize_under_the_scale(device):
    w = special_weights((256, 384), torch.bfloat16, 128, 8).nan_to_num(0.0, 1.0, 1.0).to(device)
    of_rows, _ = cq.quantize(w, DEEP_GEMM)
    q, sf = cq.quantize_blocks(w, DEEP_GEMM)
    rows_with_them = (cq.quantize(w, DEEP_GEMM)[1] == sf).all(-1)
    assert rows_with_them.any()
    assert_same_bits(of_rows[rows_with_them], q[rows_with_them])


def test_it_is_one_launch_to_bind(device):
    w = special_weights((130, 256), torch.bfloat16, 128, 9).to(device)
    for operation, args in (
        (cq.quantize_blocks, (w, DEEP_GEMM_SM90)),
        (cq.dequantize_blocks, (*cq.quantize_blocks(w, DEEP_GEMM_SM90), DEEP_GEMM_SM90)),
        (cq.requantize_blocks, (*cq.quantize_blocks(w, DEEP_GEMM_SM90), MXFP4)),
        (
            cq.convert_scales,
            (cq.quantize(w, GROUPWISE_FP8)[1], GROUPWISE_FP8, DEEP_GEMM_SM90, w.shape),
        ),
    ):
        launch = cq.bind(*args, operation=operation)
        expected = operation(*args)
        results = launch()
        pairs = zip(results, expected, strict=True) if isinstance(results, tuple) else ()
        for actual, wanted in pairs or [(results, expected)]:
            assert_same_bits(actual, wanted)


BF16 = torch.ones(256, 256, dtype=torch.bfloat16)
Q8, SF = cq.quantize_blocks(BF16, DEEP_GEMM_SM90)
OF_SGLANG = DEEP_GEMM_SM90.replace(numerics="sglang")
EMPTY = torch.empty(256, 256, dtype=torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("w", "fmt", "out", "error", "message"),
    [
        (1.0, DEEP_GEMM, None, TypeError, "w: expected a torch.Tensor, got 1.0"),
        (BF16.double(), DEEP_GEMM, None, TypeError, "w: expected a tensor of bfloat16 or"),
        (BF16, "DEEP_GEMM", None, TypeError, "fmt: expected a Format"),
        (BF16, NVFP4, None, ValueError, "fmt: expected UE8M0 or float32 scales, got e2m1:16"),
        (BF16, ROWWISE_FP8, None, ValueError, "fmt: expected a group_size for blocks of 32 x 32"),
        (BF16, OF_SGLANG, None, ValueError, "fmt: expected numerics 'ieee' or 'deepgemm' for"),
        (BF16, DEEP_GEMM.replace(group_size=64), None, ValueError, "blocks of 32 x 32 or 128 x"),
        (BF16[0], DEEP_GEMM, None, ValueError, "w: expected 2 or more dimensions"),
        (BF16[::2, ::2], DEEP_GEMM, None, ValueError, "contiguous along k or n, got strides"),
        (torch.ones(2, 3, 4, 8)[:, :2], DEEP_GEMM, None, ValueError, "w: expected leading dim"),
        (BF16[:, :255], MXFP4, None, ValueError, "w: expected a multiple of 2 columns"),
        (BF16, DEEP_GEMM, (EMPTY,), TypeError, r"out: expected \(q, sf\), got 1 items"),
        (BF16, DEEP_GEMM, (EMPTY[:255], None), ValueError, r"out q: expected shape \(256, 256\)"),
        (BF16, DEEP_GEMM, (BF16, None), TypeError, "out q: expected a tensor of float8_e4m3fn"),
        (BF16, DEEP_GEMM, (EMPTY.mT, None), ValueError, "out q: expected strides"),
        (BF16, DEEP_GEMM_SM90, (None, SF[:1]), ValueError, r"out sf: expected shape \(2, 2\)"),
        (BF16, DEEP_GEMM_SM90, (None, SF.mT), ValueError, r"out sf: expected strides \(2, 1\)"),
        (BF16, DEEP_GEMM, (None, SF), TypeError, "out sf: expected a tensor of int32"),
        (BF16, MXFP8, (None, torch.empty(9, dtype=torch.float8_e8m0fnu)), ValueError, "out sf"),
        (
            BF16.clone().requires_grad_(),
            DEEP_GEMM,
            None,
            RuntimeError,
            "w: expected a tensor that requires no gradient, since quantize_blocks",
        ),
    ],
)
def test_quantize_refuses(w, fmt, out, error, message):
    with pytest.raises(error, match=message):
        cq.quantize_blocks(w, fmt, out=out)


@pytest.mark.parametrize(
    ("q", "sf", "fmt", "options", "error", "message"),
    [
        (BF16, SF, DEEP_GEMM_SM90, {}, TypeError, "q: expected a tensor of float8_e4m3fn"),
        (Q8, SF.int(), DEEP_GEMM_SM90, {}, TypeError, "sf: expected a tensor of float32"),
        (Q8, SF[:1], DEEP_GEMM_SM90, {}, ValueError, r"sf: expected shape \(2, 2\), a scale for"),
        (Q8, SF, DEEP_GEMM_SM90, {"dtype": torch.int8}, TypeError, "dtype: expected one of"),
        (Q8, SF, NVFP4, {}, ValueError, "fmt: expected UE8M0 or float32 scales"),
        (Q8, SF, ROWWISE_FP8, {}, ValueError, "fmt: expected a group_size for blocks"),
        (Q8.mT, SF, DEEP_GEMM_SM90, {}, ValueError, "q: expected rows contiguous along k"),
        (Q8, SF, DEEP_GEMM, {}, TypeError, "sf: expected a tensor of int32"),
    ],
)
def test_dequantize_refuses(q, sf, fmt, options, error, message):
    with pytest.raises(error, match=message):
        cq.dequantize_blocks(q, sf, fmt, **options)


AMAX = torch.tensor(1.0)


@pytest.mark.parametrize(
    ("w8", "w_sf", "fmt", "options", "error", "message"),
    [
        (BF16, SF, DEEP_GEMM, {}, TypeError, "w8: expected a tensor of float8_e4m3fn"),
        (Q8.mT, SF, MXFP4, {}, ValueError, "w8: expected rows contiguous along k"),
        (Q8[::2, ::2], SF[:1, :1], MXFP8, {}, ValueError, "w8: expected weights contiguous along"),
        (Q8, SF.half(), DEEP_GEMM, {}, TypeError, "w_sf: expected a tensor of float32"),
        (Q8, SF[:, :1], DEEP_GEMM, {}, ValueError, r"w_sf: expected .* or \(2, 2\), a scale for"),
        (Q8, SF, MXFP8, {"check": 1}, TypeError, "check: expected a bool, got 1"),
        (Q8, SF, ROWWISE_FP8, {}, ValueError, "fmt: expected a group_size for blocks"),
        (Q8, SF, NVFP4, {}, ValueError, "encode_scale: expected one of"),
        (Q8, SF, NVFP4.replace(row_scale=True), {}, ValueError, "none over whole rows"),
        (Q8, SF, MXFP8, {"amax": AMAX}, ValueError, "amax: expected None for"),
        (Q8, SF, NVFP4, {"amax": AMAX, "encode_scale": AMAX}, ValueError, "expected one of"),
        (Q8, SF, DEEP_GEMM, {"out": (EMPTY, SF)}, TypeError, "out sf: expected a tensor of int32"),
        (Q8, SF, DEEP_GEMM, {"out": (Q8, None)}, ValueError, "out q: expected memory of its own"),
    ],
)
def test_requantize_refuses(w8, w_sf, fmt, options, error, message):
    with pytest.raises(error, match=message):
        cq.requantize_blocks(w8, w_sf, fmt, **options)


def with_place(t, place, value):
    """Return a copy in which one element is another."""
    t = t.clone()
    t.view(torch.uint8 if t.itemsize == 1 else t.dtype)[place] = value
    return t


@pytest.mark.parametrize("size", [128, 32])
def test_check_names_what_a_checkpoint_has_wrong(size, device):
    w8 = torch.randn(2, 256, 384, device=device).to(torch.float8_e4m3fn)
    w_sf = torch.rand(2, 256 // size, 384 // size, device=device)
    w_sf[0, 1, 1] = 0.0
    blocks = w_sf.numel()
    for fmt, options in ((DEEP_GEMM, {}), (NVFP4, {"amax": (w8.float().abs().amax() * 1.0)})):
        cq.requantize_blocks(w8, w_sf, fmt, check=True, **options)
        for value in (-1.0, torch.nan, torch.inf):
            wrong = with_place(w_sf, (1, 0, 2), value)
            got = f"got {value} at block \\(1, 0, 2\\), and such in 1 of {blocks} blocks"
            got = got.replace("-1.0", "-1")
            with pytest.raises(ValueError, match=f"^w_sf: expected finite scales, 0 or .*, {got}"):
                cq.requantize_blocks(w8, wrong, fmt, check=True, **options)
            cq.requantize_blocks(w8, wrong, fmt, **options)
        for code in (0x7F, 0xFF):
            wrong = with_place(w8, (0, size, 5), code)
            with pytest.raises(ValueError, match=r"^w8: .* got nan at block \(0, 1, 0\), and such"):
                cq.requantize_blocks(wrong, w_sf, fmt, check=True, **options)
        large = with_place(w_sf, (0, 0, 0), 3e38)
        with pytest.raises(ValueError, match=r"^w_sf: .* below 2\^128, got 3e\+38 at block"):
            cq.requantize_blocks(w8, large, fmt, check=True, **options)
    with pytest.raises(ValueError, match=r"^amax: expected about .* of what is quantized, got 1e"):
        cq.requantize_blocks(w8, w_sf, NVFP4, amax=torch.tensor(1e-9, device=device), check=True)
    with pytest.raises(ValueError, match="amax: expected about"):
        cq.requantize_blocks(w8, w_sf, NVFP4, amax=w_sf.max(), check=True)  # not times 448
    mixed_up = torch.tensor(1e-3, device=device)
    with pytest.raises(ValueError, match="were the two mixed up"):
        cq.requantize_blocks(w8, w_sf, NVFP4, encode_scale=mixed_up, check=True)
    nothing = w8[:, :0], w_sf[:, :0]
    assert cq.requantize_blocks(*nothing, DEEP_GEMM, check=True)[0].numel() == 0


def test_check_is_refused_where_nothing_is_read():
    call = torch.compile(
        lambda q: cq.requantize_blocks(q, SF, MXFP8, check=True), backend="aot_eager"
    )
    with pytest.raises(Exception, match="check: expected False under a tracer"):
        call(Q8)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_empty_scales_of_blocks(fmt):
    w = torch.ones(2, 133, 302, dtype=torch.bfloat16)
    expected = cq.quantize_blocks(w, fmt)[1]
    sf = cq.empty_scales(fmt, w.shape, blocks=True)
    assert (sf.shape, sf.stride(), sf.dtype) == (expected.shape, expected.stride(), expected.dtype)
    assert sf.untyped_storage().nbytes() == expected.untyped_storage().nbytes()
    assert cq.quantize_blocks(w, fmt, out=(None, sf))[1] is sf
    with pytest.raises(TypeError, match="blocks: expected a bool, got 1"):
        cq.empty_scales(fmt, w.shape, blocks=1)


def test_there_are_no_scales_of_blocks_of_nvfp4():
    with pytest.raises(ValueError, match="fmt: expected UE8M0 or float32 scales"):
        cq.empty_scales(NVFP4, (32, 32), blocks=True)


def test_memory_that_overlaps_is_refused():
    memory = torch.zeros(256 * 256 * 3, dtype=torch.uint8)
    w = memory[: 256 * 256 * 2].view(torch.bfloat16).view(256, 256)
    q = memory[256 * 256 : 256 * 256 * 2].view(torch.float8_e4m3fn).view(256, 256)
    with pytest.raises(ValueError, match="out q: expected memory of its own"):
        cq.quantize_blocks(w, out=(q, None))
    sf = memory[:16].view(torch.float32).view(2, 2)
    with pytest.raises(ValueError, match="out sf: expected memory of its own"):
        cq.quantize_blocks(w, DEEP_GEMM_SM90, out=(None, sf))
    # The padding rows of the last column count.
    w = memory[254 * 4 : 254 * 4 + 254 * 128 * 2].view(torch.bfloat16).view(254, 128)
    words = memory.view(torch.int32).as_strided((254, 1), (1, 256))
    with pytest.raises(ValueError, match="out sf: expected memory of its own"):
        cq.quantize_blocks(w, out=(None, words))


def test_a_view_into_a_larger_result(device):
    w = special_weights((2, 130, 96), torch.bfloat16, 128, 5)
    wide = poisoned_values(130, 112, device, batch_shape=(2,))
    q, _ = cq.quantize_blocks(w.to(device), out=(wide[..., :96], None))
    assert_same_bits(q.contiguous().cpu(), cq.quantize_blocks(w)[0])
    assert (
        wide[..., 96:].view(torch.uint8) == poisoned_values(1, 1, device).view(torch.uint8)
    ).all()


@pytest.mark.parametrize("fmt", [DEEP_GEMM_SM90, GROUPWISE_FP8], ids=str)
def test_one_row_of_float32_scales_has_no_padding(fmt):
    """Its scales overlap what is read, and nothing past them does."""
    memory = torch.ones(8)
    w = memory[3:4].view(1, 1).expand(1, 512)
    with pytest.raises(ValueError, match=r"out sf: expected memory of its own, .* overlaps w"):
        cq.quantize_blocks(w, fmt, out=(None, memory[:4].view(1, 4)))
    assert memory.eq(1).all()
    w8 = torch.ones(1, 128).to(torch.float8_e4m3fn)
    _, sf = cq.requantize_blocks(
        w8, memory[1:2].view(1, 1), fmt, out=(None, memory[0:1].view(1, 1))
    )
    assert sf.item() == pytest.approx(1 / 448) and memory[1:].eq(1).all()


def test_a_tracer_names_the_format_that_blocks_do_not_have():
    call = torch.compile(
        lambda w: cq.quantize_blocks(w, NVFP4), fullgraph=True, backend="aot_eager"
    )
    with pytest.raises(Exception, match="got e2m1:16:e4m3:128x4, under whose e4m3"):
        call(torch.ones(32, 32))
