"""Processes of a group that run functions of the tests, as many times as they are asked."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

SECONDS = 60
"""Most of an answer, where nothing is said; the processes share two cores."""
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["cute_quant.distributed", "tests.distributed.cases"])


def serve(
    rank: int, ranks: int, backend: str, store: str, timeout: float, connection: Connection
) -> None:
    """Join the group, and answer calls until the connection is closed."""
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        backend,
        init_method=f"file://{store}",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=timeout),
    )
    with contextlib.suppress(EOFError):
        while True:
            function, arguments = connection.recv()
            try:
                connection.send((function(rank, *arguments), None))
            except Exception:
                connection.send((None, traceback.format_exc()))
    # A group whose ranks are gone is not destroyed in order.
    os._exit(0)


class Ranks:
    """The processes."""

    def __init__(self, processes: list[Any], connections: list[Connection], timeout: float):
        self.processes = processes
        self.connections = connections
        self.timeout = timeout

    def start(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Have all ranks call ``function(rank, *arguments)``."""
        for connection in self.connections:
            connection.send((function, arguments))

    def answer(self, rank: int) -> tuple[Any, str | None]:
        """Return what a rank returned, or the traceback of what it raised."""
        assert self.connections[rank].poll(self.timeout), f"rank {rank} does not answer"
        return self.connections[rank].recv()

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Return the results of all ranks, or fail at the first error: others may wait for it."""
        self.start(function, *arguments)
        results: dict[int, Any] = {}
        waiting = {self.connections[rank]: rank for rank in range(len(self.processes))}
        while waiting:
            answered = wait(list(waiting), self.timeout)
            assert answered, f"ranks {sorted(waiting.values())} do not answer"
            for connection in waiting.keys() & set(answered):
                rank = waiting.pop(connection)
                results[rank], error = connection.recv()
                assert error is None, f"rank {rank}: {error}"
        return [results[rank] for rank in range(len(self.processes))]


@contextlib.contextmanager
def started(count: int, timeout: float = SECONDS, backend: str = "gloo") -> Iterator[Ranks]:
    """Start a group, on a GPU each with nccl, and end its processes afterwards."""
    processes, connections = [], []
    with tempfile.TemporaryDirectory() as directory:
        for rank in range(count):
            ours, theirs = CONTEXT.Pipe()
            process = CONTEXT.Process(
                target=serve,
                args=(rank, count, backend, f"{directory}/store", timeout, theirs),
                daemon=True,
            )
            process.start()
            theirs.close()
            processes.append(process)
            connections.append(ours)
        try:
            yield Ranks(processes, connections, timeout)
        finally:
            for connection in connections:
                connection.close()
            for process in processes:
                process.join(5)
                process.kill()
