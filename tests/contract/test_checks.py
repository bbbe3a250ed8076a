"""Bad input: every message names the argument, what was expected and what came."""

import ctypes

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cute_quant import (
    DEEP_GEMM,
    DEEP_GEMM_32,
    DEEP_GEMM_SM90,
    GROUPWISE_FP8,
    MXFP8,
    ROWWISE_INT8,
    Format,
    Indexed,
    Masked,
    PrefixSum,
    deep_gemm_format,
    dequantize,
    empty_scales,
    fake_quantize,
    quantize,
    rms_norm_quantize,
    silu_mul_quantize,
)
from cute_quant.dispatch import launch, plan
from cute_quant.integrations.deep_gemm import per_token_cast_to_fp8
from cute_quant.integrations.vllm import per_token_group_quant_fp8_packed_for_deepgemm
from cute_quant.jit import lookup
from tests.helpers import UE8M0

both = pytest.mark.parametrize("function", [quantize, fake_quantize])


operators = torch.ops.cute_quant


def activations(device, mn=6, k=256, dtype=torch.bfloat16):
    return torch.ones(mn, k, dtype=dtype, device=device)


def values(device, mn=6, k=256):
    return torch.empty(mn, k, dtype=torch.float8_e4m3fn, device=device)


def scales(device, mn=6, k=256):
    return UE8M0.empty_scales((), mn, k, torch.device(device))


def test_not_a_tensor():
    with pytest.raises(TypeError, match=r"x: expected a torch.Tensor, got list"):
        quantize([[1.0]])


@both
@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn])
def test_input_dtype(function, dtype, device):
    name = str(dtype).removeprefix("torch.")
    message = rf"x: expected .*bfloat16 or float16 or float32, got a tensor of {name}"
    with pytest.raises(TypeError, match=message):
        function(activations(device).to(dtype))


@both
@pytest.mark.parametrize("shape", [(), (256,)])
def test_dimensions(function, shape, device):
    with pytest.raises(
        ValueError, match=r"x: expected 2 or more dimensions \(\.\.\., mn, k\), got"
    ):
        function(torch.ones(shape, dtype=torch.bfloat16, device=device))


@both
def test_leading_dimensions_have_one_stride(function, device):
    x = torch.ones(4, 3, 6, 256, dtype=torch.bfloat16, device=device)
    for good in (x[::2, :1], x[0:1, ::2], x.flatten(0, 1)[::3], x[:1, :1].expand(4, 3, 6, 256)):
        function(good)
    message = r"x: expected leading dimensions that one stride walks, got shape .*, strides \("
    for bad in (x[:, :2], x.transpose(0, 1), x[:, :1].expand(4, 3, 6, 256)):
        with pytest.raises(ValueError, match=message):
            function(bad)


@both
def test_too_many_columns(function):
    x = torch.empty(0, dtype=torch.bfloat16, device="meta")
    function(x.as_strided((4, 2**20), (2**20, 1)))
    with pytest.raises(ValueError, match=r"x: expected up to 2147483647 rows of up to 1048576, "):
        function(x.as_strided((4, 2**20 + 1), (2**20 + 1, 1)))


def test_rows_are_contiguous(device):
    message = r"x: expected rows contiguous along k, got strides \(1, 256\)"
    with pytest.raises(ValueError, match=message):
        quantize(activations(device, 256, 256).t())
    with pytest.raises(ValueError, match=r"x: expected rows contiguous along k"):
        quantize(activations(device, 4, 512)[:, ::2])


@pytest.mark.parametrize(
    ("fmt", "got"),
    [
        (None, "None"),
        (128, "128"),
        (True, "True"),
        ("DEEP_GEMM", "'DEEP_GEMM': Format.parse reads text"),
        (torch.float32, "torch.float32"),
        (Format, "type"),
        (torch.ones(2), "a tensor of float32: other tensors are keywords, and gates and ups are"),
    ],
    ids=str,
)
def test_fmt_is_a_format(fmt, got, device):
    x, (q, sf) = activations(device), quantize(activations(device))
    message = rf"^fmt: expected a Format, such as cute_quant.DEEP_GEMM, got {got}"
    for call in (
        lambda: quantize(x, fmt),
        lambda: silu_mul_quantize(x, fmt),
        lambda: rms_norm_quantize(x, x[0], fmt),
        lambda: fake_quantize(x, fmt),
        lambda: dequantize(q, sf, fmt),
        lambda: empty_scales(fmt, (6, 256)),
        lambda: quantize(x.to("meta"), fmt),
        lambda: fake_quantize(x.to("meta"), fmt),
        lambda: dequantize(q.to("meta"), sf.to("meta"), fmt),
    ):
        with pytest.raises(TypeError, match=message):
            call()


# What a Format refuses where it is made.


@pytest.mark.parametrize(
    "group_size", [0, -2, -128, True, 1, 8, 127, 512, 128.5, 128.0, "128", None, [128]]
)
def test_group_size(group_size):
    message = r"group_size: expected one of \(16, 32, 64, 128, 256\) or -1 for the whole row, got"
    for fmt in (DEEP_GEMM, DEEP_GEMM_SM90):
        with pytest.raises(ValueError, match=message):
            fmt.replace(group_size=group_size)
        with pytest.raises(ValueError, match=message):
            Format(torch.int8, group_size)
    with pytest.raises(ValueError, match=r"group_size: .*, got a tensor of int64$"):
        Format(group_size=torch.tensor(128))


@pytest.mark.parametrize("group_size", [16, 64, 128, -1])
def test_group_size_of_blocked_scales(group_size):
    message = rf"group_size: expected 32 for scale_layout=128x4, .*MX formats.*got {group_size}"
    with pytest.raises(ValueError, match=message):
        MXFP8.replace(group_size=group_size)


@pytest.mark.parametrize(
    "values", [torch.float8_e8m0fnu, torch.float8_e4m3fnuz, torch.uint8, "int8", None, int, []]
)
def test_values(values):
    message = (
        r"values: expected one of float8_e4m3fn or float8_e5m2 or int8 or float4_e2m1fn_x2, got"
    )
    with pytest.raises(TypeError, match=message):
        DEEP_GEMM.replace(values=values)


@pytest.mark.parametrize("scale_dtype", [torch.uint8, torch.int32, torch.bfloat16, "ue8m0", None])
def test_scale_dtype(scale_dtype):
    message = r"scale_dtype: expected float8_e8m0fnu or float8_e4m3fn or float32, got"
    with pytest.raises(TypeError, match=message):
        DEEP_GEMM.replace(scale_dtype=scale_dtype)


def test_scale_layout():
    for layout in ("", "mn_major", "MN_MAJOR_PACKED", None, torch.float32, ["row_major"]):
        message = (
            r"scale_layout: expected one of \('mn_major_packed', 'row_major', "
            r"'row_major_packed', '128x4', '8x4'\) for float8_e8m0fnu scales, got"
        )
        with pytest.raises(ValueError, match=message):
            DEEP_GEMM.replace(scale_layout=layout)
    for layout in ("mn_major_packed", "128x4", "row", 4):
        message = r"scale_layout: expected one of \('mn_major', 'row_major'\) for float32 scales"
        with pytest.raises(ValueError, match=message):
            DEEP_GEMM_SM90.replace(scale_layout=layout)


def test_round_scale():
    for fmt in (DEEP_GEMM, DEEP_GEMM.replace(scale_layout="row_major"), MXFP8):
        with pytest.raises(ValueError, match=r"round_scale: expected False for float8_e8m0fnu"):
            fmt.replace(round_scale=True)
    for fmt in (DEEP_GEMM, DEEP_GEMM_SM90):
        for round_scale in ("yes", 0, 1, 0.0, None, torch.tensor(True)):
            with pytest.raises(TypeError, match=r"round_scale: expected a bool, got"):
                fmt.replace(round_scale=round_scale)


def test_numerics():
    for numerics in ("", "IEEE", "reciprocal", None, True, ["ieee"]):
        with pytest.raises(ValueError, match=r"numerics: expected one of \('ieee', 'vllm', "):
            DEEP_GEMM_SM90.replace(numerics=numerics)
    for fmt in (DEEP_GEMM, MXFP8, DEEP_GEMM_SM90.replace(round_scale=True)):
        if fmt is not MXFP8:
            message = r"numerics: expected one of \('ieee', 'vllm_bf16'\) for .*, got 'deepgemm'"
            with pytest.raises(ValueError, match=message):
                fmt.replace(numerics="deepgemm")
        with pytest.raises(ValueError, match=r"numerics: expected one of .*, got 'sglang'"):
            fmt.replace(numerics="sglang")


