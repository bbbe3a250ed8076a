"""Stochastic rounding: its random numbers, its rule and its mean."""

import pytest
import torch

from cute_quant import (
    DEEP_GEMM,
    DEEP_GEMM_SM90,
    GROUPWISE_FP8,
    INT8,
    MXFP4,
    MXFP8,
    NVFP4,
    ROWWISE_FP8,
    Indexed,
    Masked,
    PrefixSum,
    bind,
    dequantize,
    quantize,
)
from cute_quant.contract import philox
from cute_quant.contract.formats import Format
from cute_quant.contract.reference.values import round_stochastically
from tests import oracle
from tests.helpers import assert_same_bits, check_every_byte, random_bits

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
E5M2 = torch.float8_e5m2
FORMATS = (
    DEEP_GEMM,
    DEEP_GEMM_SM90.replace(values=E5M2),
    MXFP8.replace(values=E5M2),
    INT8,
    MXFP4,
    NVFP4,
    NVFP4.replace(row_scale=True),
    ROWWISE_FP8,
    DEEP_GEMM_SM90.replace(values=torch.int8, round_scale=True, group_size=16),
)
VALUES = {fmt.values: fmt for fmt in (GROUPWISE_FP8, MXFP8.replace(values=E5M2), INT8, MXFP4)}
every_values = pytest.mark.parametrize("fmt", VALUES.values(), ids=lambda fmt: str(fmt.values))


def state(seed: int, offset: int, device: str = "cpu") -> torch.Tensor:
    return torch.tensor([seed, offset], dtype=torch.int64, device=device)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            (0xFFFFFFFF,) * 4,
            (0xFFFFFFFF,) * 2,
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(counter, key, expected):
    """Those that Random123 ships."""
    words = philox.random_words(
        tuple(torch.tensor(word) for word in counter), tuple(torch.tensor(word) for word in key)
    )
    assert tuple(map(int, words)) == expected
    assert tuple(map(int, oracle.philox(counter, key))) == expected


@pytest.mark.parametrize(("seed", "offset"), [(0, 0), (-1, 2**46 + 5), (2**63 - 1, 2**32), (3, -1)])
def test_words_of_elements(seed, offset):
    words = philox.random_of_elements(state(seed, offset), 2, 3, 21)
    expected = oracle.random_of(state(seed, offset), 2, 3, 21)
    assert torch.equal(words, torch.from_numpy(expected.astype("int64")))
    assert words.unique().numel() == words.numel()


