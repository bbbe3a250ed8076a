"""Kernels built for a family of GPUs: what is built, what the manifest says, who takes them."""

import json

import pytest
import torch

import cute_quant
from cute_quant.cli import main
from cute_quant.jit import aot_load, keys, library, lookup
from cute_quant.kernels.architectures import FAMILIES
from cute_quant.kernels.config import QuantizeSpec
from tests.helpers import UE8M0

SPEC = QuantizeSpec(torch.bfloat16, UE8M0)
NAME = keys.spec_name(SPEC)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A directory with a kernel for both families, and for one member of one."""
    made = tmp_path_factory.mktemp("built") / "kernels"
    targets = [*(family.name for family in FAMILIES), "sm_103a"]
    options = [option for target in targets for option in ("--arch", target)]
    assert main.main(["build", "--kernel", NAME, *options, "-o", str(made)]) == 0
    return made


@pytest.fixture
def loaded(built, monkeypatch):
    """The directory alone; return the symbols of what is loaded from it."""
    symbols = []

    def load_function(file, symbol):
        symbols.append(symbol)
        return load(file, symbol)

    load = library.load_function
    monkeypatch.delenv("CUTE_QUANT_AOT_DIR", raising=False)
    monkeypatch.setattr(aot_load, "_loaded", [])
    monkeypatch.setattr(lookup, "_functions", {})
    monkeypatch.setattr(library, "load_function", load_function)
    aot_load._of_environment.cache_clear()
    cute_quant.load(built)
    return symbols


def test_manifest(built):
    kernels = json.loads((built / "manifest.json").read_text())["kernels"]
    assert [kernel["arch"] for kernel in kernels] == ["sm_100f", "sm_120f", "sm_103a"]
    for kernel in kernels:
        content = (built / kernel["file"]).read_bytes()
        assert kernel["file"] == f"{NAME}-{kernel['arch']}.so" and content[:4] == b"\x7fELF"


@pytest.mark.parametrize(
    ("capability", "target"),
    [
        ((10, 0), "sm_100f"),
        ((10, 3), "sm_103a"),
        ((10, 7), "sm_100f"),
        ((12, 0), "sm_120f"),
        ((12, 1), "sm_120f"),
        ((11, 0), None),
        ((9, 0), None),
    ],
)
def test_a_gpu_takes_the_closest_object(capability, target, loaded, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(lookup, "_using_cache", lambda spec, arch, ask: None)
    monkeypatch.setattr(lookup, "_compiled", lambda spec, arch: f"compiled for {arch}")
    lookup.find_architecture.cache_clear()
    arch = lookup.architecture(0)
    lookup.find_architecture.cache_clear()
    function = lookup.function(SPEC, arch)
    if target is None:
        assert function == f"compiled for {arch}" and not loaded
        return
    assert loaded == [f"{NAME}_{target}".replace("-", "_")]
    with pytest.raises(TypeError, match="Expects 11 parameters when calling"):
        function()


def test_build_names_families(capsys):
    with pytest.raises(SystemExit):
        main.main(["build", "--arch", "sm_90f"])
    assert "sm_100f" in capsys.readouterr().err


def test_names_are_those_of_all_architectures(capsys):
    """Kernels of an architecture without programmatic dependents are named like the others."""
    assert main.main(["build", "--kernel", NAME, "--arch", "sm_89", "--list"]) == 0
    assert capsys.readouterr().out.split() == [NAME]
