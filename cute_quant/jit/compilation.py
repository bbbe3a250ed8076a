"""Decide whether a missing kernel may be compiled here and now.

It may not while compiling is forbidden or a graph is captured, nor in a child that was forked while
its parent compiled.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator

import torch

from cute_quant.jit import dsl_variables

MODE_VARIABLE = "CUTE_QUANT_JIT"
MODES = ("on", "off")

lock = threading.RLock()
"""Held by whoever compiles. Two compilations at a time abort the process, or one silently builds
for the other's target. Kernels that others compile with the DSL are not under this lock."""

load_lock = threading.RLock()
"""Held while objects are loaded, and what loads them is imported: briefly, so a fork waits."""
FORK_SECONDS = 5.0
"""How long a fork waits for one."""

_compiling = False
_forked_meanwhile = False
_forbidden = 0
_load_lock_is_held = False


class _Forbidden(contextlib.AbstractContextManager[None]):
    """Compilation stays forbidden until the end of a ``with`` block, without one for good."""

    _ended = False

    def __exit__(self, *exception: object) -> None:
        global _forbidden
        if not self._ended:
            self._ended = True
            _forbidden -= 1


def forbid_compilation() -> contextlib.AbstractContextManager[None]:
    """Have calls raise where they would compile a kernel, in every thread, as while serving.

    A kernel that is in memory, in a directory built ahead of time or in the disk cache is used. Any
    other raises a RuntimeError at once that says which command builds it. ``CUTE_QUANT_JIT=off``
    does the same from the start. Compiling by name, with ``cute_quant.jit.build`` or ``cute-quant
    build``, stays possible.

    Returns:
        A context manager: in a ``with`` statement the end of the block permits compiling again.
        Without one it stays forbidden.
    """
    global _forbidden
    _forbidden += 1
    return _Forbidden()


def why_refused() -> str | None:
    """Return why nothing may be compiled, as half a sentence, None if it may.

    Raises:
        ValueError: ``CUTE_QUANT_JIT`` makes no sense.
    """
    if _forked_meanwhile:
        return "this process was forked while its parent compiled, so it cannot"
    if _forbidden:
        return "cute_quant.forbid_compilation() was called"
    mode = os.environ.get(MODE_VARIABLE) or MODES[0]
    if mode not in MODES:
        raise ValueError(f"{MODE_VARIABLE}: expected one of {MODES}, got {mode!r}")
    if mode == "off":
        return f"{MODE_VARIABLE}=off forbids compiling"
    return None


def is_capturing() -> bool:
    """Return whether the current stream is captured in a CUDA graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Compile while no other thread of this package does.

    Raises:
        RuntimeError: CuTe DSL cannot compile in this process.
    """
    global _compiling
    if _forked_meanwhile:
        raise RuntimeError(
            "this process was forked while its parent compiled a kernel, so CuTe DSL cannot "
            "compile in it: fork before or after, or start the process with spawn"
        )
    variable = dsl_variables.refused()
    if variable is not None:
        raise RuntimeError(
            f"{variable} is set, under which CuTe DSL compiles nothing that can be called: unset it"
        )
    with lock:
        outermost, _compiling = not _compiling, True
        try:
            yield
        finally:
            if outermost:
                _compiling = False


def _before_fork() -> None:
    global _load_lock_is_held
    _load_lock_is_held = load_lock.acquire(timeout=FORK_SECONDS)


def _after_fork_in_parent() -> None:
    if _load_lock_is_held:
        load_lock.release()


def _after_fork_in_child() -> None:
    # A thread that held a lock is not in the child to give it back, and what CuTe DSL was about to
    # do, imports included, stays half done.
    global lock, load_lock, _compiling, _forked_meanwhile
    lock, load_lock = threading.RLock(), threading.RLock()
    _forked_meanwhile |= _compiling
    _compiling = False


os.register_at_fork(
    before=_before_fork,
    after_in_parent=_after_fork_in_parent,
    after_in_child=_after_fork_in_child,
)
