"""Every private name of torch that the package uses, in one place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch._C import _after_ADInplaceOrView_keyset as BELOW_VERSIONS
from torch._C import _get_tracing_state as jit_tracing_state
from torch._C import _increment_version as increment_version
from torch._C import _len_torch_dispatch_stack as num_dispatch_modes
from torch._C._dynamo import eval_frame
from torch._C._dynamo.guards import TensorGuards
from torch._C._functorch import is_functorch_wrapped_tensor as is_functorch_wrapped
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

__all__ = [
    "BELOW_VERSIONS",
    "constant_in_graphs",
    "has_tangent",
    "hash_all_arguments",
    "in_dual_level",
    "increment_version",
    "is_fake",
    "is_functorch_wrapped",
    "jit_tracing_state",
    "look_alike_check",
    "num_dispatch_modes",
    "outside_of_graphs",
    "statically_known_true",
    "symmetric_memory",
]


_F = TypeVar("_F", bound=Callable[..., Any])


def constant_in_graphs(function: _F) -> _F:
    """Have ``torch.compile`` call a function while it traces, and take its result for a constant.

    It is ``torch.compiler.assume_constant_result`` without the seconds that its import takes.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def outside_of_graphs(function: _F) -> _F:
    """Have ``torch.compile`` trace neither a function nor what it calls.

    It is ``torch.compiler.disable`` without the seconds that its import takes, and takes no time.
    """
    skip = eval_frame._FrameExecStrategy(*[eval_frame._FrameAction.SKIP] * 2)
    eval_frame.set_code_exec_strategy(function.__code__, skip)
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    return function


def is_fake(t: object) -> bool:
    """Return whether a tensor has no memory, as tracers have them."""
    return isinstance(t, FakeTensor)


def in_dual_level() -> bool:
    """Return whether tensors may have tangents at all, which is quicker to see."""
    return forward_ad._current_level >= 0


def has_tangent(t: torch.Tensor) -> bool:
    """Return whether a tensor has a tangent of forward-mode differentiation."""
    unpack_dual: Callable[[torch.Tensor], Any] = forward_ad.unpack_dual
    return unpack_dual(t).tangent is not None


def statically_known_true(condition: Any) -> bool:
    """Return whether a condition on symbolic sizes holds in every run, without a guard."""
    # It imports sympy, which takes longer than all of this package.
    from torch.fx.experimental import symbolic_shapes

    return symbolic_shapes.statically_known_true(condition)


def look_alike_check(*tensors: torch.Tensor) -> Callable[..., bool]:
    """Return a check of other tensors that takes a tenth of the time of reading what it compares.

    It is that of ``torch.compile``'s guards. As many tensors pass as were given, with the same
    types, dtypes, devices, shapes, strides, dispatch keys (so no lazily negated views, and inside
    of no transform) and need of a gradient.
    """
    # The stubs have lists of sizes, not one for each tensor.
    return TensorGuards(
        *tensors,
        dynamic_dims_sizes=[list(t.shape) for t in tensors],  # type: ignore[misc]
        dynamic_dims_strides=[list(t.stride()) for t in tensors],  # type: ignore[misc]
    ).check


def hash_all_arguments(operator: Any) -> None:
    """Have DTensor choose the sharding of an operator anew where any argument differs.

    By itself it takes none but tensors and ints into account, and takes the dtypes and the
    placements of another format for those of this one.
    """
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._op_schema import RuntimeSchemaInfo

    keywords = [a.name for a in operator._schema.arguments if a.kwarg_only]
    info = RuntimeSchemaInfo(1, keywords or None, needs_pytree=True)
    propagator = DTensor._op_dispatcher.sharding_propagator
    propagator.op_to_schema_info[operator] = info


def symmetric_memory(
    shape: tuple[int, ...], device: torch.device, group: Any
) -> tuple[list[torch.Tensor], object]:
    """Allocate bytes on each rank that all ranks of a group see; they call this together.

    Returns:
        The memory of each rank, `shape`, uint8, zeros; and what owns it.
    """
    from torch.distributed import _symmetric_memory

    own = _symmetric_memory.empty(shape, dtype=torch.uint8, device=device)
    handle: Any = _symmetric_memory.rendezvous(own, group)
    own.zero_()
    # Nobody writes to the memory of a rank before it is zeros.
    handle.barrier()
    ranks = range(handle.world_size)
    return [handle.get_buffer(rank, shape, torch.uint8) for rank in ranks], handle
