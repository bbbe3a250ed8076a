"""The plug-in in SGLang's workers: compare results, warm kernels up."""

from __future__ import annotations

from typing import Any

import torch

from cute_quant.contract.dtypes import ceil_div
from cute_quant.dispatch import seen
from cute_quant.integrations.engines.takeover import Function


def load_model(original: Function, self: Any) -> Any:
    """Compare the results of all calls on the worker's GPU, then load the model."""
    from cute_quant.integrations.engines.sglang import ENGINE

    ENGINE.check(torch.device(self.device, self.gpu_id))
    seen.watch()
    return original(self)


def forward(
    original: Function,
    self: Any,
    forward_batch: Any,
    skip_attn_backend_init: bool | None = None,
    pp_proxy_tensors: Any = None,
    reinit_attn_backend: bool = False,
    split_forward_count: int = 1,
) -> Any:
    """Run a step; if it made calls of a new kind, warm up those of steps of other sizes.

    SGLang sends itself a short request before it serves. What that calls, longer ones call with
    more rows, as many times more as they have tokens.
    """
    from cute_quant.integrations.engines.sglang import ENGINE

    results = original(
        self,
        forward_batch,
        skip_attn_backend_init,
        pp_proxy_tensors,
        reinit_attn_backend,
        split_forward_count,
    )
    if seen.has_new():
        times = ceil_div(most_tokens(), max(forward_batch.input_ids.numel(), 1))
        done = seen.warm_up(torch.device(self.device, self.gpu_id), max(times, 1))
        ENGINE.log.info("cute_quant warmed up %s", done)
    return results


def most_tokens() -> int:
    """Return how many tokens SGLang prefills in a step at most."""
    from sglang.srt.runtime_context import get_schedule

    schedule = get_schedule()
    return max(schedule.chunked_prefill_size or 0, schedule.max_prefill_tokens or 0)
