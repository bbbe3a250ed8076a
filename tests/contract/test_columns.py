"""Groups along rows on each device: every byte against the oracle, and what is refused."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cute_quant as cq
from cute_quant import (
    DEEP_GEMM,
    DEEP_GEMM_32,
    DEEP_GEMM_SM90,
    GROUPWISE_FP8,
    MXFP4,
    MXFP8,
    NVFP4,
    ROWWISE_FP8,
    Masked,
    PrefixSum,
)
from tests.columns import (
    DTYPES,
    FLOAT32_32,
    FORMATS,
    GATED,
    ROW_FORMATS,
    STATES,
    GatedCase,
    assert_columns,
    assert_rows,
    experts,
    poisoned_columns,
    special_weights,
    views,
)
from tests.helpers import assert_same_bits, moved, on_device, poisoned_results


def check(x, fmt, device, rows=None, transposed=False):
    """Quantize columns into poison and into new memory; every byte must be the oracle's."""
    memory = poisoned_columns(fmt, tuple(x.shape), transposed, device)
    arguments = {"transposed": transposed, "rows": on_device(rows, device)}
    on_it = moved(x, device)
    results = cq.quantize_columns(on_it, fmt, **arguments, out=memory)
    assert all(result is own for result, own in zip(results, memory, strict=True))
    assert_columns(memory, x, fmt, rows, transposed)
    for new, own in zip(cq.quantize_columns(on_it, fmt, **arguments), memory, strict=True):
        assert new.is_contiguous() and new.dtype is own.dtype
        assert_same_bits(new, own)


def check_both(x, fmt, column_fmt, device, rows=None, transposed=False):
    """The same for rows and columns of one call."""
    *leading, mn, k = x.shape
    memory = (
        poisoned_results(fmt, mn, k, device, batch_shape=tuple(leading)),
        poisoned_columns(column_fmt, tuple(x.shape), transposed, device),
    )
    arguments = {"transposed": transposed, "rows": on_device(rows, device)}
    on_it = moved(x, device)
    cq.quantize_both(on_it, fmt, column_fmt, **arguments, out=memory)
    assert_rows(memory[0], x, fmt, rows)
    assert_columns(memory[1], x, column_fmt, rows, transposed)
    results = cq.quantize_both(on_it, fmt, column_fmt, **arguments)
    for pair, owned in zip(results, memory, strict=True):
        for new, own in zip(pair, owned, strict=True):
            assert new.stride() == own.stride()
            assert_same_bits(new, own)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_every_format(fmt, dtype, device):
    for seed, shape in enumerate([(128, 136), (2, 133, 70), (1, 2), (2, 3, 40, 6)]):
        x = special_weights(shape, dtype, fmt.group_size, seed)
        check(x, fmt, device, transposed=seed % 2 == 0)
        check(x, fmt, device, transposed=seed % 2 == 1)


@pytest.mark.parametrize("kind", range(1, 6))
@pytest.mark.parametrize("fmt", FORMATS[:5], ids=str)
def test_experts(fmt, kind, device):
    for mn, transposed in ((700, False), (640, True)):
        x = special_weights((mn, 40), torch.bfloat16, fmt.group_size, kind + mn)
        check(x, fmt, device, experts(mn, fmt, kind), transposed)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", [name for name in views(torch.zeros(1, 1)) if "along" not in name])
@pytest.mark.parametrize("fmt", [DEEP_GEMM_SM90, MXFP8], ids=str)
def test_every_stride(fmt, name, transposed, device):
    x = special_weights((3, 140, 134), torch.bfloat16, fmt.group_size, 3)
    check(views(x)[name], fmt, device, transposed=transposed)


@pytest.mark.parametrize("number", range(len(ROW_FORMATS)))
def test_both(number, device):
    fmt, column_fmt = ROW_FORMATS[number], FORMATS[number % len(FORMATS)]
    for seed, (shape, kind) in enumerate([((130, 134), 0), ((2, 33, 140), 0), ((300, 72), 1)]):
        x = special_weights(shape, DTYPES[(number + seed) % 3], 32, number)
        rows = experts(shape[0], column_fmt, kind)
        check_both(x, fmt, column_fmt, device, rows, transposed=(number + seed) % 2 == 0)


