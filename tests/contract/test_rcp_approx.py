"""``rcp.approx.ftz.f32`` on the CPU: the recording, and operands of every exponent and sign."""

import zlib

import numpy as np
import pytest
import torch

import cute_quant as cq
from cute_quant.contract.rcp_approx import rcp_approx
from tests.emulator import hardware, probes
from tests.peers import formulas

ONE, INFINITY, NAN, MINUS = 0x3F800000, 0x7F800000, 0x7FFFFFFF, 0x80000000
SMALLEST_NORMAL, LARGEST = 0x00800000, 0x7F7FFFFF
MANTISSAS = np.append(probes.words("rcp", 500) >> 9, [0, 1, 2, 0x400000, 0x7FFFFF]).astype(np.int64)


def of_words(words: np.ndarray) -> np.ndarray:
    """Return the bits of the reciprocals of float32 with these bits."""
    x = torch.from_numpy(np.array(words, np.uint32).view(np.int32)).view(torch.float32)
    return rcp_approx(x).view(torch.int32).numpy().view(np.uint32)


def from_one_to_two() -> tuple[np.ndarray, np.ndarray]:
    """Return all float32 from 1 to 2 and their reciprocals, float64."""
    words = np.arange(ONE, ONE + 2**23, dtype=np.uint32)
    return tuple(w.view(np.float32).astype(np.float64) for w in (words, of_words(words)))


def test_the_recording():
    """As many errors as were counted on the H100, in the places that a checksum stands for."""
    x, results = from_one_to_two()
    errors = (results - formulas.div(1.0, x)) * 2**24
    counts = dict(zip(*(a.tolist() for a in np.unique(errors, return_counts=True)), strict=True))
    assert counts == {-1: 374723, 0: 7280086, 1: 733799}
    assert zlib.crc32(errors.astype(np.int8).tobytes()) == 0x203B808E


def test_errors_are_as_small_as_ptx_promises():
    """PTX ISA 9.7.3 "rcp": one unit in the last place at most, of numbers from 1 to 2."""
    x, results = from_one_to_two()
    assert np.abs(results - 1 / x).max() < 2.0**-24


def test_the_recording_of_the_emulator():
    (probe,) = (probe for probe in probes.probes() if probe.name == "rcp_approx_ftz_f32")
    results = of_words(probe.inputs[:, 0])
    found = hardware.probe_result(probe, np.stack([results, np.zeros_like(results)], 1))
    recorded = hardware.load()[probe.name]
    assert np.array_equal(found.whole, recorded.whole)
    assert np.array_equal(found.checksums, recorded.checksums)


@pytest.mark.parametrize("sign", [0, MINUS])
def test_every_exponent(sign):
    """An exponent e of the operand takes e from that of the result, to 0 below 2^-126."""
    words = MANTISSAS + ONE
    from_half_to_one = of_words(words).view(np.float32).astype(np.float64)
    for exponent in range(-126, 128):
        exact = np.ldexp(from_half_to_one, -exponent)
        expected = np.where(exact < 2.0**-126, 0, exact).astype(np.float32).view(np.uint32)
        found = of_words(words + (exponent << 23) | sign)
        assert np.array_equal(found, expected | np.uint32(sign)), exponent


def test_the_formula_of_the_tests():
    words = probes.words("rcp.approx", 1 << 16)
    x = words.view(np.float32)
    with np.errstate(invalid="ignore"):
        expected = formulas.rcp_approx(x.astype(np.float64)).astype(np.float32)
    found = of_words(words).view(np.float32)
    assert np.array_equal(found, expected, equal_nan=True)
    assert np.array_equal(np.signbit(found), np.signbit(expected) & ~np.isnan(expected))


@pytest.mark.parametrize("sign", [0, MINUS])
@pytest.mark.parametrize(
    ("word", "result"),
    [
        (0, INFINITY),
        (1, INFINITY),
        (SMALLEST_NORMAL - 1, INFINITY),
        (SMALLEST_NORMAL, 0x7E800000),
        (ONE, ONE),
        (0x7E800000, SMALLEST_NORMAL),
        (0x7E800001, 0),
        (0x7F000000, 0),
        (LARGEST, 0),
        (INFINITY, 0),
    ],
    ids=hex,
)
def test_ends_of_the_range(word, result, sign):
    assert of_words([word | sign]) == result | sign


@pytest.mark.parametrize("word", [0x7F800001, 0x7FC00000, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF])
def test_every_nan_becomes_one(word):
    assert of_words([word]) == NAN


def test_shapes_and_strides():
    x = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    for view in (x.t(), x[::2, 1::3], x[0, 0], x[:0], x[:, :1].expand(6, 4)):
        result = rcp_approx(view)
        assert result.shape == view.shape and result.dtype is torch.float32
        assert torch.equal(result, rcp_approx(view.contiguous()))
    assert torch.equal(rcp_approx(x), rcp_approx(x.flatten()).view(6, 10))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.bfloat16])
def test_only_float32(dtype):
    with pytest.raises(TypeError, match="x: expected a tensor of float32, got a tensor of"):
        rcp_approx(torch.ones(4, dtype=dtype))


@pytest.mark.parametrize("numerics", ["vllm", "flashinfer"])
def test_numerics_take_it(numerics):
    """Under an amax of 9 the multiplier of its group is 2/3, below for them and above for IEEE."""
    x = torch.zeros(1, 16)
    x[0, :4] = torch.tensor([9.0, 1.125, 2.625, 5.25])
    codes = []
    for name in (numerics, "ieee"):
        q, _ = cq.quantize(x, cq.NVFP4.replace(numerics=name), amax=torch.tensor(9.0))
        codes.append(q.view(torch.uint8)[0, :2].tolist())
    assert codes == [[0x17, 0x53], [0x27, 0x64]]
