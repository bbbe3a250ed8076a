"""Mix-ups between producers and readers: each is planted, and named; nothing else is."""

import pytest
import torch

import cute_quant as cq
from cute_quant.contract.reader_checks.quantized import RULES
from cute_quant.contract.rows import Indexed, Masked, PrefixSum

MN, K = 100, 1024
POWERS = cq.DEEP_GEMM_SM90.replace(round_scale=True)
E8X4 = cq.NVFP4.replace(scale_layout="8x4")
RIGHT = [
    (cq.DEEP_GEMM_SM90, "deep_gemm_sm90"),
    (cq.GROUPWISE_FP8, "deep_gemm_sm90"),
    (cq.DEEP_GEMM, "deep_gemm_sm100"),
    (cq.DEEP_GEMM_32, "deep_gemm_sm100"),
    (POWERS, "deep_gemm_sm100"),
    (cq.ROWWISE_FP8, "scaled_mm"),
    (cq.MXFP8, "scaled_mm"),
    (cq.MXFP8, "cutlass"),
    (cq.MXFP4, "scaled_mm"),
    (cq.NVFP4, "scaled_mm"),
    (cq.NVFP4, "cutlass"),
    (E8X4, "trtllm_8x4"),
]


@pytest.fixture
def x(device):
    return torch.randn(MN, K, generator=torch.Generator().manual_seed(1)).to(device)


def quantized(x, fmt, **options):
    if fmt.upper_scale:
        options["amax"] = cq.tensor_amax(x)
    q, sf = cq.quantize(x, fmt, **options)[:2]
    return q, sf, {name: options[name] for name in ("amax", "rows") if name in options}


def rules(*arguments, **options):
    found = cq.check_scales(*arguments, **options)
    for finding in found:
        assert finding.rule in RULES
        assert str(finding) == finding.text and ": expected " in finding.text
    return [finding.rule for finding in found]


@pytest.mark.parametrize(("fmt", "reader"), RIGHT, ids=str)
def test_nothing_is_found_in_results(fmt, reader, x):
    q, sf, options = quantized(x, fmt)
    assert rules(q, sf, fmt, reader, **options) == []
    assert rules(q, sf, fmt, reader, x=x, **options) == []


@pytest.mark.parametrize("reader", ["deep_gemm_sm90", "deep_gemm_sm100"])
@pytest.mark.parametrize("kind", ["masked", "contiguous", "psum"])
def test_grouped_rows(reader, kind, device):
    x = torch.randn(3, 8, K).to(device)
    fmt = cq.DEEP_GEMM if reader == "deep_gemm_sm100" else cq.DEEP_GEMM_SM90
    counts = {"masked": [3, 0, 8], "contiguous": [0] * 8 + [-1] * 16, "psum": [3, 8, 20]}[kind]
    data = torch.tensor(counts, dtype=torch.int32, device=device)
    kinds = {"masked": Masked, "contiguous": Indexed, "psum": PrefixSum}
    rows = PrefixSum(data, 4) if kind == "psum" else kinds[kind](data)
    x = x if kind == "masked" else x.flatten(0, 1)
    memory = cq.empty_scales(fmt, x.shape, device=device)
    memory.untyped_storage().fill_(0)
    q, sf = cq.quantize(x, fmt, rows=rows, out=(None, memory))
    assert rules(q, sf, fmt, reader, rows=rows, x=x) == []
    wrong = q.unsqueeze(0) if kind != "masked" else q[0]
    assert "shape" in rules(wrong, sf, fmt, reader, rows=rows)


def test_the_format_is_none_that_the_reader_takes(x):
    q, sf, _ = quantized(x, cq.MXFP8)
    for reader in ("deep_gemm_sm90", "deep_gemm_sm100", "trtllm_8x4"):
        assert rules(q, sf, cq.MXFP8, reader) == ["format"]
    q, sf, _ = quantized(x, cq.DEEP_GEMM_SM90)
    assert rules(q, sf, cq.DEEP_GEMM_SM90, "deep_gemm_sm100") == ["format"]


def test_dtypes(x):
    q, sf, _ = quantized(x, cq.MXFP8)
    assert rules(q.view(torch.uint8), sf, cq.MXFP8, "scaled_mm") == ["dtype"]
    assert rules(q, sf.view(torch.uint8), cq.MXFP8, "scaled_mm") == ["dtype"]
    assert "view(torch.float8_e8m0fnu)" in str(
        cq.check_scales(q, sf.view(torch.uint8), cq.MXFP8, "cutlass")[0]
    )
    fp4 = cq.DEEP_GEMM_32.replace(values=torch.float4_e2m1fn_x2)
    q, sf, _ = quantized(x, fp4)
    assert rules(q, sf, fp4, "deep_gemm_sm100") == ["dtype"]
    assert rules(q.view(torch.int8), sf, fp4, "deep_gemm_sm100") == []