def check_gated(name, shape, dtype, formats, device, rows=None, transposed=False, state=None):
    """The same for gates and ups whose products are exact, or their gradients."""
    case = GatedCase.make(shape, dtype, len(name), **GATED[name])
    x, (fmt, column_fmt) = case.values, formats
    memory = (
        poisoned_results(fmt, *x.shape[-2:], device, batch_shape=tuple(x.shape[:-2])),
        poisoned_columns(column_fmt, tuple(x.shape), transposed, device),
    )
    given = None if state is None else state.to(device)
    options = {"transposed": transposed, "rows": on_device(rows, device), "rng_state": given}
    case.call(device, *formats, **options, out=memory)
    assert_rows(memory[0], x, fmt, rows, rng_state=state)
    assert_columns(memory[1], x, column_fmt, rows, transposed, state)


@pytest.mark.parametrize("name", GATED)
def test_gated_activations(name, device):
    calls = [((130, 72), 0, None), ((2, 33, 140), 0, 1), ((300, 128), 1, 2), ((5, 3), 0, None)]
    for number, (shape, kind, state) in enumerate(calls):
        number = number + len(name)
        formats = ROW_FORMATS[number % 8], FORMATS[(number + kind) % 3]
        rows, state = experts(shape[0], formats[1], kind), None if state is None else STATES[state]
        dtype, transposed = DTYPES[number % 3], number % 2 == 0
        check_gated(name, shape, dtype, formats, device, rows, transposed, state)


def test_rounded_sigmoids_are_those_of_the_operation_of_rows(device):
    """Of gates that need a sigmoid, with every option: the same numbers in both directions."""
    generator = torch.Generator().manual_seed(0)
    gate_up = torch.randn(133, 384, generator=generator).bfloat16().to(device)
    grad = torch.randn(133, 192, generator=generator).bfloat16().to(device)
    gated = {"clamp": 2.0, "alpha": 1.702, "beta": 1.0, "interleaved": True}
    fmt, column_fmt = DEEP_GEMM, DEEP_GEMM_32
    weight = torch.rand(133, generator=generator).to(device)
    products = {**gated, "rounding": "unfused", "weight": weight}
    for rows, both in (
        (
            cq.silu_mul_quantize(gate_up, fmt, **products),
            cq.silu_mul_quantize_both(gate_up, fmt, column_fmt, **products),
        ),
        (
            cq.silu_mul_backward_quantize(grad, gate_up, fmt, **gated),
            cq.silu_mul_backward_quantize_both(grad, gate_up, fmt, column_fmt, **gated),
        ),
    ):
        for actual, expected in zip(both[0], rows, strict=True):
            assert_same_bits(actual, expected)
        scale = 2.0 ** (
            both[1][1].contiguous().view(torch.uint8).view(2, -1, 4).transpose(1, 2).flatten(0, 1)
        )[:5].float().sub(127)
        back = both[1][0].float() * scale.repeat_interleave(32, 0)[:133]
        of_rows = cq.dequantize(*rows, fmt, dtype=torch.float32)
        assert ((back - of_rows).norm() / of_rows.norm()).item() < 0.06


@pytest.mark.parametrize("fmt", FORMATS[:4], ids=str)
def test_stochastic_rounding(fmt, device):
    """Draws of columns are those of their place in x, and others than those of rows."""
    x = special_weights((2, 133, 72), torch.bfloat16, fmt.group_size, 1)
    for transposed in (False, True):
        memory = poisoned_columns(fmt, tuple(x.shape), transposed, device)
        state = STATES[1 + transposed]
        cq.quantize_columns(
            x.to(device), fmt, transposed=transposed, rng_state=state.to(device), out=memory
        )
        assert_columns(memory, x, fmt, None, transposed, state)
    # A value between two codes, far from both, in groups with the same scales in both directions.
    x = torch.full((128, 128), 17.0, dtype=torch.bfloat16, device=device)
    x.fill_diagonal_(448.0)
    state = STATES[2].to(device)
    (q, _), (columns, _) = cq.quantize_both(x, DEEP_GEMM_SM90, DEEP_GEMM_SM90, rng_state=state)
    up, columns_up = (t.float() == 18.0 for t in (q, columns))
    assert 0.46 < up.float().mean().item() < 0.54 > columns_up.float().mean().item() > 0.46
    assert 0.46 < (up == columns_up).float().mean().item() < 0.54
    transposed, _ = cq.quantize_columns(x, DEEP_GEMM_SM90, transposed=True, rng_state=state)
    assert_same_bits(transposed.mT.contiguous(), columns)


