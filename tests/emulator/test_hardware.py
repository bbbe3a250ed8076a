"""The emulator against what an H100 answered: instructions, and whole kernels."""

import itertools

import numpy as np
import pytest

from cute_quant.emulator import isa
from tests.emulator import hardware, probes
from tests.kernels.emulated_gpu import Gpu

PROBES = {
    family: list(members)
    for family, members in itertools.groupby(
        sorted(probes.probes(), key=lambda p: p.name), key=lambda p: p.name.split("_")[0]
    )
}


@pytest.fixture(scope="session")
def recording() -> dict[str, hardware.Result]:
    if not hardware.RECORDING.exists():
        pytest.fail(f"{hardware.RECORDING} is not there; how to record it:\n{hardware.__doc__}")
    return hardware.load()


def assert_same(name: str, actual: hardware.Result, recording: dict[str, hardware.Result]) -> None:
    assert name in recording, f"{name} is not in the recording: record it anew"
    expected = recording[name]
    for row, (got, want) in enumerate(zip(actual.whole, expected.whole, strict=True)):
        differ = np.flatnonzero(got != want)
        if len(differ):
            got, want = got[differ[0]], want[differ[0]]
            raise AssertionError(f"{name}: result {row}: {got:#x}, the hardware says {want:#x}")
    differ = np.flatnonzero(actual.checksums != expected.checksums)
    assert not len(differ), f"{name}: results differ from the hardware's in parts {differ}"


def assert_near(probe: probes.Probe, outputs: np.ndarray, expected: np.ndarray) -> None:
    """Of approximations, whose last bits the emulator does not know."""
    assert len(outputs) == len(expected), f"{probe.name}: {len(expected)} results were kept"
    places = np.flatnonzero(hardware.differ(probe, outputs, expected))
    if len(places):
        got, want = (int(a[places[0], 0]) for a in (outputs, expected))
        raise AssertionError(
            f"{probe.name}: {len(places)} results are too far off, the first of input {places[0]}: "
            f"{got:#x}, the hardware says {want:#x}"
        )


@pytest.mark.parametrize("family", PROBES)
def test_instructions(recording, family):
    problems = []
    for probe in PROBES[family]:
        outputs = hardware.emulate_probe(probe)
        try:
            if probe.approximate and probe.name in recording:
                assert_near(probe, outputs, recording[probe.name].whole)
            else:
                assert_same(probe.name, hardware.probe_result(probe, outputs), recording)
        except AssertionError as error:
            problems.append(str(error))
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    ("dtype", "fmt"),
    hardware.CONFIGURATIONS,
    ids=[hardware.configuration_id(*c) for c in hardware.CONFIGURATIONS],
)
def test_kernels(recording, kernels, dtype, fmt):
    name = hardware.configuration_id(dtype, fmt)
    results = hardware.run_kernel(Gpu(kernels, hardware.ARCH).quantize, dtype, fmt, "cpu")
    for key, result in results.items():
        assert_same(f"{name}.{key}", result, recording)


def test_everything_is_recorded(recording):
    names = {probe.name for probe in probes.probes()}
    names |= {
        f"{hardware.configuration_id(*c)}.{key}"
        for c in hardware.CONFIGURATIONS
        for key in ("q", "sf")
    }
    missing = sorted(names - recording.keys())
    assert not missing, f"record anew, results are missing: {', '.join(missing)}"


def test_every_instruction_is_probed():
    """All of the table, but for what sm_100 alone has."""
    names = {probe.name for probe in probes.probes()}
    missing = {op for op in isa.OPERATIONS if op.replace(".", "_") not in names}
    assert all(probes.SM100_ONLY.fullmatch(op) for op in missing)


@pytest.mark.parametrize("off", [0, 1, 2, 3])
def test_approximations_are_compared_by_distance(off):
    """Also across zero, next to which flushing puts the smallest normal numbers."""
    words = np.array([0x3F800000, 0xC0000001, 0x00800000, 0x80800000, 0x7F7FFFFE], np.uint32)
    expected = np.stack([words, np.zeros_like(words)], 1)
    outputs = expected.copy()
    outputs[:, 0] += np.uint32(off)
    probe = probes.Probe("any", "", np.zeros((5, 4), np.uint32), approximate=True)
    assert hardware.differ(probe, outputs, expected).tolist() == [off > 2] * 5
    outputs = np.array([[0, 0], [0x80000001, 0], [0x7FC00000, 0], [0x7FFFFFFF, 0]], np.uint32)
    expected = np.array(
        [[0x800001, 0], [0x80800000, 0], [0x7F800000, 0], [0x7FC00000, 0]], np.uint32
    )
    expected[0, 0] += np.uint32(off)
    assert hardware.differ(probe, outputs, expected).tolist() == [off > 0, False, True, False]


def test_recordings_are_read_as_they_were_written(tmp_path):
    results = {
        "a": hardware.Result.of(np.arange(4096, dtype=np.uint32).reshape(2048, 2), 1024, 3),
        "b": hardware.Result.of(np.arange(30, dtype=np.uint8).reshape(3, 10), 1, 2),
    }
    hardware.save(tmp_path / "r.npz", results)
    loaded = hardware.load(tmp_path / "r.npz")
    for name, result in results.items():
        assert_same(name, result, loaded)
    results["b"].checksums[1] ^= 1
    with pytest.raises(AssertionError, match=r"b: results differ .* \[1\]"):
        assert_same("b", results["b"], loaded)