@every_values
def test_share_of_draws_that_round_up(fmt):
    """`count` of all 2^F first bits of a word, for a value `count` of 2^F parts of a step up."""
    bits = fmt.value_type.fraction_bits
    table = oracle.TABLES[fmt.values]
    generator = torch.Generator().manual_seed(1)
    random = torch.randint(2**32, (1000,), generator=generator)
    for below in (0, 1, 2, len(table) // 2, len(table) - 2):
        low, high = table[below], table[below + 1]
        for count in torch.randint(1, 2**bits, (8,), generator=generator).tolist():
            value = torch.tensor([low + (high - low) * count / 2**bits], dtype=FP32)
            first_up = 2**bits - count
            edges = (first_up << 32 - bits) - 1, first_up << 32 - bits
            words = torch.cat([torch.tensor([0, *edges, 2**32 - 1]), random])
            expected = torch.where(words >> 32 - bits >= first_up, high, low).float()
            for sign in (1, -1):
                rounded = round_stochastically(sign * value, words, fmt)
                assert torch.equal(rounded, sign * expected), (below, count)


@every_values
def test_values_of_the_format_stay(fmt):
    table = torch.from_numpy(oracle.TABLES[fmt.values]).float()
    words = torch.tensor([0, 2**32 - 1]).view(2, 1)
    values = torch.cat([table, -table])
    rounded = round_stochastically(values, words, fmt)
    assert torch.equal(rounded, values.expand(2, -1))
    assert torch.equal(rounded.signbit(), values.signbit().expand(2, -1))
    beyond = torch.tensor([1.01, 1e30, torch.inf]) * fmt.value_type.max
    assert (round_stochastically(beyond, words, fmt) == fmt.value_type.max).all()
    assert round_stochastically(torch.tensor([torch.nan]), words, fmt).isnan().all()


@every_values
def test_fractions_below_normal_values_are_rounded(fmt):
    """Not truncated: what is nearer to a value of the format than 2^-F of a step is that value."""
    bits, step = fmt.value_type.fraction_bits, oracle.TABLES[fmt.values][1]
    value = torch.tensor([step * (1 - 2.0 ** -(bits + 2))], dtype=FP32)
    words = torch.tensor([0, 2**32 - 1])
    assert value < step
    assert (round_stochastically(value, words, fmt) == step).all()


@every_values
def test_mean(fmt, device):
    """The mean over offsets comes as near to x as independent draws do, and nearest does not.

    The square of a sum of 64 independent errors is that of one times 64 in the mean: of 4096
    elements within some percent. An error of a tenth of a step in the mean would triple it.
    """
    x = torch.randn(8, 512, generator=torch.Generator().manual_seed(2)).to(device)
    given, draws = state(7, 0, device), 64
    total, squares = torch.zeros_like(x), torch.zeros_like(x)
    for _ in range(draws):
        q, sf = quantize(x, fmt, rng_state=given)
        error = dequantize(q, sf, fmt, dtype=FP32) - x
        total, squares = total + error, squares + error**2
        given[1] += 1
    assert abs(total.square().sum() / squares.sum() - 1) < 0.2
    assert abs(total.sum()) < 5 * squares.sum().sqrt()
    nearest = dequantize(*quantize(x, fmt), fmt, dtype=FP32)
    assert (total / draws).norm() < 0.3 * (nearest - x).norm()


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_every_byte(fmt, dtype, device):
    x = random_bits((5, 544), dtype, seed=9).to(device)
    check_every_byte(x, fmt, extra_rows=2, rng_state=state(-11, 2**40 + 3, device))


@pytest.mark.parametrize("fmt", [DEEP_GEMM, NVFP4, INT8], ids=str)
def test_every_row_domain(fmt, device):
    given, dtype = state(5, 6, device), torch.int32
    x = torch.randn(3, 12, 256, generator=torch.Generator().manual_seed(4)).to(BF16).to(device)
    counts = torch.tensor([12, 0, 5], dtype=dtype, device=device)
    check_every_byte(x, fmt, rows=Masked(counts), rng_state=given)
    check_every_byte(x, fmt, rng_state=given)
    stacked = x[0]
    ends = torch.tensor([3, 11], dtype=dtype, device=device)
    check_every_byte(stacked, fmt, rows=PrefixSum(ends, 8), rng_state=given)
    indices = torch.tensor([0, 0, -1, 1] * 3, dtype=dtype, device=device)
    check_every_byte(stacked, fmt, rows=Indexed(indices), rng_state=given)
    index = torch.tensor([5, -1, 5, 11, 12], dtype=dtype, device=device)
    check_every_byte(stacked, fmt, index=index, rng_state=given)


def test_draws_belong_to_places(device):
    """Of the result: not to strides, layouts, the source row, or how many rows there are."""
    x = torch.randn(6, 384, generator=torch.Generator().manual_seed(5)).to(BF16).to(device)
    given = state(1, 2, device)
    q, _ = quantize(x, DEEP_GEMM_SM90, rng_state=given)
    wide = torch.zeros(6, 1000, dtype=BF16, device=device)
    wide[:, :384] = x
    for fmt, source in (
        (DEEP_GEMM_SM90.replace(scale_layout="row_major"), x),
        (DEEP_GEMM_SM90, wide[:, :384]),
        (DEEP_GEMM_SM90, x[:4]),
        (DEEP_GEMM_SM90, x[:, :256]),
        (DEEP_GEMM_SM90, x[None]),
    ):
        other = quantize(source, fmt, rng_state=given)[0].view(-1, source.shape[-1])
        assert_same_bits(other, q[: len(other), : source.shape[-1]])
    same = torch.zeros(2, 6, dtype=torch.int32, device=device)
    gathered, _ = quantize(x, DEEP_GEMM_SM90, index=same, rng_state=given)
    rows = {tuple(row.tolist()) for row in gathered.view(torch.uint8).view(12, -1)}
    assert len(rows) == 12  # the same row of x, rounded anew in each place
    for changed in (state(2, 2, device), state(1, 3, device), state(1, 2 + 2**32, device)):
        assert not torch.equal(
            quantize(x, DEEP_GEMM_SM90, rng_state=changed)[0].view(torch.uint8),
            q.view(torch.uint8),
        )


@pytest.mark.parametrize(
    ("given", "fmt", "error", "message"),
    [
        ([1, 2], DEEP_GEMM, TypeError, "rng_state: expected a tensor"),
        (torch.zeros(2), DEEP_GEMM, TypeError, "rng_state: expected a tensor of int64"),
        (torch.zeros(3, dtype=torch.int64), DEEP_GEMM, ValueError, r"rng_state: expected shape"),
        (
            torch.zeros(2, 2, dtype=torch.int64)[:, 0],
            DEEP_GEMM,
            ValueError,
            "rng_state: expected a contiguous",
        ),
        (
            torch.zeros(2, dtype=torch.int64, device="meta"),
            DEEP_GEMM,
            ValueError,
            "rng_state: expected",
        ),
        (
            state(1, 2),
            DEEP_GEMM_SM90.replace(numerics="deepgemm"),
            ValueError,
            "rng_state: expected None for",
        ),
        (
            state(1, 2),
            NVFP4.replace(four_over_six=True),
            ValueError,
            "rng_state: expected None for",
        ),
    ],
)
def test_wrong_states(given, fmt, error, message):
    x = torch.zeros(4, 128, dtype=BF16)
    with pytest.raises(error, match=message):
        quantize(x, fmt, amax=torch.ones(()) if fmt.upper_scale else None, rng_state=given)


def test_state_that_is_written(device):
    x = torch.zeros(1, 128, dtype=BF16, device=device)
    memory = torch.zeros(128, dtype=torch.uint8, device=device)
    q = memory.view(torch.float8_e4m3fn).view(1, 128)
    sf = DEEP_GEMM_SM90.empty_scales((), 1, 128, device)
    with pytest.raises(ValueError, match="rng_state"):
        quantize(x, DEEP_GEMM_SM90, rng_state=memory[:16].view(torch.int64), out=(q, sf))


def test_bound_launch_reads_the_state(device):
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(6)).to(BF16).to(device)
    given = state(1, 0, device)
    launch = bind(x, DEEP_GEMM_SM90, rng_state=given)
    for offset in range(3):
        given[1] = offset
        q, _ = launch()
        expected, _ = quantize(x, DEEP_GEMM_SM90, rng_state=state(1, offset, device))
        assert_same_bits(q, expected)


