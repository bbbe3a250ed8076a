"""Processes forked while a thread compiles: each child compiles, loads, or raises by name."""

import json
import os
import subprocess
import sys

import pytest

from tests.helpers import environment

FORKS = int(os.environ.get("CUTE_QUANT_TEST_FORKS", "20"))
"""How often it is forked: ``CUTE_QUANT_TEST_FORKS=200`` for long."""

FORK = """
import itertools, json, os, random, select, signal, sys, threading, time, torch
from cute_quant import DEEP_GEMM
from cute_quant.jit import lookup
from cute_quant.kernels.config import Access, QuantizeSpec

kept = QuantizeSpec(torch.bfloat16, DEEP_GEMM)
lookup.function(kept, "sm_100a")
lookup._functions.clear()
stop, compiled = threading.Event(), []

def compile_forever():
    formats = itertools.product((16, 32, 64, 128, 256), (16, 8, 4, 2), (16, 8, 4, 2, 1))
    for size, load, store in formats:
        if stop.is_set():
            return
        fmt = DEEP_GEMM.replace(group_size=size)
        spec = QuantizeSpec(torch.float16, fmt, access=Access(load, store))
        lookup.function(spec, "sm_100a")
        compiled.append(1)

def child(write, number):
    spec = kept if number % 2 else QuantizeSpec(torch.float32, DEEP_GEMM)
    try:
        lookup.function(spec, "sm_100a")
        outcome = "loaded" if number % 2 else "compiled"
    except RuntimeError as error:
        outcome = str(error)
    os.write(write, outcome.encode())
    os._exit(0)

thread = threading.Thread(target=compile_forever, daemon=True)
thread.start()
draw, outcomes = random.Random(0), []
for number in range(int(sys.argv[1])):
    time.sleep(draw.uniform(0.0, 0.1))
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        child(write, number)
    os.close(write)
    ready, _, _ = select.select([read], [], [], 30)
    outcomes.append(os.read(read, 4096).decode() if ready else "hangs")
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(read)
    if not ready:
        break
stop.set()
thread.join()
print(json.dumps([outcomes, len(compiled) > 0]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["on", pytest.param("off", marks=pytest.mark.slow)])
def test_children_of_a_process_that_compiles(cache, tmp_path):
    directory = tmp_path / "cache"
    directory.mkdir(mode=0o700)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORK, str(FORKS)],
        env=environment(CUTE_QUANT_CACHE_DIR=str(directory), CUTE_QUANT_CACHE=cache),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    outcomes, went_on = json.loads(done.stdout)
    assert went_on
    refused = "this process was forked while its parent compiled"
    for number, outcome in enumerate(outcomes):
        loads = number % 2 and cache == "on"
        assert (
            outcome == "loaded"
            if loads
            else outcome in ("loaded", "compiled")
            or (refused in outcome and "for sm_100a is not built yet" in outcome)
        ), (number, outcome)
    assert any(refused in outcome for outcome in outcomes), "it never compiled when it was forked"


BEFORE = """
import os, torch
from cute_quant import DEEP_GEMM
from cute_quant.jit import lookup
from cute_quant.kernels.config import QuantizeSpec
lookup.function(QuantizeSpec(torch.bfloat16, DEEP_GEMM), "sm_100a")
if os.fork() == 0:
    lookup.function(QuantizeSpec(torch.float16, DEEP_GEMM), "sm_100a")
    os._exit(7)
print(os.waitstatus_to_exitcode(os.wait()[1]))
"""


@pytest.mark.slow
def test_child_of_a_process_that_has_compiled_compiles():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BEFORE],
        env=environment(CUTE_QUANT_CACHE="off"),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout == "7\n", done.stderr
