"""The parts of a kernel of one's own that ends in the quantizer; `stage` shows how.

The kernels of this package end in the same stage. `Stage` takes registers and returns 8-bit
registers and scales. `Tile` is the thread-value layout, `Segment` a thread's part of a row.
`Matrix` and `Params` are arguments of kernels. `load` and `store` move segments, and `fake_matrix`
stands in for a tensor when a kernel is compiled.

Names are loaded when they are first used, so this package does not import CuTe DSL by itself.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cute_quant.kernels.config import LANES, Access, Tile
    from cute_quant.kernels.copy import Segment, fake_matrix, load, store
    from cute_quant.kernels.encodings import registers, widen, zeros
    from cute_quant.kernels.layouts import Matrix
    from cute_quant.kernels.params import Params
    from cute_quant.kernels.scales import GroupScale
    from cute_quant.kernels.stage import Rows, Scales, Stage

__all__ = [
    "LANES",
    "Access",
    "GroupScale",
    "Matrix",
    "Params",
    "Rows",
    "Scales",
    "Segment",
    "Stage",
    "Tile",
    "fake_matrix",
    "load",
    "registers",
    "store",
    "widen",
    "zeros",
]

_MODULES = {
    "config": ("LANES", "Access", "Tile"),
    "copy": ("Segment", "fake_matrix", "load", "store"),
    "encodings": ("registers", "widen", "zeros"),
    "layouts": ("Matrix",),
    "params": ("Params",),
    "scales": ("GroupScale",),
    "stage": ("Rows", "Scales", "Stage"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
