"""Time GPU work: CUDA graphs of launches over rotating buffers, with interleaved replays."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

ROTATION_BYTES = 320 << 20
MAX_BUFFERS = 16
MIN_LAUNCHES = 20
MAX_LAUNCHES = 160
REPLAYS = 24

# A graph long enough that the gap between its first event and first kernel is lost in it. The
# rates only size graphs; nothing is computed from them.
GRAPH_SECONDS = 200e-6
ASSUMED_BYTES_PER_SECOND = 3e12
ASSUMED_LAUNCH_SECONDS = 1.5e-6

# Clock cycles that the GPU spins before each timed replay, about 200 us, so that the graph is
# enqueued by the time its first event passes.
SPIN_CYCLES = 400_000
WARM_UP_SPINS = 1500

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Graph:
    """A captured sequence of calls.

    Attributes:
        graph: the CUDA graph.
        launches: number of calls in the graph.
        calls: the captured calls, whose memory has to last as long as the graph.
    """

    graph: torch.cuda.CUDAGraph
    launches: int
    calls: tuple[Callable[[], object], ...]


@dataclass(frozen=True)
class Timing:
    """Times of a call.

    Attributes:
        seconds: seconds of a call, one for each replay, ascending.
    """

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Return the median of the replays, in seconds."""
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Return the lower and the upper quartile of the replays, in seconds."""
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, high


def buffer_count(bytes_per_call: int) -> int:
    """Return the number of buffers to rotate so that no call finds its data in the L2 cache.

    It is at most ``MAX_BUFFERS``: in a model, too, small activations come from the L2 cache.
    """
    return max(2, min(MAX_BUFFERS, -(-ROTATION_BYTES // bytes_per_call)))


def launch_count(bytes_per_call: int) -> int:
    """Return the number of calls to capture in one graph."""
    seconds = ASSUMED_LAUNCH_SECONDS + bytes_per_call / ASSUMED_BYTES_PER_SECOND
    return max(MIN_LAUNCHES, min(MAX_LAUNCHES, round(GRAPH_SECONDS / seconds)))


def capture(calls: Sequence[Callable[[], object]], launches: int = MIN_LAUNCHES) -> Graph:
    """Capture a graph of `launches` calls that cycles through `calls`.

    Each call runs once before: a first call may compile or load a module, which no capture allows.
    """
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(launches):
            calls[i % len(calls)]()
    graph.replay()
    torch.cuda.synchronize()
    return Graph(graph, launches, tuple(calls))


def warm_up() -> None:
    """Keep the GPU busy for some tenths of a second, since an idle GPU starts at low clocks."""
    for _ in range(WARM_UP_SPINS):
        torch.cuda._sleep(SPIN_CYCLES)
    torch.cuda.synchronize()


def measure(graphs: Mapping[Key, Graph], replays: int = REPLAYS) -> dict[Key, Timing]:
    """Time graphs with interleaved replays, each round starting with another graph."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    seconds: dict[Key, list[float]] = {key: [] for key in graphs}
    keys = list(graphs)
    for i in range(replays):
        first = i % len(keys)
        for key in keys[first:] + keys[:first]:
            torch.cuda._sleep(SPIN_CYCLES)
            start.record()
            graphs[key].graph.replay()
            end.record()
            end.synchronize()
            seconds[key].append(start.elapsed_time(end) / 1e3 / graphs[key].launches)
    return {key: Timing(tuple(sorted(values))) for key, values in seconds.items()}


def median_seconds(graphs: Mapping[Key, Graph]) -> dict[Key, float]:
    """Return the seconds of a call for each graph, the median of interleaved replays."""
    return {key: timing.median for key, timing in measure(graphs).items()}