@pytest.mark.parametrize(
    ("values", "numerics"),
    [(torch.float8_e4m3fn, "vllm"), (torch.int8, "vllm"), (torch.float8_e4m3fn, "vllm_bf16")],
)
def test_numerics_that_divide_or_truncate_are_refused(values, numerics, device):
    x, fmt = torch.zeros(4, 32, device=device), DEEP_GEMM_SM90.replace(values=values)
    fmt = fmt.replace(numerics=numerics)
    assert fmt.divides or fmt.truncates or fmt.in_bf16
    with pytest.raises(ValueError, match=r"^fmt: expected numerics that multiply"):
        cq.quantize_columns(x, fmt)
    with pytest.raises(ValueError, match=r"^fmt: expected numerics that multiply"):
        cq.quantize_both(x, fmt, MXFP8)


def test_what_gated_activations_refuse(device):
    gate_up, grad = torch.zeros(4, 64, device=device), torch.zeros(4, 32, device=device)
    gaps = cq.PrefixSumWithGaps(torch.zeros(1, dtype=torch.int32, device=device))
    state = torch.zeros(2, dtype=torch.int64, device=device)
    formats, numerics = (MXFP8, MXFP8), MXFP8.replace(numerics="flashinfer")
    for error, message, call in (
        (
            ValueError,
            "gate_up: expected an even",
            lambda: cq.silu_mul_quantize_both(gate_up[:, :63], *formats),
        ),
        (
            ValueError,
            "weight: expected shape",
            lambda: cq.silu_mul_quantize_both(
                gate_up, *formats, weight=torch.zeros(3, device=device)
            ),
        ),
        (
            ValueError,
            "grad: expected shape",
            lambda: cq.silu_mul_backward_quantize_both(gate_up, gate_up, *formats),
        ),
        (
            ValueError,
            "column_fmt: expected 8-bit",
            lambda: cq.silu_mul_backward_quantize_both(grad, gate_up, MXFP8, MXFP4),
        ),
        (
            TypeError,
            "rng_state: expected a tensor of",
            lambda: cq.silu_mul_quantize_both(gate_up, *formats, rng_state=state.int()),
        ),
        (
            ValueError,
            "rng_state: expected None for",
            lambda: cq.quantize_columns(grad, numerics, rng_state=state),
        ),
        (
            ValueError,
            "rows: expected None or a PrefixSum",
            lambda: cq.quantize_columns(grad, MXFP8, rows=gaps),
        ),
        (
            TypeError,
            "transposed: expected a bool",
            lambda: cq.silu_mul_quantize_both(gate_up, *formats, transposed=1),
        ),
        (
            ValueError,
            "out column q, .*overlap|overlap",
            lambda: cq.silu_mul_quantize_both(
                gate_up, *formats, out=(None, (gate_up.view(torch.float8_e4m3fn)[:, :32], None))
            ),
        ),
    ):
        with pytest.raises(error, match=message):
            call()