@pytest.mark.gpu
def test_graph_draws_anew_at_every_replay():
    x = torch.randn(64, 512, dtype=BF16, device="cuda")
    given, out = state(1, 0, "cuda"), quantize(x, DEEP_GEMM_SM90)
    quantize(x, DEEP_GEMM_SM90, rng_state=given, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        quantize(x, DEEP_GEMM_SM90, rng_state=given, out=out)
        given[1] += 1
    for offset in range(3):
        given.copy_(state(1, offset))
        graph.replay()
        expected, _ = quantize(x.cpu(), DEEP_GEMM_SM90, rng_state=state(1, offset))
        assert_same_bits(out[0].cpu(), expected)
        assert given[1] == offset + 1


def test_operators(device):
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(7)).to(BF16).to(device)
    given = state(3, 4, device)
    operators, end = torch.ops.cute_quant, (None, None, None, None, given)
    torch.library.opcheck(operators.quantize.default, (x, str(DEEP_GEMM_SM90), *end))
    q, sf = quantize(x, DEEP_GEMM_SM90, rng_state=given)
    operators.quantize_out(x, q.zero_(), sf.zero_(), None, str(DEEP_GEMM_SM90), *end)
    expected = quantize(x, DEEP_GEMM_SM90, rng_state=given)
    assert_same_bits(q, expected[0])
    assert_same_bits(sf, expected[1])


@pytest.mark.slow
def test_compiled(device):
    """The state is an input of the graph, which may advance it."""

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(x: torch.Tensor, given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        results = quantize(x * 2, DEEP_GEMM_SM90, rng_state=given)
        again = quantize(x * 2, DEEP_GEMM_SM90, rng_state=given + 1)
        return *results, *again

    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(8)).to(BF16).to(device)
    given = state(1, 2, device)
    expected = [
        t for moved in (given, given + 1) for t in quantize(x * 2, DEEP_GEMM_SM90, rng_state=moved)
    ]
    for result, wanted in zip(step(x, given), expected, strict=True):
        assert_same_bits(result, wanted)


def test_upper_scale_and_row_scales(device):
    x = torch.randn(4, 96, generator=torch.Generator().manual_seed(9)).to(BF16).to(device)
    fmt: Format = NVFP4.replace(row_scale=True)
    q, sf, rows = quantize(x, fmt, rng_state=state(1, 2, device))
    plain = quantize(x, fmt)
    assert_same_bits(sf, plain[1])
    assert torch.equal(rows, plain[2])
    assert not torch.equal(q.view(torch.uint8), plain[0].view(torch.uint8))
