"""Checks of what a caller hands to an emulated kernel, by the names of its arguments."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from cute_quant.contract.dtypes import describe, dtype_names
from cute_quant.contract.tensors import check_real
from cute_quant.emulator.host import DLPACK_TYPES

Coordinate = tuple[int, int, int]


def check_arguments(names: Sequence[str], arguments: Sequence[Any]) -> None:
    """Check the number of arguments, and that the emulator can read the tensors among them.

    Raises:
        TypeError: there are more or fewer than names, or a tensor has no memory.
        ValueError: a tensor is not strided, on the CPU and of values in memory.
    """
    if len(arguments) != len(names):
        raise TypeError(
            f"arguments: expected {len(names)} ({', '.join(names)}), got {len(arguments)}"
        )
    for name, argument in zip(names, arguments, strict=True):
        if isinstance(argument, torch.Tensor):
            _check_memory(name, argument)
            if argument.dtype not in DLPACK_TYPES:
                raise ValueError(
                    f"{name}: expected a tensor of {dtype_names(DLPACK_TYPES)}, got "
                    f"{describe(argument)}"
                )


def check_outputs(outputs: Any, names: Sequence[str], arguments: Sequence[Any]) -> None:
    """Check that `outputs` are tensors in the memory of arguments.

    Raises:
        TypeError: it is no sequence of tensors.
        ValueError: one of them shares no memory with an argument.
    """
    if isinstance(outputs, torch.Tensor | str) or not isinstance(outputs, Sequence):
        raise TypeError(f"outputs: expected a tuple or list of tensors, got {describe(outputs)}")
    tensors = {n: a for n, a in zip(names, arguments, strict=True) if isinstance(a, torch.Tensor)}
    storages = {t.untyped_storage().data_ptr() for t in tensors.values()}
    for i, output in enumerate(outputs):
        name = f"outputs[{i}]"
        if not isinstance(output, torch.Tensor):
            raise TypeError(f"{name}: expected a tensor, got {describe(output)}")
        _check_memory(name, output)
        if output.untyped_storage().data_ptr() not in storages:
            raise ValueError(
                f"{name}: expected one of the tensors {', '.join(tensors)} or a view of one, got "
                f"a tensor of shape {tuple(output.shape)} that shares memory with none of them"
            )


def check_selection(only: Any, watch: Any) -> None:
    """Check the form of the blocks to run and of the thread to watch.

    Raises:
        ValueError: `only` is no list of blocks, or `watch` no pair of a block and a thread.
    """
    if only is not None and not _are_coordinates(only):
        raise ValueError(f"only: expected blocks as a list of (x, y, z), got {only!r}")
    if watch is not None and not (_are_coordinates(watch) and len(watch) == 2):
        raise ValueError(
            f"watch: expected a block and a thread as ((x, y, z), (x, y, z)), got {watch!r}"
        )


def _are_coordinates(values: Any) -> bool:
    return isinstance(values, Sequence) and all(_is_coordinate(value) for value in values)


def _is_coordinate(value: Any) -> bool:
    return isinstance(value, Iterable) and [type(n) for n in value] == [int] * 3


def _check_memory(name: str, t: torch.Tensor) -> None:
    if t.is_nested or t.layout is not torch.strided:
        kind = "a nested tensor" if t.is_nested else f"layout {t.layout}"
        raise ValueError(f"{name}: expected a strided tensor, got {kind}")
    if t.device.type != "cpu":
        raise ValueError(f"{name}: expected a tensor on the CPU, got one on {t.device}")
    if t.is_conj():
        raise ValueError(f"{name}: expected values in memory, got a lazily conjugated view")
    check_real({name: t})