def test_packed_words_and_float32_mixed_up(x):
    q, sf, _ = quantized(x, POWERS)
    words = cq.convert_scales(sf, POWERS, cq.DEEP_GEMM, x.shape)
    for given, fmt in ((sf, cq.DEEP_GEMM), (words, POWERS)):
        (found,) = cq.check_scales(q, given, fmt, "deep_gemm_sm100")
        assert found.rule == "dtype" and "convert_scales makes packed words" in found.text
    # As the same bits.
    assert "shape" in rules(q, words.view(torch.float32), POWERS, "deep_gemm_sm100")
    floats = torch.empty_like(words).copy_(sf[:, : words.shape[1]].view(torch.int32))
    assert "values" in rules(q, floats, cq.DEEP_GEMM, "deep_gemm_sm100", x=x)


def test_scales_that_were_rounded_after_the_values_were_quantized(x):
    x = x * torch.logspace(-3, 3, MN, device=x.device)[:, None]
    for fmt, reader in ((cq.DEEP_GEMM_SM90, "deep_gemm_sm90"), (POWERS, "deep_gemm_sm100")):
        q, sf, _ = quantized(x, cq.DEEP_GEMM_SM90)
        rounded = torch.empty_strided(sf.shape, sf.stride(), device=sf.device)
        rounded.copy_(torch.exp2(sf.log2().ceil()))
        (found,) = cq.check_scales(q, rounded, fmt, reader, x=x)
        assert found.rule == "values"
        assert "were they rounded after the values were quantized?" in found.text
        assert "quantized with, got scales 1 to 2 times as large" in found.text
    q, sf, _ = quantized(x, cq.MXFP8)
    bytes_ = sf.view(torch.uint8)
    doubled = (bytes_ + (bytes_ > 0).to(torch.uint8)).view(sf.dtype)
    (found,) = cq.check_scales(q, doubled, cq.MXFP8, "cutlass", x=x)
    assert "got scales 1.9 to 2.1 times as large" in found.text
    (found,) = cq.check_scales(q, sf, cq.MXFP8, "cutlass", x=x * 4)
    assert "the scales belong to other groups, or to another x" in found.text


@pytest.mark.parametrize("factor", [1e-5, 1e-14])
def test_tiny_values_under_the_least_scale(factor, x):
    """They round to few values, or to 0, and nothing is wrong with that."""
    tiny = x * factor
    q, sf, _ = quantized(tiny, cq.DEEP_GEMM_SM90)
    assert cq.check_scales(q, sf, cq.DEEP_GEMM_SM90, "deep_gemm_sm90", x=tiny) == []
    (found,) = cq.check_scales(q, sf, cq.DEEP_GEMM_SM90, "deep_gemm_sm90", x=x)
    assert found.rule == "values"


@pytest.mark.gpu
def test_devices(x):
    q, sf, _ = quantized(x.cuda(), cq.MXFP8)
    assert rules(q, sf.cpu(), cq.MXFP8, "scaled_mm") == ["device"]


def test_shapes(x):
    q, sf, _ = quantized(x, cq.DEEP_GEMM)
    assert rules(q, sf[:-1], cq.DEEP_GEMM, "deep_gemm_sm100") == ["shape"]
    assert rules(q[:, :-8], sf, cq.DEEP_GEMM, "deep_gemm_sm100") == ["shape"]
    q, sf, _ = quantized(x[:, :1016].contiguous(), cq.DEEP_GEMM)
    assert "shape" in rules(q, sf, cq.DEEP_GEMM, "deep_gemm_sm100")
    q, sf, _ = quantized(x, cq.MXFP8)
    found = cq.check_scales(q, sf.view(128, 32), cq.MXFP8, "scaled_mm")
    assert [f.rule for f in found] == ["shape"] and "flatten()" in found[0].text
    assert rules(q[None], sf[None], cq.MXFP8, "scaled_mm") == ["shape"]
    assert rules(q[None], sf[None], cq.MXFP8, "cutlass") == []


