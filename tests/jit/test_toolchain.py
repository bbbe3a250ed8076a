"""Which flavour of CuTe DSL is taken."""

import pytest

from cute_quant.jit import toolchain


@pytest.mark.parametrize(
    ("driver", "flavour"), [(None, "cu13"), ((13, 1), "cu13"), ((12, 9), "cu12"), ((11, 8), None)]
)
def test_the_newest_flavour_that_the_driver_runs(monkeypatch, tmp_path, driver, flavour):
    for name in ("cu12", "cu13", "cu14"):
        (tmp_path / name / "lib").mkdir(parents=True)
        if name != "cu14":  # has no runtime
            (tmp_path / name / "lib" / toolchain.RUNTIME_NAME).touch()

    class Spec:
        submodule_search_locations = (str(tmp_path),)

    monkeypatch.setattr(toolchain.importlib.util, "find_spec", lambda name: Spec)
    monkeypatch.setattr(toolchain.importlib.metadata, "version", lambda name: "4.8")
    monkeypatch.setattr(toolchain, "driver_cuda_version", lambda: driver)
    dsl = toolchain.installed_dsl.__wrapped__()
    assert (dsl and dsl.flavour) == flavour
