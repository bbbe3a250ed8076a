"""Operators on distributed tensors, by four processes on a mesh of 2 x 2."""

import pytest

from tests.distributed import dtensor_cases as cases
from tests.distributed.ranks import started


@pytest.fixture(scope="module")
def ranks():
    with started(4) as group:
        yield group


@pytest.mark.parametrize(
    "case",
    [
        cases.quantize_in_every_placement,
        cases.quantize_stays_where_it_is,
        cases.formats_after_each_other,
        cases.row_domains,
        cases.numbers_of_rows_and_groups_along_them,
        cases.fused_operations,
        cases.back_and_blocks,
        cases.partial_sums_are_added_first,
        cases.compiled,
    ],
    ids=lambda case: case.__name__,
)
def test_dtensor(ranks, case):
    ranks.run(case)
