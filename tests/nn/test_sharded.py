"""Layers under DistributedDataParallel and FSDP2, on two processes."""

import pytest

from tests.distributed.ranks import started
from tests.nn import sharded_cases


@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp"])
def test_gradients_are_the_mean_of_those_of_ranks(sharded):
    with started(2) as ranks:
        assert ranks.run(sharded_cases.gradients, sharded) == [0.0, 0.0]
