"""How the operators of this package may be sharded, for DTensor.

A strategy is of one dimension of a mesh; DTensor combines them over several, and redistributes what
is sharded otherwise. Rows, and matrices of a batch, are independent of each other. Along k a shard
has whole groups, and whole words of four where scales are packed. All else is replicated.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from cute_quant.contract.blocks import stored_once
from cute_quant.contract.formats import Format
from cute_quant.contract.rows import DENSE, Indexed, Masked
from cute_quant.contract.torch_private import hash_all_arguments

if TYPE_CHECKING:
    from torch.distributed.tensor import Placement

Spec = Any
"""A tensor's shape, mesh and placements, as DTensor gives them."""
Strategy = tuple[list["Placement | None"], list["Placement | None"]]
"""Placements of results and of arguments, None of those that are no tensors."""


class Sharding(NamedTuple):
    """One way to shard an operator along a dimension of a mesh.

    Attributes:
        results: dimension of each result that is sharded.
        arguments: the same of arguments, by name; all others are replicated.
    """

    results: tuple[int, ...]
    arguments: dict[str, int]


@functools.cache
def register_shardings() -> None:
    """Tell DTensor how the operators may be sharded; once in a process.

    Results and residuals that are written in place keep their placements: they may be sharded by
    rows on all dimensions of the mesh, or replicated. ``convert_scales``, whose shape is an
    argument, groups along rows, and operators that write to `out` take replicated tensors.
    """
    ops = torch.ops.cute_quant
    for name, shardings in _SHARDINGS.items():
        _register(getattr(ops, name).default, shardings)
    for name in _REPLICATED:
        _register(getattr(ops, name).default, lambda arguments: [])


def _register(operator: Any, shardings: Callable[[dict[str, Any]], list[Sharding]]) -> None:
    """Register the strategies of an operator."""
    from torch.distributed.tensor.experimental import register_sharding

    declared = operator._schema.arguments
    names = [argument.name for argument in declared]
    written = [a.name for a in declared if a.alias_info is not None and a.alias_info.is_write]
    num_results = len(operator._schema.returns)

    def strategies(*positional: Any, **keywords: Any) -> list[Strategy]:
        arguments = dict(zip(names, positional, strict=False))
        found = [Sharding((), {}), *shardings({**arguments, **keywords})]
        for name, dimension in _kept({name: arguments.get(name) for name in written}).items():
            found = [s for s in found if s.arguments.get(name) == dimension]
            if not found:
                raise ValueError(
                    f"{name}: expected a tensor that is not sharded along {dimension}, as "
                    f"{operator} cannot be, got one that is"
                )
        return [_strategy(sharding, arguments, num_results) for sharding in found]

    register_sharding(operator)(strategies)
    hash_all_arguments(operator)


def _kept(written: dict[str, Spec | None]) -> dict[str, int | None]:
    """Return the dimension that each tensor to be written is sharded along, None if replicated.

    Raises:
        ValueError: it is not the same on all dimensions of the mesh.
    """
    kept = {}
    for name, spec in written.items():
        if spec is None:
            continue
        placement = spec.placements[0]
        alike = all(other == placement for other in spec.placements)
        if not alike or not (placement.is_shard() or placement.is_replicate()):
            raise ValueError(
                f"{name}: expected one placement on all dimensions of the mesh, Shard or "
                f"Replicate, for what is written in place, got {spec.placements}"
            )
        kept[name] = placement.dim if placement.is_shard() else None
    return kept


def _strategy(sharding: Sharding, arguments: dict[str, Any], num_results: int) -> Strategy:
    """Return a sharding as DTensor takes it."""
    from torch.distributed.tensor import Replicate, Shard

    def placement(name: str) -> Placement | None:
        if not hasattr(arguments[name], "placements"):
            return None
        dimension = sharding.arguments.get(name)
        return Replicate() if dimension is None else Shard(dimension)

    results: list[Placement | None] = [Shard(dimension) for dimension in sharding.results]
    if not sharding.results:
        results = [Replicate() for _ in range(num_results)]
    return results, [placement(name) for name in arguments]


