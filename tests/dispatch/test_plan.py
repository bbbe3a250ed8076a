"""Plans without a GPU: which kernel a call takes, with which numbers and views of its tensors."""

from __future__ import annotations

import math

import pytest
import torch

from cute_quant import (
    DEEP_GEMM,
    MXFP4,
    MXFP8,
    NVFP4,
    PrefixSum,
    dequantize,
    fake_quantize,
    quantize,
    rms_norm_quantize,
    silu_mul_quantize,
)
from cute_quant.dispatch import launch, repeats, seen
from cute_quant.dispatch.call_range import RMS_NORM, SILU_MUL
from cute_quant.jit import lookup
from cute_quant.kernels.config import Tile
from cute_quant.kernels.heuristics import TWO_ROWS
from tests.helpers import UE8M0, poisoned_scales, poisoned_values

BF16 = torch.bfloat16
ROW_MAJOR = DEEP_GEMM.replace(scale_layout="row_major")
NVFP4_ROWS = NVFP4.replace(row_scale=True)
SCALES = ("encode_scale", "decode_scale", "amax")


class Launched:
    """A launch: the spec of its kernel, and what the kernel was called on."""

    def __init__(self, spec, arguments):
        self.spec = spec
        self.arguments = arguments

    @property
    def load_bytes(self) -> int:
        return self.spec.access.load_bytes