def test_strides(x):
    fmt = cq.DEEP_GEMM
    q, sf, _ = quantized(x[:99], fmt)
    assert rules(q, sf.contiguous(), fmt, "deep_gemm_sm100") == ["strides"]
    compact = sf.t().contiguous().t()
    assert compact.stride() == (1, 99)
    assert rules(q, compact, fmt, "deep_gemm_sm100") == ["strides"]
    by_column = q.view(torch.uint8).t().contiguous().t().view(q.dtype)
    assert "strides" in rules(by_column, sf, fmt, "deep_gemm_sm100")
    # Of one column, DeepGEMM looks at the stride too.
    q, sf, _ = quantized(x[:, :512].contiguous(), fmt)
    assert rules(q, sf.as_strided(sf.shape, (1, 1)), fmt, "deep_gemm_sm100") == ["strides"]
    # Float32 scales it transposes itself.
    q, sf, _ = quantized(x, cq.DEEP_GEMM_SM90)
    assert rules(q, sf.contiguous(), cq.DEEP_GEMM_SM90, "deep_gemm_sm90") == []
    batch = x.view(4, 25, K)
    q, sf = cq.quantize(batch, fmt)
    spread = torch.empty(4, 32, K, dtype=q.dtype, device=q.device)[:, :25].copy_(q)
    assert "strides" in rules(spread, sf, fmt, "deep_gemm_sm100")
    q, sf, _ = quantized(x, cq.ROWWISE_FP8)
    assert rules(q, sf.expand(MN, 2)[:, :1].repeat(1, 2)[:, :1], cq.ROWWISE_FP8, "scaled_mm") == [
        "strides"
    ]


def test_alignment(x):
    q, sf, _ = quantized(x, cq.MXFP8)
    moved = torch.empty(q.numel() + 8, dtype=torch.uint8, device=q.device)[8:].view(q.dtype)
    moved = moved.view(q.shape).copy_(q)
    assert rules(moved, sf, cq.MXFP8, "scaled_mm") == ["alignment"]
    moved = torch.empty(sf.numel() + 4, dtype=torch.uint8, device=q.device)[4:].view(sf.dtype)
    assert rules(q, moved.copy_(sf), cq.MXFP8, "scaled_mm") == ["alignment"]
    apart = torch.empty(MN, K + 8, dtype=q.dtype, device=q.device)[:, :K].copy_(q)
    assert "alignment" in rules(apart, sf, cq.MXFP8, "scaled_mm")


def test_padding(x):
    x = x[:99, :1000].contiguous()
    for fmt, place in ((cq.MXFP8, -1), (E8X4, -1)):
        wide = x[:, :992].contiguous()
        q, sf, options = quantized(wide, fmt)
        reader = "scaled_mm" if fmt is cq.MXFP8 else "trtllm_8x4"
        sf.view(torch.uint8)[place] = 7
        assert rules(q, sf, fmt, reader, **options) == ["padding"]
    fmt = cq.DEEP_GEMM
    wide = x[:, :528].contiguous()
    q, sf, _ = quantized(wide, fmt)
    assert rules(q, sf, fmt, "deep_gemm_sm100") == []
    sf[5, 1] |= 0x7F << 24
    assert rules(q, sf, fmt, "deep_gemm_sm100") == ["padding"]
    q, sf, _ = quantized(wide, fmt)
    sf.as_strided((1,), (1,), 99)[0] = 1
    assert rules(q, sf, fmt, "deep_gemm_sm100") == ["padding"]
    q, sf, _ = quantized(wide, fmt)
    sf.as_strided((1,), (1,), 199)[0] = 1
    assert rules(q, sf, fmt, "deep_gemm_sm100") == ["padding"]


def test_scales_that_are_no_powers_of_two(x):
    q, sf, _ = quantized(x, POWERS)
    sf[MN - 1, 3] = 0.3
    assert rules(q, sf, POWERS, "deep_gemm_sm100") == ["powers of two"]
    assert "0.3" in cq.check_scales(q, sf, POWERS, "deep_gemm_sm100")[0].text
    assert rules(q, sf, POWERS, "deep_gemm_sm90") == []
    # Dead rows trap too.
    counts = torch.tensor([MN - 1], dtype=torch.int32, device=x.device)
    batch = q[None], sf[None], POWERS
    assert rules(*batch, "deep_gemm_sm100", rows=Masked(counts)) == ["powers of two"]
    sf[MN - 1, 3] = torch.inf
    assert rules(q, sf, POWERS, "deep_gemm_sm100") == ["nan"]
    sf[MN - 1, 3] = torch.nan
    assert rules(q, sf, POWERS, "deep_gemm_sm100") == ["powers of two", "nan"]