def _rows(arguments: dict[str, Any], input_name: str, *of_rows: str) -> list[Sharding]:
    """Return the shardings of rows, and of matrices, of an operator that quantizes them.

    Args:
        arguments: of the operator.
        input_name: of the argument that is quantized.
        of_rows: arguments that have the rows of the result, if they are given.
    """
    fmt, x = Format.parse(arguments["fmt"]), arguments[input_name]
    kind, index = arguments.get("rows", DENSE), arguments.get("index")
    upper, counts = arguments.get("upper"), arguments.get("row_data")
    if _bound_to_places(arguments) or kind not in (DENSE, Masked.kind, Indexed.kind):
        return []
    leading = tuple(x.shape[:-1] if index is None else index.shape)
    last = len(leading) - 1
    found = []
    # Of masked experts a shard has whole ones.
    for dimension in range(1 if kind == Masked.kind else len(leading)):
        if dimension == last and not _whole_blocks(fmt, leading[-1], x.mesh.size()):
            continue
        sharded = {input_name if index is None else "index": dimension}
        sharded |= {name: dimension for name in of_rows if arguments.get(name) is not None}
        if counts is not None:
            sharded["row_data"] = dimension
        if upper is not None and dimension != last and _numel(upper) > 1:
            sharded["upper"] = dimension
        found.append(Sharding((dimension, dimension), sharded))
    return found


