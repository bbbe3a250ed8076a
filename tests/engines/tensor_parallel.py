"""A linear layer of vLLM whose weight two spawned processes share, each with the plug-in.

Each prints its rank, the calls that it took over, and how far its product is off.
"""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace

import torch

PROCESSES, ROWS, N, K = 2, 5, 256, 512


def run(rank: int, store: str) -> None:
    from tests.engines import pretended_gpu, triton_on_cpu

    triton_on_cpu.mend()
    pretended_gpu.pretend(*map(int, os.environ["PRETENDED_GPU"].split(".")))
    import vllm.plugins
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.model_executor.layers.linear import RowParallelLinear
    from vllm.model_executor.layers.quantization.fp8 import Fp8Config

    from cute_quant.integrations.deep_gemm import per_block_cast_to_fp8
    from cute_quant.integrations.engines.vllm import ENGINE

    vllm.plugins.load_general_plugins()
    config = VllmConfig()
    # DeepGEMM's kernel asks for the model's type.
    model = SimpleNamespace(
        hf_text_config=SimpleNamespace(model_type="x"), dtype=torch.bfloat16, is_moe=False
    )
    object.__setattr__(config, "model_config", model)
    with set_current_vllm_config(config):
        parallel_state.init_distributed_environment(
            PROCESSES, rank, f"file://{store}", rank, "gloo"
        )
        parallel_state.initialize_model_parallel(PROCESSES)
        torch.set_default_dtype(torch.bfloat16)
        layer = RowParallelLinear(
            K,
            N,
            bias=False,
            params_dtype=torch.bfloat16,
            quant_config=Fp8Config(True, "dynamic", weight_block_size=[128, 128]),
        )
        torch.set_default_dtype(torch.float32)
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(ROWS, K, generator=generator).bfloat16()
        w = torch.randn(N, K, generator=generator)
        w8, scales = per_block_cast_to_fp8(w, use_ue8m0=True)
        layer.weight.weight_loader(layer.weight, w8)
        layer.weight_scale_inv.weight_loader(layer.weight_scale_inv, scales)
        layer.quant_method.process_weights_after_loading(layer)
        y, _ = layer(x.chunk(PROCESSES, -1)[rank].contiguous())
    expected = x.float() @ w.mT
    error = ((y - expected).norm() / expected.norm()).item()
    counters = [t.counter for t in ENGINE.takeovers if t.name == "linear"]
    calls = sum(c.calls + c.traced for c in counters)
    print(f"rank {rank}: {calls} calls, {error:.3f} off", flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.spawn(run, (sys.argv[1],), PROCESSES)
