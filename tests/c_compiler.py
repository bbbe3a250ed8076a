"""The mark of tests that emulate kernels, whose host code a C compiler links."""

import pytest

from cute_quant.emulator.host import C_COMPILER

needs_c_compiler = pytest.mark.skipif(C_COMPILER is None, reason="needs a C compiler")
