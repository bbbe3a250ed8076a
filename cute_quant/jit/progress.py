"""Progress in a terminal while something takes long. Elsewhere nothing is written."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator

QUIET_SECONDS = 0.5
"""Work that is done by then shows nothing."""
REFRESH_SECONDS = 0.1

ERASE_LINE = "\r\x1b[2K"
BAR_WIDTH = 30


@contextlib.contextmanager
def elapsed(label: str) -> Iterator[None]:
    """Show a label and the seconds since, from half a second on until the end."""
    if not _is_terminal():
        yield
        return
    start = time.perf_counter()
    done = threading.Event()

    def show() -> None:
        shown = done.wait(QUIET_SECONDS)
        while not shown:
            _write(f"{ERASE_LINE}{label} {time.perf_counter() - start:.1f} s")
            shown = done.wait(REFRESH_SECONDS)

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        if time.perf_counter() - start > QUIET_SECONDS:
            _write(ERASE_LINE)


def bar(done: int, total: int, label: str) -> None:
    """Show how many of how many are done, and what comes next."""
    if _is_terminal():
        filled = BAR_WIDTH * done // max(total, 1)
        drawn = "█" * filled + "░" * (BAR_WIDTH - filled)
        _write(f"{ERASE_LINE}{drawn} {done}/{total} {label}"[: len(ERASE_LINE) + 99])


def end_bar() -> None:
    """Make place for other lines."""
    if _is_terminal():
        _write(ERASE_LINE)


def _is_terminal() -> bool:
    # A process may have no stderr, or one that is closed, or put anything in its place: what is
    # shown must not break what is done.
    try:
        return bool(sys.stderr.isatty())
    except (AttributeError, OSError, ValueError):
        return False


def _write(text: str) -> None:
    with contextlib.suppress(AttributeError, OSError, ValueError):
        sys.stderr.write(text)
        sys.stderr.flush()
