"""Quantized activations between GPUs: expert parallel, and DTensor.

    plan = distributed.route(topk_ids, experts, group)      # which token goes where
    q, sf = distributed.dispatch(x, plan, fmt)              # quantized, sent, in front of the GEMM
    y = distributed.combine(y, plan, weights)               # and back

`register_shardings` tells DTensor how the operators of this package may be sharded.
"""

from cute_quant.distributed.exchange import combine, dispatch
from cute_quant.distributed.peers import PeerBuffers
from cute_quant.distributed.routing import Plan, route
from cute_quant.distributed.sharding import register_shardings

__all__ = ["PeerBuffers", "Plan", "combine", "dispatch", "register_shardings", "route"]
