"""What a fault is, and how it is planted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

PACKAGE = "cute_quant"


class Fault(NamedTuple):
    """A fault to plant.

    Attributes:
        file: of the package.
        before, after: text that the file has exactly once, and what replaces it.
        tests: files, functions or cases, as pytest names them, the fastest first; one must fail.
    """

    id: str
    file: str
    before: str
    after: str
    tests: Sequence[str]

    def planted(self, source: str) -> str:
        """Return the source of the file with this fault.

        Raises:
            ValueError: the text to be replaced is not there, or more than once.
        """
        count = source.count(self.before)
        if count != 1:
            raise ValueError(
                f"{self.id}: expected {self.before!r} once in {self.file}, found it {count} times"
            )
        return source.replace(self.before, self.after)
