"""Results of a benchmark, and the file that holds them.

JSON lines: the first describes the machine; each after it is one provider at one shape, or the
host times.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Result:
    """One provider at one shape.

    Attributes:
        provider, launch: as in `bench.providers`.
        mn, k: rows and columns of the input.
        seconds, quartiles: a call, over the replays.
        bytes: that a quantizer moves at this shape.
        buffers, launches, replays: of the measurement.
        difference: how the output is not the reference's; empty where it is as it should be.
        differing: share of the values and scales looked at that are not the reference's to the
            bit, though as close as they have to be.
    """

    provider: str
    launch: str
    mn: int
    k: int
    seconds: float
    quartiles: tuple[float, float]
    bytes: int
    buffers: int
    launches: int
    replays: int
    difference: str = ""
    differing: float = 0.0

    @property
    def spread(self) -> float:
        """Return the interquartile range over the median."""
        return (self.quartiles[1] - self.quartiles[0]) / self.seconds


class Results:
    """All of a run, to be looked up by provider, launch and shape."""

    def __init__(
        self,
        machine: dict[str, Any],
        results: Sequence[Result] = (),
        host: dict[str, float] | None = None,
    ):
        self.machine = machine
        self.host = host or {}
        self._by_key: dict[tuple[str, str, int, int], Result] = {}
        for result in results:
            self.add(result)

    def add(self, result: Result) -> None:
        self._by_key[result.provider, result.launch, result.mn, result.k] = result

    def get(self, provider: str, launch: str, mn: int, k: int) -> Result | None:
        return self._by_key.get((provider, launch, mn, k))

    def ratio(self, a: str, b: str, launch: str, mn: int, k: int) -> float | None:
        """Return the time of provider `a` over that of `b`, or None if one was not measured."""
        over, under = self.get(a, launch, mn, k), self.get(b, launch, mn, k)
        return over.seconds / under.seconds if over and under else None

    def providers(self, launch: str | None = None) -> list[str]:
        """Return names in the order in which they came."""
        return list(dict.fromkeys(r.provider for r in self if launch in (None, r.launch)))

    def launches(self) -> list[str]:
        return list(dict.fromkeys(r.launch for r in self))

    def columns(self) -> list[int]:
        return sorted({r.k for r in self})

    def rows(self, k: int) -> list[int]:
        return sorted({r.mn for r in self if r.k == k})

    def __iter__(self) -> Iterator[Result]:
        return iter(self._by_key.values())

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as file:
            for line in self.to_json():
                file.write(json.dumps(line) + "\n")

    def to_json(self) -> list[dict[str, Any]]:
        host = [{"host_seconds": self.host}] if self.host else []
        return [{"machine": self.machine}, *map(asdict, self), *host]

    @classmethod
    def read(cls, path: Path) -> Results:
        lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
        results, machine, host = [], {}, {}
        for line in lines:
            if "machine" in line:
                machine = line["machine"]
            elif "host_seconds" in line:
                host = line["host_seconds"]
            else:
                results.append(Result(**{**line, "quartiles": tuple(line["quartiles"])}))
        return cls(machine, results, host)


def machine_lines(machine: dict[str, Any]) -> list[str]:
    """Return the GPU, its driver, and versions, in words; what was not recorded is left out."""
    known = {
        "driver ": machine.get("driver"),
        "CUDA ": machine.get("cuda"),
        "": machine.get("date"),
        "commit ": machine.get("commit") or "unknown",
    }
    versions = {**machine.get("versions", {}), "Python": machine.get("python")}
    lines = [
        [str(machine.get("gpu")), *(f"{name}{value}" for name, value in known.items() if value)],
        [f"{name} {version}" for name, version in versions.items() if version],
    ]
    return [", ".join(words) for words in lines if words]
