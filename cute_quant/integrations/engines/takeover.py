"""Calls of an engine that are taken over: where they stand, what replaces them, and a counter."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Protocol

import torch

from cute_quant.contract.torch_private import constant_in_graphs
from cute_quant.integrations.engines.imports import replace_everywhere

Function = Callable[..., Any]
Check = Callable[[Function, Function, torch.device], str | None]
"""Compares a replacement with the engine's own function on a device; returns what differs.

An exception of the engine's function, such as that it has no kernel for the device, may pass.
"""


class Place(Protocol):
    """Where a function of an engine stands."""

    @property
    def module(self) -> str:
        """The name of the module, after whose import the function is there."""

    def read(self, module: ModuleType) -> Function:
        """Return the function that stands there.

        Raises:
            LookupError, AttributeError: there is none.
        """

    def write(self, module: ModuleType, function: Function) -> None:
        """Have another function stand there."""


@dataclass(frozen=True)
class Attribute:
    """A function or class of a module, also where other modules imported it with ``from``."""

    module: str
    name: str

    def read(self, module: ModuleType) -> Function:
        """Return the function."""
        function: Function = getattr(module, self.name)
        return function

    def write(self, module: ModuleType, function: Function) -> None:
        """Replace the function in every module of the package that has it."""
        package = self.module.partition(".")[0]
        replace_everywhere(package, self.read(module), function)


@dataclass(frozen=True)
class Method:
    """A method of a class in a module."""

    module: str
    owner: str
    name: str

    def read(self, module: ModuleType) -> Function:
        """Return the method as a function."""
        function: Function = getattr(module, self.owner).__dict__[self.name]
        return function

    def write(self, module: ModuleType, function: Function) -> None:
        """Replace the method of the class."""
        setattr(getattr(module, self.owner), self.name, function)


@dataclass
class Counter:
    """How often a replacement was called.

    Attributes:
        calls: calls that it computed.
        traced: calls that ``torch.compile`` traced, which run inside of a graph afterwards.
        declined: calls with arguments that it hands to the engine's own function, traced ones too.
    """

    calls: int = 0
    traced: int = 0
    declined: int = 0


@dataclass(frozen=True)
class Takeover:
    """A call of an engine, and the function that takes its place.

    Args:
        name: what users select it by; calls that belong together share it.
        place: where the engine's function stands.
        compute: the replacement. It has the parameters of the engine's function, and returns
            ``NotImplemented`` for arguments that it leaves to that.
        check: compares results with those of the engine's function. None where they have nothing
            to be compared with.
        majors: major compute capabilities that the engine calls it on; empty for all.
    """

    name: str
    place: Place
    compute: Function
    check: Check | None = None
    majors: tuple[int, ...] = ()
    counter: Counter = field(default_factory=Counter, compare=False)

    @property
    def key(self) -> str:
        """The name of the function in the engine."""
        owner = getattr(self.place, "owner", None)
        function = getattr(self.place, "name", self.name)
        words = [self.place.module, owner, function]
        return ".".join(word for word in words if word is not None)

    def make(self, original: Function) -> Function:
        """Return a function that calls ``compute``, and `original` for what that declines."""
        key, compute, counter = self.key, self.compute, self.counter
        _counters[key] = counter

        @functools.wraps(original)
        def replacement(*args: Any, **kwargs: Any) -> Any:
            results = compute(*args, **kwargs)
            taken = results is not NotImplemented
            # A graph would guard on a counter, and be compiled anew whenever it changed.
            if torch.compiler.is_compiling():
                count_traced(key, taken)
            else:
                count(counter, taken)
            return results if taken else original(*args, **kwargs)

        return replacement


def count(counter: Counter, taken: bool) -> None:
    """Count a call."""
    if taken:
        counter.calls += 1
    else:
        counter.declined += 1


_counters: dict[str, Counter] = {}


@constant_in_graphs
def count_traced(key: str, taken: bool) -> None:
    """Count a call while it is traced."""
    if taken:
        _counters[key].traced += 1
    else:
        _counters[key].declined += 1
