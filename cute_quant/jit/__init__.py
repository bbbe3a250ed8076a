"""Turn a kernel into a function of torch tensors.

`build` compiles a kernel of your own for an `architecture`. The kernels of this package come from
`lookup`.

Importing this package does not import CuTe DSL; compiling does.
"""

from cute_quant.jit.lookup import architecture, build

__all__ = ["architecture", "build"]
