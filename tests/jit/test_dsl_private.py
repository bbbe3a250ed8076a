"""Private names of CuTe DSL, and what it sees of the command line."""

import argparse
import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import cute_quant
from cute_quant.jit import dsl_private
from tests.helpers import environment

PACKAGE = Path(cute_quant.__file__).parent
PRIVATE = ("cutlass._mlir", "cutlass.base_dsl", "cutlass.cutlass_dsl")


@pytest.mark.parametrize("module", dsl_private.NAMES)
def test_private_names_exist(module):
    # The first import of CuTe DSL has to be that of the whole.
    importlib.import_module("cutlass.cute")
    imported = importlib.import_module(module)
    for name in dsl_private.NAMES[module]:
        assert hasattr(imported, name), f"{module} has no {name} any more"


def test_private_names_are_all_that_are_used():
    used: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PRIVATE):
                used.setdefault(node.module, set()).update(alias.name for alias in node.names)
            elif isinstance(node, ast.Call) and path.name != "dsl_private.py":
                # A module that is imported by name.
                for argument in node.args:
                    text = argument.value if isinstance(argument, ast.Constant) else None
                    if isinstance(text, str) and text.startswith(PRIVATE):
                        module, _, name = text.rpartition(".")
                        used.setdefault(module, set()).add(name)
    used["cutlass.base_dsl.dsl"] = {"argparse", "_get_diagnostic_arg_parser"}  # replaced, cleared
    assert {module: set(names) for module, names in dsl_private.NAMES.items()} == used


SPEC = """
import sys, threading, torch
from cute_quant import DEEP_GEMM
from cute_quant.jit import lookup
from cute_quant.kernels.config import QuantizeSpec
spec = QuantizeSpec(torch.bfloat16, DEEP_GEMM)
"""
LOOK_UP = "lookup.function(spec, 'sm_100a')\n"
OF_ITS_OWN = """
import cutlass, cutlass.cute as cute
from cute_quant import jit
class Own:
    def signature(self):
        return (cutlass.Int32(1),)
    @cute.jit
    def __call__(self, n: cutlass.Int32):
        pass
jit.build(Own(), "sm_100a")
"""
IN_A_THREAD = f"""
done = []
thread = threading.Thread(target=lambda: done.append({LOOK_UP.strip()}))
thread.start(); thread.join()
assert done, "the thread has died"
"""
AFTER_ANOTHERS = f"""
import cutlass.cute as cute
@cute.jit
def another():
    pass
own, sys.argv = sys.argv, sys.argv[:1]
cute.compile(another, options="--gpu-arch sm_100a")
sys.argv = own
{LOOK_UP}"""


def run(directory: Path, code: str, *arguments: str) -> subprocess.CompletedProcess:
    """Run a program with these arguments; the DSL reads the source of jitted functions."""
    program = directory / "serve.py"
    program.write_text(code)
    return subprocess.run(
        [sys.executable, program, *arguments],
        env=environment(CUTE_QUANT_CACHE="off"),
        capture_output=True,
        text=True,
    )


CALLS = {
    "lookup": (LOOK_UP, ["-d", "cuda"]),
    "own": (OF_ITS_OWN, ["-di", "3"]),
    "thread": (IN_A_THREAD, ["-host", "0.0.0.0"]),
    "after another's": (AFTER_ANOTHERS, ["-h"]),
}


@pytest.mark.slow
@pytest.mark.parametrize(("code", "arguments"), CALLS.values(), ids=CALLS)
def test_arguments_of_the_caller_are_not_read(code, arguments, tmp_path):
    program = f"{SPEC}{code}\nassert sys.argv[1:] == {arguments}\nprint('went on')"
    done = run(tmp_path, program, *arguments)
    assert (done.returncode, done.stdout, done.stderr) == (0, "went on\n", "")


def test_other_compilations_read_the_command_line(tmp_path):
    """CuTe DSL's own option works where the caller compiles without this package."""
    code = """
import cutlass.cute as cute
@cute.jit
def own():
    pass
cute.compile(own, options="--gpu-arch sm_100a")
"""
    done = run(tmp_path, SPEC + LOOK_UP + code, "-h")
    assert done.returncode == 0 and "-diagnostic" in done.stdout


def test_arguments_are_hidden_in_one_thread_alone(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["serve.py", "--port", "1"])
    parser = dsl_private._Parser()
    parser.add_argument("--port")
    with dsl_private.arguments_hidden():
        assert parser.parse_known_args()[0].port is None
        assert sys.argv == ["serve.py", "--port", "1"]
        with dsl_private.arguments_hidden():
            pass
        assert parser.parse_known_args()[0].port is None
    assert parser.parse_known_args()[0].port == "1"
    assert argparse.ArgumentParser is not dsl_private._Parser
