"""The emulator against what an H100 answered: instructions, and whole kernels."""

import itertools

import numpy as np
import pytest

from tests.emulator import hardware, isa, probes
from tests.emulator.quantizer import Gpu

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


@pytest.mark.parametrize("family", PROBES)
def test_instructions(recording, family):
    problems = []
    for probe in PROBES[family]:
        if probe.name not in recording:
            continue  # test_everything_is_recorded names it
        try:
            result = hardware.probe_result(hardware.emulate_probe(probe))
            assert_same(probe.name, result, recording)
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
    assert not missing, f"record anew, {len(missing)} results are missing: {', '.join(missing)}"


def test_every_instruction_is_probed():
    """All of the table, but for what sm_100 alone has and what is not exact."""
    names = {probe.name for probe in probes.probes()}
    missing = {op for op in isa.OPERATIONS if op.replace(".", "_") not in names}
    apart = probes.SM100_ONLY, probes.APPROXIMATE
    assert all(any(pattern.fullmatch(op) for pattern in apart) for op in missing)


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
