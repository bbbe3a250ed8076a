"""The scale over e4m3 scales, and rows of two values a byte: what there is, and bad input."""

import math
import re

import numpy as np
import pytest
import torch

from cute_quant import (
    MXFP4,
    MXFP8,
    NVFP4,
    Indexed,
    Masked,
    PrefixSum,
    dequantize,
    fake_quantize,
    quantize,
    rms_norm_quantize,
    silu_mul_quantize,
)
from cute_quant.contract.upper_scales import KINDS, UpperScale
from tests import oracle
from tests.contract.test_inputs import inputs, int32
from tests.helpers import (
    FLOAT32,
    as_arguments,
    assert_same_bits,
    bits,
    check_every_byte,
    poisoned_results,
    upper_scale,
)

E2M1 = torch.float4_e2m1fn_x2
PER_ROW = NVFP4.replace(row_scale=True)
ROW_MAJOR = NVFP4.replace(scale_layout="row_major")

every_kind = pytest.mark.parametrize("kind", KINDS)


def x_of(device, *shape, dtype=torch.bfloat16):
    shape = shape or (6, 64)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype).to(device)


def one(device="cpu", *shape, dtype=torch.float32):
    return torch.ones(shape, dtype=dtype, device=device)


def calls(fmt):
    """Return functions of x and further arguments, one for each operation."""
    return [
        lambda x, **k: quantize(x, fmt, **k),
        lambda x, **k: fake_quantize(x, fmt, **k),
        lambda x, **k: silu_mul_quantize(torch.cat([x, x], -1), fmt, **k),
        lambda x, **k: rms_norm_quantize(x, x.new_ones(x.shape[-1]), fmt, **k),
    ]


# What an upper scale does.


