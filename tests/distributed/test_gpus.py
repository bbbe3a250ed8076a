"""Expert parallel between GPUs of a host: NCCL, symmetric memory, CUDA graphs."""

import pytest
import torch

from tests.distributed import cases
from tests.distributed.ranks import started

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


@pytest.fixture(scope="module")
def ranks():
    with started(2, timeout=300, backend="nccl") as group:
        yield group


@pytest.mark.parametrize(
    ("bounded", "memory"),
    # Buffers are of one size on all ranks, so plans are bounded.
    [(False, None), (True, None), (True, cases.SYMMETRIC)],
)
@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("name", cases.FORMATS)
def test_there_and_back(ranks, name, layout, bounded, memory):
    for seed, kind in enumerate(("random", "all to one", "none")):
        ranks.run(cases.there_and_back, kind, layout, name, bounded, seed, memory)


@pytest.mark.parametrize("peers", [False, True])
@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_in_a_graph(ranks, layout, peers):
    ranks.run(cases.in_a_graph, layout, peers)
