"""SiLU times up into the quantizer: its kernels against float64, every byte."""

import pytest
import torch

from cute_quant.formats import Format, make_format
from tests.emulator.cases import assert_quantized_within, strided
from tests.emulator.intervals import Interval
from tests.emulator.quantizer import Gpu
from tests.helpers import FLOAT32, UE8M0, full_id, poisoned_scales, poisoned_values

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
RELATIVE_ERROR = 1e-6
"""What a few roundings of float32 and the errors of exponential and reciprocal stay below."""

VARIANTS = {
    "fused": {},
    "unfused": {"unfused": True},
    "clamped": {"clamp": 2.5},
    "scaled": {"alpha": 1.702},
    "shifted": {"beta": -1.0},
    "weighted": {"weighted": True},
    "interleaved": {"interleaved": True},
    "gpt-oss": {"clamp": 7.0, "alpha": 1.702, "beta": 1.0, "interleaved": True},
    "scaled unfused": {"alpha": -0.7, "beta": 0.3, "unfused": True},
    "all": {"clamp": 7.0, "alpha": 1.702, "beta": 1.0, "weighted": True, "unfused": True},
}
SHAPES = [(mn, k) for k in (16, 128, 640) for mn in (1, 3, 5, 33)]
FORMATS = (
    (BF16, FLOAT32, 640),
    (FP16, UE8M0, 640),
    (FP32, UE8M0, 640),
    (FP32, make_format(16, "float32", True, torch.int8), 130),
    (BF16, make_format(32, "ue8m0_128x4", False, torch.float8_e5m2), 416),
    (BF16, make_format(-1, "float32_row_major", False), 1040),
    (FP16, make_format(-1, "ue8m0", False), 520),
    (BF16, make_format(256, "ue8m0_row_major", False), 640),
)


def halves(mn: int, k: int, dtype: torch.dtype, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Gates and ups, (mn, k) each, with all that needs care in groups of their own."""
    generator = torch.Generator().manual_seed(seed)
    gate, up = (torch.randn(mn, k, generator=generator) * 3 for _ in range(2))
    gate[:, 128:160] = 0.0
    up[:, 160:192] = -0.0
    gate[:, 256:384] *= 25  # to where the sigmoid is 0, or 1
    up[4::5, 384:512] *= 1e-9  # against the floor
    for rows, t, value in ((1, up, "nan"), (2, gate, "inf"), (3, gate, "-inf"), (3, up, "inf")):
        t[rows::5, 400:401] = float(value)
    return gate.to(dtype), up.to(dtype)


def sigmoid_product(
    gate: torch.Tensor,
    up: torch.Tensor,
    clamp: float | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
    factors: torch.Tensor | None = None,
    unfused: bool = False,
) -> Interval:
    """``(up + beta) * gate * sigmoid(alpha * gate)`` in float64; unfused rounded at each step."""
    dtype = gate.dtype

    def step(values: Interval) -> Interval:
        return values.spread(RELATIVE_ERROR).rounded(dtype) if unfused else values

    alpha, beta = (torch.tensor(number, dtype=FP32).double() for number in (alpha, beta))
    gate, up = gate.double(), up.double()
    if clamp is not None:
        gate, up = gate.clamp(max=clamp), up.clamp(-clamp, clamp)
    gates = Interval.of(gate)
    arguments = Interval.of(gate * alpha)
    ups = Interval.of(up)
    if alpha != 1:
        arguments = step(arguments)
    if beta != 0:
        ups = step(Interval.of(up + beta))
    sigmoids = Interval(*(end.sigmoid() for end in arguments))
    if alpha != 1:
        sigmoids = step(sigmoids)
    product = step(step(gates.times(sigmoids)).times(ups))
    if factors is not None:
        product = step(product.times(Interval.of(factors.unsqueeze(-1))))
    return product if unfused else product.spread(RELATIVE_ERROR)


def check(
    gpu: Gpu,
    mn: int,
    k: int,
    fmt: Format,
    dtype: torch.dtype = BF16,
    *,
    weighted: bool = False,
    interleaved: bool = False,
    extra_rows: int = 0,
    last_padding: bool = True,
    batch: tuple[int, ...] = (),
    **variant,
) -> None:
    """Run a call into poisoned memory."""
    rows = mn * batch[0] if batch else mn
    gate, up = halves(rows, k, dtype, seed=mn + k)
    factors = torch.linspace(-2, 3, rows) if weighted else None
    x = torch.stack((gate, up), 2).flatten(1) if interleaved else torch.cat((gate, up), 1)
    x = strided(x.view(*batch, mn, 2 * k), 2 * k)
    q = poisoned_values(mn + extra_rows, k, "cpu", fmt.dtype, batch)
    sf = poisoned_scales(fmt, mn, k, "cpu", last_padding, batch)
    weight = None if factors is None else factors.view(*batch, mn)
    gpu.silu_mul_quantize(x, q, sf, fmt, weight=weight, interleaved=interleaved, **variant)
    product = sigmoid_product(gate, up, factors=factors, **variant)
    assert_quantized_within(q, sf, fmt, Interval(*(end.view(*batch, mn, k) for end in product)))


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_variants(gpu, variant):
    for mn, k in SHAPES:
        check(gpu, mn, k, UE8M0, extra_rows=mn % 3, last_padding=k != 128, **variant)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_ragged_rows(gpu, variant):
    for mn in (1, 5):
        check(gpu, mn, 520, UE8M0, extra_rows=2, **variant)


def test_long_rows(gpu):
    check(gpu, 5, 7168, UE8M0)


@pytest.mark.parametrize(
    ("dtype", "fmt", "k"), FORMATS, ids=lambda v: full_id(v) if isinstance(v, Format) else str(v)
)
def test_formats(gpu, dtype, fmt, k):
    for variant in ("weighted", "all"):
        check(gpu, 5, k, fmt, dtype, extra_rows=1, last_padding=False, **VARIANTS[variant])


def test_batches(kernels, arch):
    """Also of more rows and matrices than the grid counts."""
    for max_grid in (65535, 2):
        gpu = Gpu(kernels, arch, max_grid=max_grid)
        check(gpu, 33, 640, UE8M0, batch=(5,), extra_rows=1, **VARIANTS["weighted"])