@every_kind
@pytest.mark.parametrize("turn", [0, 3, 6], ids=["number", "one", "of matrices"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_every_kind_and_shape(kind, turn, dtype, device):
    x = (inputs((3, 7, 100), dtype, 1) * torch.tensor([1.0, 2.0**-7, 0.0]).view(3, 1, 1)).to(dtype)
    x[0, 1, 3], x[1, 2, 40] = math.inf, -math.inf
    x = x.to(device)
    upper = upper_scale(x, NVFP4, turn=turn + KINDS.index(kind))
    assert upper.kind == kind and upper.tensor.shape == {0: (), 3: (1,), 6: (3,)}[turn]
    check_every_byte(x, NVFP4, upper=upper, extra_rows=2)
    check_every_byte(x, ROW_MAJOR, upper=upper)


def test_both_conventions_are_inverses(device):
    """A power of two has an exact inverse, so both give the same bits."""
    x = x_of(device)
    for exponent in (-117, -3, 0, 4, 117):
        scale = torch.tensor(2.0**exponent, device=device)
        results = quantize(x, NVFP4, encode_scale=scale)
        others = quantize(x, NVFP4, decode_scale=1 / scale)
        for result, other in zip(results, others, strict=True):
            assert_same_bits(result, other)


@pytest.mark.parametrize(
    ("amax", "encode"),
    [
        (2688.0, 1.0),
        (0.0, 1.0),
        (-0.0, 1.0),
        (2.0**-149, 2.0**117),
        (2688 * 2.0**-117, 2.0**117),
        (2688 * 2.0**-118, 2.0**117),
        (math.inf, math.nan),
        (math.nan, math.nan),
        (-1.0, math.nan),
    ],
)
def test_encode_scale_of_an_amax(amax, encode, device):
    x = torch.full((3, 32), 0.3, device=device)
    given = torch.tensor(amax, device=device)
    q, sf = check_every_byte(x, ROW_MAJOR, upper=UpperScale("amax", given))
    if math.isnan(encode):
        assert bits(sf).eq(0x7F).all() and bits(q).eq(0).all()
        return
    expected = quantize(x, ROW_MAJOR, encode_scale=torch.tensor(encode, device=device))
    for result, wanted in zip((q, sf), expected, strict=True):
        assert_same_bits(result, wanted)


@pytest.mark.parametrize("kind", ["encode_scale", "decode_scale"])
@pytest.mark.parametrize(
    "value", [0.0, -1.0, math.nan, math.inf, -math.inf, 2.0**118, 2.0**-118, 2.0**-149]
)
def test_upper_scales_out_of_range(kind, value, device):
    """Scales are NaN in rows that exist, and 0 in others."""
    given = torch.tensor([1.0, value], device=device)
    x = x_of(device, 2, 5, 64)
    upper = UpperScale(kind, given)
    rows = Masked(int32([5, 3], device))
    q, sf = check_every_byte(x, ROW_MAJOR, upper=upper, rows=rows)
    assert bits(sf[1, :3]).eq(0x7F).all() and bits(q[1, :3]).eq(0).all()
    assert not bits(sf[0]).eq(0x7F).any()
    y = fake_quantize(x, ROW_MAJOR, **as_arguments(upper))
    assert y[1].isnan().all() and not y[0].isnan().any()


@pytest.mark.parametrize("limit", [2.0**117, 2.0**-117])
@pytest.mark.parametrize("kind", ["encode_scale", "decode_scale"])
def test_upper_scales_at_the_edges(kind, limit, device):
    x = random_magnitudes().to(device)
    given = torch.tensor(limit, device=device)
    check_every_byte(x, ROW_MAJOR, upper=UpperScale(kind, given))


def random_magnitudes():
    """Return groups of all magnitudes of float32, subnormals among them."""
    x = torch.randn(40, 96, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    exponents = torch.arange(240, dtype=torch.float64).view(40, 6) - 140
    return (x.view(40, 6, 16) * (2.0**exponents).unsqueeze(2)).float().view(40, 96)


def test_underflowing_groups(device):
    """Groups whose scale rounds to 0 beside the smallest that does not: codes are 0 with signs."""
    steps = torch.tensor([0.0, 0.49, 0.5, 0.51, 1.0, 1.5, 2.5]) * 2.0**-9 * 6
    x = (torch.ones(7, 16) * steps[:, None]).to(device)
    x[:, ::2] *= -1
    q, sf = check_every_byte(x, ROW_MAJOR, upper=UpperScale("encode_scale", one(device)))
    assert bits(sf).tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert bits(q[:3]).eq(0x08).all() and not bits(q[3:]).eq(0x08).any()
    for name, floor in (("deepgemm", 1), ("torchao", 8)):
        fmt = ROW_MAJOR.replace(min_scale=name)
        _, sf = check_every_byte(x, fmt, upper=UpperScale("encode_scale", one(device)))
        assert bits(sf).tolist() == [max(floor, byte) for byte in (0, 0, 0, 1, 1, 2, 2)]


def test_known_values(device):
    """Two values in a byte, the earlier one below."""
    codes = [0.0, 0.5, -1.0, 1.5, 2.0, -3.0, 4.0, 6.0, 0.25, 0.75, -0.0, 5.0, 2.5, -6.0, 0.76, 9e-9]
    x = torch.tensor([codes], device=device)
    q, sf = quantize(x, ROW_MAJOR, encode_scale=one(device))
    assert bits(sf).tolist() == [0x38]
    assert bits(q).tolist() == [0x10, 0x3A, 0xD4, 0x76, 0x20, 0x68, 0xF4, 0x02]
    q, sf = quantize(x, MXFP4.replace(scale_layout="row_major"))
    assert bits(sf).tolist() == [127]
    assert bits(q).tolist() == [0x10, 0x3A, 0xD4, 0x76, 0x20, 0x68, 0xF4, 0x02]


# A scale of each row.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_scales_of_rows_are_those_of_single_matrices(dtype, device):
    """Each row is what a matrix of it alone is, with its amax."""
    x = inputs((12, 100), dtype, 3).to(device)
    fmt = PER_ROW.replace(scale_layout="row_major")
    q, sf, scales = check_every_byte(x, fmt)
    for i, row in enumerate(x.split(1)):
        amax = row.float().abs().amax()
        other_q, other_sf = quantize(row, ROW_MAJOR, amax=amax)
        assert_same_bits(q[i : i + 1], other_q)
        assert_same_bits(sf[i : i + 1], other_sf)
        expected = oracle.forms_of_amax(amax.double().cpu().numpy()).decode
        assert scales[i].item() == expected or (math.isnan(expected) and scales[i].isnan())


@pytest.mark.parametrize(
    "rows", [None, Masked(int32([4, 0])), "index", "psum"], ids=["all", "masked", "index", "psum"]
)
def test_scales_of_rows_that_do_not_exist(rows, device):
    """They are 0, but past the count of a masked expert, where they keep what memory held."""
    x = torch.full((2, 6, 64), 3.0, device=device)
    live = torch.ones(2, 6, dtype=torch.bool)
    index, masked = None, isinstance(rows, Masked)
    if masked:
        rows = Masked(rows.masked_m.to(device))
        live = torch.arange(6) < torch.tensor([[4], [0]])
    elif rows == "index":
        rows, index = None, int32([[0, -1, 5, 6, 99, 2], [-1] * 6], device)
        x, live = x[0], (index.cpu() >= 0) & (index.cpu() < 6)
    elif rows == "psum":
        rows, x = PrefixSum(int32([1, 5], device), 4), x[0]
        live = torch.tensor([True, False, False, False, True, False])
    out = poisoned_results(PER_ROW, 6, 64, device, batch_shape=tuple(live.shape[:-1]))
    poison = bits(out[2])[:4].clone().view(torch.float32).item()
    scales = quantize(x, PER_ROW, rows=rows, index=index, out=out)[2].cpu()
    assert scales[live].eq(oracle.forms_of_amax(np.float64(3.0)).decode.item()).all()
    assert scales[~live].eq(poison if masked else 0.0).all()


def test_scales_of_rows_go_where_they_are_wanted(device):
    x = x_of(device, 2, 6, 64)
    results = quantize(x, PER_ROW)
    own = torch.empty(2, 6, device=device)
    others = quantize(x, PER_ROW, out=(None, None, own))
    assert others[2] is own
    for result, other in zip(results, others, strict=True):
        assert_same_bits(result, other)
    y = dequantize(*results[:2], PER_ROW, decode_scale=results[2], dtype=torch.bfloat16)
    assert_same_bits(y, fake_quantize(x, PER_ROW))


# Bad input.


@pytest.mark.parametrize("call", range(4))
def test_one_upper_scale_is_needed(call, device):
    message = (
        "encode_scale: expected one of encode_scale, decode_scale, amax for "
        f"{NVFP4}, whose float8_e4m3fn scales have one above them, got none"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        calls(NVFP4)[call](x_of(device))


@pytest.mark.parametrize("call", range(4))
@pytest.mark.parametrize(
    "names", [KINDS, KINDS[:2], KINDS[1:], KINDS[::2]], ids=["three", "two", "last", "ends"]
)
def test_no_more_than_one_upper_scale(call, names, device):
    message = (
        f"{' and '.join(names)}: expected one of encode_scale, decode_scale, amax, got {len(names)}"
    )
    for fmt in (NVFP4, MXFP8):
        with pytest.raises(ValueError, match=f"^{message}$"):
            calls(fmt)[call](x_of(device), **dict.fromkeys(names, one(device)))


@pytest.mark.parametrize("call", range(4))
@every_kind
def test_formats_without_an_upper_scale(call, kind, device):
    cases = [
        (MXFP4, "no scale lies above those of groups"),
        (MXFP8, "no scale lies above those of groups"),
        (FLOAT32, "no scale lies above those of groups"),
        (PER_ROW, "each row has its own"),
    ]
    for fmt, reason in cases:
        message = f"{kind}: expected None for {fmt}, where {reason}, got a tensor"
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            calls(fmt)[call](x_of(device), **{kind: one(device)})


@pytest.mark.parametrize("call", range(4))
@every_kind
@pytest.mark.parametrize(("value", "got"), [(1.0, "1.0"), (3, "3"), ([1.0], "list"), ("1", "'1'")])
def test_upper_scales_are_tensors(call, kind, value, got, device):
    message = rf"^{kind}: expected a float32 tensor on the device of the input.*, got {got}$"
    with pytest.raises(TypeError, match=message):
        calls(NVFP4)[call](x_of(device), **{kind: value})


@pytest.mark.parametrize("call", range(4))
@every_kind
def test_bad_upper_scales(call, kind, device):
    x = x_of(device, 3, 5, 64)
    cases = [
        (TypeError, "expected .*float32, .*got .* float64", one(device).double()),
        (TypeError, "expected .*float32, .*got .* bfloat16", one(device).bfloat16()),
        (ValueError, r"expected shape \(\) or \(1,\) or \(3,\), got \(5,\)", one(device, 5)),
        (ValueError, r"expected shape \(\) or \(1,\) or \(3,\), got \(3, 1\)", one(device, 3, 1)),
        (ValueError, r"expected shape .*, got \(3, 5\)", one(device, 3, 5)),
        (ValueError, r"expected shape .*, got \(0,\)", one(device, 0)),
        (ValueError, r"expected .*device.*", one("meta")),
        (ValueError, r"expected .*contiguous.*", one(device, 6)[::2]),
    ]  # fmt: skip
    for error, message, given in cases:
        with pytest.raises(error, match=rf"^{kind}: {message}"):
            calls(NVFP4)[call](x, **{kind: given})


@pytest.mark.parametrize("fmt", [NVFP4, PER_ROW, MXFP4, MXFP4.replace(scale_layout="8x4")], ids=str)
def test_odd_columns(fmt, device):
    scale = {} if fmt is not NVFP4 else {"encode_scale": one(device)}
    message = (
        r"expected a multiple of 2 columns in the result, whose float4_e2m1fn_x2 values share "
        r"bytes, got {}$"
    )
    for k in (1, 33):
        x = torch.ones(4, k, device=device)
        for call in calls(fmt):
            with pytest.raises(ValueError, match="^(x|gate_up): " + message.format(k)):
                call(x, **scale)
    # Half of the columns of gates and ups is odd.
    with pytest.raises(ValueError, match="^gate_up: " + message.format(33)):
        silu_mul_quantize(torch.ones(4, 66, device=device), fmt, **scale)


@pytest.mark.parametrize("call", range(4))
def test_scales_of_rows_need_rows_in_registers(call, device):
    x = torch.ones(1, 32770, dtype=torch.bfloat16, device=device)
    message = "^(x|gate_up): expected up to 32768 columns in the result of a format with row_scale"
    if call == 3:
        message = "^x: expected up to .* rows of up to 32768, "
    with pytest.raises(ValueError, match=message):
        calls(PER_ROW)[call](x)
    calls(PER_ROW)[call](x[:, :32768].contiguous())


@pytest.mark.parametrize("call", [0, 2, 3])
def test_values_have_half_the_columns(call, device):
    x, fmt = x_of(device), PER_ROW
    good = torch.empty(6, 32, dtype=torch.uint8, device=device).view(E2M1)
    for wrong in ((6, 64), (6, 31), (5, 32), (32,)):
        q = torch.empty(wrong, dtype=torch.uint8, device=device).view(E2M1)
        message = rf"^out q: expected shape \(6 or more, 32\), got {re.escape(str(wrong))}$"
        with pytest.raises(ValueError, match=message):
            calls(fmt)[call](x, out=(q, None, None))
    message = r"^out q: expected a tensor of float4_e2m1fn_x2, got a tensor of uint8"
    with pytest.raises(TypeError, match=message):
        calls(fmt)[call](x, out=(good.view(torch.uint8), None, None))
    assert calls(fmt)[call](x, out=(good, None, None))[0] is good


@pytest.mark.parametrize("call", [0, 2, 3])
def test_bad_scales_of_rows(call, device):
    x = x_of(device, 2, 6, 64)
    cases = [
        (ValueError, r"expected shape \(2, 6\), got \(6,\)", one(device, 6)),
        (ValueError, r"expected shape \(2, 6\), got \(2, 6, 1\)", one(device, 2, 6, 1)),
        (ValueError, r"expected shape \(2, 6\), got \(2, 8\)", one(device, 2, 8)),
        (TypeError, "expected a tensor of float32", one(device, 2, 6).half()),
        (TypeError, "expected a tensor", 1.0),
        (ValueError, ".*device", one("meta", 2, 6)),
        (ValueError, ".*contiguous", one(device, 6, 2).t()),
        (ValueError, ".*requires no grad", one(device, 2, 6).requires_grad_()),
    ]
    for error, message, given in cases:
        with pytest.raises(error, match=rf"^out row scales: {message}"):
            calls(PER_ROW)[call](x, out=(None, None, given))


def test_results_that_a_format_has(device):
    x = x_of(device)
    with pytest.raises(TypeError, match=r"^out: expected \(q, sf, row_scales\), got 2 items$"):
        quantize(x, PER_ROW, out=(None, None))
    with pytest.raises(TypeError, match=r"^out: expected \(q, sf\), got 3 items$"):
        quantize(x, NVFP4, out=(None, None, None), encode_scale=one(device))
    message = (
        r"^out: expected \(q, sf, row_scales\) or \(q, sf, row_scales, residual\), got 2 items$"
    )
    with pytest.raises(TypeError, match=message):
        rms_norm_quantize(x, x[0], PER_ROW, out=(None, None))


def test_scales_of_rows_overlap_nothing(device):
    arena = torch.zeros(1024, dtype=torch.uint8, device=device)
    x = x_of(device, 4, 32)
    q, scales = arena[:64].view(E2M1).view(4, 16), arena[60:76].view(torch.float32)
    with pytest.raises(ValueError, match=r"^out (q|row scales): .*overlaps out (q|row scales)"):
        quantize(x, PER_ROW, out=(q, None, scales))
    x = arena[512:768].view(torch.bfloat16).view(4, 32)
    with pytest.raises(ValueError, match=r"^out row scales: .*overlaps x"):
        quantize(x, PER_ROW, out=(None, None, arena[600:616].view(torch.float32)))
    message = r"^out (q|sf): .*overlaps encode_scale"
    with pytest.raises(ValueError, match=message):
        quantize(x, NVFP4, out=(q, None), encode_scale=arena[4:8].view(torch.float32))


def test_dequantize_takes_the_scale_of_the_call(device):
    x = x_of(device, 2, 6, 64)
    q, sf = quantize(x, NVFP4, encode_scale=one(device))
    rows_q, rows_sf, row_scales = quantize(x, PER_ROW)
    missing = "encode_scale: expected one of encode_scale, decode_scale, amax for .*, got none"
    wanted = "decode_scale: expected the scales of rows that quantize returned for .*, got"
    cases = [
        ((q, sf, NVFP4), missing, {}),
        ((q, sf, NVFP4), r"decode_scale: expected shape \(\) or \(1,\) or \(2,\), got \(2, 6\)",
         {"decode_scale": row_scales}),
        ((rows_q, rows_sf, PER_ROW), f"{wanted} None", {}),
        ((rows_q, rows_sf, PER_ROW), f"{wanted} encode_scale", {"encode_scale": row_scales}),
        ((rows_q, rows_sf, PER_ROW), f"{wanted} amax", {"amax": row_scales}),
        ((rows_q, rows_sf, PER_ROW), r"decode_scale: expected shape \(2, 6\), got \(2,\)",
         {"decode_scale": row_scales[:, 0]}),
        ((*quantize(x, MXFP4), MXFP4), "amax: expected None for .*", {"amax": one(device)}),
    ]  # fmt: skip
    for arguments, message, scale in cases:
        with pytest.raises(ValueError, match=f"^{message}"):
            dequantize(*arguments, **scale)
    message = (
        r"^sf: expected shape \(2, 512\), the float8_e4m3fn scales of values \(2, 6, 64\) in layout"
    )
    with pytest.raises(ValueError, match=message):
        dequantize(q, sf[:, :256].contiguous(), NVFP4, encode_scale=one(device))


# check=True.


@pytest.mark.parametrize("scale", [2.0**-130, 2.0**-30, 1.0, 2.0**10, 2.0**20])
def test_check_names_a_mixed_up_scale(scale, device):
    x = x_of(device, 3, 5, 64, dtype=torch.float32) * scale
    amax = x.abs().amax()
    encode = (2688 / amax).clamp(max=2.0**117)
    for good in ({"encode_scale": encode}, {"decode_scale": 1 / encode}, {"amax": amax}):
        quantize(x, NVFP4, **good, check=True)
    mixed = encode.log2().abs() > 4
    for kind, given in (("encode_scale", 1 / encode), ("decode_scale", encode)):
        if not mixed:
            quantize(x, NVFP4, **{kind: given}, check=True)
            continue
        message = rf"^{kind}: expected about 2688 / amax = .* as an encode scale, or amax / 2688"
        with pytest.raises(ValueError, match=message + r" = .*: were the two mixed up\?$"):
            quantize(x, NVFP4, **{kind: given}, check=True)
        quantize(x, NVFP4, **{kind: given})


def test_check_allows_a_scale_within_2_to_20(device):
    x = torch.full((4, 64), 2688.0, device=device)
    for exponent, good in ((20, True), (-20, True), (21, False), (-21, False)):
        given = torch.tensor(2.0**exponent, device=device)
        if good:
            quantize(x, NVFP4, encode_scale=given, check=True)
            continue
        with pytest.raises(ValueError, match=r"^encode_scale: .* mixed up\?$"):
            quantize(x, NVFP4, encode_scale=given, check=True)


@pytest.mark.parametrize("kind", ["encode_scale", "decode_scale"])
@pytest.mark.parametrize(
    "value", [0.0, -1.0, math.nan, math.inf, 2.0**118, 2.0**-118], ids=lambda v: f"{v:.3g}"
)
def test_check_names_scales_out_of_range(kind, value, device):
    x = x_of(device, 2, 5, 64)
    message = rf"^{kind}: expected numbers from 2\^-117 to 2\^117, got {value}$"
    message = message.replace("+", r"\+")
    given = torch.tensor([1.0, value], device=device)
    for call in (0, 2, 3):
        with pytest.raises(ValueError, match=message):
            calls(NVFP4)[call](x, **{kind: given}, check=True)


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf], ids=str)
def test_check_names_a_bad_amax(value, device):
    with pytest.raises(
        ValueError, match=rf"^amax: expected finite numbers, 0 or above, got {value}$"
    ):
        quantize(x_of(device), NVFP4, amax=torch.tensor(value, device=device), check=True)


def test_check_names_an_amax_of_other_values(device):
    given = torch.tensor(2.0**40, device=device)
    with pytest.raises(
        ValueError, match=r"^amax: expected about 1, that of what is quantized, got 1.1e\+12$"
    ):
        quantize(torch.ones(4, 64, device=device), NVFP4, amax=given, check=True)


def test_check_names_groups_without_a_scale(device):
    x, amax = x_of(device, 5, 64), torch.tensor([3.0, 4.0], device=device)
    good, bad = (Indexed(int32([0, 1, last, -1, 0], device)) for last in (1, 2))
    quantize(x, NVFP4, amax=amax, rows=good, check=True)
    message = r"^amax: expected a scale for each group of rows, 3 or more, got 2$"
    with pytest.raises(ValueError, match=message):
        quantize(x, NVFP4, amax=amax, rows=bad, check=True)
    assert quantize(x, NVFP4, amax=amax, rows=bad)[0][2].view(torch.uint8).eq(0).all()


def test_check_looks_at_each_matrix_and_at_rows_that_exist(device):
    x = x_of(device, 2, 5, 64)
    x[1] *= 2.0**-30
    encode = 2688 / x.float().abs().amax((1, 2))
    quantize(x, NVFP4, encode_scale=encode, check=True)
    with pytest.raises(ValueError, match=r"^encode_scale: .* mixed up\?$"):
        quantize(x, NVFP4, encode_scale=encode.flip(0), check=True)
    # One number is that of all matrices.
    quantize(x, NVFP4, encode_scale=encode[0], check=True)
    x[0, 3] = 1e30
    rows = Masked(int32([3, 5], device))
    quantize(x, NVFP4, encode_scale=encode, rows=rows, check=True)
    with pytest.raises(ValueError, match=r"^encode_scale: .* mixed up\?$"):
        quantize(x, NVFP4, encode_scale=encode, check=True)
    dead = Indexed(int32([0, 0, 0, -1, 0], device))
    quantize(x[0], NVFP4, encode_scale=encode[0], rows=dead, check=True)


def test_check_passes_inputs_without_an_amax(device):
    for x in (torch.zeros(4, 64, device=device), torch.full((4, 64), math.inf, device=device)):
        quantize(x, NVFP4, encode_scale=torch.tensor(2.0**100, device=device), check=True)
    quantize(torch.ones(0, 64, device=device), NVFP4, encode_scale=one(device), check=True)
