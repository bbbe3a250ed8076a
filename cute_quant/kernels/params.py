"""Arguments of a kernel that belong together, as one."""

from __future__ import annotations

import cutlass


class Params:
    """Passes its attributes to a kernel: tensors, numbers, other `Params`, None."""

    def __extract_mlir_values__(self) -> list:
        return [value for t in vars(self).values() for value in _values(t)]

    def __new_from_mlir_values__(self, values: list) -> Params:
        new = object.__new__(type(self))
        rest = list(values)
        for name, t in vars(self).items():
            count = len(_values(t))
            mine, rest = rest[:count], rest[count:]
            setattr(new, name, cutlass.new_from_mlir_values(t, mine) if count else t)
        return new


def _values(t: object) -> list:
    return [] if t is None else cutlass.extract_mlir_values(t)