@pytest.mark.parametrize(("fmt", "reader"), RIGHT, ids=str)
def test_nan(fmt, reader, x):
    amax = cq.tensor_amax(x)
    x[7, 3] = torch.nan
    q, sf = cq.quantize(x, fmt, **({"amax": amax} if fmt.upper_scale else {}))
    options = {"amax": amax} if fmt.upper_scale else {}
    assert "nan" in rules(q, sf, fmt, reader, **options)
    found = cq.check_scales(q, sf, fmt, reader, **options)
    assert any("at (0, 7, 0)" in finding.text for finding in found if finding.rule == "nan")


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_encode_and_decode_scale_mixed_up(scale, x):
    x = x * scale
    amax = cq.tensor_amax(x)
    encode = 2688 / amax
    q, sf = cq.quantize(x, cq.NVFP4, encode_scale=encode)
    call = q, sf, cq.NVFP4, "scaled_mm"
    assert rules(*call, encode_scale=encode) == rules(*call, decode_scale=1 / encode) == []
    # By the reader: with x at hand, of any magnitude.
    assert "upper scale" in rules(*call, decode_scale=encode, x=x)
    assert "upper scale" in rules(*call, encode_scale=1 / encode, x=x)
    if scale != 100.0:
        assert rules(*call, decode_scale=encode) == ["upper scale"]
    assert rules(*call) == ["upper scale"]
    # By the producer, whose scales underflow.
    q, sf = cq.quantize(x, cq.NVFP4, encode_scale=1 / encode)
    if scale == 1.0:
        assert rules(q, sf, cq.NVFP4, "scaled_mm", decode_scale=encode) == ["upper scale"]
    found = rules(q, sf, cq.NVFP4, "scaled_mm", amax=amax, x=x)
    assert found[0] == "upper scale"


def test_a_scale_too_large_saturates(x):
    q, sf = cq.quantize(x, cq.NVFP4, encode_scale=2688 * 1000 / cq.tensor_amax(x))
    found = rules(q, sf, cq.NVFP4, "scaled_mm", amax=cq.tensor_amax(x))
    assert found == ["upper scale"]


def test_a_swizzle_that_is_none(x):
    for fmt, reader in ((cq.MXFP8, "scaled_mm"), (cq.NVFP4, "cutlass"), (E8X4, "trtllm_8x4")):
        q, sf, options = quantized(x, fmt)
        row_major = fmt.replace(scale_layout="row_major")
        flat = cq.convert_scales(sf, fmt, row_major, x.shape).view(torch.uint8).flatten()
        assert "swizzle" in rules(q, flat.view(sf.dtype), fmt, reader, **options)
        padded = torch.zeros_like(sf.view(torch.uint8))
        padded[: flat.numel()] = flat
        found = rules(q, padded.view(sf.dtype), fmt, reader, **options)
        assert found[:2] == ["padding", "swizzle"]
        assert rules(q, sf, fmt, reader, x=x, **options) == []
    # Without padding, x alone tells.
    x = (
        torch.randn(128, 1024, device=x.device)
        * torch.logspace(-3, 3, 128, device=x.device)[:, None]
    )
    q, sf = cq.quantize(x, cq.MXFP8)
    flat = cq.quantize(x, cq.MXFP8.replace(scale_layout="row_major"))[1].flatten()
    assert rules(q, flat, cq.MXFP8, "scaled_mm") == []
    assert rules(q, flat, cq.MXFP8, "scaled_mm", x=x) == ["swizzle"]
    assert rules(q, sf, cq.MXFP8, "scaled_mm", x=x) == []
    flipped = sf.view(torch.uint8).flip(0).view(sf.dtype)
    assert rules(q, flipped, cq.MXFP8, "scaled_mm", x=x) == ["values"]
    assert rules(q, sf, cq.MXFP8, "scaled_mm", x=x[1:]) == ["shape"]


@pytest.mark.parametrize("mn", [8, 100, 128])
@pytest.mark.parametrize(("given", "fmt"), [(E8X4, cq.NVFP4), (cq.NVFP4, E8X4)], ids=str)
def test_blocks_of_the_other_size(mn, given, fmt, device):
    x = torch.randn(mn, 512, device=device) * torch.logspace(-2, 2, mn, device=device)[:, None]
    q, sf, options = quantized(x, given)
    reader = "cutlass" if fmt is cq.NVFP4 else "trtllm_8x4"
    (finding, *_) = cq.check_scales(q, sf, fmt, reader, x=x, **options)
    assert (finding.rule == "swizzle" and f"from {given.scale_layout}" in finding.text) or (
        mn == 8 and "row_major or 8x4" in finding.text
    )


