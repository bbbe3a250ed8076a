"""Tests of plug-ins need the engines: see `make test-engines`.

`PRETENDED_GPU` is the compute capability of the GPU that vLLM is made to see.
"""

import os
from importlib.util import find_spec

GPU = os.environ.get("PRETENDED_GPU")

collect_ignore_glob = [
    f"test_{engine}*.py" for engine in ("vllm", "sglang") if find_spec(engine) is None
]
if GPU is None:
    collect_ignore_glob.append("test_vllm*.py")
else:
    from tests.engines import pretended_gpu, triton_on_cpu

    triton_on_cpu.mend()
    pretended_gpu.pretend(*map(int, GPU.split(".")))
