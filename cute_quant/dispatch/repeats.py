"""Calls of an operator that look like a recent one, launched without keys, checks and plans.

What compiled graphs call has the same options at every layer, and tensors of the same looks. This
serves operators that return q and sf, whatever they read and write besides; `launch` has the same
for functions of x alone, with less to compare.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from cute_quant.contract.calls import Call
from cute_quant.contract.dtypes import LOAD_BYTES
from cute_quant.contract.tensors import span
from cute_quant.contract.torch_private import look_alike_check
from cute_quant.dispatch import launch
from cute_quant.dispatch.launch import Results
from cute_quant.dispatch.plan import Plan, View


class _Slot(NamedTuple):
    """A tensor of a call among the arguments of the kernel.

    Attributes:
        place: among the arguments of the kernel.
        source: among the tensors of the call, after which come q and sf.
        view: that the kernel takes, None for the tensor as it is.
    """

    place: int
    source: int
    view: View | None


class _Repeat(NamedTuple):
    """A call, without its tensors.

    Attributes:
        options: arguments by position, ``torch.Tensor`` in the place of tensors.
        keywords: arguments by name.
        matches: whether tensors look like those of the call.
        offsets: addresses of the tensors over the alignment of loads.
        extents: bytes from the first element of each tensor to its last.
        written: which of the tensors are written.
        plan: allocates the results.
        function: the kernel.
        arguments: of the kernel, but for its tensors.
        slots: where these belong.
    """

    options: list[object]
    keywords: dict[str, object]
    matches: Callable[..., bool]
    offsets: list[int]
    extents: list[int]
    written: list[int]
    plan: Plan
    function: Callable[..., None]
    arguments: list[object]
    slots: list[_Slot]


_recent: dict[str, list[_Repeat]] = {}
"""Those of an operator by its name, the last one first."""


def run(name: str, positional: tuple[Any, ...], keywords: dict[str, Any]) -> Results | None:
    """Launch a call of an operator and return q and sf.

    Return None if it looks like no recent one, or anything else is unusual.
    """
    recent = _recent.get(name)
    if recent is None or not launch.launches_now():
        return None
    tensors, options = _parts(positional)
    for repeat in recent:
        # Tensors without memory have no address, and match none.
        if (
            repeat.options == options
            and repeat.keywords == keywords
            and repeat.matches(*tensors)
            and repeat.offsets == _offsets(tensors)
        ):
            break
    else:
        return None
    if _overlaps(repeat, tensors):
        return None
    arguments = repeat.arguments.copy()
    q, sf = repeat.plan.new_q(), repeat.plan.new_sf()
    tensors += q, sf
    for place, source, view in repeat.slots:
        t = tensors[source]
        arguments[place] = t if view is None else view.of(t)
    repeat.function(*arguments)
    return q, sf


def remember(
    name: str, call: Call, results: Results, positional: tuple[Any, ...], keywords: dict[str, Any]
) -> None:
    """Have calls like one that was launched find it."""
    tensors, options = _parts(positional)
    q, sf = results[:2]
    sources = {id(t): i for i, t in enumerate([*tensors, q, sf])}
    if len(sources) < len(tensors) + 2 or not launch.launches_now():
        # Of a tensor that is given twice nothing says which argument took which place.
        return
    plan = launch.known_plan(call)
    if plan is None or plan.kernel is None:
        return
    recent = _recent.setdefault(name, [])
    for repeat in recent:
        # One that looks the same was passed over for something else, and will be again.
        if (
            repeat.plan is plan
            and repeat.options == options
            and repeat.keywords == keywords
            and repeat.matches(*tensors)
        ):
            return
    operands, further = launch.kernel_tensors(call, q, sf, None)
    taken = [*operands, *further]
    views = plan.kernel.views or [None] * len(taken)
    missing_rows = 0  # of new scales, which have memory for all padding
    numbers: list[object] = [missing_rows, *plan.kernel.numbers]
    arguments = [*[None] * len(operands), *numbers, *[None] * len(further)]
    slots = []
    for i, (t, view) in enumerate(zip(taken, views, strict=True)):
        if t is None:
            continue
        if id(t) not in sources:
            return
        place = i if i < len(operands) else i + len(numbers)
        slots.append(_Slot(place, sources[id(t)], view))
    writes = () if call.prologue is None else call.prologue.writes.values()
    repeat = _Repeat(
        options,
        keywords,
        look_alike_check(*tensors),
        _offsets(tensors),
        [span(t) for t in tensors],
        [sources[id(t)] for t in writes],
        plan,
        plan.kernel.function,
        arguments,
        slots,
    )
    recent[:] = [repeat, *recent[: launch.MAX_RECENT - 1]]


def _parts(positional: tuple[Any, ...]) -> tuple[list[torch.Tensor], list[object]]:
    """Return the tensors among arguments, and the arguments with their class in their places."""
    tensors = [t for t in positional if isinstance(t, torch.Tensor)]
    return tensors, [torch.Tensor if isinstance(v, torch.Tensor) else v for v in positional]


def _offsets(tensors: list[torch.Tensor]) -> list[int]:
    return [t.data_ptr() % LOAD_BYTES for t in tensors]


def _overlaps(repeat: _Repeat, tensors: list[torch.Tensor]) -> bool:
    """Return whether what is written may lie in the memory of another tensor."""
    if not repeat.written:
        return False
    extents, addresses = repeat.extents, [t.data_ptr() for t in tensors]
    for i in repeat.written:
        start, end = addresses[i], addresses[i] + extents[i]
        for j, other in enumerate(addresses):
            if j != i and start < other + extents[j] and other < end:
                return True
    return False
