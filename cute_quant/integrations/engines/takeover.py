"""Calls of an engine that are taken over: where they stand, what replaces them, and a counter."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Protocol

import torch

from cute_quant.contract.torch_private import constant_in_graphs
from cute_quant.integrations.engines.imports import replace_everywhere

Function = Callable[..., Any]
Check = Callable[[Function, Function, torch.device], str | None]
"""Compares a replacement with the engine's own function on a device; returns what differs.

Exceptions of the engine's function, such as that it has no kernel for the device, arrive as
`NotComparable`, and may pass.
"""


class NotComparable(Exception):
    """The engine's function has no results to compare with."""


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
        around: `compute` takes the engine's function before its parameters, and calls it.
    """

    name: str
    place: Place
    compute: Function
    check: Check | None = None
    majors: tuple[int, ...] = ()
    around: bool = False
    counter: Counter = field(default_factory=Counter, compare=False)

    @property
    def key(self) -> str:
        """The name of the function in the engine."""
        owner = getattr(self.place, "owner", None)
        function = getattr(self.place, "name", self.name)
        words = [self.place.module, owner, function]
        return ".".join(word for word in words if word is not None)

    @property
    def expected_parameters(self) -> str:
        """The parameters that the engine's function is expected to have."""
        return parameters(self.compute, skip=int(self.around))

    def make(self, original: Function) -> Function:
        """Return a function that calls ``compute``, and `original` for what that declines."""
        key, counter = self.key, self.counter
        compute = functools.partial(self.compute, original) if self.around else self.compute
        _counters[key] = counter

        @functools.wraps(original)
        def replacement(*args: Any, **kwargs: Any) -> Any:
            if _paused:
                return original(*args, **kwargs)
            results = compute(*args, **kwargs)
            taken = results is not NotImplemented
            # A graph would guard on a counter, and be compiled anew whenever it changed.
            if torch.compiler.is_compiling():
                count_traced(key, taken)
            else:
                count(counter, taken)
            return results if taken else original(*args, **kwargs)

        return replacement


def parameters(function: Function, *, skip: int = 0) -> str:
    """Return the parameters of a function as text, without annotations.

    Of a default only plain values count: others, such as members of an enumeration, are dots.

    Args:
        function: of any kind.
        skip: how many of the first ones to leave out.
    """
    found = []
    for p in inspect.signature(function).parameters.values():
        default = p.default if p.default is p.empty or isinstance(p.default, _PLAIN) else ...
        found.append(p.replace(annotation=p.empty, default=default))
    return str(inspect.Signature(found[skip:]))


_PLAIN = (bool, int, float, str, type(None))


def count(counter: Counter, taken: bool) -> None:
    """Count a call."""
    if taken:
        counter.calls += 1
    else:
        counter.declined += 1


_counters: dict[str, Counter] = {}
_paused = False


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """Have all replacements call the engine's own functions, which call each other."""
    global _paused
    _paused = True
    try:
        yield
    finally:
        _paused = False


@constant_in_graphs
def count_traced(key: str, taken: bool) -> None:
    """Count a call while it is traced."""
    if taken:
        _counters[key].traced += 1
    else:
        _counters[key].declined += 1
