"""The package for kernels of one's own: what it exports, and what importing it costs."""

import subprocess
import sys

from cute_quant import kernels


def test_importing_does_not_load_the_dsl():
    code = (
        "import sys, cute_quant.kernels, cute_quant.kernels.config, cute_quant.kernels.heuristics\n"
        "sys.exit('cutlass' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_name_is_there():
    for name in kernels.__all__:
        assert getattr(kernels, name) is not None
    assert not hasattr(kernels, "no_such_name")
