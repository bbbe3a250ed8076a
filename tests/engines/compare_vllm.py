"""Print what `cute-quant engines` finds without a GPU, where vLLM takes its Triton kernels."""

import sys

from tests.engines import triton_on_cpu


def main() -> int:
    triton_on_cpu.mend()
    from cute_quant.cli.main import run

    return run("engines", ["--engine", "vllm", "--json"])


if __name__ == "__main__":
    sys.exit(main())
