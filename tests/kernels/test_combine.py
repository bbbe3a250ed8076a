"""The kernel that adds up rows of experts and of ranks, beside what torch does on the CPU."""

import pytest
import torch

from bench.sass import machine_code
from cute_quant.distributed.combination import add_up
from cute_quant.kernels.config import Access, CombineSpec
from tests.helpers import assert_same_bits
from tests.kernels.emulated_gpu import Gpu

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

# dtype, n, choices, whether there are factors
CASES = {
    "experts": (BF16, 1304, 8, True),
    "ranks": (BF16, 640, 2, False),
    "one": (FP16, 256, 1, True),
    "nine": (FP32, 333, 9, True),
    "more than a warp has lanes": (FP16, 100, 70, False),
    "a column": (FP32, 1, 3, False),
    "bytes between rows": (BF16, 17, 5, True),
}
ROWS, RECORDS = 23, 5


def drawn(
    dtype: torch.dtype, n: int, choices: int, weighted: bool, records: int = RECORDS
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Rows of all magnitudes, places and factors; NaN where nothing may be read or multiplied."""
    generator = torch.Generator().manual_seed(n + choices)
    exponents = torch.randint(-40, 4, (ROWS, 1), generator=generator)
    rows = (torch.randn(ROWS, n, generator=generator) * 2.0**exponents).to(dtype)
    places = torch.randint(0, ROWS, (records, choices), generator=generator).int()
    gone = torch.rand(records, choices, generator=generator) < 0.4
    gone[0], gone[-1] = True, False
    places = places.where(~gone, -1)
    named = torch.zeros(ROWS, dtype=torch.bool)
    named[places[places >= 0].long()] = True
    rows[~named] = torch.nan
    factors = None
    if weighted:
        factors = torch.randn(records, choices, generator=generator).where(~gone, torch.nan)
    return rows, places, factors


@pytest.mark.parametrize("name", CASES)
def test_sums(kernels, arch, name):
    rows, places, factors = drawn(*CASES[name])
    gpu = Gpu(kernels, arch)
    actual = gpu.add_up(rows, places, factors)
    assert len(gpu.launched) == 1
    expected = add_up(rows, places, factors)
    assert not expected.isnan().any() and expected[0].eq(0).all()
    assert_same_bits(actual, expected)


def test_rows_that_lie_apart(kernels, arch):
    """Vectors are as narrow as the strides and the first address ask for; others go to torch."""
    rows, places, factors = drawn(BF16, 640, 8, True)
    expected = add_up(rows, places, factors)
    for columns, first, nbytes in ((652, 4, 8), (643, 3, 2)):
        wide = torch.full((ROWS, columns), torch.nan, dtype=BF16)
        wide[:, first : first + 640] = rows
        gpu = Gpu(kernels, arch)
        assert_same_bits(gpu.add_up(wide[:, first : first + 640], places, factors), expected)
        (launched,) = gpu.launched
        assert launched.kernel.spec.access.load_bytes == nbytes
    gpu = Gpu(kernels, arch)
    assert_same_bits(gpu.add_up(rows.t().contiguous().t(), places, factors), expected)
    assert not gpu.launched


def test_more_records_than_a_grid_counts(kernels):
    gpu = Gpu(kernels, "sm_90a", max_grid=2)
    rows, places, _ = drawn(FP16, 136, 3, False)
    assert_same_bits(gpu.add_up(rows, places), add_up(rows, places))


def test_places_past_the_rows(kernels):
    """They name no row, as -1 does: nothing is read outside of a tensor."""
    rows, places, _ = drawn(BF16, 640, 2, False)
    past = places.where(places >= 0, ROWS)
    assert_same_bits(Gpu(kernels, "sm_90a").add_up(rows, past), add_up(rows, places))


@pytest.mark.parametrize("shape", [(0, 4), (7, 0)], ids=["no rows", "no columns"])
@pytest.mark.parametrize("records", [0, 3])
def test_nothing_to_add(kernels, shape, records):
    gpu = Gpu(kernels, "sm_90a")
    sums = gpu.add_up(torch.empty(shape, dtype=BF16), torch.full((records, 2), -1).int())
    assert_same_bits(sums, torch.zeros(records, shape[1], dtype=BF16))
    assert gpu.add_up(torch.ones(7, 4), torch.empty(records, 0).int()).eq(0).all()
    assert gpu.add_up(torch.ones(7, 4), torch.empty(0, 2).int()).shape == (0, 4)
    assert not gpu.launched


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_products_are_rounded(kernels, arch, dtype):
    """A product less what it rounds to: the sum of a fused instruction is what rounding loses."""
    value, factor = torch.tensor(3.0, dtype=dtype), torch.tensor(2.0**12 / 7)
    product = value.float() * factor
    rest = value.double() * factor.double() - product.double()
    assert rest.to(dtype) != 0
    rows = torch.stack([torch.tensor(-1.0, dtype=dtype), value]).unsqueeze(1).expand(2, 64)
    factors = torch.stack([product, factor]).unsqueeze(0)
    places = torch.tensor([[0, 1]], dtype=torch.int32)
    sums = Gpu(kernels, arch).add_up(rows.contiguous(), places, factors)
    assert_same_bits(sums, torch.zeros(1, 64, dtype=dtype))


def test_machine_code(arch):
    """All rows are on their way before the first is added, and no product is fused with a sum."""
    width = {"sm_90a": 16, "sm_100a": 32}[arch]
    code = machine_code(CombineSpec(BF16, 4, width // 2, Access(width, width), True), arch)
    wide = "LDG.E.128" if width == 16 else "LDG.E.ENL2.256"
    loads = [i for i, op in enumerate(code.opcodes) if op == wide]
    sums = [i for i, op in enumerate(code.opcodes) if op in ("FADD", "FADD2")]
    assert len(loads) == 4 and loads[-1] < sums[0]
    assert code.count("FFMA", "FFMA2") == 0
    assert code.stack == 0


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["experts", "ranks", "nine"])
def test_on_a_gpu(name):
    """The CPU's bits at DeepSeek's size, also where a graph is replayed on other rows."""
    dtype, _, choices, weighted = CASES[name]
    rows, places, factors = drawn(dtype, 7168, choices, weighted, records=300)
    expected = add_up(rows, places, factors)
    on_gpu = [None if t is None else t.cuda() for t in (torch.zeros_like(rows), places, factors)]
    add_up(*on_gpu)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sums = add_up(*on_gpu)
    on_gpu[0].copy_(rows)
    graph.replay()
    assert_same_bits(sums.cpu(), expected)
