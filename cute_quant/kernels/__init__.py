"""What a kernel of your own needs to end in the quantizer; `stage` shows how. The kernels of this
package end in the same stage.

`Stage` takes registers and gives 8-bit registers and scales, `Tile` says who holds what, `Matrix`
and `Params` are arguments of kernels, `load` and `store` move a lane's values, and `fake_matrix`
stands in for a tensor when a kernel is compiled.
"""

from cute_quant.kernels.config import LANES, Access, Tile
from cute_quant.kernels.copy import fake_matrix, load, store, zeros
from cute_quant.kernels.layouts import Matrix
from cute_quant.kernels.numerics import registers, widen
from cute_quant.kernels.params import Params
from cute_quant.kernels.stage import Scales, Stage

__all__ = [
    "LANES",
    "Access",
    "Matrix",
    "Params",
    "Scales",
    "Stage",
    "Tile",
    "fake_matrix",
    "load",
    "registers",
    "store",
    "widen",
    "zeros",
]