def hypothesis_calls(data, device):
    draw = data.draw
    column_fmt, dtype = draw(st.sampled_from(FORMATS)), draw(st.sampled_from(DTYPES))
    kind, transposed = draw(st.integers(0, 5)), draw(st.booleans())
    mn, k = draw(st.integers(0, 300)), draw(st.integers(0, 150))
    leading = () if kind else draw(st.sampled_from([(), (1,), (2,), (0,), (2, 2)]))
    seed = draw(st.integers(0, 99))
    x = special_weights((*leading, mn, k), dtype, column_fmt.group_size, seed)
    if x.numel():
        x = views(x)[draw(st.sampled_from(["whole", "apart", "unaligned"]))]
    rows = experts(mn, column_fmt, kind, seed)
    if draw(st.integers(0, 2)) == 0:
        fmts = draw(st.sampled_from(ROW_FORMATS)), draw(st.sampled_from(FORMATS[:4]))
        name, state = draw(st.sampled_from(list(GATED))), draw(st.sampled_from([None, *STATES]))
        shape, domain = (*leading, mn, k), experts(mn, fmts[1], kind, seed)
        # Numerics of a library round to nearest.
        state = state if all(fmt.numerics == "ieee" for fmt in fmts) else None
        check_gated(name, shape, dtype, fmts, device, domain, transposed, state)
    elif draw(st.booleans()):
        fmt = draw(st.sampled_from(ROW_FORMATS))
        check_both(x, fmt, column_fmt, device, rows, transposed)
    else:
        check(x, column_fmt, device, rows, transposed)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_hypothesis_calls(data):
    hypothesis_calls(data, "cpu")


@pytest.mark.gpu
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_hypothesis_calls_on_gpu(data):
    hypothesis_calls(data, "cuda")


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_it_is_quantize_of_the_transpose(fmt, device):
    x = special_weights((200, 136), torch.bfloat16, fmt.group_size, 4).to(device)
    expected_q, expected_sf = cq.quantize(x.mT.contiguous(), fmt)
    q, sf = cq.quantize_columns(x, fmt, transposed=True)
    assert_same_bits(q, expected_q)
    assert_same_bits(sf if fmt.blocked else sf.mT.contiguous(), expected_sf.contiguous())
    y = cq.dequantize(q, sf if fmt.blocked else sf.mT, fmt)
    assert_same_bits(y, cq.dequantize(expected_q, expected_sf, fmt))


def test_rows_that_do_not_exist_are_zeros_beside_what_is_not_finite(device):
    """In values too: a group's NaN is not theirs."""
    x = torch.ones(256, 64, dtype=torch.bfloat16)
    x[3, 5], x[130, 6], x[40:128] = float("nan"), float("inf"), float("nan")
    for transposed in (False, True):
        rows = PrefixSum(torch.tensor([40, 131], dtype=torch.int32))
        check(x, DEEP_GEMM_SM90, device, rows, transposed)
        q, sf = cq.quantize_columns(
            x.to(device), DEEP_GEMM_SM90, transposed=transposed, rows=on_device(rows, device)
        )
        bits = (q.mT if transposed else q).contiguous().view(torch.uint8).cpu()
        assert (bits[:40, 5] == 0x7F).all() and (bits[40:128] == 0).all()
        assert (bits[128:131, 6] == 0x7F).all() and (bits[131:] == 0).all()
        assert sf.isnan().sum() == 2


def test_a_word_of_scales(device):
    """Group j of a column is byte j % 4 of word j / 4, the low one first."""
    x = torch.zeros(160, 8, dtype=torch.bfloat16, device=device)
    for group, power in enumerate((448.0, 896.0, 1792.0, 3584.0, 7168.0)):
        x[32 * group + group, 2] = power
    _, sf = cq.quantize_columns(x, DEEP_GEMM_32)
    assert sf.shape == (2, 8) and sf.dtype is torch.int32
    assert sf[:, 2].contiguous().view(torch.uint8).tolist() == [127, 128, 129, 130, 131, 0, 0, 0]
    assert sf[:, 0].tolist() == [0x5E5E5E5E, 0x5E]


