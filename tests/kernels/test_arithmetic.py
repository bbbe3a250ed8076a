"""float32 arithmetic of the kernels, where approximate instructions err as far as they may."""

from fractions import Fraction

import cutlass.cute as cute
import numpy as np
import pytest
import torch
from cutlass import BFloat16, Float32, Uint32

from cute_quant.contract.rcp_approx import rcp_approx
from cute_quant.emulator import EmulatedKernel, isa
from cute_quant.emulator import floats as formats
from cute_quant.kernels import arithmetic, encodings
from cute_quant.kernels.encodings import registers
from tests import oracle
from tests.c_compiler import needs_c_compiler
from tests.exact import E2M1
from tests.kernels.elementwise import Apply

pytestmark = needs_c_compiler


def sigmoid(factor=None):
    """Return the sigmoid of one element."""

    def of_one(x: Float32) -> Float32:
        rX = cute.make_rmem_tensor(1, Float32)
        rX[0] = x
        alpha = None if factor is None else arithmetic.SigmoidFactor(Float32(factor))
        return registers(arithmetic.sigmoid(rX.load(), alpha))[0]

    return of_one


def apply(function, x, directory, arch="sm_100a"):
    y = torch.full_like(x, torch.nan)
    EmulatedKernel(Apply(function), arch, directory)(x, y, outputs=(y,))
    return y


def floats(count, low, high):
    """Return float32 of random mantissas between two powers of two."""
    generator = torch.Generator().manual_seed(count)
    exponents = torch.randint(low, high, (count,), generator=generator)
    return torch.ldexp(1 + torch.rand(count, generator=generator), exponents).float()


@pytest.mark.parametrize("step", [-1, 0, 1])
def test_reciprocal_is_rounded_whatever_its_estimate(step, tmp_path, monkeypatch):
    """The instruction is off by up to one unit of the last place."""

    def off(a):
        estimate = np.float32(1.0) / a
        return (estimate.view(np.int32) + step).view(np.float32)

    opcode = "rcp.approx.ftz.f32"
    monkeypatch.setitem(isa.OPERATIONS, opcode, isa.OPERATIONS[opcode]._replace(compute=off))
    x = floats(4096, -100, 100)
    assert torch.equal(apply(arithmetic.reciprocal, x, tmp_path), 1.0 / x)


def test_reciprocal_of_every_mantissa():
    """With the estimates that were recorded. An exponent scales every step, exactly.

    Both steps are `fma`. The first has an exact sum in float64. The second is rounded there, and a
    second rounding errs only from the middle of two float32: those sums are computed as fractions.
    """
    significands = np.arange(0x3F800000, 0x40000000, dtype=np.int32)
    x = significands.view(np.float32)
    estimates = rcp_approx(torch.from_numpy(x)).numpy()
    a, estimate = x.astype(np.float64), estimates.astype(np.float64)
    error = (1 - a * estimate).astype(np.float32).astype(np.float64)
    total = error * estimate + estimate
    below_float32 = total.view(np.int64) & (1 << 29) - 1
    middles = np.flatnonzero(below_float32 == 1 << 28)
    expected = np.float32(1) / x
    assert len(middles) == 3
    for i in middles:
        exact = Fraction(error[i]) * Fraction(estimate[i]) + Fraction(estimate[i])
        assert exact != Fraction(total[i])
        total[i] = np.nextafter(total[i], 2 if exact > Fraction(total[i]) else 0)
    assert np.array_equal(total.astype(np.float32), expected)


@pytest.mark.parametrize("largest", [448.0, 57344.0, 127.0])
def test_quotient_is_rounded(largest, tmp_path):
    x = floats(4096, -100, 100)
    quotients = apply(lambda a: arithmetic.quotient(a, largest), x, tmp_path)
    assert torch.equal(quotients, x / largest)


def test_rounding_to_e2m1(tmp_path):
    """Every bfloat16 but NaN, and the float32 beside the middles of two values."""

    def rounded(x: Float32) -> Float32:
        rX = cute.make_rmem_tensor(1, Float32)
        rX[0] = x
        return encodings.round_to_e2m1(rX)[0]

    x = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    x = x.where(~x.isnan(), 0.0)
    table = torch.from_numpy(oracle.TABLES[E2M1]).float()
    middles = (table[1:] + table[:-1]) / 2
    for i, towards in enumerate((0.0, 10.0)):
        beside = torch.nextafter(middles, torch.tensor(towards))
        x[16 * i : 16 * i + 7], x[16 * i + 8 : 16 * i + 15] = beside, -beside
    expected = table[oracle.nearest(x.abs().double().numpy(), table.numpy())].copysign(x)
    actual = apply(rounded, x, tmp_path, "sm_90a")
    assert torch.equal(actual.view(torch.int32), expected.view(torch.int32))


