"""The parts of a kernel of your own that ends in quantized results.

The kernels of this package end in the same stage. `Stage` takes registers and returns 8-bit
registers and scales. `Tile` is the thread-value layout, `Segment` a thread's part of a row.
`Matrix` and `Params` are arguments of kernels. `load` and `store` move segments, and `fake_matrix`
describes a tensor to the compiler, which is `cute_quant.jit.build`. `scale_layout` says where the
scale of a row and a group lies.

Names are loaded when they are first used, so this package does not import CuTe DSL by itself.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cute_quant.contract.tensors import last_column_rows
    from cute_quant.kernels.config import LANES, Access, Tile
    from cute_quant.kernels.copy import Segment, fake_matrix, load, store
    from cute_quant.kernels.encodings import registers, widen, zeros
    from cute_quant.kernels.layouts import Matrix, scale_layout
    from cute_quant.kernels.params import Params
    from cute_quant.kernels.scales import GroupScale
    from cute_quant.kernels.stage import Rows, Scales, Stage
    from cute_quant.kernels.upper_scales import UpperScale

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
    "UpperScale",
    "fake_matrix",
    "last_column_rows",
    "load",
    "registers",
    "scale_layout",
    "store",
    "widen",
    "zeros",
]

_MODULES = {
    "cute_quant.contract.tensors": ("last_column_rows",),
    "cute_quant.kernels.config": ("LANES", "Access", "Tile"),
    "cute_quant.kernels.copy": ("Segment", "fake_matrix", "load", "store"),
    "cute_quant.kernels.encodings": ("registers", "widen", "zeros"),
    "cute_quant.kernels.layouts": ("Matrix", "scale_layout"),
    "cute_quant.kernels.params": ("Params",),
    "cute_quant.kernels.scales": ("GroupScale",),
    "cute_quant.kernels.stage": ("Rows", "Scales", "Stage"),
    "cute_quant.kernels.upper_scales": ("UpperScale",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return __all__