@pytest.mark.parametrize(
    "min_scale",
    [-1, -1e-10, float("nan"), float("inf"), -float("inf"), 2.0**101, 10**400],
    ids=lambda value: f"{str(value)[:9]}",
)
@pytest.mark.parametrize("fmt", [DEEP_GEMM, MXFP8, DEEP_GEMM_SM90, GROUPWISE_FP8], ids=str)
def test_min_scale(min_scale, fmt):
    with pytest.raises(ValueError, match=r"min_scale: expected .* <= min_scale <= .*, got"):
        fmt.replace(min_scale=min_scale)


def test_min_scale_of_float32_scales_is_normal():
    for round_scale in (False, True):
        for min_scale in (0, 2.0**-127):
            with pytest.raises(ValueError, match=rf"min_scale: expected 1.17.* got {min_scale}"):
                DEEP_GEMM_SM90.replace(round_scale=round_scale, min_scale=min_scale)


@pytest.mark.parametrize("min_scale", [True, [1e-10], 1j, torch.tensor(1e-10)])
def test_min_scale_is_a_number(min_scale):
    with pytest.raises(TypeError, match=r"min_scale: expected a number or one of \('vllm', .*got"):
        DEEP_GEMM.replace(min_scale=min_scale)


@pytest.mark.parametrize("min_scale", ["1", "", "vLLM", "tilekernels"])
def test_min_scale_is_a_name(min_scale):
    with pytest.raises(ValueError, match=r"min_scale: expected a number or one of \('vllm', .*got"):
        DEEP_GEMM.replace(min_scale=min_scale)


@pytest.mark.parametrize("fmt", [DEEP_GEMM_SM90, GROUPWISE_FP8], ids=str)
def test_float32_scales_need_a_floor(fmt):
    with pytest.raises(ValueError, match=r"min_scale: expected 1.17.*e-38 <= .*, got 'ocp'"):
        fmt.replace(min_scale="ocp")


def test_formats_do_not_change():
    for change in (
        lambda: setattr(DEEP_GEMM, "group_size", 64),
        lambda: setattr(DEEP_GEMM, "anything", 1),
        lambda: delattr(DEEP_GEMM, "group_size"),
    ):
        with pytest.raises(AttributeError, match=r": a Format does not change, use replace\(\)"):
            change()
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'dtype'"):
        DEEP_GEMM.replace(dtype=torch.int8)
    assert DEEP_GEMM.group_size == 128


@pytest.mark.parametrize(
    "text",
    [
        "",
        "ue8m0",
        "deep_gemm",
        "e4m3:128",
        "e4m3:128:e8m0",
        "fp8:128:e8m0:mn_major_packed",
        "e4m3:127:e8m0:mn_major_packed",
        "e4m3:128:e8m0:128x4",
        "e4m3:128:e8m0:mn_major_packed:",
        "e4m3:128:e8m0:mn_major_packed:round_scale",
        "e4m3:128:float32:mn_major:round_scale=True",
        "e4m3:128:float32:mn_major:round_scale=False",
        "e4m3:128:float32:mn_major:round_scale=",
        "e4m3:128:float32:mn_major:round_scale:round_scale",
        "e4m3:128:e8m0:mn_major_packed:min_scale=",
        "e4m3:128:e8m0:mn_major_packed:min_scale=1e-10:min_scale=1e-10",
        "e4m3:128:e8m0:mn_major_packed:values=int8",
    ],
)
def test_text_of_a_format(text):
    with pytest.raises(ValueError, match=r"^fmt: expected one of DEEP_GEMM, .*or text such as 'e4"):
        Format.parse(text)


@pytest.mark.parametrize("text", [None, 128, b"DEEP_GEMM", DEEP_GEMM, ["DEEP_GEMM"]], ids=repr)
def test_formats_are_parsed_from_text(text):
    with pytest.raises(TypeError, match=r"fmt: expected a str, got"):
        Format.parse(text)


def test_empty_scales():
    for shape in ((), (256,)):
        with pytest.raises(ValueError, match=r"mn, k\), each from 0 to 2147483647, with k up to"):
            empty_scales(DEEP_GEMM, shape)


