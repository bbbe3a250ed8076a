"""Processes that call functions of this package side by side, each on one task after the other.

They are fresh processes of this interpreter, not forks, and do not import the caller's program:
who calls from a script that has no ``if __name__ == "__main__"`` may use them.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Sequence
from typing import Any

MAX_WORKERS = 8
"""Processes; each has a compiler in memory."""

_BOOT = "import sys; sys.path[:] = {path!r}; from cute_quant.jit.workers import serve; serve()"


def count_for(tasks: int) -> int:
    """Return how many processes are worth it; each takes as long to start as five kernels."""
    return min(len(os.sched_getaffinity(0)), MAX_WORKERS, (tasks + 4) // 5)


def serve() -> None:
    """Answer requests from standard input until it ends: what a worker does."""
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    # What the compiler prints does not belong between the answers.
    os.dup2(2, 1)
    while True:
        try:
            function, task = pickle.load(requests)
        except EOFError:
            return
        try:
            answer = True, function(*task)
        except Exception as error:
            answer = False, f"{type(error).__name__}: {error}"
        pickle.dump(answer, answers)
        answers.flush()


class _Worker:
    """A process that answers."""

    def __init__(self) -> None:
        # A terminal interrupts all processes of its group; this one ends the others.
        self._process = subprocess.Popen(
            [sys.executable, "-c", _BOOT.format(path=sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )

    def ask(self, function: Callable[..., Any], task: tuple[Any, ...]) -> Any:
        """Return what a function returns for a task.

        Raises:
            RuntimeError: it raises, or ends the process.
        """
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        try:
            pickle.dump((function, task), process.stdin)
            process.stdin.flush()
            done, answer = pickle.load(process.stdout)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError) as error:
            raise RuntimeError(
                f"a process that compiled ended with status {process.wait()}"
            ) from error
        if not done:
            raise RuntimeError(answer)
        return answer

    def end(self) -> None:
        """End the process, whatever it does."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()


def results(
    function: Callable[..., Any], tasks: Sequence[tuple[Any, ...]], count: int
) -> Generator[tuple[int, Any], None, None]:
    """Yield the number of each task and what a function returns for it, as they are done.

    Args:
        function: of a module of this package.
        tasks: its arguments, once for each call.
        count: of processes, at least 1.

    Raises:
        RuntimeError: a call raises, or ends its process. Tasks that are left are not done.
    """
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in range(len(tasks)):
        waiting.put(number)
    answers: queue.SimpleQueue[tuple[int, Any, Exception | None]] = queue.SimpleQueue()
    workers: list[_Worker] = []

    def drive(worker: _Worker) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                number = waiting.get_nowait()
                try:
                    answers.put((number, worker.ask(function, tasks[number]), None))
                except Exception as error:
                    answers.put((number, None, error))
                    return

    try:
        for _ in range(min(count, len(tasks))):
            workers.append(_Worker())
            threading.Thread(target=drive, args=(workers[-1],), daemon=True).start()
        for _ in tasks:
            number, result, error = answers.get()
            if error is not None:
                raise error
            yield number, result
    finally:
        for worker in workers:
            worker.end()