def pack_as_deep_gemm(sf: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """Return the words of float32 scales (rows, k), each of 32 rows of a group of `sizes` rows.

    Ported from DeepGEMM's ``pack_fp32_into_ue8m0``: each group starts a new row of words, and bytes
    behind its last scale are 0.
    """
    words = []
    for scales in sf.split([-(-size // 32) for size in sizes]):
        exponents = scales.view(torch.int32) >> 23
        exponents = torch.nn.functional.pad(exponents, (0, 0, 0, -len(scales) % 4))
        lowest, *others = exponents.view(-1, 4, sf.shape[1]).unbind(1)
        for byte, exponent in enumerate(others, start=1):
            lowest = lowest | exponent << 8 * byte
        words.append(lowest)
    return torch.cat(words)


@pytest.mark.parametrize("sizes", [[128], [256, 96, 512], [32, 0, 200, 1, 128]], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_words_of_experts_are_those_that_deep_gemm_packs(transposed, sizes, device):
    """Of experts that lie at multiples of 128 rows here, and one behind the other there."""
    k = 40
    starts = [0, *itertools.accumulate(-(-size // 128) * 128 for size in sizes)]
    parts = [slice(start, start + size) for start, size in zip(starts, sizes, strict=False)]
    ends = torch.tensor([part.stop for part in parts], dtype=torch.int32, device=device)
    x = special_weights((starts[-1], k), torch.bfloat16, 32, 5).to(device)
    q, words = cq.quantize_columns(x, DEEP_GEMM_32, transposed=transposed, rows=PrefixSum(ends))
    in_float32 = FLOAT32_32.replace(round_scale=True)
    singly = [cq.quantize_columns(x[part], in_float32) for part in parts]
    packed = pack_as_deep_gemm(torch.cat([sf for _, sf in singly]), sizes)
    assert_same_bits(words, packed)
    q = q.mT if transposed else q
    for part, (expected, _) in zip(parts, singly, strict=True):
        assert_same_bits(q[part].contiguous(), expected)


def test_it_is_one_launch_to_bind(device):
    x = special_weights((130, 256), torch.bfloat16, 128, 9).to(device)
    launch = cq.bind(x, DEEP_GEMM_32, operation=cq.quantize_columns)
    for actual, expected in zip(launch(), cq.quantize_columns(x, DEEP_GEMM_32), strict=True):
        assert_same_bits(actual, expected)
    launch = cq.bind(x, DEEP_GEMM, DEEP_GEMM_32, operation=cq.quantize_both)
    for pair, wanted in zip(launch(), cq.quantize_both(x, DEEP_GEMM, DEEP_GEMM_32), strict=True):
        for actual, expected in zip(pair, wanted, strict=True):
            assert_same_bits(actual, expected)


X = torch.ones(256, 256, dtype=torch.bfloat16)
Q = torch.empty(256, 256, dtype=torch.float8_e4m3fn)
ENDS = torch.tensor([100, 256], dtype=torch.int32)
SF32 = torch.empty(2, 256)


@pytest.mark.parametrize(
    ("x", "fmt", "options", "error", "message"),
    [
        (1.0, DEEP_GEMM_32, {}, TypeError, "x: expected a torch.Tensor, got 1.0"),
        (X.double(), DEEP_GEMM_32, {}, TypeError, "x: expected a tensor of bfloat16 or"),
        (X, "MXFP8", {}, TypeError, "fmt: expected a Format"),
        (X, NVFP4, {}, ValueError, "fmt: expected 8-bit values, got e2m1:16"),
        (X, MXFP4, {}, ValueError, "fmt: expected 8-bit values, got e2m1:32"),
        (X, ROWWISE_FP8, {}, ValueError, "fmt: expected a group_size of 32 or 128, got e4m3:row"),
        (X, DEEP_GEMM.replace(group_size=64), {}, ValueError, "fmt: expected a group_size of 32"),
        (X, DEEP_GEMM, {}, ValueError, "groups of 32 rows where scales are bytes of words"),
        (X, GROUPWISE_FP8, {}, ValueError, "fmt: expected a scale_layout of .*'mn_major'.*128x4"),
        (X, MXFP8.replace(scale_layout="8x4"), {}, ValueError, "fmt: expected a scale_layout"),
        (X[0], DEEP_GEMM_32, {}, ValueError, "x: expected 2 or more dimensions"),
        (X.mT[:200], DEEP_GEMM_32, {}, ValueError, "x: expected rows contiguous along k"),
        (X, DEEP_GEMM_32, {"transposed": 1}, TypeError, "transposed: expected a bool, got 1"),
        (X, DEEP_GEMM_32, {"check": 1}, TypeError, "check: expected a bool, got 1"),
        (X, DEEP_GEMM_32, {"rows": ENDS}, TypeError, "rows: expected None or a PrefixSum"),
        (
            X[None],
            DEEP_GEMM_32,
            {"rows": Masked(ENDS[:1])},
            ValueError,
            "rows: expected None or a PrefixSum for groups along rows, got Masked",
        ),
        (X[None], DEEP_GEMM_32, {"rows": PrefixSum(ENDS)}, ValueError, r"expected shape \(M, k\)"),
        (
            X,
            DEEP_GEMM_32,
            {"rows": PrefixSum(ENDS, 32)},
            ValueError,
            "rows.alignment: expected a multiple of 128, .* got 32",
        ),
        (X, DEEP_GEMM_SM90, {"rows": PrefixSum(ENDS, 64)}, ValueError, "a multiple of 128"),
        (X, FORMATS[4], {"rows": PrefixSum(ENDS, 48)}, ValueError, "a multiple of 32"),
        (
            X,
            DEEP_GEMM_32,
            {"rows": PrefixSum(ENDS + 1), "check": True},
            ValueError,
            "rows.ends: expected 0 to 256, got 257",
        ),
        (
            X,
            DEEP_GEMM_32,
            {"rows": PrefixSum(ENDS.flip(0)), "check": True},
            ValueError,
            "rows.ends: expected group 1 to end at its start",
        ),
        (X, DEEP_GEMM_32, {"out": (Q,)}, TypeError, r"out: expected \(q, sf\), got 1 items"),
        (X, DEEP_GEMM_32, {"out": (X, None)}, TypeError, "out q: expected a tensor of float8"),
        (X, DEEP_GEMM_32, {"out": (Q[:9], None)}, ValueError, r"out q: expected shape \(256, 256"),
        (
            X[:, :64],
            DEEP_GEMM_32,
            {"out": (Q[:, :64], None), "transposed": True},
            ValueError,
            r"out q: expected shape \(64, 256\)",
        ),
        (X, DEEP_GEMM_SM90, {"out": (None, SF32.int())}, TypeError, "out sf: expected a tensor of"),
        (X, DEEP_GEMM_SM90, {"out": (None, SF32[:1])}, ValueError, r"expected shape \(2, 256\)"),
        (
            X,
            DEEP_GEMM_SM90,
            {"out": (None, torch.empty(256, 2).mT)},
            ValueError,
            r"out sf: expected strides \(256, 1\)",
        ),
        (
            X,
            MXFP8,
            {"out": (None, torch.empty(2049, dtype=torch.uint8)[1:].view(MXFP8.sf_dtype))},
            ValueError,
            "out sf: expected memory at a multiple of 4 bytes, got an address 1 bytes past",
        ),
        (
            X.clone().requires_grad_(),
            DEEP_GEMM_32,
            {},
            RuntimeError,
            "x: expected a tensor that requires no gradient, since quantize_columns",
        ),
    ],
)
def test_what_is_refused(x, fmt, options, error, message):
    with pytest.raises(error, match=message):
        cq.quantize_columns(x, fmt, **options)


@pytest.mark.parametrize(
    ("fmt", "column_fmt", "out", "error", "message"),
    [
        (NVFP4, MXFP8, None, ValueError, "^fmt: expected 8-bit values"),
        (ROWWISE_FP8, MXFP8, None, ValueError, "^fmt: expected a group_size of 32 or 128"),
        (MXFP8, MXFP4, None, ValueError, "column_fmt: expected 8-bit values"),
        (MXFP8, GROUPWISE_FP8, None, ValueError, "column_fmt: expected a scale_layout"),
        (MXFP8, DEEP_GEMM, None, ValueError, "column_fmt: expected groups of 32 rows"),
        (MXFP8, None, None, TypeError, "column_fmt: expected a Format"),
        (MXFP8, DEEP_GEMM_32, Q, TypeError, r"out: expected \(\(q, sf\), \(q, sf\)\), got a"),
        (
            MXFP8,
            DEEP_GEMM_32,
            (Q, None),
            TypeError,
            r"out: expected \(\(q, sf\), \(q, sf\)\), got a tensor",
        ),
        (MXFP8, DEEP_GEMM_32, ((Q[:9], None), None), ValueError, "out q: expected shape"),
        (MXFP8, DEEP_GEMM_32, (None, (Q[:9], None)), ValueError, "out column q: expected shape"),
        (DEEP_GEMM_32, DEEP_GEMM_SM90, (None, (None, SF32[:1])), ValueError, "out column sf: "),
        (
            MXFP8,
            DEEP_GEMM_32,
            ((Q, None), (Q, None)),
            ValueError,
            "out q: expected memory of its own, got memory that overlaps out column q",
        ),
    ],
)
def test_what_both_refuse(fmt, column_fmt, out, error, message):
    with pytest.raises(error, match=message):
        cq.quantize_both(X, fmt, column_fmt, out=out)


def test_memory_that_overlaps_is_refused():
    memory = torch.zeros(256 * 256 * 3, dtype=torch.uint8)
    x = memory[: 256 * 256 * 2].view(torch.bfloat16).view(256, 256)
    q = memory[256 * 256 : 256 * 256 * 2].view(torch.float8_e4m3fn).view(256, 256)
    with pytest.raises(ValueError, match=r"out q: expected memory of its own, .* overlaps x"):
        cq.quantize_columns(x, DEEP_GEMM_32, out=(q, None))
    sf = memory[: 4 * 512].view(torch.float32).view(2, 256)
    with pytest.raises(ValueError, match="out sf: expected memory of its own"):
        cq.quantize_columns(x, DEEP_GEMM_SM90, out=(None, sf))
    ends = memory[-8:].view(torch.int32)
    q = memory[-(256 * 256) :].view(torch.float8_e4m3fn).view(256, 256)
    with pytest.raises(ValueError, match=r"out q: .* overlaps rows\.ends"):
        cq.quantize_columns(X, DEEP_GEMM_32, rows=PrefixSum(ends), out=(q, None))
    # The padding rows of the last column of the rows' scales count.
    words = memory.view(torch.int32).as_strided((254, 1), (1, 256))
    x = memory[254 * 4 : 254 * 4 + 254 * 128 * 2].view(torch.bfloat16).view(254, 128)
    with pytest.raises(ValueError, match="out sf: expected memory of its own"):
        cq.quantize_both(x, DEEP_GEMM, DEEP_GEMM_32, out=((None, words), None))


def test_more_scales_in_blocks_than_a_kernel_counts():
    x = torch.empty(2**20, dtype=torch.bfloat16).expand(2**31 - 1, -1)
    with pytest.raises(ValueError, match="x: expected up to 2147483647 scales in a matrix"):
        cq.quantize_columns(x, MXFP8)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_view_into_a_larger_result(transposed, device):
    x = special_weights((2, 130, 96), torch.bfloat16, 32, 5)
    shape = (2, 96, 150) if transposed else (2, 130, 112)
    wide = torch.full(shape, 0x5A, dtype=torch.uint8, device=device)
    columns = 130 if transposed else 96
    q = wide.view(torch.float8_e4m3fn)[..., :columns]
    _, sf = cq.quantize_columns(x.to(device), DEEP_GEMM_32, transposed=transposed, out=(q, None))
    assert_columns((q.contiguous(), sf), x, DEEP_GEMM_32, None, transposed)
    assert (wide[..., columns:] == 0x5A).all()


def test_both_are_two_calls(device):
    rows = PrefixSum(ENDS.to(device))
    x = special_weights((256, 256), torch.bfloat16, 32, 6).to(device)
    of_rows, of_columns = cq.quantize_both(x, DEEP_GEMM, MXFP8, rows=rows, transposed=True)
    expected = cq.quantize(x, DEEP_GEMM, rows=rows)
    for actual, wanted in zip(of_rows, expected, strict=True):
        assert_same_bits(actual, wanted)
    expected = cq.quantize_columns(x, MXFP8, rows=rows, transposed=True)
    for actual, wanted in zip(of_columns, expected, strict=True):
        assert_same_bits(actual, wanted)
