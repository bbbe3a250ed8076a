"""Each fault of the list can be planted, and names tests that there are."""

from pathlib import Path

import pytest

from tests.mutants.__main__ import of_faults
from tests.mutants.fault import PACKAGE, Fault
from tests.mutants.faults import FAULTS

ROOT = Path(__file__).parents[2]
LEAST = 380


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.id)
def test_a_fault_has_its_place(fault):
    source = (ROOT / PACKAGE / fault.file).read_text()
    planted = fault.planted(source)
    assert planted != source
    compile(planted, fault.file, "exec")


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.id)
def test_a_fault_has_tests(fault):
    assert fault.tests
    for test in fault.tests:
        path, *names = test.partition("[")[0].split("::")
        source = (ROOT / path).read_text()
        assert not names or f"def {names[-1]}(" in source, test


def test_faults_have_names_of_their_own():
    ids = [fault.id for fault in FAULTS]
    assert len(set(ids)) == len(ids) >= LEAST
    changes = [(fault.file, fault.before, fault.after) for fault in FAULTS]
    assert len(set(changes)) == len(changes)


@pytest.mark.parametrize("source", ["b = 1", "a = 1; a = 1"])
def test_a_stale_fault_is_an_error(source):
    with pytest.raises(ValueError, match=r"x: expected 'a = 1' once in rows.py, found it [02] tim"):
        Fault("x", "rows.py", "a = 1", "a = 2", ["tests/helpers.py"]).planted(source)


def test_parts_are_all_faults():
    assert sorted(i for n in range(1, 4) for i in range(7)[of_faults(f"{n}/3")[0] :: 3]) == [
        *range(7)
    ]
    number, count = of_faults("today")
    assert 0 <= number < count == 10
