"""Arguments of a kernel that belong together, as one."""

from __future__ import annotations

from typing import ClassVar, TypeVar

import cutlass

Self = TypeVar("Self", bound="Params")


class Params:
    """Arguments of a kernel as attributes of one object.

    An attribute is a tensor, a number, a tuple of these, another `Params` or None. A subclass is
    a dataclass of them, or computes them in an ``__init__`` of its own, which runs where the kernel
    is launched, not in it.

    Attributes:
        static: names of attributes that are compile-time choices, and are not passed.
    """

    static: ClassVar[tuple[str, ...]] = ()

    def replace(self: Self, **attributes: object) -> Self:
        """Return a copy with other attributes."""
        new = object.__new__(type(self))
        vars(new).update(vars(self) | attributes)
        return new

    def __extract_mlir_values__(self) -> list:
        return [value for name in vars(self) for value in self._values(name)]

    def __new_from_mlir_values__(self, values: list) -> Params:
        new = object.__new__(type(self))
        rest = list(values)
        for name, t in vars(self).items():
            count = len(self._values(name))
            mine, rest = rest[:count], rest[count:]
            setattr(new, name, cutlass.new_from_mlir_values(t, mine) if count else t)
        return new

    def _values(self, name: str) -> list:
        t = getattr(self, name)
        return [] if t is None or name in self.static else cutlass.extract_mlir_values(t)