def _columns(arguments: dict[str, Any], input_name: str, columns: int = 1) -> list[Sharding]:
    """Return the sharding along k of an operator whose rows are all dense.

    Args:
        arguments: of the operator.
        input_name: of the argument that is quantized.
        columns: of it for each of the result, beside each other.
    """
    fmt, x = Format.parse(arguments["fmt"]), arguments[input_name]
    moved = arguments.get("index") is not None or _bound_to_places(arguments)
    if moved or arguments.get("rows", DENSE) != DENSE:
        return []
    if not _whole_words(fmt, x.shape[-1] // columns, x.mesh.size()):
        return []
    last = x.ndim - 1
    return [Sharding((last, last), {input_name: last})]


def _bound_to_places(arguments: dict[str, Any]) -> bool:
    """Return whether results depend on numbers of rows, which a shard does not know.

    These are the places of a scatter, and what random numbers are drawn for.
    """
    return any(arguments.get(name) is not None for name in ("scatter", "rng_state"))


def _numel(spec: Spec) -> int:
    return math.prod(spec.shape)


def _whole_blocks(fmt: Format, rows: int, shards: int) -> bool:
    """Return whether rows can be sharded: of blocks of scales each shard has whole ones."""
    return not fmt.blocked or rows % (shards * fmt.block_rows) == 0


def _whole_words(fmt: Format, k: int, shards: int) -> bool:
    """Return whether each shard along k has whole groups, and whole words where they are packed."""
    if fmt.whole_row or fmt.row_scale or fmt.blocked:
        return False
    return k > 0 and k % (shards * fmt.group_size * fmt.groups_per_unit) == 0


def _quantize(arguments: dict[str, Any]) -> list[Sharding]:
    return _rows(arguments, "x") + _columns(arguments, "x")


def _silu_mul(arguments: dict[str, Any]) -> list[Sharding]:
    found = _rows(arguments, "gate_up", "weight")
    # Gates and ups in the halves of a row would not be in the same shard.
    return found + (_columns(arguments, "gate_up", 2) if arguments["interleaved"] else [])


def _silu_mul_backward(arguments: dict[str, Any]) -> list[Sharding]:
    return _rows(arguments, "gate_up", "grad")


def _rms_norm(arguments: dict[str, Any]) -> list[Sharding]:
    return _rows(arguments, "x", "residual", "residual_out", "normalized")


def _dequantize(arguments: dict[str, Any]) -> list[Sharding]:
    fmt, q, upper = Format.parse(arguments["fmt"]), arguments["q"], arguments.get("upper")
    shards, found = q.mesh.size(), []
    for dimension in range(q.ndim - 1):
        rows = dimension == q.ndim - 2
        if rows and not _whole_blocks(fmt, q.shape[-2], shards):
            continue
        sharded = {"q": dimension, "sf": dimension}
        if upper is not None and _numel(upper) > 1 and (fmt.row_scale or not rows):
            sharded["upper"] = dimension
        found.append(Sharding((dimension,), sharded))
    k = q.shape[-1] * fmt.value_type.per_byte
    if _whole_words(fmt, k, shards):
        columns = q.ndim - 1
        found.append(Sharding((columns,), {"q": columns, "sf": columns}))
    return found


def _fake_quantize(arguments: dict[str, Any]) -> list[Sharding]:
    fmt, x, upper = Format.parse(arguments["fmt"]), arguments["x"], arguments.get("upper")
    found = []
    for dimension in range(x.ndim - 1):
        sharded = {"x": dimension}
        if upper is not None and dimension < x.ndim - 2 and _numel(upper) > 1:
            sharded["upper"] = dimension
        found.append(Sharding((dimension,), sharded))
    whole = fmt.whole_row or fmt.row_scale
    if not whole and x.shape[-1] % (x.mesh.size() * fmt.group_size) == 0:
        found.append(Sharding((x.ndim - 1,), {"x": x.ndim - 1}))
    return found


def _tensor_amax(arguments: dict[str, Any]) -> list[Sharding]:
    """Return matrices: the largest of several shards would not keep NaN for sure."""
    x = arguments["x"]
    dimensions = range(x.ndim - 2) if arguments["per_matrix"] else ()
    return [Sharding((dimension,), {"x": dimension}) for dimension in dimensions]


def _blocks(*inputs: str, results: int) -> Callable[[dict[str, Any]], list[Sharding]]:
    """Return the shardings of an operator on weights in square blocks, the first of `inputs`."""

    def shardings(arguments: dict[str, Any]) -> list[Sharding]:
        fmt, w = Format.parse(arguments["fmt"]), arguments[inputs[0]]
        upper = arguments.get("upper")
        found = []
        for dimension in range(w.ndim - 2):
            sharded = dict.fromkeys(inputs, dimension)
            if upper is not None and _numel(upper) > 1:
                sharded["upper"] = dimension
            found.append(Sharding((dimension,) * results, sharded))
        rows, columns = w.ndim - 2, w.ndim - 1
        size, shards = fmt.group_size, w.mesh.size()
        whole = _whole_blocks(fmt, w.shape[-2], shards) and w.shape[-2] % (shards * size) == 0
        if whole and "w_sf" not in inputs:
            found.append(Sharding((rows,) * results, dict.fromkeys(inputs, rows)))
        unit = size if stored_once(fmt) else size * fmt.groups_per_unit
        k = w.shape[-1] * (fmt.value_type.per_byte if inputs[0] == "q" else 1)
        if "w_sf" not in inputs and not fmt.blocked and k % (shards * unit) == 0:
            found.append(Sharding((columns,) * results, dict.fromkeys(inputs, columns)))
        return found

    return shardings


_SHARDINGS: dict[str, Callable[[dict[str, Any]], list[Sharding]]] = {
    "quantize": _quantize,
    "silu_mul_quantize": _silu_mul,
    "silu_mul_backward_quantize": _silu_mul_backward,
    "rms_norm_quantize": _rms_norm,
    "rms_norm_quantize_residual": _rms_norm,
    "dequantize": _dequantize,
    "fake_quantize": _fake_quantize,
    "tensor_amax": _tensor_amax,
    "quantize_blocks": _blocks("w", results=2),
    "dequantize_blocks": _blocks("q", "sf", results=1),
    "requantize_blocks": _blocks("w8", "w_sf", results=2),
}
_REPLICATED = (
    "quantize_out",
    "silu_mul_quantize_out",
    "silu_mul_backward_quantize_out",
    "rms_norm_quantize_out",
    "quantize_blocks_out",
    "requantize_blocks_out",
    "quantize_columns",
    "quantize_columns_out",
    "quantize_both",
    "quantize_both_out",
    "convert_scales",
    "convert_scales_out",
)
