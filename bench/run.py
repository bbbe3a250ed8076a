"""Run providers over shapes: check, capture, measure, keep the results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch

from bench import environment
from bench.results import Result, Results
from cute_quant.lab import timing


class Check(NamedTuple):
    """How results compare with the reference.

    Attributes:
        difference: in words; empty where they are within what is allowed.
        differing: share of values and scales that are not the reference's to the bit.
    """

    difference: str
    differing: float = 0.0


class Problem(Protocol):
    """Buffers of one shape."""

    mn: int
    k: int

    @property
    def buffers(self) -> Sequence[object]:
        """Return the memory of the calls, one buffer for each."""


ProblemT = TypeVar("ProblemT", bound=Problem, contravariant=True)


class Provider(Protocol[ProblemT]):
    """A way to compute something on each buffer of a problem.

    Attributes:
        name: in tables and plots.
        launch: one of ``names.LAUNCHES``.
        ours: whether a wrong result is a defect of this package.
    """

    name: str
    launch: str
    ours: bool

    def calls(self, problem: ProblemT) -> Sequence[Callable[[], object]]:
        """Return a call on each buffer."""

    def check(self, problem: ProblemT) -> Check:
        """Run on poisoned outputs, and compare with the reference."""

    def bytes_moved(self, problem: ProblemT) -> int:
        """Return the bytes that one call moves."""


ProviderT = TypeVar("ProviderT", bound=Provider[Any])


class Run(Generic[ProviderT]):
    """A run of a benchmark.

    Args:
        program: command line without its arguments.
        make_problem: function of rows and columns that makes the buffers of a shape.
        providers: implementations to measure.
        commit: name of the measured version, where there is no git to ask.

    Attributes:
        providers: those that have not failed so far.
        results: results so far.
        wrong: whether a provider of this package gave a wrong result.
    """

    def __init__(
        self,
        program: str,
        make_problem: Callable[[int, int], Problem],
        providers: Iterable[ProviderT],
        commit: str | None,
    ):
        self.make_problem = make_problem
        self.providers = list(providers)
        self.results = Results(environment.describe(program, commit))
        self.wrong = False

    def measure(self, mn: int, k: int, providers: Iterable[ProviderT]) -> None:
        """Measure a shape, and add the results of providers that are right and do not fail."""
        # The blocks of the shape before fit none of this one.
        torch.cuda.empty_cache()
        problem = self.make_problem(mn, k)
        graphs: dict[tuple[str, str], timing.Graph] = {}
        found: dict[tuple[str, str], tuple[ProviderT, Check]] = {}
        for provider in list(providers):
            key = provider.name, provider.launch
            try:
                calls = provider.calls(problem)
                check = provider.check(problem)
                if check.difference:
                    self._report(provider, problem, check.difference)
                    if provider.ours:
                        continue
                launches = timing.launch_count(provider.bytes_moved(problem))
                graphs[key] = timing.capture(calls, launches)
                found[key] = provider, check
            except Exception as error:
                if provider.ours:
                    raise
                say(f"dropped: {provider.name}, {provider.launch}: {first_line(error)}")
                self.providers.remove(provider)
        for key, measured in timing.measure(graphs).items():
            provider, check = found[key]
            self.results.add(
                Result(
                    provider=provider.name,
                    launch=provider.launch,
                    mn=mn,
                    k=k,
                    seconds=measured.median,
                    quartiles=measured.quartiles,
                    bytes=provider.bytes_moved(problem),
                    buffers=len(problem.buffers),
                    launches=graphs[key].launches,
                    replays=len(measured.seconds),
                    difference=check.difference,
                    differing=check.differing,
                )
            )

    def _report(self, provider: ProviderT, problem: Problem, difference: str) -> None:
        self.wrong |= provider.ours
        marked = "not timed" if provider.ours else "marked !"
        say(
            f"{provider.name}, {provider.launch}, at {problem.mn} x {problem.k} is not what the "
            f"reference allows, {marked}: {difference}"
        )


def say(*lines: str) -> None:
    """Print lines as they come."""
    for line in lines:
        print(line, flush=True)


def first_line(error: Exception) -> str:
    """Return the kind of an error and the first line of what it says."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
