"""Variables of CuTe DSL: each that it reads is known, and the code depends on none but those named.

A variable that a new version reads makes the first test fail: enter it in the list that fits.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cute_quant.jit import disk_cache, dsl_variables, lookup, toolchain
from cute_quant.jit.dsl_variables import CODE, NEUTRAL, OUTPUT, PREFIX, REFUSED
from cute_quant.kernels.config import QuantizeSpec
from tests.helpers import UE8M0

SPEC, ARCH = QuantizeSpec(torch.bfloat16, UE8M0), "sm_100a"
NO_VARIABLES = {
    "CUDA_ERROR_CHECK",  # a macro of generated headers
    "FAMILY_PREFIXES",
    "JAX_MIN_SUPPORTED_PYTHON_VERSION",
    "MIN_SUPPORTED_JAX_VERSION",
    "RUNTIME_LIBRARY_NAME",
}
"""Other names in the source that look like variables."""


def named_in_source() -> set[str]:
    """Return what the source of CuTe DSL and the strings of its libraries name."""
    found = set()
    for path in toolchain.installed_dsl().root.rglob("*"):
        if path.suffix not in (".py", ".so") or not path.is_file():
            continue
        data = path.read_bytes()
        found |= set(re.findall(rb"CUTE_DSL_([A-Z][A-Z0-9_]*[A-Z0-9])", data))
        if path.suffix == ".py":
            # Names made of the DSL's own, but for those of generated C code.
            pattern = rb"\{(?:prefix|dsl_name|self\.prefix|self\.name)\}_([A-Z][A-Z0-9_]*[A-Z0-9])"
            found |= set(re.findall(pattern, data))
    return {name.decode() for name in found}


def declared() -> set[str]:
    """Return the variables that CuTe DSL declares, and those that it declared before."""
    code = """
import json, cutlass.cute
from cutlass.base_dsl import env_manager
from cutlass.cutlass_dsl import CuTeDSL
spec = type(CuTeDSL._get_dsl().envar)._ENV_VAR_SPEC
names = [v.source for v in spec if isinstance(v.source, str)]
print(json.dumps(names + [switch for switch, _ in env_manager._DEPRECATED_KEEP_SWITCHES]))
"""
    return set(json.loads(subprocess.check_output([sys.executable, "-c", code])))


def test_every_variable_of_the_installed_dsl_is_known():
    lists = (CODE, OUTPUT, REFUSED, NEUTRAL)
    known = frozenset().union(*lists)
    assert len(known) == sum(map(len, lists)), "a variable is in two lists"
    read = declared() | named_in_source() - NO_VARIABLES
    assert read - known == set()
    assert known - read == set(), "the installed CuTe DSL reads these no more"


ODD = {
    "ARCH": "sm_90a",
    "LIBS": "",
    "LOG_LEVEL": "30",
    "JIT_CACHE_MAX_ELEMS": "3",
    "LOG_AUTOTUNE": "0",
}
"""Values of variables that are no switches; directories are made."""


def built(**variables: str) -> str:
    """Return the digest of an object that is built under these variables."""
    code = f"""
import hashlib, torch
from cute_quant import DEEP_GEMM
from cute_quant.jit import lookup, toolchain
from cute_quant.kernels.config import QuantizeSpec
spec = QuantizeSpec(torch.bfloat16, DEEP_GEMM)
built = lookup.build_object(spec, "{ARCH}", "kernel", toolchain.this_host())
print(hashlib.sha256(built).hexdigest())
"""
    own = {n: v for n, v in os.environ.items() if not n.startswith(PREFIX)}
    environment = own | {PREFIX + name: value for name, value in variables.items()}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.slow
def test_code_depends_on_no_neutral_variable(tmp_path: Path):
    directories = {"CACHE_DIR": str(tmp_path / "cache"), "DUMP_DIR": str(tmp_path / "dump")}
    switched = {name: "1" for name in NEUTRAL} | ODD | directories
    # Both values of a switch that is on by itself, and of those that exclude each other.
    off = switched | {name: "0" for name in ("FILTER_STACKTRACE", "WARNINGS_AS_ERRORS")}
    plain = built()
    assert built(**switched) == plain
    assert built(**off) == plain
    assert built(LINEINFO="1") != plain, "nothing is compared"


@pytest.fixture
def unset(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in list(os.environ):
        if name.startswith(PREFIX):
            monkeypatch.delenv(name)
    return monkeypatch


@pytest.mark.parametrize("name", [*sorted(CODE), "MADE_UP"])
def test_key_depends_on_variables_of_code(name, unset):
    options = lookup.compile_options(ARCH)
    before = disk_cache.key(SPEC, ARCH, options)
    unset.setenv(PREFIX + name, "x")
    assert disk_cache.key(SPEC, ARCH, options) != before


@pytest.mark.parametrize("name", sorted(NEUTRAL | OUTPUT))
def test_key_depends_on_no_other(name, unset):
    options = lookup.compile_options(ARCH)
    before = disk_cache.key(SPEC, ARCH, options)
    unset.setenv(PREFIX + name, "x")
    assert disk_cache.key(SPEC, ARCH, options) == before


@pytest.mark.parametrize(
    ("name", "value", "asks"),
    [
        ("KEEP_PTX", "1", True),
        ("KEEP", "ptx", True),
        ("PRINT_IR", "True", True),
        *(("KEEP_PTX", no, False) for no in ("", "0", "false", "OFF", " no ")),
        ("DUMP_DIR", "/tmp", False),
        ("LOG_LEVEL", "1", False),
    ],
)
def test_variables_that_ask_for_output(name, value, asks, unset):
    unset.setenv(PREFIX + name, value)
    assert dsl_variables.asks_for_output() == asks


def test_dry_run_is_refused_by_name(unset):
    unset.setenv("CUTE_DSL_DRYRUN", "1")
    unset.setattr(lookup, "_functions", {})
    with pytest.raises(RuntimeError, match=r"^CUTE_DSL_DRYRUN is set, under which .*: unset it$"):
        lookup.function(SPEC, ARCH)
    unset.setenv("CUTE_DSL_DRYRUN", "0")
    assert dsl_variables.refused() is None