@pytest.fixture
def launched(monkeypatch) -> list[Launched]:
    """Launches of calls on CPU tensors that are taken for CUDA's."""
    launches: list[Launched] = []

    def function(spec, arch):
        return lambda *arguments: launches.append(Launched(spec, arguments))

    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(lookup, "architecture", lambda device: "sm_100a")
    monkeypatch.setattr(lookup, "find_architecture", lambda device: "sm_100a")
    monkeypatch.setattr(lookup, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(lookup, "function", function)
    for name, empty in (("_plans", {}), ("_recent", []), ("_recent_out", [])):
        monkeypatch.setattr(launch, name, empty)
    monkeypatch.setattr(repeats, "_recent", {})
    return launches


def at(
    nbytes: int, shape: tuple[int, ...], dtype: torch.dtype, stride: int | None = None
) -> torch.Tensor:
    """Return ones, the first one `nbytes` past a multiple of 128; rows `stride` elements apart."""
    stride = shape[-1] if stride is None else stride
    rows = math.prod(shape[:-1])
    storage = torch.zeros(rows * stride * dtype.itemsize + 256, dtype=torch.uint8)
    first = -storage.data_ptr() % 128 + nbytes
    t = storage[first : first + rows * stride * dtype.itemsize].view(dtype)
    strides = [1, stride]
    for size in reversed(shape[1:-1]):
        strides.append(strides[-1] * size)
    return t.as_strided(shape, tuple(reversed(strides[: len(shape)])), t.storage_offset())


def x_at(nbytes: int = 0, shape: tuple[int, ...] = (6, 256), stride: int | None = None):
    return at(nbytes, shape, BF16, stride)


# Alignment of loads and stores


@pytest.mark.parametrize("nbytes", [2, 4, 8, 16, 32])
def test_loads_are_as_wide_as_x_is_aligned(launched, nbytes):
    quantize(x_at(nbytes))
    quantize(x_at(stride=256 + nbytes // 2))
    assert [one.load_bytes for one in launched] == [nbytes] * 2


@pytest.mark.parametrize("nbytes", [1, 2, 4, 8, 16])
def test_stores_are_as_wide_as_q_is_aligned(launched, nbytes):
    x = x_at()
    q = at(nbytes, (6, 256), torch.float8_e4m3fn)
    quantize(x, out=(q, None))
    quantize(x, out=(at(0, (6, 256), q.dtype, 256 + nbytes), None))
    assert [one.spec.access.store_bytes for one in launched] == [nbytes] * 2


@pytest.mark.parametrize("nbytes", [2, 8, 32])
def test_loads_are_as_wide_as_the_matrices_of_a_batch_are_aligned(launched, nbytes):
    """The stride of the batch counts too, where that of the rows is a multiple of more."""
    storage = x_at(0, (4096,))
    quantize(storage.as_strided((2, 3, 256), (1024 + nbytes // 2, 256, 1)))
    assert launched[0].load_bytes == nbytes


@pytest.mark.parametrize(("k", "nbytes"), [(64, 32), (72, 16), (68, 8), (66, 4), (65, 2)])
@pytest.mark.parametrize("interleaved", [False, True])
def test_loads_are_as_wide_as_the_ups_are_aligned(launched, k, nbytes, interleaved):
    """They start k elements after the gates; interleaved they are loaded with them."""
    x = x_at(0, (6, 2 * k), stride=192)
    silu_mul_quantize(x, interleaved=interleaved)
    assert launched[0].load_bytes == (32 if interleaved else nbytes)


@pytest.mark.parametrize("nbytes", [2, 4, 8, 16, 32])
@pytest.mark.parametrize("name", ["weight", "residual", "out residual", "normalized"])
def test_loads_are_as_wide_as_what_lies_beside_x_is_aligned(launched, name, nbytes):
    names = ("weight", "residual", "out residual", "normalized")
    x = x_at()
    weight, *rows = (
        at(nbytes if other == name else 0, (256,) if other == "weight" else (6, 256), BF16)
        for other in names
    )
    residual, residual_out, normalized = rows
    rms_norm_quantize(
        x, weight, residual=residual, normalized=normalized, out=(None, None, residual_out)
    )
    assert launched[0].load_bytes == nbytes


# Plans that are kept


def calls_of_two_alignments(name: str, nbytes: int):
    """Return a call with all at a multiple of 128 bytes, and one where `name` is past one."""

    def call(past: int) -> None:
        places = {name: past}
        x = x_at(places.get("x", 0))
        if name in ("weight", "residual", "normalized"):
            rms_norm_quantize(
                x,
                at(places.get("weight", 0), (256,), BF16),
                residual=x_at(places.get("residual", 0)),
                normalized=x_at(places.get("normalized", 0)),
            )
        else:
            q = at(places.get("q", 0), (6, 256), torch.float8_e4m3fn)
            quantize(x, out=(q, poisoned_scales(UE8M0, 6, 256, "cpu")))

    return lambda: call(0), lambda: call(nbytes)


@pytest.mark.parametrize("name", ["x", "q", "weight", "residual", "normalized"])
@pytest.mark.parametrize("aligned_first", [True, False])
def test_plans_are_of_the_alignment_of_all_tensors(launched, name, aligned_first):
    calls = calls_of_two_alignments(name, 8)
    for call in calls if aligned_first else reversed(calls):
        call()
        call()
    widths = [one.spec.access[1 if name == "q" else 0] for one in launched]
    wide = 16 if name == "q" else 32
    assert widths == ([wide, wide, 8, 8] if aligned_first else [8, 8, wide, wide])


def test_plans_are_of_the_shape_of_an_index(launched):
    x = x_at()
    for rows in (4, 4, 8, 3):
        q, sf = quantize(x, index=torch.zeros(rows, dtype=torch.int32))
        assert q.shape == (rows, 256) and sf.shape == (rows, 1)
    q, sf = quantize(x, index=torch.zeros(2, 4, dtype=torch.int32))
    assert q.shape == (2, 4, 256) and sf.shape == (2, 4, 1)


def test_plans_are_of_the_alignment_of_groups(launched):
    x, ends = x_at(), torch.tensor([3, 6], dtype=torch.int32)
    for alignment in (4, 8, 4):
        quantize(x, rows=PrefixSum(ends, alignment))
        assert launched[-1].arguments[8] == alignment


def test_plans_are_of_a_device():
    """Two tensors that differ in nothing else, and have no memory."""
    first, second = (torch.empty(0, 256, dtype=BF16, device=device) for device in ("cpu", "meta"))
    assert launch._looks(first) != launch._looks(second)


# Upper scales


def looks(t: object) -> object:
    """Return how a kernel takes an argument."""
    return (t.shape, t.stride(), t.dtype) if isinstance(t, torch.Tensor) else t


def out_of(fmt, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    *batch_shape, mn, k = shape
    q = torch.zeros(*batch_shape, mn, fmt.value_columns(k), dtype=torch.uint8).view(fmt.values)
    return q, fmt.empty_scales(tuple(batch_shape), mn, k, "cpu")


@pytest.mark.parametrize("with_out", [False, True])
@pytest.mark.parametrize("kind", SCALES)
@pytest.mark.parametrize(
    ("shape", "scale_shape"),
    [((6, 256), ()), ((6, 256), (1,)), ((2, 6, 256), ()), ((2, 6, 256), (2,))],
)
def test_warm_calls_with_an_upper_scale_need_no_key(
    launched, monkeypatch, shape, scale_shape, kind, with_out
):
    inputs = [(x_at(0, shape), torch.ones(scale_shape)) for _ in range(2)]
    out = out_of(NVFP4, *shape) if with_out else None
    first = quantize(inputs[0][0], NVFP4, **{kind: inputs[0][1]}, out=out)
    monkeypatch.setattr(launch, "_key", lambda call: pytest.fail("looked closer"))
    for x, scale in inputs:
        again = quantize(x, NVFP4, **{kind: scale}, out=out)
        assert launched[-1].spec is launched[0].spec and launched[0].spec.upper == kind
        assert list(map(looks, launched[-1].arguments)) == list(map(looks, launched[0].arguments))
        assert launched[-1].arguments[0] is x
        assert launched[-1].arguments[3].data_ptr() == scale.data_ptr()
        assert launched[-1].arguments[1] is again[0] and launched[-1].arguments[2] is again[1]
        assert list(map(looks, again)) == list(map(looks, first))
        assert out is None or all(map(torch.Tensor.is_set_to, again, out))
    assert len(launched) == 3


def test_warm_calls_return_scales_of_rows(launched, monkeypatch):
    x = x_at()
    first = quantize(x, NVFP4_ROWS)
    monkeypatch.setattr(launch, "_key", lambda call: pytest.fail("looked closer"))
    again = quantize(x, NVFP4_ROWS)
    assert list(map(looks, again)) == list(map(looks, first)) and again[2].shape == (6,)
    assert launched[-1].arguments[3] is again[2]


def test_recent_calls_are_of_one_kind_of_upper_scale(launched):
    """Each kind has a kernel of its own, and so has another shape another view."""
    x, one = x_at(), torch.ones(())
    for _ in range(2):
        for kind in SCALES:
            quantize(x, NVFP4, **{kind: one})
            assert launched[-1].spec.upper == kind
    quantize(x, NVFP4, amax=torch.ones(1))
    assert launched[-1].arguments[3].shape == (1,) and len(launched) == 7


def test_warm_calls_refuse_what_cold_ones_do(launched):
    x, one = x_at(), torch.ones(())
    q, sf = out_of(NVFP4, 6, 256)
    fp8 = out_of(DEEP_GEMM, 6, 256)
    rows = *out_of(NVFP4_ROWS, 6, 256), None

    def refused() -> None:
        for message, fmt, given in (
            ("encode_scale: expected None", DEEP_GEMM, {"encode_scale": one}),
            ("amax: expected None", DEEP_GEMM, {"amax": one, "out": fp8}),
            ("encode_scale: expected one of", NVFP4, {}),
            ("encode_scale: expected one of", NVFP4, {"out": (q, sf)}),
            ("decode_scale and amax: expected", NVFP4, {"decode_scale": one, "amax": one}),
            ("encode_scale and decode_scale and amax", NVFP4, dict.fromkeys(SCALES, one)),
            ("amax: expected shape", NVFP4, {"amax": torch.ones(6)}),
            ("amax: expected None", NVFP4_ROWS, {"amax": one}),
        ):
            with pytest.raises(ValueError, match=message):
                quantize(x, fmt, **given)
        with pytest.raises(TypeError, match=r"amax: expected a float32 tensor on the device"):
            quantize(x, NVFP4, amax=1.0)
        with pytest.raises(TypeError, match=r"out: expected \(q, sf, row_scales\)"):
            quantize(x, NVFP4_ROWS, out=rows[:2])
        with pytest.raises(RuntimeError, match="amax: expected a tensor that requires no grad"):
            quantize(x, NVFP4, amax=one.clone().requires_grad_())

    refused()
    for _ in range(2):
        quantize(x)
        quantize(x, out=fp8)
        for kind in SCALES:
            quantize(x, NVFP4, **{kind: one})
            quantize(x, NVFP4, **{kind: one}, out=(q, sf))
        quantize(x, NVFP4_ROWS)
        quantize(x, NVFP4_ROWS, out=rows)
    count = len(launched)
    refused()
    assert len(launched) == count


@pytest.mark.parametrize("name", ["q", "sf"])
def test_recent_calls_overwrite_no_upper_scale(launched, name):
    """An upper scale that looks like a recent one, but lies in the results."""
    x, (q, sf) = x_at(), out_of(NVFP4, 6, 256)
    for _ in range(2):
        quantize(x, NVFP4, amax=torch.ones(()), out=(q, sf))
    inside = (q if name == "q" else sf).view(torch.uint8).flatten()[:4].view(torch.float32)[0]
    with pytest.raises(ValueError, match=f"out {name}: expected memory of its own"):
        quantize(x, NVFP4, amax=inside, out=(q, sf))
    assert len(launched) == 2


def test_kernels_take_one_number_or_one_of_each_matrix(launched):
    """A view of the call's own tensor: a batch repeats one number."""
    for shape, scale, expected in (
        ((6, 256), torch.ones(()), ((1,), (1,))),
        ((2, 6, 256), torch.ones(1), ((2,), (0,))),
        ((2, 3, 4, 256), torch.ones(2, 3), ((6,), (1,))),
    ):
        for operation in (quantize, fake_quantize):
            operation(x_at(0, shape), NVFP4, amax=scale)
            upper = launched[-1].arguments[3]
            assert (upper.shape, upper.stride()) == expected
            assert upper.data_ptr() == scale.data_ptr()
    quantize(x_at(), MXFP4)
    assert launched[-1].arguments[3] is None and launched[-1].spec.upper is None


def test_memory_for_scales_of_rows(launched):
    row_scales = torch.zeros(2, 3, 4)
    q, sf = out_of(NVFP4_ROWS, 2, 3, 4, 256)
    results = quantize(x_at(0, (2, 3, 4, 256)), NVFP4_ROWS, out=(q, sf, row_scales))
    assert results[2] is row_scales
    viewed = launched[0].arguments[3]
    assert viewed.shape == (6, 4) and viewed.data_ptr() == row_scales.data_ptr()


# Numbers


def numbers(launch: Launched) -> tuple[float, ...]:
    """Return those of the prologue, after the smallest scale."""
    return launch.arguments[11 : 11 + (3 if "silu" in launch.spec.kernel else 2)]


def test_numbers_of_a_norm(launched):
    x, weight = x_at(), x_at(0, (1, 256))[0]
    rms_norm_quantize(x, weight, eps=0.25, weight_offset=1.0)
    assert numbers(launched[0]) == (0.25, 1.0)


def test_no_offset_keeps_the_sign_of_a_weight(launched):
    """-0.0 + -0.0 is -0.0, and -0.0 + 0.0 is not."""
    x, weight = x_at(), x_at(0, (1, 256))[0]
    for offset in (0.0, -0.0):
        rms_norm_quantize(x, weight, weight_offset=offset)
        _, offset = numbers(launched[-1])
        assert offset == 0.0 and math.copysign(1.0, offset) == -1.0


@pytest.mark.parametrize("rounding", ["fused", "unfused", "vllm"])
def test_numbers_of_a_gated_activation(launched, rounding):
    """The bound is rounded as torch rounds it: to the dtype of x where each step is."""
    silu_mul_quantize(x_at(), clamp=7.03, alpha=1.5, beta=0.25, rounding=rounding)
    dtype = BF16 if rounding == "unfused" else torch.float32
    assert numbers(launched[0]) == (torch.tensor(7.03, dtype=dtype).item(), 1.5, 0.25)
    spec = launched[0].spec
    assert spec.clamped and spec.scaled and spec.shifted and not spec.weighted
    silu_mul_quantize(x_at())
    spec = launched[1].spec
    assert not (spec.clamped or spec.scaled or spec.shifted or spec.interleaved)
    assert spec.rounding == "fused"


# Views


def test_factors_of_a_batch_have_its_stride(launched):
    x = x_at(0, (2, 3, 4, 256))
    weight = torch.arange(24.0).view(2, 3, 4)
    silu_mul_quantize(x, weight=weight)
    viewed = launched[0].arguments[14]
    assert viewed.shape == (6, 4) and torch.equal(viewed, weight.view(6, 4))


@pytest.mark.parametrize(
    "fmt", [UE8M0, MXFP8, DEEP_GEMM.replace(scale_layout="row_major")], ids=str
)
def test_kernels_take_a_batch_of_matrices(launched, fmt):
    x = x_at(0, (2, 3, 4, 256))
    q, sf = quantize(x, fmt)
    viewed_x, viewed_q, viewed_sf = launched[0].arguments[:3]
    assert viewed_x.shape == viewed_q.shape == (6, 4, 256)
    assert viewed_q.data_ptr() == q.data_ptr() and viewed_q.stride() == (1024, 256, 1)
    assert viewed_sf.shape == (6, *sf.shape[2:]) and viewed_sf.stride() == sf.stride()[1:]


def test_views_of_a_residual_have_its_strides(launched):
    x, weight = x_at(0, (2, 3, 256)), x_at(0, (1, 256))[0]
    residual = x_at(0, (2, 3, 256), stride=512)
    rms_norm_quantize(x, weight, residual=residual)
    for viewed in launched[0].arguments[14:16]:
        assert viewed.stride() == (1536, 512, 1) and viewed.data_ptr() == residual.data_ptr()


@pytest.mark.parametrize("fmt", [UE8M0, ROW_MAJOR, MXFP8], ids=str)
@pytest.mark.parametrize("shape", [(0, 256), (2, 0, 256), (0, 3, 256), (3, 0)])
def test_results_without_elements_have_the_strides_of_torch(launched, fmt, shape):
    """As on the CPU: a dimension of no elements counts as one of one element."""
    q, sf = quantize(torch.empty(shape, dtype=BF16), fmt)
    expected_q = torch.empty(shape)
    expected_sf = fmt.empty_scales(shape[:-2], *shape[-2:], "cpu")
    assert q.stride() == expected_q.stride() and sf.stride() == expected_sf.stride()


# Tiles


def test_random_numbers_keep_16_values_a_thread(launched, monkeypatch):
    """On Hopper, where 8 of them are bound by arithmetic."""
    monkeypatch.setattr(lookup, "architecture", lambda device: "sm_90a")
    monkeypatch.setattr(lookup, "multiprocessors", lambda device: 1)
    x = torch.ones(64, 1024, dtype=BF16)
    quantize(x, DEEP_GEMM)
    quantize(x, DEEP_GEMM, rng_state=torch.zeros(2, dtype=torch.int64))
    assert [one.spec.tile for one in launched] == [Tile(8, 8), TWO_ROWS]


# What is written


def test_memory_of_results_counts_their_padding(launched):
    """What lies in the padding rows of the last column of scales would be overwritten."""
    storage = torch.zeros(4096, dtype=torch.uint8)
    x = torch.zeros(5, 256, dtype=BF16)
    first = -storage.data_ptr() % 128
    sf = storage[first : first + 32].view(torch.int32).as_strided((5, 1), (1, 8), first // 4)
    q = storage[first + 20 : first + 20 + 1280].view(torch.float8_e4m3fn).view(5, 256)
    with pytest.raises(ValueError, match="out sf: expected memory of its own"):
        quantize(x, out=(q, sf))
    before = storage[first : first + 1280].view(torch.float8_e4m3fn).view(5, 256)
    after = storage[first + 1280 :].view(torch.int32).as_strided((5, 1), (1, 8), first // 4 + 320)
    quantize(x, out=(before, after))
    behind = storage[first + 32 : first + 32 + 1280].view(torch.float8_e4m3fn).view(5, 256)
    quantize(x, out=(behind, sf))


def test_memory_of_results_counts_their_padding_on_the_cpu():
    storage = torch.zeros(2048, dtype=torch.uint8)
    sf = storage[:32].view(torch.int32).as_strided((5, 1), (1, 8))
    x, q = torch.zeros(5, 256, dtype=BF16), storage[20 : 20 + 1280].view(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="out sf: expected memory of its own"):
        quantize(x, out=(q.view(5, 256), sf))


def test_recent_calls_overlap_nothing(launched):
    """A call that looks like a recent one, whose values lie in the memory of x."""
    x = x_at()
    sf = poisoned_scales(UE8M0, 6, 256, "cpu")
    in_x = x.view(torch.float8_e4m3fn)[:, :256]
    elsewhere = at(0, (6, 256), in_x.dtype, 512)
    for _ in range(2):
        quantize(x, out=(elsewhere, sf))
    with pytest.raises(ValueError, match="out q: expected memory of its own"):
        quantize(x, out=(in_x, sf))
    assert len(launched) == 2


def test_the_stride_of_a_single_row_does_not_matter(launched):
    """Kernels check it all the same: it has to be a multiple of the alignment."""
    for stride in (1, 129, 2**40):
        quantize(x_at(0, (1, 256)).as_strided((1, 256), (stride, 1)))
        viewed = launched[-1].arguments[0]
        assert launched[-1].load_bytes == 32 and viewed.stride() == (256, 1)


def test_autograd_knows_what_is_written(launched):
    x = x_at()
    out, q = torch.empty_like(x), poisoned_values(6, 256, "cpu")
    fake_quantize(x, out=out)
    assert [t._version for t in (x, out)] == [0, 1]
    assert launched[0].spec.fake
    sf = poisoned_scales(UE8M0, 6, 256, "cpu")
    before = sf._version
    for count in range(1, 4):
        quantize(x, out=(q, sf))
        assert (q._version, sf._version - before) == (count, count)


def test_there_are_no_tangents_of_values(launched):
    q = torch.ones(6, 256).to(torch.float8_e4m3fn)
    sf = torch.ones(6, 2)
    fmt = DEEP_GEMM.replace(scale_dtype=torch.float32, scale_layout="row_major")
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(sf, torch.ones_like(sf))
        with pytest.raises(RuntimeError, match="sf: expected a tensor without a tangent"):
            launch.dequantize(q, dual, fmt, BF16)
    dequantize(q, sf, fmt)
    assert len(launched) == 1


@pytest.fixture
def watching():
    seen.watch()
    yield
    seen.forget()


@pytest.mark.usefixtures("launched", "watching")
class TestSeen:
    """Ranges of calls that were made, for a warm-up of those with fewer rows."""

    def test_the_most_rows(self):
        for rows in (3, 40, 7):
            quantize(torch.zeros(rows, 256, dtype=BF16))
        (calls,) = seen.ranges()
        assert (calls.operation, calls.fmt, calls.k) == ("quantize", DEEP_GEMM, (256,))
        assert calls.max_rows == 40

    def test_what_calls_differ_in(self):
        quantize(torch.zeros(3, 256, dtype=BF16))
        quantize(torch.zeros(3, 512, dtype=BF16), MXFP8)
        silu_mul_quantize(torch.zeros(3, 512, dtype=BF16), rounding="vllm")
        rms_norm_quantize(torch.zeros(3, 256, dtype=BF16), torch.ones(256, dtype=BF16))
        found = {(c.operation, c.fmt, c.k, c.rounding) for c in seen.ranges()}
        assert len(found) == 4
        assert (SILU_MUL, DEEP_GEMM, (256,), "vllm") in found
        assert (RMS_NORM, DEEP_GEMM, (256,), "fused") in found

    def test_forgotten(self):
        quantize(torch.zeros(3, 256, dtype=BF16))
        seen.forget()
        quantize(torch.zeros(4, 256, dtype=BF16))
        assert seen.ranges() == []

    def test_warm_up_of_all(self, monkeypatch):
        warmed = []
        monkeypatch.setattr(
            seen.warming, "on_device", lambda calls, device: warmed.append((calls, device))
        )
        device = torch.device("cuda", 0)
        quantize(torch.zeros(3, 256, dtype=BF16))
        seen.warm_up(device)
        ((calls, where),) = warmed
        assert (calls, where) == (seen.ranges(), device)

    def test_new_calls(self, monkeypatch):
        """Calls are new until they are made ready, and with more rows than that again."""
        warmed = []
        monkeypatch.setattr(seen.warming, "on_device", lambda calls, device: warmed.extend(calls))
        assert not seen.has_new()
        for rows, is_new in ((3, True), (4, False), (6, False), (7, True)):
            quantize(torch.zeros(rows, 256, dtype=BF16))
            assert seen.has_new() == is_new
            if rows == 3:
                seen.warm_up(torch.device("cuda", 0), 2)
        (calls,) = warmed
        assert calls.max_rows == 6


def test_nothing_seen_is_nothing_to_warm_up():
    assert list(seen.warm_up(torch.device("cuda", 0))) == []
