"""What the environment asks of CuTe DSL, and which of its flavours is taken."""

import pytest

from cute_quant.jit import toolchain


@pytest.mark.parametrize(
    ("name", "value", "asks"),
    [
        ("CUTE_DSL_KEEP_PTX", "1", True),
        ("CUTE_DSL_DUMP", "on", True),
        ("CUTE_DSL_PRINT_IR", "True", True),
        *(("CUTE_DSL_KEEP_PTX", no, False) for no in ("", "0", "false", "OFF", " no ")),
        ("CUTE_DSL_DUMP_DIR", "/tmp", False),
        ("CUTE_DSL_LOG_LEVEL", "1", False),
    ],
)
def test_variables_that_ask_for_output(monkeypatch, name, value, asks):
    for other in toolchain.dsl_variables():
        monkeypatch.delenv(other)
    monkeypatch.setenv(name, value)
    assert toolchain.asks_for_output() == asks


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
    monkeypatch.setattr(toolchain.importlib.metadata, "version", lambda name: "4.7")
    monkeypatch.setattr(toolchain, "driver_cuda_version", lambda: driver)
    dsl = toolchain.installed_dsl.__wrapped__()
    assert (dsl and dsl.flavour) == flavour