@pytest.mark.parametrize("capability", [(8, 9), (12, 0)])
def test_deep_gemm_format(capability, monkeypatch):
    with pytest.raises(ValueError, match=r"device: expected a CUDA device, got cpu"):
        deep_gemm_format("cpu")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    version = ".".join(map(str, capability))
    with pytest.raises(RuntimeError, match=rf"device: expected .* 9 or 10, .*, got {version}"):
        deep_gemm_format()
    for capability, fmt in (((9, 0), DEEP_GEMM_SM90), ((10, 0), DEEP_GEMM), ((10, 3), DEEP_GEMM)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert deep_gemm_format("cuda:1") is fmt


# What calls refuse.


def test_gradients(device):
    x = activations(device).requires_grad_()
    for function in (quantize, fake_quantize):
        operator = getattr(operators, function.__name__)
        message = rf"x: .*{function.__name__} is not differentiable"
        with pytest.raises(RuntimeError, match=message):
            function(x)
        with pytest.raises(RuntimeError, match=message):
            operator(x, str(DEEP_GEMM))
        with torch.no_grad():
            function(x)
            function(torch.nn.Parameter(x))
            operator(x, str(DEEP_GEMM))
        function(x.detach())


def test_layout(device):
    with pytest.raises(TypeError, match=r"x: expected a strided tensor, got layout"):
        quantize(activations(device).to_sparse())


def test_negated_view(device):
    quantize(activations(device))  # of the same look
    with pytest.raises(ValueError, match=r"x: expected values in memory, got a lazily negated"):
        quantize(torch._neg_view(activations(device)))


def test_row_stride(device):
    x = torch.empty(1, dtype=torch.bfloat16, device=device).expand(2, 128)
    with pytest.raises(ValueError, match=r"x: expected rows contiguous along k"):
        quantize(x)
    far = torch.empty(0, dtype=torch.bfloat16, device="meta").as_strided((2, 128), (2**31, 1))
    with pytest.raises(ValueError, match=r"x: expected a row stride up to 2147483647 bytes"):
        quantize(far)


@pytest.mark.parametrize("out", [torch.empty(1), (torch.empty(1),), (1, 2, 3), "qs", 5, True])
def test_out_is_a_pair(out, device):
    with pytest.raises(TypeError, match=r"out: expected \(q, sf\), got"):
        quantize(activations(device), out=out)


def bad_values(device):
    return [
        (TypeError, r"expected a tensor of float8_e4m3fn, got 'q'", "q"),
        (TypeError, r"expected a tensor of float8_e4m3fn, got a tensor of uint8",
         values(device).view(torch.uint8)),
        (TypeError, r"got a tensor of float8_e5m2", values(device).view(torch.float8_e5m2)),
        (ValueError, r"expected shape \(6 or more, 256\), got \(5, 256\)", values(device, 5)),
        (ValueError, r"expected shape .*got \(6, 384\)", values(device, 6, 384)),
        (ValueError, r"expected shape .*got \(1536,\)", values(device).flatten()),
        (ValueError, r"expected strides .*got \(1, 256\)", values(device, 256, 256).t()),
        (ValueError, r"expected strides .*got \(0, 1\)", values(device, 1).expand(6, 256)),
        (ValueError, r"expected strides .*got \(128, 1\)",
         values(device).as_strided((6, 256), (128, 1))),
    ]  # fmt: skip


def bad_batched_values(device):
    q = torch.empty(3, 6, 256, dtype=torch.float8_e4m3fn, device=device)
    return [
        (r"expected shape \(3, 6 or more, 256\), got \(6, 256\)", q[0]),
        (r"expected shape .*got \(2, 6, 256\)", q[:2]),
        (r"expected shape .*got \(3, 5, 256\)", q[:, :5]),
        (r"expected shape .*got \(1, 3, 6, 256\)", q[None]),
        (r"expected strides .*got \(0, 256, 1\)", q[:1].expand(3, 6, 256)),
        (r"expected strides .*got \(1280, 256, 1\)", q.as_strided((3, 6, 256), (1280, 256, 1))),
        (r"expected strides .*got \(256, 512, 1\)", q.as_strided((3, 6, 256), (256, 512, 1))),
    ]


def bad_scales(device):
    aligned = torch.empty_strided((6, 1), (1, 8), dtype=torch.int32, device=device)
    return [
        (TypeError, r"expected a tensor of int32, got a tensor of fl", aligned.view(torch.float32)),
        (TypeError, r"expected a tensor of int32, got tuple", (1, 2)),
        (ValueError, r"expected shape \(6, 2\), got \(6, 3\)", scales(device, 6, 1536)),
        (ValueError, r"expected shape \(6, 2\), got \(7, 2\)", scales(device, 7, 1024)),
        (ValueError, r"expected strides \(1, 8\) or \(1, 6\), got \(1, 7\)",
         torch.empty_strided((6, 2), (1, 7), dtype=torch.int32, device=device)),
        (ValueError, r"expected strides \(1, 8\) or \(1, 6\), got \(2, 1\)",
         torch.empty((6, 2), dtype=torch.int32, device=device)),
        (ValueError, r"expected strides \(1, 8\) or \(1, 6\), got \(2, 8\)",
         torch.empty_strided((6, 2), (2, 8), dtype=torch.int32, device=device)),
    ]  # fmt: skip


@pytest.mark.parametrize("case", range(9))
def test_out_values(case, device):
    error, message, q = bad_values(device)[case]
    with pytest.raises(error, match=r"out q: .*" + message):
        quantize(activations(device), out=(q, None))


@pytest.mark.parametrize("case", range(7))
def test_out_scales(case, device):
    error, message, sf = bad_scales(device)[case]
    with pytest.raises(error, match=r"out sf: .*" + message):
        quantize(activations(device, k=1024), out=(None, sf))


@pytest.mark.parametrize("case", range(7))
def test_out_values_of_a_batch(case, device):
    message, q = bad_batched_values(device)[case]
    with pytest.raises(ValueError, match=r"out q: .*" + message):
        quantize(activations(device).expand(3, 6, 256), out=(q, None))


@pytest.mark.parametrize(
    ("fmt", "shape", "strides", "message"),
    [
        (DEEP_GEMM_32, (3, 6, 8), (64, 8, 1), r"strides \(64, 1, 8\) or \(48, 1, 6\), got \(64"),
        (DEEP_GEMM_32, (3, 6, 8), (8, 1, 24), r"strides \(64, 1, 8\) or .*, got \(8, 1, 24\)"),
        (DEEP_GEMM_32, (6, 8), (1, 8), r"shape \(3, 6, 8\), got \(6, 8\)"),
        (
            DEEP_GEMM_SM90.replace(group_size=32),
            (3, 6, 32),
            (192, 32, 1),
            r"strides \(256, 1, 8\) or \(192, 1, 6\), got \(192, 32, 1\)",
        ),
        (
            GROUPWISE_FP8.replace(group_size=32),
            (3, 6, 32),
            (256, 1, 8),
            r"strides \(192, 32, 1\), got",
        ),
        (
            DEEP_GEMM_32.replace(scale_layout="row_major"),
            (3, 6, 32),
            (384, 64, 2),
            r"strides \(192, 32, 1\), got",
        ),
        (MXFP8, (3, 6, 32), (192, 32, 1), r"shape \(3, 4096\), got \(3, 6, 32\)"),
        (MXFP8, (3, 4096), (1, 3), r"strides \(4096, 1\), got \(1, 3\)"),
    ],
)
def test_out_scales_of_a_batch(fmt, shape, strides, message, device):
    sf = torch.empty(4096 * 3, dtype=fmt.sf_dtype, device=device).as_strided(shape, strides)
    x = activations(device, k=1024).expand(3, 6, -1)
    with pytest.raises(ValueError, match=r"out sf: expected " + message):
        quantize(x, fmt, out=(None, sf))


def test_masked_values_have_no_more_rows(device):
    rows = Masked(torch.zeros(3, dtype=torch.int32, device=device))
    q = torch.empty(3, 7, 256, dtype=torch.float8_e4m3fn, device=device)
    with pytest.raises(ValueError, match=r"out q: expected shape \(3, 6, 256\), got \(3, 7, 256\)"):
        quantize(activations(device).expand(3, 6, 256), rows=rows, out=(q, None))


def int32(*values_, device):
    return torch.tensor(values_, dtype=torch.int32, device=device)


@pytest.mark.parametrize("rows", [torch.zeros(3, dtype=torch.int32), "masked", Masked, (3,)])
def test_rows_are_of_a_kind(rows, device):
    message = r"rows: expected None or one of Masked, PrefixSum, PrefixSumWithGaps, Indexed, got "
    with pytest.raises(TypeError, match=message):
        quantize(activations(device).expand(3, 6, 256), rows=rows)


def test_rows(device):
    x, batch = activations(device), activations(device).expand(3, 6, 256)
    three, six = int32(1, 2, 3, device=device), int32(1, 2, 3, 4, 5, 6, device=device)
    cases = [
        (
            TypeError,
            r"rows.masked_m: expected a tensor of int32, got a tensor of int64",
            batch,
            Masked(three.long()),
        ),
        (TypeError, r"rows.ends: expected a tensor of int32, got list", x, PrefixSum([1, 2])),
        (TypeError, r"rows.m_indices: expected a tensor of int32, got None", x, Indexed(None)),
        (
            ValueError,
            r"x: expected shape \(E, max_m, k\) for rows=Masked, got \(6, 256\)",
            x,
            Masked(six),
        ),
        (
            ValueError,
            r"x: expected shape \(M, k\) for rows=PrefixSum, got",
            batch,
            PrefixSum(three),
        ),
        (
            ValueError,
            r"x: expected shape \(M, k\) for rows=Indexed, got \(3, 6, 256\)",
            batch,
            Indexed(three),
        ),
        (ValueError, r"rows.masked_m: expected shape \(3,\), got \(6,\)", batch, Masked(six)),
        (
            ValueError,
            r"rows.masked_m: expected shape \(3,\), got \(3, 1\)",
            batch,
            Masked(three[:, None]),
        ),
        (
            ValueError,
            r"rows.ends: expected shape \(G,\), .*got \(3, 1\)",
            x,
            PrefixSum(three[:, None]),
        ),
        (ValueError, r"rows.m_indices: expected shape \(6,\), got \(3,\)", x, Indexed(three)),
        (
            ValueError,
            r"rows.masked_m: expected a contiguous tensor, got strides \(2,\)",
            batch,
            Masked(six[::2]),
        ),
        (ValueError, r"rows.alignment: expected 1 to 2147483647, got 0", x, PrefixSum(three, 0)),
        (ValueError, r"rows.alignment: expected 1 to 2147483647, got -8", x, PrefixSum(three, -8)),
        (TypeError, r"rows.alignment: expected an int, got 4.0", x, PrefixSum(three, 4.0)),
        (TypeError, r"rows.alignment: expected an int, got True", x, PrefixSum(three, True)),
    ]
    for error, message, x_, rows in cases:
        with pytest.raises(error, match=message):
            quantize(x_, rows=rows)


def test_index(device):
    x, three = activations(device), int32(0, 1, 2, device=device)
    cases = [
        (TypeError, r"index: expected a tensor of int32, got a tensor", x, three.long(), None),
        (TypeError, r"index: expected a tensor of int32, got list", x, [1], None),
        (ValueError, r"index: expected 1 or 2 dimensions, got shape \(\)", x, three[0], None),
        (ValueError, r"index: expected 1 or 2 dimensions", x, three[None, None], None),
        (
            ValueError,
            r"index: expected a contiguous tensor, got strides \(2,\)",
            x,
            three[::2],
            None,
        ),
        (ValueError, r"x: expected 2 dimensions \(T, k\) with an index", x[None], three, None),
        (
            ValueError,
            r"index: expected shape \(E, max_m\) for rows=Masked, got \(3,\)",
            x,
            three,
            Masked(three),
        ),
        (
            ValueError,
            r"index: expected shape \(M\) for rows=PrefixSum, got \(1, 3\)",
            x,
            three[None],
            PrefixSum(three),
        ),
        (
            ValueError,
            r"rows.m_indices: expected shape \(3,\), got \(2,\)",
            x,
            three,
            Indexed(three[:2]),
        ),
    ]
    for error, message, x_, index, rows in cases:
        with pytest.raises(error, match=message):
            quantize(x_, index=index, rows=rows)


def test_check(device):
    """What is clamped otherwise is named with `check`."""
    x, batch = activations(device), activations(device).expand(3, 6, 256)

    def tensor(*numbers):
        return int32(*numbers, device=device)

    good = [
        (batch, Masked(tensor(0, 6, 3)), None),
        (x, PrefixSum(tensor(2, 4, 6), 4), None),
        (x, PrefixSum(tensor(0, 0, 6), 4), None),
        (x, PrefixSum(tensor(), 4), None),
        (x, Indexed(tensor(-9, 3, 3, 2**30, 0, -1)), None),
        (x, None, tensor(-1, 0, 5, 5)),
        (x, None, None),
    ]
    for x_, rows, index in good:
        quantize(x_, rows=rows, index=index, check=True)
    bad = [
        (r"rows.masked_m: expected 0 to 6, got 7 at 1", batch, Masked(tensor(0, 7, 3)), None),
        (r"rows.masked_m: expected 0 to 6, got -1 at 2", batch, Masked(tensor(0, 6, -1)), None),
        (r"rows.ends: expected 0 to 6, got 7 at 0", x, PrefixSum(tensor(7)), None),
        (r"rows.ends: expected 0 to 6, got -2 at 1", x, PrefixSum(tensor(1, -2)), None),
        (r"rows.ends: expected group 1 to end at its start 4 or later, got 3",
         x, PrefixSum(tensor(2, 3, 6), 4), None),
        (r"index: expected -1 to 5, got 6 at 1", x, None, tensor(0, 6)),
        (r"index: expected -1 to 5, got -2 at \(1, 0\)", x, None, tensor(0, -2)[:, None]),
    ]  # fmt: skip
    for message, x_, rows, index in bad:
        quantize(x_, rows=rows, index=index)
        with pytest.raises(ValueError, match=message):
            quantize(x_, rows=rows, index=index, check=True)
    for check in (1, None, "yes"):
        with pytest.raises(TypeError, match=r"check: expected a bool, got"):
            quantize(x, check=check)
    with pytest.raises(ValueError, match=r"check: expected False under a tracer"):
        quantize(x.to("meta"), check=True)


def test_out_overlaps(device):
    arena = torch.zeros(1 << 16, dtype=torch.uint8, device=device)

    def view(dtype, shape, strides, offset):
        typed = arena.view(dtype)
        return typed.as_strided(shape, strides, offset // typed.element_size())

    x = view(torch.bfloat16, (6, 256), (256, 1), 0)  # bytes 0 .. 3072
    q = view(torch.float8_e4m3fn, (6, 256), (256, 1), 3072)  # .. 4608
    sf = view(torch.int32, (6, 1), (1, 8), 4608)
    quantize(x, out=(q, sf))
    cases = [
        ("out q", "x", x, view(q.dtype, (6, 256), (256, 1), 3072 - 32), None),
        ("out q", "x", x, view(q.dtype, (6, 256), (256, 1), 0), None),
        ("out sf", "x", x, None, view(sf.dtype, (6, 1), (1, 8), 3072 - 4)),
        ("out sf", "out q", x, q, view(sf.dtype, (6, 1), (1, 8), 4608 - 4)),
    ]
    for name, other, x_, q_, sf_ in cases:
        with pytest.raises(ValueError, match=rf"{name}: expected memory of its own.* {other}"):
            quantize(x_, out=(q_, sf_))
    # Padding rows are written too, so they count: six rows end where x starts.
    x = view(torch.bfloat16, (6, 256), (256, 1), 8192)
    with pytest.raises(ValueError, match=r"out sf: expected memory of its own.* x"):
        quantize(x, out=(q, view(sf.dtype, (6, 1), (1, 8), 8192 - 24)))
    quantize(x, out=(q, view(sf.dtype, (6, 1), (1, 8), 8192 - 32)))


@pytest.mark.gpu
def test_devices_do_not_mix():
    for here, there in (("cpu", "cuda"), ("cuda", "cpu")):
        with pytest.raises(ValueError, match=r"out q: expected the device of x, .*got"):
            quantize(activations(here), out=(values(there), None))
        with pytest.raises(ValueError, match=r"out sf: expected the device of x, .*got"):
            quantize(activations(here), out=(None, scales(there)))
        with pytest.raises(ValueError, match=r"sf: expected the device of q"):
            dequantize(values(here), scales(there))


@pytest.mark.parametrize("capability", [(8, 0), (9, 1), (13, 0)])
def test_unsupported_architecture(capability, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Some GPU")
    lookup.find_architecture.cache_clear()
    version = ".".join(map(str, capability))
    with pytest.raises(RuntimeError, match=rf"8.9, .* or 12.1, .*cuda:0, Some GPU, of {version}"):
        lookup.architecture(0)
    assert lookup.find_architecture(0) is None
    lookup.find_architecture.cache_clear()


def test_failed_calls_write_nothing(device):
    q, sf = values(device), scales(device)
    q.view(torch.uint8).fill_(7)
    sf.fill_(7)
    counts = int32(6, device=device)
    for error, choices in (
        (TypeError, {"fmt": "DEEP_GEMM"}),
        (TypeError, {"check": 1}),
        (TypeError, {"index": [0]}),
        (ValueError, {"rows": PrefixSum(counts, 0)}),
        (ValueError, {"rows": PrefixSum(counts + 1), "check": True}),
    ):
        with pytest.raises(error):
            quantize(activations(device), out=(q, sf), **choices)
    assert q.view(torch.uint8).eq(7).all() and sf.eq(7).all()


def test_dequantize(device):
    q, sf = quantize(activations(device))
    message = r"q: expected a tensor of float8_e4m3fn, got a tensor of uint8"
    with pytest.raises(TypeError, match=message):
        dequantize(q.view(torch.uint8), sf)
    with pytest.raises(TypeError, match=r"q: expected a tensor of int8, got a tensor of float8_e4"):
        dequantize(q, sf, ROWWISE_INT8)
    with pytest.raises(TypeError, match=r"sf: expected a tensor of int32, got a tensor of uint8"):
        dequantize(q, sf.to(torch.uint8))
    for fmt, name in ((DEEP_GEMM_SM90, "float32"), (MXFP8, "float8_e8m0fnu")):
        with pytest.raises(TypeError, match=rf"sf: expected a tensor of {name}, got a tens"):
            dequantize(q, sf, fmt)
    with pytest.raises(TypeError, match=r"sf: expected a strided tensor, got layout"):
        dequantize(q, torch.ones(6, 2, device=device).to_sparse(), DEEP_GEMM_SM90)
    for dtype in (torch.int8, torch.float64, "bfloat16", None):
        with pytest.raises(TypeError, match=r"dtype: expected one of .*, got"):
            dequantize(q, sf, dtype=dtype)
    with pytest.raises(ValueError, match=r"q: expected 2 or more dimensions"):
        dequantize(q.flatten(), sf)
    with pytest.raises(TypeError, match=r"q: expected a torch.Tensor, got list"):
        dequantize([q], sf)
    with pytest.raises(TypeError, match=r"sf: expected a torch.Tensor, got None"):
        dequantize(q, None)


@pytest.mark.parametrize(
    ("fmt", "shape", "expected"),
    [
        (
            DEEP_GEMM,
            (5, 1),
            r"\(6, 1\), the float8_e8m0fnu scales of values \(6, 256\) in layout mn_major_packed "
            r"for groups of 128, got \(5, 1\)",
        ),
        (DEEP_GEMM_32, (6, 1), r"\(6, 2\), the float8_e8m0fnu scales .*groups of 32, got"),
        (DEEP_GEMM, (1, 6, 1), r"\(6, 1\), the float8_e8m0fnu scales"),
        (DEEP_GEMM_SM90, (6, 1), r"\(6, 2\), the float32 scales .*layout mn_major "),
        (DEEP_GEMM_SM90.replace(group_size=-1), (6, 2), r"\(6, 1\), the float32 scales"),
        (
            DEEP_GEMM.replace(group_size=16, scale_layout="row_major"),
            (6, 8),
            r"\(6, 16\), the float8_e8m0fnu scales .*layout row_major",
        ),
        (MXFP8, (48,), r"\(1024,\), the float8_e8m0fnu scales .*layout 128x4"),
    ],
)
def test_dequantize_shapes(fmt, shape, expected, device):
    sf = torch.empty(shape, dtype=fmt.sf_dtype, device=device)
    with pytest.raises(ValueError, match=r"sf: expected shape " + expected):
        dequantize(values(device), sf, fmt)


def test_fake_quantize_out(device):
    x = activations(device)
    cases = [
        (TypeError, r"expected .* bfloat16, got a tensor of float16", torch.empty_like(x).half()),
        (TypeError, r"expected a tensor of bfloat16, got tuple", (x, None)),
        (ValueError, r"expected shape \(6, 256\), got \(7, 256\)", activations(device, 7)),
        (ValueError, r"expected strides .*got \(1, 6\)", activations(device, 256, 6).t()),
        (ValueError, r"expected strides .*got \(0, 1\)", activations(device, 1).expand(6, 256)),
        (ValueError, r"expected memory of its own, got memory that overlaps x", x),
        (ValueError, r"requires no gradient", torch.empty_like(x).requires_grad_()),
        (ValueError, r"lazily negated view", torch._neg_view(torch.empty_like(x))),
    ]
    for error, message, out in cases:
        with pytest.raises(error, match=r"out: .*" + message):
            fake_quantize(x, out=out)


def test_out_requires_no_gradient(device):
    sf = torch.empty_strided((6, 2), (1, 8), device=device, requires_grad=True)
    q = values(device)
    q.view(torch.uint8).fill_(7)
    with pytest.raises(ValueError, match=r"out sf: expected a tensor that requires no gradient"):
        quantize(activations(device), DEEP_GEMM_SM90, out=(q, sf))
    assert q.view(torch.uint8).eq(7).all()


@pytest.fixture
def planned(monkeypatch):
    """CPU tensors that say CUDA, and a kernel that does nothing: what stands before a launch."""
    launched = []
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(lookup, "find_architecture", lambda index: "sm_90a")

    def choose_kernel(call, result, scales):
        return plan.Kernel(lambda *arguments: launched.append(arguments), None, (call.fmt.floor,))

    monkeypatch.setattr(plan, "choose_kernel", choose_kernel)
    monkeypatch.setattr(launch, "_plans", {})
    monkeypatch.setattr(launch, "_recent", [])
    monkeypatch.setattr(launch, "_recent_out", [])
    return launched


def test_plans_are_kept_for_what_they_hold(planned):
    """Each thing that a plan was checked for makes another plan."""
    x, q, sf = activations("cpu"), values("cpu"), scales("cpu")
    wide = torch.ones(6, 512, dtype=torch.bfloat16)[:, :256]
    calls = [
        lambda: quantize(x, out=(q, sf)),
        lambda: quantize(wide, out=(q, sf)),
        lambda: quantize(x.half(), out=(q, sf)),
        lambda: quantize(x[:5], out=(q, None)),
        lambda: quantize(x, out=(values("cpu", 9), sf)),
        lambda: quantize(x, out=(None, sf)),
        lambda: quantize(x),
        lambda: quantize(x, DEEP_GEMM.replace(min_scale=1e-9)),
        lambda: quantize(x, DEEP_GEMM_SM90),
        lambda: quantize(x, DEEP_GEMM_SM90.replace(round_scale=True)),
    ]
    for count, call in enumerate(calls, 1):
        call()
        call()
        assert len(launch._plans) == count and len(planned) == 2 * count
    floors = [arguments[-1] for arguments in planned[::2]]
    assert floors == [94] * 7 + [98, ctypes.c_float(1e-10).value, 94]


def test_autograd_knows_what_kernels_write(planned):
    x, q, sf = activations("cpu"), values("cpu"), scales("cpu")
    residual, normalized = activations("cpu"), activations("cpu")
    quantize(x, out=(q, sf))
    rms_norm_quantize(x, x[0], residual=residual, normalized=normalized)
    assert [t._version for t in (x, q, sf, residual, normalized)] == [0, 1, 1, 1, 1]
    with torch.inference_mode():
        q = values("cpu")
    quantize(x, out=(q, None))


def test_plans_skip_no_check(planned):
    x, q = activations("cpu"), values("cpu")
    sf = torch.empty_strided((6, 2), (1, 8))
    quantize(x, DEEP_GEMM_SM90, out=(q, sf))
    with pytest.raises(ValueError, match="out sf: expected a tensor that requires no gradient"):
        quantize(x, DEEP_GEMM_SM90, out=(q, sf.clone().requires_grad_()))
    with pytest.raises(ValueError, match="out sf: expected values in memory, got a lazily negated"):
        quantize(x, DEEP_GEMM_SM90, out=(q, torch._neg_view(sf)))
    with pytest.raises(ValueError, match="x: expected values in memory, got a lazily negated"):
        quantize(torch._neg_view(x), DEEP_GEMM_SM90, out=(q, sf))
    with pytest.raises(ValueError, match="out q: expected memory of its own"):
        quantize(x, DEEP_GEMM_SM90, out=(x.view(q.dtype)[:, :256], sf))


def test_warm_calls_are_refused_inside_of_transforms(planned):
    """A call that looks like a recent one skips the checks, and so must not look like it."""
    x, q, sf = activations("cpu"), values("cpu"), scales("cpu")
    for call in (quantize, lambda t: quantize(t, out=(q, sf))):
        call(x)
        call(x)
        with pytest.raises(RuntimeError, match="vmap is not supported"):
            torch.vmap(call)(x[None])
        with pytest.raises(RuntimeError, match=r"torch.jit.trace is not supported"):
            torch.jit.trace(call, (x,))
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
            with pytest.raises(RuntimeError, match="x: expected a tensor without a tangent"):
                call(dual)
        with pytest.raises(RuntimeError, match=r"x: .*quantize is not differentiable"):
            call(x.clone().requires_grad_())
        with FakeTensorMode() as mode:
            assert quantize(mode.from_tensor(x))[0].shape == x.shape


def test_what_the_kernel_refuses_is_named(planned, monkeypatch):
    """Its host code checks dtypes and devices; a plan leaves them to it."""
    x, q, sf = activations("cpu"), values("cpu"), scales("cpu")

    def refuse(*arguments):
        if arguments[1].dtype != torch.float8_e4m3fn:
            raise ValueError("Mismatched Tensor on argument #1")

    monkeypatch.setattr(plan, "choose_kernel", lambda *_: plan.Kernel(refuse, None, ()))
    quantize(x, out=(q, sf))
    with pytest.raises(TypeError, match="out q: expected a tensor of float8_e4m3fn, got a tensor"):
        quantize(x, out=(q.view(torch.uint8), sf))
    assert len(launch._plans) == 1


def test_plans_tell_alignments_apart(planned):
    """The widths of loads and stores are compiled in."""
    storage = torch.ones(6 * 256 + 32, dtype=torch.bfloat16)
    first = -storage.data_ptr() % 32 // 2
    for count, offset in enumerate((0, 1, 2, 8), 1):
        quantize(storage.as_strided((6, 256), (256, 1), first + offset))
        quantize(storage.as_strided((6, 256), (256, 1), first + offset))
        assert len(launch._plans) == count
    quantize(storage.as_strided((6, 256), (256, 1), first + 16))
    assert len(launch._plans) == 4


def test_too_many_scales():
    x = torch.empty(0, dtype=torch.bfloat16, device="meta").as_strided((2**25, 2048), (2048, 1))
    quantize(x, DEEP_GEMM.replace(group_size=16))
    with pytest.raises(ValueError, match=r"x: expected up to 4294967295 scales in a matrix"):
        quantize(x, DEEP_GEMM_SM90.replace(group_size=16))
    quantize(x[:-128], MXFP8)
    with pytest.raises(ValueError, match=r"x: expected up to 2147483647 scales in a matrix"):
        quantize(x, MXFP8)


def test_too_many_matrices():
    x = torch.empty(0, dtype=torch.bfloat16, device="meta")
    with pytest.raises(ValueError, match=r"x: expected up to 2147418112 matrices, got 2147483647"):
        quantize(x.as_strided((2**31 - 1, 1, 1), (0, 0, 0)))
    # The tiles of all experts are counted together.
    masked_m = torch.empty(6, dtype=torch.int32, device="meta")
    with pytest.raises(ValueError, match=r"x: expected up to 3 matrices, got 6"):
        quantize(x.as_strided((6, 2**31 - 1, 1), (0, 0, 0)), rows=Masked(masked_m))


def test_too_large_to_dequantize():
    q = torch.empty(0, dtype=torch.int8, device="meta")
    sf = torch.empty(0, device="meta")
    with pytest.raises(ValueError, match=r"q: expected up to 2147483647 rows of up to 1048576"):
        wide = q.as_strided((2, 2**30), (2**30, 1))
        dequantize(wide, sf.as_strided((2, 1), (1, 1)), ROWWISE_INT8)
    with pytest.raises(ValueError, match=r"q: expected up to 2147418112 matrices"):
        many = q.as_strided((2**31 - 1, 1, 1), (0, 0, 0))
        dequantize(many, sf.as_strided((2**31 - 1, 1, 1), (0, 0, 0)), ROWWISE_INT8)


def test_dequantize_is_not_differentiable(device):
    q, sf = quantize(activations(device), DEEP_GEMM_SM90)
    with pytest.raises(RuntimeError, match=r"sf: .*dequantize is not differentiable"):
        dequantize(q, sf.clone().requires_grad_(), DEEP_GEMM_SM90)
    with torch.no_grad():
        dequantize(q, sf.clone().requires_grad_(), DEEP_GEMM_SM90)


def test_operands_of_the_operator_belong_to_the_rows():
    x, counts = activations("cpu"), torch.zeros(2, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"row_data: expected None for rows='dense', got one"):
        operators.quantize(x, str(DEEP_GEMM), counts)
    with pytest.raises(ValueError, match=r"row_data: expected a tensor for rows='masked', got N"):
        operators.quantize(x, str(DEEP_GEMM), rows="masked")
    with pytest.raises(ValueError, match=r"alignment: expected 1 for rows='indexed', got 7"):
        operators.quantize(x, str(DEEP_GEMM), counts, rows="indexed", alignment=7)


def test_fake_operands_of_a_real_input(device):
    with FakeTensorMode():
        q, sf = values(device), scales(device)
        index = torch.zeros(3, dtype=torch.int32, device=device)
    x = activations(device)
    for name, arguments in (
        ("out q", {"out": (q, None)}),
        ("out sf", {"out": (None, sf)}),
        ("index", {"index": index}),
    ):
        with pytest.raises(TypeError, match=f"{name}: expected a tensor with memory, got Fake"):
            quantize(x, **arguments)


def test_too_many_rows():
    x = torch.empty(0, dtype=torch.bfloat16, device="meta").as_strided((2**31, 128), (128, 1))
    with pytest.raises(ValueError, match=r"x: expected up to 2147483647 rows"):
        quantize(x)


@pytest.mark.parametrize("eps", [None, "1e-10", 1j])
def test_eps_is_a_number(eps, device):
    with pytest.raises(TypeError, match=r"eps: expected a number, got"):
        per_token_group_quant_fp8_packed_for_deepgemm(activations(device), 128, eps=eps)


@pytest.mark.parametrize("eps", [0, 0.0, -1e-10, float("nan"), float("inf")])
def test_eps(eps, device):
    with pytest.raises(ValueError, match=r"eps: expected 0 < eps <= .*, got"):
        per_token_group_quant_fp8_packed_for_deepgemm(activations(device), 128, eps=eps)


def test_vllm(device):
    x, cast = activations(device), per_token_group_quant_fp8_packed_for_deepgemm
    with pytest.raises(ValueError, match=r"use_ue8m0: expected True or None, got False"):
        cast(x, 128, use_ue8m0=False)
    for group_size in (16, 64, 256, -1, 32.0, True, None):
        with pytest.raises(ValueError, match=r"group_size: expected one of \(32, 128\), got"):
            cast(x, group_size)
    with pytest.raises(ValueError, match=r"out_q: expected a contiguous tensor of rows of 256"):
        cast(x, 128, out_q=values(device)[:, :128])
    with pytest.raises(ValueError, match=r"out_q: expected a contiguous tensor of rows of 128"):
        cast(x[:, :128], 128, out_q=values(device)[:, :128])
    with pytest.raises(TypeError, match=r"x: expected a tensor of bfloat16 or .*, got 3"):
        cast(3, 128)
    with pytest.raises(TypeError, match=r"out_q: expected a tensor of float8_e4m3fn, got 3"):
        cast(x, 128, out_q=3)
    with pytest.raises(ValueError, match=r"x: expected at least 1 dimension, got 0"):
        cast(x[0, 0], 128)
    for group_size in (32, 128):
        message = rf"x: expected rows of a multiple of {group_size}, got shape \(6, 200\)"
        with pytest.raises(ValueError, match=message):
            cast(x[:, :200], group_size)


def test_deep_gemm(device):
    x = activations(device)
    with pytest.raises(ValueError, match=r"x: expected 2 dimensions \(m, n\), got"):
        per_token_cast_to_fp8(x[None], True)
    with pytest.raises(TypeError, match=r"x: expected a tensor of bfloat16 or .*, got 3"):
        per_token_cast_to_fp8(3, True)
    for gran_k in (16, 64, 256, -1, 32.0, True, None):
        with pytest.raises(ValueError, match=r"gran_k: expected one of \(32, 128\), got"):
            per_token_cast_to_fp8(x, True, gran_k=gran_k)
    for flag in ("no", 1, None):
        with pytest.raises(TypeError, match=r"use_ue8m0: expected a bool, got"):
            per_token_cast_to_fp8(x, flag)
        with pytest.raises(TypeError, match=r"use_packed_ue8m0: expected a bool, got"):
            per_token_cast_to_fp8(x, True, use_packed_ue8m0=flag)
    with pytest.raises(ValueError, match=r"use_packed_ue8m0: expected False"):
        per_token_cast_to_fp8(x, False, use_packed_ue8m0=True)


def norm(x, **options):
    return rms_norm_quantize(x, x.new_ones(x.shape[-1:]), **options)


SILU_MUL = pytest.param(silu_mul_quantize, "gate_up", id="silu_mul")
RMS_NORM = pytest.param(norm, "x", id="rms_norm")
prologues = pytest.mark.parametrize(("function", "name"), [SILU_MUL, RMS_NORM])


def test_no_tensors_for_prologues(device):
    x = activations(device)
    with pytest.raises(TypeError, match=r"gate_up: expected a torch.Tensor, got list"):
        silu_mul_quantize([[1.0]])
    with pytest.raises(TypeError, match=r"weight: expected a torch.Tensor, got list"):
        silu_mul_quantize(x, weight=[1.0])
    with pytest.raises(TypeError, match=r"x: expected a torch.Tensor, got None"):
        rms_norm_quantize(None, x[0])
    with pytest.raises(TypeError, match=r"weight: expected a torch.Tensor, got None"):
        rms_norm_quantize(x, None)
    with pytest.raises(TypeError, match=r"residual: expected a torch.Tensor, got True"):
        rms_norm_quantize(x, x[0], eps=1e-6, residual=True)


@prologues
def test_inputs_of_prologues(function, name, device):
    x = activations(device)
    cases = [
        (TypeError, r"expected a tensor of bfloat16 or float16 or float32, got a ", x.double()),
        (TypeError, r"expected a strided tensor, got layout", x.to_sparse()),
        (ValueError, r"expected 2 or more dimensions", x[0]),
        (ValueError, r"expected rows contiguous along k", x.T),
        (ValueError, r"expected leading dim.*one stride", x.expand(4, 6, 256)[None, :, :2].expand(
            3, 4, 2, 256).transpose(0, 2)),
        (ValueError, r"expected values in memory, got a lazily negated", torch._neg_view(x)),
    ]  # fmt: skip
    for error, message, bad in cases:
        with pytest.raises(error, match=rf"^{name}: " + message):
            if function is norm:
                rms_norm_quantize(bad, x.new_ones(bad.shape[-1:]).to(bad.dtype))
            else:
                function(bad)
    with pytest.raises(ValueError, match=rf"^{name}: expected 2 dimensions .* with an index"):
        function(x[None], index=int32(0, device=device))
    with pytest.raises(ValueError, match=rf"^{name}: expected shape \(E, max_m, k\) for rows=Mask"):
        function(x, rows=Masked(int32(0, device=device)))
    with pytest.raises(ValueError, match=r"^rows.masked_m: expected shape \(3,\)"):
        function(x.expand(3, 6, 256), rows=Masked(int32(0, device=device)))


@prologues
def test_choices_of_prologues(function, name, device):
    x = activations(device)
    cases = [
        (TypeError, "fmt", {"fmt": 127}),
        (TypeError, "check", {"check": 1}),
        (TypeError, "rows", {"rows": "masked"}),
        (TypeError, "index", {"index": [1]}),
        (ValueError, r"rounding: expected one of \('fused', 'unfused', .*\), got 'exact'",
         {"rounding": "exact"}),
        (ValueError, "rounding: .* got None", {"rounding": None}),
        (ValueError, "rounding: .* got True", {"rounding": True}),
    ]  # fmt: skip
    for error, message, choices in cases:
        with pytest.raises(error, match=rf"^{message}"):
            function(x, **choices)


@prologues
def test_out_of_prologues(function, name, device):
    x = activations(device)
    k = 128 if function is silu_mul_quantize else 256
    triple = function is norm
    message = (
        r"out: expected \(q, sf\) or \(q, sf, residual\)" if triple else r"out: expected \(q, sf\)"
    )
    for out in (torch.empty(1), (None,), (None, None, None, None), "qs"):
        with pytest.raises(TypeError, match=message):
            function(x, out=out)
    cases = [
        (TypeError, r"out q: expected a tensor of float8_e4m3fn", (x, None)),
        (ValueError, rf"out q: expected shape \(6 or more, {k}\)", (values(device, 6, 384), None)),
        (ValueError, r"out q: expected strides", (values(device, 1, k).expand(6, k), None)),
        (TypeError, r"out sf: expected a tensor of int32", (None, x)),
        (ValueError, r"out sf: expected shape \(6, 1\)", (None, scales(device, 7))),
        (ValueError, r"out q: expected memory of its own.* overlaps " + name,
         (x.view(torch.float8_e4m3fn)[:, :k], None)),
    ]  # fmt: skip
    for error, message, out in cases:
        with pytest.raises(error, match=message):
            function(x, out=out)


@pytest.mark.parametrize("k", [1, 3, 257])
def test_gates_need_ups(k, device):
    with pytest.raises(ValueError, match=rf"gate_up: expected an even number .*got .*6, {k}\)"):
        silu_mul_quantize(activations(device, k=k))


def test_too_many_columns_for_prologues():
    x = torch.empty(0, dtype=torch.bfloat16, device="meta")
    silu_mul_quantize(x.as_strided((4, 2**21), (2**21, 1)))
    with pytest.raises(
        ValueError, match=r"gate_up: expected up to 2147483647 rows of up to 2097152"
    ):
        silu_mul_quantize(x.as_strided((4, 2**21 + 2), (2**21 + 2, 1)))
    norm(x.as_strided((4, 2**15), (2**15, 1)))
    with pytest.raises(ValueError, match=r"x: expected up to 2147483647 rows of up to 32768, got"):
        norm(x.as_strided((4, 2**15 + 1), (2**15 + 1, 1)))


def test_too_many_results():
    x = torch.empty(0, dtype=torch.bfloat16, device="meta")
    silu_mul_quantize(x.as_strided((2**25, 4094), (4094, 1)), DEEP_GEMM_32)
    with pytest.raises(ValueError, match=r"gate_up: expected up to 4294967295 scales in a matrix"):
        silu_mul_quantize(
            x.as_strided((2**25, 4096), (4096, 1)), DEEP_GEMM_SM90.replace(group_size=16)
        )
    with pytest.raises(ValueError, match=r"gate_up: expected up to 2147418112 matrices, got 2147"):
        silu_mul_quantize(x.as_strided((2**31 - 1, 1, 2), (0, 0, 1)))


BEYOND_FLOAT32 = [float("nan"), float("inf"), -float("inf"), 1e39, 10**400]
NO_NUMBERS = ["1", 1j, [1.0], torch.tensor(1.0), True]


@pytest.mark.parametrize("option", ["clamp", "alpha", "beta", "eps", "weight_offset"])
def test_numbers(option, device):
    function = norm if option in ("eps", "weight_offset") else silu_mul_quantize
    for value in BEYOND_FLOAT32:
        with pytest.raises(ValueError, match=rf"^{option}: expected a number .* in float32, got"):
            function(activations(device), **{option: value})
    for value in NO_NUMBERS:
        with pytest.raises(TypeError, match=rf"^{option}: expected a number, got"):
            function(activations(device), **{option: value})
    if option != "clamp":
        with pytest.raises(TypeError, match=rf"^{option}: expected a number, got None"):
            function(activations(device), **{option: None})


def test_signs_of_numbers(device):
    for clamp in (0, -1.0, 1e-50):
        with pytest.raises(ValueError, match=r"clamp: expected None or a float32 above 0, got"):
            silu_mul_quantize(activations(device), clamp=clamp)
    with pytest.raises(ValueError, match=r"eps: expected 0 or more, got -1e-06"):
        norm(activations(device), eps=-1e-6)


@pytest.mark.parametrize("interleaved", [0, 1, None, "yes"])
def test_interleaved(interleaved, device):
    with pytest.raises(TypeError, match=r"interleaved: expected a bool, got"):
        silu_mul_quantize(activations(device), interleaved=interleaved)


def test_weights_of_rows(device):
    x, weight = activations(device), torch.ones(6, device=device)
    cases = [
        (TypeError, r"expected a tensor of float32, got a tensor of bf", x, weight.bfloat16(), {}),
        (ValueError, r"expected shape \(6,\), one for each row .*got \(5,\)", x, weight[:5], {}),
        (ValueError, r"expected shape \(6,\).*got \(6, 1\)", x, weight[:, None], {}),
        (ValueError, r"expected shape \(3, 6\).*got \(6,\)", x.expand(3, 6, 256), weight, {}),
        (ValueError, r"expected shape \(2,\).*got \(6,\)", x, weight,
         {"index": int32(0, 1, device=device)}),
        (ValueError, r"expected a contiguous tensor, got strides \(0,\)", x,
         weight[:1].expand(6), {}),
        (ValueError, r"expected values in memory, got a lazily", x, torch._neg_view(weight), {}),
        (ValueError, r"expected the device of gate_up, .*got meta", x, weight.to("meta"), {}),
    ]  # fmt: skip
    silu_mul_quantize(x, weight=weight)
    for error, message, x_, weight_, choices in cases:
        with pytest.raises(error, match=r"^weight: " + message):
            silu_mul_quantize(x_, weight=weight_, **choices)


def test_weights_of_columns(device):
    x, weight = activations(device), activations(device)[0]
    cases = [
        (TypeError, r"expected .* bfloat16 or float32, got a tensor of float16", weight.half()),
        (ValueError, r"expected shape \(256,\), one for each column .*got \(255,\)", weight[:255]),
        (ValueError, r"expected shape \(256,\).*got \(1, 256\)", weight[None]),
        (ValueError, r"expected shape \(256,\).*got \(\)", weight[0]),
        (ValueError, r"expected a contiguous tensor, got strides \(0,\)", weight[:1].expand(256)),
        (ValueError, r"expected values in memory, got a lazily negated", torch._neg_view(weight)),
        (ValueError, r"expected the device of x, .*got meta", weight.to("meta")),
    ]  # fmt: skip
    for error, message, bad in cases:
        with pytest.raises(error, match=r"^weight: " + message):
            rms_norm_quantize(x, bad)


@pytest.mark.parametrize("argument", ["residual", "out residual", "normalized"])
def test_rows_beside_the_quantized(argument, device):
    """What a residual, a place for the updated one and normalized rows have to look like."""
    x = activations(device).expand(3, 6, 256)
    own = torch.empty(3, 6, 512, dtype=x.dtype, device=device)
    residual = torch.empty_like(own[..., :256])

    def call(t, x=x, **choices):
        options = {
            "residual": {"residual": t},
            "out residual": {"residual": residual, "out": (None, None, t)},
            "normalized": {"normalized": t},
        }[argument]
        return norm(x, **options, **choices)

    call(own[..., :256])
    call(own[..., 256:])
    wide = torch.empty(6, 3, 256, dtype=x.dtype, device=device)
    call(wide.transpose(0, 1))
    cases = [
        (TypeError, r"expected .* bfloat16, got a tensor of float16", own[..., :256].half()),
        (TypeError, r"expected a strided tensor, got layout", wide.transpose(0, 1).to_sparse()),
        (ValueError, r"expected shape \(3, 6, 256\), got \(3, 6, 255\)", own[..., :255]),
        (ValueError, r"expected shape \(3, 6, 256\), got \(6, 256\)", own[0, :, :256]),
        (ValueError, r"expected strides .*got \(3072, 512, 2\)", own[..., ::2]),
        (ValueError, r"expected strides .*got \(0, 512, 1\)", own[:1, :, :256].expand(3, 6, 256)),
        (ValueError, r"expected strides .*got \(3072, 0, 1\)", own[:, :1, :256].expand(3, 6, 256)),
        (ValueError, r"expected values in memory, got a lazily", torch._neg_view(own[..., :256])),
        (ValueError, r"expected the device of x, .*got meta", own[..., :256].to("meta")),
    ]  # fmt: skip
    for error, message, bad in cases:
        with pytest.raises(error, match=rf"^{argument}: " + message):
            call(bad)
    x, flat = activations(device), activations(device)
    residual = torch.empty_like(flat)
    for choices in (
        {"index": torch.arange(6, dtype=torch.int32, device=device)},
        {"rows": Indexed(int32(0, 1, 2, 3, 4, 5, device=device))},
    ):
        with pytest.raises(ValueError, match=r": expected None with rows or an index, .*got a t"):
            call(flat, x, **choices)
    if argument == "normalized":
        with pytest.raises(ValueError, match=r"normalized: expected None with rows or an index"):
            norm(x, normalized=True, index=int32(0, device=device))


@pytest.mark.parametrize("normalized", [None, 1, "yes", (1, 2)])
def test_normalized(normalized, device):
    with pytest.raises(TypeError, match=r"normalized: expected a bool or a tensor, got"):
        norm(activations(device), normalized=normalized)


def test_out_residual_needs_a_residual(device):
    x = activations(device)
    with pytest.raises(ValueError, match=r"out residual: expected None without a residual, got a"):
        norm(x, out=(None, None, torch.empty_like(x)))
    with pytest.raises(TypeError, match=r"out residual: expected a tensor of bfloat16, got 'x'"):
        norm(x, residual=torch.empty_like(x), out=(None, None, "x"))


def test_memory_of_prologues(device):
    """What is written overlaps nothing else; an updated residual may replace its residual."""
    x, weight = activations(device), activations(device)[0]
    memory = torch.zeros(24, 256, dtype=torch.bfloat16, device=device)
    first, second, between = memory[:6], memory[6:12], memory[3:9]
    cases = [
        ("residual", "x", {"residual": x}),
        ("residual", "x", {"residual": x.view_as(x)}),
        ("out residual", "x", {"residual": first, "out": (None, None, x)}),
        ("out residual", "residual", {"residual": first, "out": (None, None, between)}),
        ("out residual", "residual", {"residual": memory[:12:2], "out": (None, None, memory[:6])}),
        ("normalized", "x", {"normalized": x}),
        ("normalized", "residual", {"residual": first, "normalized": first}),
        ("normalized", "residual", {"residual": first, "normalized": between,
                                    "out": (None, None, memory[12:18])}),
        ("normalized", "out residual", {"residual": first, "normalized": memory[9:15],
                                        "out": (None, None, second)}),
        ("residual", "out q", {"residual": first,
                               "out": (first.view(torch.float8_e4m3fn)[:, 256:], None)}),
        ("normalized", "out sf", {"normalized": first,
                                  "out": (None, first.view(torch.int32)[0].view(-1, 8).T[:6, :1])}),
    ]  # fmt: skip
    for name, other, options in cases:
        message = rf"^{name}: expected memory of its own, got memory that overlaps {other}$"
        with pytest.raises(ValueError, match=message):
            rms_norm_quantize(x, weight, **options)
    assert memory.eq(0).all()
    weight = memory[0]
    with pytest.raises(ValueError, match=r"residual: expected memory of its own.* weight"):
        rms_norm_quantize(x, weight, residual=first)
    with pytest.raises(ValueError, match=r"out q: expected memory of its own.* weight"):
        rms_norm_quantize(x, weight, out=(memory.view(torch.float8_e4m3fn)[:6, :256], None))
    rows = memory.view(torch.float32)[0, :6]
    with pytest.raises(ValueError, match=r"out q: expected memory of its own.* weight"):
        q = memory.view(torch.float8_e4m3fn)[:6, :128]
        silu_mul_quantize(x, weight=rows, out=(q, None))
    rms_norm_quantize(x, x[0], residual=first, normalized=second)
    rms_norm_quantize(x, x[0], residual=first, out=(None, None, first.view_as(first)))


def test_gradients_of_prologues(device):
    x, weight = activations(device), torch.ones(6, device=device)
    options = {"interleaved": False, "clamp": None, "alpha": 1.0, "beta": 0.0}

    def parameter(t):
        return torch.nn.Parameter(t.clone())

    cases = [
        ("gate_up", lambda: silu_mul_quantize(parameter(x))),
        ("weight", lambda: silu_mul_quantize(x, weight=parameter(weight))),
        ("x", lambda: norm(parameter(x))),
        ("weight", lambda: rms_norm_quantize(x, parameter(x[0]))),
        ("residual", lambda: norm(x, residual=parameter(x))),
        ("gate_up and weight",
         lambda: operators.silu_mul_quantize(
             x, parameter(weight), str(DEEP_GEMM), **options, rounding="fused")),
    ]  # fmt: skip
    for name, call in cases:
        message = rf"^{name}: .*(silu_mul|rms_norm)_quantize is not differentiable"
        with pytest.raises(RuntimeError, match=message):
            call()
        with torch.no_grad():
            call()
    for name, options in (
        ("normalized", {"normalized": parameter(x)}),
        ("out residual", {"residual": x.clone(), "out": (None, None, parameter(x))}),
    ):
        with pytest.raises(ValueError, match=rf"{name}: expected a tensor that requires no grad"):
            norm(x, **options)


def test_fakes_beside_a_real_input(device):
    x = activations(device)
    with FakeTensorMode():
        fake, row = activations(device), torch.ones(6, device=device)
    cases = [
        ("weight", lambda: silu_mul_quantize(x, weight=row)),
        ("weight", lambda: rms_norm_quantize(x, fake[0])),
        ("residual", lambda: norm(x, residual=fake)),
        ("out residual", lambda: norm(x, residual=x.clone(), out=(None, None, fake))),
        ("normalized", lambda: norm(x, normalized=fake)),
    ]
    for name, call in cases:
        with pytest.raises(TypeError, match=f"^{name}: expected a tensor with memory, got Fake"):
            call()


def test_operators_write_no_residual_that_they_read():
    x, q, sf = activations("cpu"), values("cpu"), scales("cpu")
    options = {"eps": 1e-6, "weight_offset": 0.0, "rounding": "fused"}
    residual = torch.zeros_like(x)
    with pytest.raises(ValueError, match=r"residual_out: expected a tensor with a residual.*None"):
        operators.rms_norm_quantize_out(
            x, x[0], q, sf, None, residual, None, None, str(DEEP_GEMM), **options
        )
    assert residual.eq(0).all()


def test_plans_tell_prologues_apart(planned):
    """Options and what tensors look like; a plan skips none of their checks."""
    x, row = activations("cpu"), torch.ones(6)
    wide = torch.empty(6, 512, dtype=torch.bfloat16)
    calls = [
        lambda: quantize(x),
        lambda: silu_mul_quantize(x),
        lambda: silu_mul_quantize(x, interleaved=True),
        lambda: silu_mul_quantize(x, clamp=7),
        lambda: silu_mul_quantize(x, alpha=1.702),
        lambda: silu_mul_quantize(x, beta=1),
        lambda: silu_mul_quantize(x, rounding="unfused"),
        lambda: silu_mul_quantize(x, weight=row),
        lambda: norm(x),
        lambda: norm(x, eps=1e-5),
        lambda: norm(x, weight_offset=1),
        lambda: norm(x, rounding="unfused"),
        lambda: rms_norm_quantize(x, torch.ones(256)),
        lambda: norm(x, residual=wide[:, :256]),
        lambda: norm(x, residual=wide[:, 128:384].contiguous()),
        lambda: norm(x, residual=x.clone(), out=(None, None, x.clone())),
        lambda: norm(x, normalized=x.clone()),
    ]
    for count, call in enumerate(calls, 1):
        call()
        call()
        assert len(launch._plans) == count and len(planned) == 2 * count
    with pytest.raises(ValueError, match="residual: expected memory of its own"):
        norm(x, residual=x)
    with pytest.raises(ValueError, match="normalized: expected a tensor that requires no grad"):
        norm(x, normalized=x.clone().requires_grad_())
    with pytest.raises(ValueError, match="weight: expected values in memory, got a lazily negated"):
        silu_mul_quantize(x, weight=torch._neg_view(row))
