"""The kernels that a ceiling is the best of: all words moved, none but them."""

import pytest
import torch

from bench import ceiling, stream
from bench.stream import CHUNK, BulkStream, Stream, Traffic
from cute_quant import emulator
from cute_quant.lab import timing
from cute_quant.lab.machine_code import disassemble

SMS = 132
TRAFFICS = (Traffic(), Traffic(2, 3), Traffic(words_in=2, words_out=8))


@pytest.mark.parametrize(
    ("loads", "stores", "words_in", "words_out", "written"),
    [(1, 1, 8, 4, 1), (2, 1, 8, 4, 1), (2, 3, 8, 4, 2), (1, 1, 8, 2, 1), (1, 1, 2, 8, 4)],
)
def test_every_word_counts(loads, stores, words_in, words_out, written):
    spec = Stream(True, loads, stores, words_in, words_out)
    x = torch.arange(loads * 2 * words_in, dtype=torch.int32)
    y = spec.expected(x)
    assert y.shape == (stores, 2 * words_out)
    for i in range(len(x)):
        x[i] ^= 1 << 20
        assert int((spec.expected(x) != y).sum()) == written
        x[i] ^= 1 << 20


def test_each_store_of_a_bulk_copy_takes_the_first_words_of_a_load():
    spec = BulkStream(True, 2, 3)
    x = torch.arange(2 * 2 * CHUNK * 8, dtype=torch.int32)
    y = spec.expected(x).view(3, 2, CHUNK * 4)
    for store, load in enumerate((0, 1, 0)):
        for chunk in range(2):
            first = (2 * load + chunk) * CHUNK * 8
            assert y[store, chunk].tolist() == list(range(first, first + CHUNK * 4))


def test_the_family_moves_the_bytes_of_its_traffic():
    for traffic in TRAFFICS:
        specs = list(stream.family(True, traffic, SMS))
        assert len(set(specs)) == len(specs) == 18
        for spec in specs:
            assert spec.words_in * traffic.words_out == spec.words_out * traffic.words_in
            assert (spec.loads, spec.stores) == traffic[:2]


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
@pytest.mark.parametrize(
    ("traffic", "choices"),
    [
        (Traffic(), (1, 128)),
        (Traffic(2, 3), (2, 256)),
        (Traffic(2, 1, 4, 2), (4, 128)),
        (Traffic(words_in=2, words_out=8), (2, 128)),
    ],
)
def test_a_kernel_moves_its_words(arch, traffic, choices):
    """Of sizes that are no multiple of what a CTA has, and of whole CTAs."""
    spec = Stream(True, *traffic, *choices)
    kernel = emulator.compile(spec, arch)
    for vectors in (1, 130, spec.in_flight * spec.threads):
        size = vectors * traffic.loads * traffic.words_in
        x = torch.randint(2**31 - 1, (size,), dtype=torch.int32)
        y = torch.empty(vectors * traffic.stores * traffic.words_out, dtype=torch.int32)
        kernel(x, y, outputs=(y,))
        assert torch.equal(y.view(traffic.stores, -1), spec.expected(x))


def test_bulk_copies_take_whole_chunks():
    assert BulkStream(True).fits(2 * CHUNK) and not BulkStream(True).fits(2 * CHUNK - 1)
    assert not BulkStream(True, words_in=2, words_out=8).fits(CHUNK)
    code = disassemble(BulkStream(True, 2, 3, stages=4, sms=SMS), "sm_90a")
    loads, stores = code.count("UBLKCP.S.G"), code.count("UBLKCP.G.S")
    assert (loads, stores) == (2 * (4 + 1), 3)


@pytest.mark.parametrize("spec", [*stream.family(True, Traffic(2, 1), SMS)], ids=str)
def test_no_kernel_asks_for_more_alignment_than_an_allocation_has(spec):
    """The allocator of a GPU starts blocks at multiples of 512 bytes, of a CPU at those of 64."""
    x, y, _ = spec.signature()
    for memory in (x, y):
        assert 16 <= memory._assumed_align <= 128


def test_memory_of_a_traffic(monkeypatch):
    on_cpu = torch.randint

    def randint(*arguments, device, **options):
        return on_cpu(*arguments, **options)

    monkeypatch.setattr(torch, "randint", randint)
    words = ceiling.allocate(Traffic(2, 3), 33)
    assert (words.x.numel(), words.y.numel()) == (3 * 2 * 8, 3 * 3 * 4)


@pytest.mark.gpu
@pytest.mark.parametrize("elements", [16, 7168, 1 << 20, 100 * 7168 + 16])
@pytest.mark.parametrize("traffic", TRAFFICS, ids=str)
def test_the_ceiling_is_the_fastest(elements, traffic):
    """Making one checks what each kernel of the family moves."""
    memory = [ceiling.allocate(traffic, elements) for _ in range(2)]
    chosen = ceiling.Ceiling(memory)
    graphs = {
        "chosen": timing.capture(chosen.calls()),
        "first": timing.capture([chosen.bind(Stream(True, *traffic), words) for words in memory]),
    }
    seconds = timing.median_seconds(graphs)
    assert seconds["chosen"] < 1.2 * seconds["first"]
