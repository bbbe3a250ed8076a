"""What the plug-in does in vLLM's workers: compare results, warm kernels up, fuse graphs."""

from __future__ import annotations

from typing import Any

from cute_quant.dispatch import seen
from cute_quant.integrations.engines.engine import Engine
from cute_quant.integrations.engines.takeover import Counter, Function

COMPILE_FACTOR = "CUTE_QUANT_TAKEN_OVER"


def load_model(original: Function, self: Any, *, load_dummy_weights: bool = False) -> Any:
    """Compare the results of all calls on the worker's GPU, then load the model."""
    from cute_quant.integrations.engines.vllm import ENGINE

    seen.watch()
    ENGINE.check(self.device)
    return original(self, load_dummy_weights=load_dummy_weights)


def kernel_warmup(original: Function, worker: Any, *, process_local_only: bool = False) -> None:
    """Warm up vLLM's kernels, then those of the calls that its dummy run has made.

    The run has as many tokens as a step may have. Steps of fewer tokens may take other kernels.
    """
    from cute_quant.integrations.engines.vllm import ENGINE

    original(worker, process_local_only=process_local_only)
    done = seen.warm_up(worker.device)
    ENGINE.log.info("cute_quant warmed up %s", done)


fused = Counter()
"""Traced calls are quantizers that became one with what is before them."""


def configure_passes(original: Function, self: Any, config: Any) -> None:
    """Let vLLM's manager of passes choose its own, then add the one of this package."""
    from cute_quant.integrations.engines.vllm_passes import FuseWithQuantize

    original(self, config)
    self.passes.append(FuseWithQuantize(config, fused))


def add_to_compile_key(engine: Engine) -> None:
    """Have vLLM's cache of compiled graphs tell apart what was taken over.

    Graphs with operators of this package stay valid for it alone.
    """
    from vllm import envs

    from cute_quant import __version__

    def factor() -> str:
        return ",".join([__version__, *engine.taken()])

    envs.environment_variables[COMPILE_FACTOR] = factor