def test_pairs_to_e2m1(tmp_path):
    """Every bfloat16 below 8, or a part of it, in each place of a word."""
    factors = (1.0, 0.5, 0.5, 1.0, 0.25, 0.5, 1.0, 1.0)
    negated = (0, 1, 1, 0, 0, 1, 0, 1)

    def encoded(x: Float32) -> Float32:
        rX = cute.make_rmem_tensor(len(factors), BFloat16)
        for i, factor in enumerate(factors):
            rX[i] = (x * Float32(factor)).to(BFloat16)
        pairs = cute.recast_tensor(rX, Uint32)
        for i in range(len(factors) // 2):
            signs = negated[2 * i] << 15 | negated[2 * i + 1] << 31
            pairs[i] = pairs[i] ^ Uint32(signs)
        rQ = encodings.products_e2m1(rX, Float32(1.0), True)
        return cute.recast_tensor(rQ, Float32)[0]

    x = torch.arange(0x4100, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    x = torch.cat([x, -x])
    assert x.max() == 7.96875
    table = oracle.TABLES[E2M1]
    expected = torch.zeros(len(x), dtype=torch.int64)
    for i, factor in enumerate(factors):
        # A part of the smallest ones is rounded to bfloat16, and 0 either way.
        value = (x * factor).double().numpy()
        code = oracle.nearest(np.minimum(np.abs(value), 6.0), table)
        code += 8 * (np.signbit(value) ^ negated[i])
        expected += torch.from_numpy(code) << 4 * i
    actual = apply(encoded, x, tmp_path, "sm_90a").view(torch.int32)
    assert torch.equal(actual, expected.to(torch.int32))


@pytest.mark.parametrize("factor", [None, 1.702, -3.3])
def test_sigmoid(factor, tmp_path):
    """However large its argument, the error is that of a few roundings."""
    sign = torch.tensor([1.0, -1.0]).repeat(2048)
    x = floats(4096, -10, 7) * sign
    x[:8] = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 1e30, -1e30, 200.0, -200.0])
    actual = apply(sigmoid(factor), x, tmp_path).double()
    alpha = torch.tensor(1.0 if factor is None else factor, dtype=torch.float32).double()
    exact = torch.sigmoid(alpha * x.double())
    error = (actual - exact).abs()
    assert (error <= exact * 4 * 2.0**-24 + 2.0**-126).all(), x[(error / exact).argmax()]
    assert (actual <= 1).all()


def sigmoid_of_nvcc(x: np.ndarray) -> np.ndarray:
    """Return ``1 / (1 + expf(-x))`` by the PTX that nvcc 13.0 makes of it."""

    def fma(a, b, c):
        exact = formats.fma(*(np.asarray(v, np.float64) + np.zeros(x.shape) for v in (a, b, c)))
        return exact.astype(np.float32), exact

    constants = [0x3BBB989D, 0x3FB8AA3B, 0x32A57060]
    step, log2e, rest = np.array(constants, np.uint32).view(np.float32).astype(np.float64)
    fraction = fma(-x, step, 0.5)[0].clip(0, 1)
    shifted, exact = fma(fraction, 252.0, 12582913.0)
    shifted = np.where(shifted > exact, shifted - np.float32(1), shifted)
    f = fma(-x, log2e, -(shifted - np.float32(12582913 + 126)))[0]
    f = fma(-x, rest, f)[0].astype(np.float64)
    power = (shifted.view(np.uint32) << np.uint32(23)).view(np.float32)
    return np.float32(1) / fma(np.exp2(f).astype(np.float32), power, 1.0)[0]


@pytest.mark.parametrize("divides", [True, False])
def test_sigmoid_of_cuda(divides, tmp_path):
    """Bit for bit, but for quotients below the normal numbers, and those that are approximate."""
    x = floats(8192, -12, 7) * torch.tensor([1.0, -1.0]).repeat(4096)
    x[:8] = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 88.0, -88.0, 200.0, -87.0])

    def of_one(x: Float32) -> Float32:
        rX = cute.make_rmem_tensor(1, Float32)
        rX[0] = x
        return registers(arithmetic.cuda_sigmoid(rX.load(), divides))[0]

    actual = apply(of_one, x, tmp_path)
    with np.errstate(all="ignore"):
        expected = torch.from_numpy(sigmoid_of_nvcc(x.numpy()))
    normal = expected >= 2.0**-126
    assert (actual[~normal] < 2.0**-126).all()
    if not divides:
        assert ((actual - expected).abs() <= expected * 2.0**-23)[normal].all()
        return
    assert torch.equal(actual[normal], expected[normal])
    exact = torch.sigmoid(x.double())
    assert ((actual - exact).abs() <= exact * 2.0**-22)[normal].all()
    assert apply(of_one, torch.full((256,), torch.nan), tmp_path).isnan().all()
