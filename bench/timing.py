"""Time GPU work: a CUDA graph of launches over buffers that together exceed the L2 cache."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch

ROTATION_BYTES = 320 << 20
MAX_BUFFERS = 16
LAUNCHES_PER_GRAPH = 20
REPLAYS = 20


def buffer_count(bytes_per_call: int) -> int:
    """Buffers to rotate so that a call finds none of its data in the L2 cache."""
    return max(2, min(MAX_BUFFERS, -(-ROTATION_BYTES // bytes_per_call)))


def capture(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """A graph that runs `calls` in turn, ``LAUNCHES_PER_GRAPH`` of them."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(LAUNCHES_PER_GRAPH):
            calls[i % len(calls)]()
    graph.replay()
    return graph


def median_seconds(graphs: dict[str, torch.cuda.CUDAGraph]) -> dict[str, float]:
    """Seconds a launch for each graph, the median over replays that alternate between them."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    seconds: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(REPLAYS):
        for name, graph in graphs.items():
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            seconds[name].append(start.elapsed_time(end) / 1e3 / LAUNCHES_PER_GRAPH)
    return {name: statistics.median(values) for name, values in seconds.items()}