def test_k_grouped(device):
    """Values (sum_k, mn) and scales of neighbouring rows."""
    sum_k, mn = 512, 64
    q = torch.zeros(sum_k, mn, dtype=torch.float8_e4m3fn, device=device)
    floats = torch.ones(sum_k // 128, mn, device=device)
    reader = "deep_gemm_sm100_k_grouped"
    assert rules(q, floats, POWERS, reader) == []
    assert rules(q, floats * 3, POWERS, reader) == ["powers of two"]
    assert rules(q, floats[1:], POWERS, reader) == ["shape"]
    assert rules(q, floats[:, 4:].contiguous(), POWERS, reader) == ["shape"]
    assert rules(q, floats.t().contiguous().t(), POWERS, reader) == ["strides"]
    assert rules(q[:, :62].contiguous(), floats[:, :62].contiguous(), POWERS, reader) == ["shape"]
    assert rules(q, floats, cq.DEEP_GEMM_SM90, reader) == ["format"]
    words = torch.full((sum_k // 128, mn), 0x7F7F7F7F, dtype=torch.int32, device=device)
    assert rules(q, words, cq.DEEP_GEMM_32, reader) == []
    words[0, 0] = -1
    assert rules(q, words, cq.DEEP_GEMM_32, reader) == ["nan"]
    assert rules(q, floats, cq.DEEP_GEMM_32, reader) == ["dtype"]
    assert rules(q.view(torch.uint8), floats, POWERS, reader) == ["dtype"]
    reader = "deep_gemm_sm90_k_grouped"
    scales = floats.t() * 0.3
    assert rules(q.flatten(), scales, cq.DEEP_GEMM_SM90, reader) == []
    assert rules(q, scales, cq.DEEP_GEMM_SM90, reader) == ["shape"]
    assert rules(q.flatten(), scales[:, 1:], cq.DEEP_GEMM_SM90, reader) == ["shape"]


def test_bad_arguments(x):
    q, sf, _ = quantized(x, cq.MXFP8)
    with pytest.raises(ValueError, match=r"reader: expected one of .* got 'cublas'"):
        cq.check_scales(q, sf, cq.MXFP8, "cublas")
    with pytest.raises(TypeError, match=r"sf: expected a torch.Tensor, got None"):
        cq.check_scales(q, None, cq.MXFP8, "scaled_mm")
    with pytest.raises(TypeError, match="fmt: expected a Format"):
        cq.check_scales(q, sf, "MXFP8", "scaled_mm")
    with pytest.raises(TypeError, match="rows: expected None or one of"):
        cq.check_scales(q, sf, cq.MXFP8, "scaled_mm", rows=3)


def test_empty(device):
    x = torch.empty(0, K, device=device)
    q, sf = cq.quantize(x, cq.MXFP8)
    assert rules(q, sf, cq.MXFP8, "scaled_mm") == []


@pytest.mark.parametrize(
    ("fmt", "reader"),
    [
        (cq.DEEP_GEMM_SM90, "deep_gemm_sm90"),
        (cq.GROUPWISE_FP8, "deep_gemm_sm90"),
        (POWERS, "deep_gemm_sm100"),
        (cq.DEEP_GEMM, "deep_gemm_sm100"),
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(300, 1040), (2, 260, 640), (1, 256), (3, 5, 128)])
def test_blocks_of_weights(fmt, reader, shape, device):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(device)
    w *= torch.logspace(-2, 2, shape[-2], device=device)[:, None]
    q, sf = cq.quantize_blocks(w, fmt)
    assert rules(q, sf, fmt, reader) == rules(q, sf, fmt, reader, x=w) == []
    assert rules(q, sf, fmt, reader, x=w * 4) == ["values"]
    assert rules(q, sf, fmt, reader, x=w[..., 1:]) == ["shape"]
    if fmt.byte_scales:
        return
    wrong = torch.zeros(*sf.shape[:-2], sf.shape[-2] + 1, sf.shape[-1], device=device)
    if wrong.shape != fmt.scale_shape(shape[:-2], *shape[-2:]):
        (found,) = cq.check_scales(q, wrong, fmt, reader)
        assert found.rule == "shape" and "of blocks of weights" in found.text
    # DeepGEMM loads these, or repeats them first: TMA does not read them.
    moved = torch.empty(sf.numel() + 1, device=device)[1:].view(sf.shape).copy_(sf)
    assert rules(q, moved, fmt, reader) == []
    sf.view(-1)[-1] = torch.nan
    assert rules(q, sf, fmt, reader)[-1:] == ["nan"]
    sf.view(-1)[-1] = 0.3
    powers = ["powers of two"] if reader == "deep_gemm_sm100" else []
    assert rules(q, sf, fmt, reader) == powers


def test_strides_of_blocks_of_weights(device):
    w = torch.randn(2, 260, 640).to(device)
    for fmt, reader in ((cq.DEEP_GEMM_SM90, "deep_gemm_sm90"), (POWERS, "deep_gemm_sm100")):
        q, sf = cq.quantize_blocks(w, fmt)
        by_column = sf.mT.contiguous().mT
        assert rules(q, by_column, fmt, reader, x=w) == []
        spread = torch.empty(2, 3, 8, device=device)[..., :5].copy_(sf)
        wrong = ["strides"] if reader == "deep_gemm_sm90" else []
        assert rules(q, spread, fmt, reader, x=w) == wrong
        assert rules(q[0], spread[0], fmt, reader, x=w[0]) == wrong
        apart = torch.empty(2, 4, 5, device=device)[:, :3].copy_(sf)
        assert rules(q, apart, fmt, reader, x=w) == wrong
    # Rows of groups alone have row domains.
    rows = Masked(torch.tensor([3, 4], dtype=torch.int32, device=device))
    assert "shape" in rules(q, sf, POWERS, "deep_gemm_sm100", rows=rows)
    assert "shape" in rules(q[0], sf[0, :1], cq.ROWWISE_FP8, "scaled_mm")


@pytest.mark.parametrize("k", [640, 608])
@pytest.mark.parametrize(
    ("fmt", "reader"), [pair for pair in RIGHT if pair[1] != "scaled_mm"], ids=str
)
def test_masked_scales_that_are_not_written(fmt, reader, k, device):
    """Scales past a count, rounded up to 4, are what their memory held."""
    x = torch.randn(2, 130, k, generator=torch.Generator().manual_seed(2)).to(device)
    rows = Masked(torch.tensor([130, 3], dtype=torch.int32, device=device))
    sf = cq.empty_scales(fmt, x.shape, device=device)
    memory = torch.empty(0, dtype=torch.uint8, device=device).set_(sf.untyped_storage())
    memory.fill_(9)
    if reader == "deep_gemm_sm100" and not fmt.byte_scales:
        memory.view(torch.float32).fill_(1.0)
    options = {"amax": cq.tensor_amax(x)} if fmt.upper_scale else {}
    q, sf = cq.quantize(x, fmt, rows=rows, out=(None, sf), **options)
    x[1, 3:] = 1e6
    for given in ({}, {"x": x}):
        assert rules(q, sf, fmt, reader, rows=rows, **options, **given) == []
    # Below the count of the first matrix all is written.
    if fmt.mn_major:
        sf.as_strided((1,), (1,), sf.storage_offset() + 130)[0] = 9
        assert rules(q, sf, fmt, reader, rows=rows) == ["padding"]


def test_padding_of_strided_batches(device):
    x = torch.randn(4, 130, 640, generator=torch.Generator().manual_seed(2)).to(device)
    q, sf = cq.quantize(x, cq.DEEP_GEMM_SM90)
    # Matrices lie apart, with other numbers between them.
    memory = torch.full((4, 10, 132), 7.0, device=device)
    spread = memory[:, :5, :130].mT.copy_(sf)
    assert rules(q, spread, cq.DEEP_GEMM_SM90, "deep_gemm_sm90", x=x) == []
    expanded = sf[:1].expand(4, -1, -1)
    same = q[:1].expand(4, -1, -1).contiguous()
    assert rules(same, expanded, cq.DEEP_GEMM_SM90, "deep_gemm_sm90") == []
    alone = sf[0][None].expand(4, -1, -1)
    assert rules(same, alone, cq.DEEP_GEMM_SM90, "deep_gemm_sm90") == []


def test_padding_is_counted_in_all_matrices(device):
    x = torch.randn(2, 5, 96, generator=torch.Generator().manual_seed(2)).to(device)
    q, sf = cq.quantize(x, cq.MXFP8)
    bytes_ = sf.view(torch.uint8)
    bytes_[bytes_ == 0] = 9
    (found,) = cq.check_scales(q, sf, cq.MXFP8, "cutlass")
    padding = 2 * (128 * 4 - 5 * 3)
    assert f"got 9 at (0, 0, 3), and {padding} such places of {padding}" in found.text


def test_an_upper_scale_of_dead_and_infinite_rows(device):
    x = torch.randn(2, 130, 640, generator=torch.Generator().manual_seed(2)).to(device)
    amax = cq.tensor_amax(x)
    rows = Masked(torch.tensor([130, 3], dtype=torch.int32, device=device))
    x[1, 3:] = 1e6
    q, sf = cq.quantize(x, cq.NVFP4, amax=amax, rows=rows)
    assert rules(q, sf, cq.NVFP4, "cutlass", amax=amax, rows=rows, x=x) == []
    for value in (torch.nan, torch.inf):
        y = x[0].clone()
        y[3, 5], y[3, 6] = value, 1e4
        q, sf = cq.quantize(y, cq.NVFP4, amax=amax)
        assert rules(q, sf, cq.NVFP4, "scaled_mm", amax=amax, x=y) == ["nan"]
    zero = torch.zeros_like(x[0])
    q, sf = cq.quantize(zero, cq.NVFP4, amax=amax)
    assert rules(q, sf, cq.NVFP4, "scaled_mm", amax=amax, x=zero) == []
    assert "upper scale" in rules(q, sf, cq.NVFP4, "scaled_mm", amax=amax, x=x[0])


@pytest.mark.parametrize("kind", ["psum", "contiguous", "masked"])
def test_upper_scales_of_groups(kind, device):
    x = torch.randn(3, 8, K, generator=torch.Generator().manual_seed(2)).to(device)
    x *= torch.tensor([1e-3, 1.0, 1e3], device=device).view(3, 1, 1)
    amax = x.abs().amax((1, 2))
    counts = {"masked": [3, 8, 0], "contiguous": [0] * 8 + [1] * 8 + [2] * 8, "psum": [8, 16, 24]}
    data = torch.tensor(counts[kind], dtype=torch.int32, device=device)
    kinds = {"masked": Masked, "contiguous": Indexed}
    rows = PrefixSum(data, 8) if kind == "psum" else kinds[kind](data)
    x = x if kind == "masked" else x.flatten(0, 1)
    q, sf = cq.quantize(x, cq.NVFP4, rows=rows, amax=amax)
    call = q, sf, cq.NVFP4, "cutlass"
    assert rules(*call, rows=rows, amax=amax) == rules(*call, rows=rows, amax=amax, x=x) == []
    # One of them is wrong; the largest of all results is as expected.
    wrong = amax.clone()
    wrong[0] *= 16
    found = cq.check_scales(*call, rows=rows, amax=wrong, x=x)
    assert found[0].rule == "upper scale"
    word = "matrix" if kind == "masked" else "group"
    assert f"in {word} 0, and such in 1 of 3" in found[0].text
    encode = 2688 / amax
    encode[1] *= 1e3
    q, sf = cq.quantize(x, cq.NVFP4, rows=rows, encode_scale=encode)
    found = cq.check_scales(q, sf, cq.NVFP4, "cutlass", rows=rows, encode_scale=encode)
    assert [f.rule for f in found] == ["upper scale"]
    assert "expected few scales" in found[0].text and f"in {word} 1" in found[0].text


@pytest.mark.parametrize("shape", [(1, 256), (4, 1024)])
def test_all_scales_of_a_constant_are_the_largest(shape, device):
    x = torch.full(shape, -0.37, device=device)
    x[:, 5::7] = 0.0
    amax = cq.tensor_amax(x)
    q, sf = cq.quantize(x, cq.NVFP4, amax=amax)
    call = q, sf, cq.NVFP4, "scaled_mm"
    assert rules(*call, amax=amax) == rules(*call, amax=amax, x=x) == []
    x[0, :32] = torch.linspace(-0.37, 0.37, 32)
    encode = 2688 * 1.5 / amax
    q, sf = cq.quantize(x, cq.NVFP4, encode_scale=encode)
    found = cq.check_scales(q, sf, cq.NVFP4, "scaled_mm", encode_scale=encode, x=x)
    assert [f.rule for f in found] == ["upper scale", "values"]
    assert "expected few scales of 448" in found[0].text


def test_few_scales_may_be_the_largest(device):
    x = torch.ones(1, 32, device=device)
    amax = cq.tensor_amax(x)
    q, sf = cq.quantize(x, cq.NVFP4, amax=amax)
    assert rules(q, sf, cq.NVFP4, "scaled_mm", amax=amax, x=x) == []


def test_bad_upper_scales(x):
    amax = cq.tensor_amax(x)
    q, sf = cq.quantize(x, cq.NVFP4, amax=amax)
    call = q, sf, cq.NVFP4, "scaled_mm"
    with pytest.raises(ValueError, match=r"amax: expected shape \(\) or \(1,\), got \(5,\)"):
        cq.check_scales(*call, amax=amax.expand(5).contiguous())
    for dtype in (torch.int32, torch.float64):
        with pytest.raises(TypeError, match="amax: expected a tensor of float32, got a tensor of"):
            cq.check_scales(*call, amax=amax.to(dtype))
    with pytest.raises(ValueError, match="amax: expected "):
        cq.check_scales(*call, amax=amax.to("meta"))
    q, sf = cq.quantize(x, cq.MXFP8)
    with pytest.raises(ValueError, match="amax: expected None for"):
        cq.check_scales(q, sf, cq.MXFP8, "scaled_mm", amax=amax)
    fmt = cq.NVFP4.replace(row_scale=True)
    q, sf, row_scales = cq.quantize(x, fmt)
    assert rules(q, sf, fmt, "scaled_mm", decode_scale=row_scales, x=x) == []
    with pytest.raises(ValueError, match="amax: expected decode_scale for"):
        cq.check_scales(q, sf, fmt, "scaled_mm", amax=amax)
    with pytest.raises(ValueError, match="decode_scale: expected shape"):
        cq.check_scales(q, sf, fmt, "scaled_mm", decode_scale=row_scales[1:])


def test_arguments_without_memory(x):
    q, sf = cq.quantize(x, cq.MXFP8)
    meta = {"q": q.to("meta"), "sf": sf.to("meta"), "x": x.to("meta")}
    for name in meta:
        given = {"q": q, "sf": sf, "x": x, name: meta[name]}
        with pytest.raises(ValueError, match=": expected "):
            cq.check_scales(given["q"], given["sf"], cq.MXFP8, "scaled_mm", x=given["x"])
    with pytest.raises(TypeError, match="sf: expected a strided tensor, got layout"):
        sparse = torch.ones(4, 4, device=x.device).to_sparse()
        cq.check_scales(q, sparse, cq.MXFP8, "scaled_mm")
    with pytest.raises(TypeError, match="x: expected a tensor of"):
        cq.check_scales(q, sf, cq.MXFP8, "scaled_mm", x=x.to(torch.complex64))
    (found,) = cq.check_scales(q, sf, cq.MXFP8, "scaled_mm", x=x[None])
    assert found.rule == "shape" and f"values ({MN}, {K}), got (1, {MN}, {K})" in found.text


def test_k_grouped_findings_in_place_of_errors(device):
    sum_k, mn = 512, 64
    q = torch.zeros(sum_k, 2 * mn, dtype=torch.float8_e4m3fn, device=device)
    words = torch.full((4, 2 * mn), 0x7F7F7F7F, dtype=torch.int32, device=device)
    reader = "deep_gemm_sm100_k_grouped"
    strided = q[:, :mn], words[:, :mn]
    assert rules(*strided, cq.DEEP_GEMM_32, reader) == ["strides", "strides"]
    assert rules(q, words.t().contiguous().t(), cq.DEEP_GEMM_32, reader) == ["strides"]
    moved = torch.empty(4 * 2 * mn + 1, device=device)[1:].view(4, 2 * mn).fill_(1)
    assert rules(q, moved, POWERS, reader) == []
    scales = torch.ones(mn, 5, device=device)
    sm90 = "deep_gemm_sm90_k_grouped"
    (found,) = cq.check_scales(q[:, :mn].flatten(), scales, cq.DEEP_GEMM_SM90, sm90)
    assert found.rule == "shape" and "expected exactly sum_k / 128 columns" in found.text
    with pytest.raises(ValueError, match="x: expected None for DeepGEMM's k-grouped GEMM"):
        cq.check_scales(q, words, cq.DEEP_GEMM_32, reader, x=q.float())
    rows = PrefixSum(torch.tensor([512], dtype=torch.int32, device=device))
    with pytest.raises(ValueError, match="rows: expected None for DeepGEMM's k-grouped GEMM"):
        cq.check_scales(q, words, cq.DEEP_GEMM_32, reader, rows=rows)


def test_alignment_of_scales_that_tma_does_not_read(x):
    q, sf = cq.quantize(x, cq.ROWWISE_FP8)
    moved = torch.empty(MN + 1, 1, device=x.device)[1:].copy_(sf)
    assert rules(q, moved, cq.ROWWISE_FP8, "scaled_mm", x=x) == []
    q, sf = cq.quantize(x, cq.GROUPWISE_FP8)
    moved = torch.empty(sf.numel() + 1, device=x.device)[1:].view(sf.shape).copy_(sf)
    assert rules(q, moved, cq.GROUPWISE_FP8, "deep_gemm_sm90") == []
    q, sf = cq.quantize(x, cq.DEEP_GEMM_SM90)
    moved = torch.empty(sf.numel() + 1, device=x.device)[1:].view(sf.mT.shape).mT.copy_(sf)
    assert rules(q, moved, cq.DEEP_GEMM_SM90, "deep_gemm_sm90") == ["alignment"]
    assert rules(q, moved, cq.GROUPWISE_FP8, "deep_gemm_sm90") == ["alignment"]
    k_grouped = q.mT.contiguous().flatten(), moved, cq.DEEP_GEMM_SM90, "deep_gemm_sm90_k_grouped"
    assert rules(*k_grouped) == ["alignment"]
    # Other strides than its own it transforms.
    apart = torch.empty(sf.shape[1], MN + 4, device=x.device)[:, 1 : MN + 1].mT.copy_(sf)
    assert rules(q, apart, cq.DEEP_GEMM_SM90, "deep_gemm_sm90", x=x) == []


@pytest.mark.parametrize("shape", [(4, 130, 0), (4, 0, 128), (0, 130, 128), (0, 128)])
@pytest.mark.parametrize(("fmt", "reader"), RIGHT[:4], ids=str)
def test_no_values(fmt, reader, shape, device):
    q, sf = cq.quantize(torch.zeros(shape, device=device), fmt)
    assert rules(q, sf, fmt, reader) == []


def test_texts_name_what_came(x):
    q, sf = cq.quantize(x, cq.DEEP_GEMM_SM90)
    sf[3, 1] = torch.inf
    (found,) = cq.check_scales(q, sf, cq.DEEP_GEMM_SM90, "deep_gemm_sm90")
    assert found.rule == "nan" and "got inf at (0, 3, 1)" in found.text
    q, sf = cq.quantize(x, cq.MXFP8)
    (found,) = cq.check_scales(q, sf.view(128, 32), cq.MXFP8, "scaled_mm")
    assert "flatten() it if it is swizzled, convert_scales" in found.text
