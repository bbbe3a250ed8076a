"""Progress of long work: shown on a terminal, and nowhere else."""

import contextlib
import io
import os
import pty
import re
import subprocess
import sys
import time
import types

import pytest

from cute_quant.jit import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    made = Terminal()
    # pytest puts a stderr of its own in place between this and the test.
    monkeypatch.setattr(progress, "sys", types.SimpleNamespace(stderr=made))
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.1)
    monkeypatch.setattr(progress, "REFRESH_SECONDS", 0.02)
    return made


def test_long_work_is_shown_until_its_end(terminal):
    with progress.elapsed("compiling a"):
        time.sleep(0.3)
    shown = terminal.getvalue()
    assert shown.count(f"{progress.ERASE_LINE}compiling a 0.") > 2
    assert shown.endswith(progress.ERASE_LINE)


def test_long_work_that_fails_leaves_no_line(terminal):
    with pytest.raises(KeyError), progress.elapsed("compiling a"):
        time.sleep(0.2)
        raise KeyError
    assert terminal.getvalue().endswith(progress.ERASE_LINE)


def test_short_work_is_not_shown(terminal):
    with progress.elapsed("compiling a"):
        pass
    assert terminal.getvalue() == ""


def test_bar(terminal):
    progress.bar(1, 2, "a" * 200)
    half = progress.BAR_WIDTH // 2
    assert terminal.getvalue().startswith(f"{progress.ERASE_LINE}{'█' * half}{'░' * half} 1/2 a")
    assert len(terminal.getvalue()) < 100 + len(progress.ERASE_LINE)
    progress.end_bar()
    assert terminal.getvalue().endswith(progress.ERASE_LINE)


def test_files_get_nothing(monkeypatch):
    file = io.StringIO()
    monkeypatch.setattr(progress, "sys", types.SimpleNamespace(stderr=file))
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.0)
    with progress.elapsed("compiling a"):
        time.sleep(0.05)
    progress.bar(1, 2, "a")
    progress.end_bar()
    assert file.getvalue() == ""


def closed() -> io.StringIO:
    file = io.StringIO()
    file.close()
    return file


@pytest.mark.parametrize("stderr", [None, closed(), object()], ids=["none", "closed", "plain"])
def test_no_stderr_is_no_terminal(monkeypatch, stderr):
    monkeypatch.setattr(progress, "sys", types.SimpleNamespace(stderr=stderr))
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.0)
    with progress.elapsed("compiling a"):
        pass
    progress.bar(1, 2, "a")
    progress.end_bar()


def test_stderr_that_goes_away_meanwhile(terminal):
    with progress.elapsed("compiling a"):
        progress.sys.stderr = None
        time.sleep(0.3)


COMPILE = """
import sys, torch
from cute_quant import DEEP_GEMM
from cute_quant.jit import lookup
from cute_quant.kernels.config import QuantizeSpec
lookup.function(QuantizeSpec(torch.bfloat16, DEEP_GEMM), "sm_90a")
"""


def test_a_call_that_compiles_says_so_on_a_terminal():
    parent, child = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", COMPILE], stderr=child)
    os.close(child)
    shown = b""
    # Linux ends a terminal whose other end is closed with an error.
    with contextlib.suppress(OSError):
        while data := os.read(parent, 4096):
            shown += data
    os.close(parent)
    assert process.wait() == 0
    expected = "cute_quant: compiling quantize-bfloat16-e4m3_128_e8m0_mn_major_packed for sm_90a"
    seconds = re.search(rf"{expected} (\d\.\d) s", shown.decode())
    assert seconds and float(seconds[1]) < 1.0, shown
    assert shown.endswith(progress.ERASE_LINE.encode())
