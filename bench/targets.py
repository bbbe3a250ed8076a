"""Targets for ratios of times, and verdicts on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench.results import Result, Results

ANY = (1, 2**31)
"""Rows, whatever their number."""


@dataclass(frozen=True)
class Target:
    """A bound on the ratio of two providers' times over a range of rows.

    Attributes:
        over, under: the providers, or how their names start.
        launches: ways to launch it is judged in.
        rows: smallest and largest mn.
        bound: of the ratio.
        at_most: whether the bound is an upper one.
    """

    over: str
    under: str
    launches: tuple[str, ...]
    rows: tuple[int, int]
    bound: float
    at_most: bool = True

    def __str__(self) -> str:
        low, high = self.rows
        if self.rows == ANY:
            rows = ""
        elif high == ANY[1]:
            rows = f", M >= {low}"
        else:
            rows = f", M <= {high}" if low == 1 else f", M {low} to {high}"
        operation, separator, _ = self.over.rpartition(": ")
        return f"{self.over} / {self.under.removeprefix(operation + separator)}{rows}"

    def concerns(self, result: Result) -> bool:
        """Return whether a result is of `over`, which names versions without their last part."""
        over = result.provider
        named = over == self.over or (over.startswith(f"{self.over}.") and "vLLM" in over)
        return named and self.rows[0] <= result.mn <= self.rows[1]


def verdicts(results: Results, targets: Sequence[Target]) -> list[str]:
    """Return a line for each target that the results can judge, with its worst shape."""
    lines = []
    for target in targets:
        for launch in target.launches:
            ratios = []
            for r in results:
                if target.concerns(r) and r.launch == launch:
                    ratio = results.ratio(r.provider, target.under, launch, r.mn, r.k)
                    ratios += [(ratio, r.mn, r.k)] if ratio else []
            if ratios:
                worst, mn, k = (max if target.at_most else min)(ratios)
                where = f"worst of {len(ratios)} at {mn} x {k}"
                label = f"{target}, {launch}"
                lines.append(verdict(label, worst, target.bound, target.at_most, where))
    return lines


def verdict(label: str, ratio: float, bound: float, at_most: bool, where: str = "") -> str:
    """Return a line about one ratio."""
    met = ratio <= bound if at_most else ratio >= bound
    sign = "<=" if at_most else ">="
    word = "met   " if met else "MISSED"
    return f"{word} {ratio:6.3f} {sign} {bound:<5} {label:68} {where}".rstrip()
