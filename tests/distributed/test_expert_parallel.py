"""Expert parallel on four processes with gloo: everything against all ranks' data."""

import itertools
import time

import pytest

from tests.distributed import cases
from tests.distributed.ranks import started

KINDS = ("random", "empty experts", "empty ranks", "all to one", "none")


@pytest.fixture(scope="module")
def ranks():
    with started(4) as group:
        yield group


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(ranks, kind, layout, tmp_path):
    """Each routing and layout with formats, bounded and exact sizes, and peers' memory in turn."""
    names = itertools.cycle(cases.FORMATS)
    turn = KINDS.index(kind) + (layout == "masked")
    for _ in range(turn):
        next(names)
    for seed, (bounded, peers) in enumerate(((False, False), (True, False), (True, True))):
        memory = str(tmp_path) if peers else None
        arguments = kind, layout, next(names), bounded, 10 * turn + seed, memory
        ranks.run(cases.there_and_back, *arguments)


def test_rows_that_find_no_place(ranks):
    ranks.run(cases.too_few_rows)


def test_errors(ranks):
    ranks.run(cases.errors)


def test_ranks_wait_for_each_other(ranks, tmp_path):
    ranks.run(cases.barriers, str(tmp_path))


def test_a_rank_that_dies():
    """The others get an error within the timeout of the group."""
    with started(4, timeout=8) as group:
        begin = time.monotonic()
        group.start(cases.die_or_dispatch)
        for rank in range(3):
            message, error = group.answer(rank)
            assert error is None and message, error
        assert time.monotonic() - begin < 30


def test_more_ranks_than_a_row_has_places():
    cases.more_ranks_than_places(0)


@pytest.mark.slow
def test_the_example(ranks):
    """Tokens with experts on one rank have the bits of the layer on one GPU."""
    for same, error in ranks.run(cases.example):
        assert same == 1.0 and error < 0.01
