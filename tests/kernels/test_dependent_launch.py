"""Programmatic dependent launch: kernels that overlap never read or write too early."""

import pytest
import torch

from bench.stream import Stream, function
from cute_quant import quantize
from cute_quant.jit import lookup
from tests.helpers import UE8M0, random_bits

pytestmark = pytest.mark.gpu


def words(t: torch.Tensor) -> torch.Tensor:
    return t.view(torch.int32).flatten()


@pytest.mark.parametrize("mn", [1, 33, 512, 4096])
@pytest.mark.parametrize("captured", [False, True], ids=["stream", "graph"])
def test_chain_of_dependents(mn, captured):
    """Producer, quantizer and consumer share their buffers over many rounds.

    All three are dependents of each other: the producer overwrites x while the quantizer of the
    round before may still run, the consumer reads q that the quantizer may still write, and the
    next quantizer overwrites q that the consumer may still read.
    """
    k, rounds = 2048, 24
    architecture = lookup.architecture(torch.cuda.current_device())
    stream = function(Stream(True), architecture)
    # The stream kernel halves what it reads: two inputs joined by an exclusive or of zeros.
    inputs = [random_bits((mn, k), torch.bfloat16, seed=i).cuda() for i in range(rounds)]
    sources = []
    for x in inputs:
        eighths = words(x).view(-1, 4)
        sources.append(torch.cat([eighths, torch.zeros_like(eighths)], 1).flatten())
    x, q = torch.empty_like(inputs[0]), torch.empty(mn, k, dtype=torch.float8_e4m3fn, device="cuda")
    sf = [UE8M0.empty_scales((), mn, k, x.device) for _ in range(rounds)]
    results = [torch.empty(mn * k // 8, dtype=torch.int32, device="cuda") for _ in range(rounds)]
    expected = [quantize(x) for x in inputs]

    def run() -> None:
        for i in range(rounds):
            stream(sources[i], words(x))
            quantize(x, out=(q, sf[i]))
            stream(words(q), results[i])

    run()
    torch.cuda.synchronize()
    for _ in range(20):
        for t in results:
            t.fill_(-1)
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                run()
            graph.replay()
        else:
            run()
        torch.cuda.synchronize()
        for i, (wanted_q, wanted_sf) in enumerate(expected):
            halves = words(wanted_q).view(-1, 2, 4)
            assert torch.equal(results[i], (halves[:, 0] ^ halves[:, 1]).flatten()), i
            assert torch.equal(sf[i], wanted_sf), i
