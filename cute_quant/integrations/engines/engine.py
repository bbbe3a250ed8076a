"""Engines: which of their calls are taken over, which are not, and why."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from cute_quant import __version__
from cute_quant.integrations.engines import imports
from cute_quant.integrations.engines.takeover import (
    Function,
    NotComparable,
    Takeover,
    parameters,
    paused,
)
from cute_quant.jit.lookup import ARCHITECTURES

WAITS = "waits"
"""The engine has not imported the module yet."""
PROBATION = "probation"
"""The version of the engine was not tested, so results are compared before."""
TAKEN = "taken"
REFUSED = "refused"
"""The self-check failed."""
LEFT = "left"
"""The call is not selected, or not for this GPU."""

_OFF = {"0", "off", "none"}
_ALL = {"", "1", "on", "all"}


@dataclass
class State:
    """What became of a takeover.

    Attributes:
        status: one of the words of this module.
        reason: why, where it is not taken.
        checked: on which device results were compared, or why they were not.
    """

    status: str
    reason: str = ""
    checked: str = "not compared yet"
    original: Function | None = None


class Engine:
    """An inference engine, and what of it is taken over.

    Args:
        name: of its package.
        tested: versions that were tested.
        variable: the environment variable that selects names, such as ``linear,silu``; ``0`` for
            none of them.
        takeovers: all calls.
        capability: returns the compute capability of the GPU without touching it, None without a
            GPU.
        why_not: returns why nothing of the engine is taken over on this machine, None if it is.
    """

    def __init__(
        self,
        name: str,
        *,
        tested: tuple[str, ...],
        variable: str,
        takeovers: Iterable[Takeover],
        capability: Callable[[], tuple[int, int] | None],
        why_not: Callable[[], str | None] = lambda: None,
    ) -> None:
        self.name = name
        self.tested = tested
        self.variable = variable
        self.takeovers = tuple(takeovers)
        self.capability = capability
        self.why_not = why_not
        self.log = logging.getLogger(f"{name}.cute_quant")
        """Below the engine's own logger, so that its handlers print it."""
        self.states: dict[str, State] = {}
        self._callbacks: dict[str, imports.Callback] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Names that can be selected."""
        return tuple(dict.fromkeys(takeover.name for takeover in self.takeovers))

    @property
    def version(self) -> str | None:
        """The version that is installed, None where none is."""
        try:
            return importlib.metadata.version(self.name)
        except importlib.metadata.PackageNotFoundError:
            return None

    @property
    def installed(self) -> bool:
        """Whether :meth:`install` was called, and nothing was restored since."""
        return bool(self.states)

    @property
    def is_tested(self) -> bool:
        """Whether the version was tested; local parts of it (after ``+``) do not matter."""
        version = self.version
        return version is not None and version.partition("+")[0] in self.tested

    def selected(self) -> set[str]:
        """Return the names that the environment selects.

        Raises:
            ValueError: it names something else.
        """
        text = os.environ.get(self.variable, "").strip().lower()
        if text in _OFF:
            return set()
        if text in _ALL:
            return set(self.names)
        names = {word.strip() for word in text.split(",")} - {""}
        unknown = sorted(names - set(self.names))
        if unknown:
            raise ValueError(
                f"{self.variable}: expected 0 or some of {', '.join(self.names)}, "
                f"got {', '.join(unknown)}"
            )
        return names

    def install(self) -> None:
        """Take over what is selected, as soon as the engine imports it; a second call is none.

        It is what the engine's plug-in system calls, in every process, so it raises nothing.
        """
        if self.installed:
            return
        try:
            selected = self.selected()
        except ValueError as error:
            self.log.warning("cute_quant takes nothing over: %s", error)
            return
        if not selected:
            return
        reason_for_all = self.why_not()
        capability = self.capability()
        for takeover in self.takeovers:
            reason = reason_for_all or _why_not(takeover, selected, capability)
            if reason is not None:
                self.states[takeover.key] = State(LEFT, reason)
                continue
            self.states[takeover.key] = State(WAITS if self.is_tested else PROBATION)
            if self.is_tested:
                self._await(takeover)
        self.log.info("%s", self.summary())
        if not self.is_tested:
            self.log.warning(
                "cute_quant was tested with %s %s, not with %s: it takes over only calls that "
                "give its bits",
                self.name,
                ", ".join(self.tested),
                self.version,
            )

    def summary(self) -> str:
        """Return one line: what is taken over, what is not, and why."""
        names: dict[str, list[str]] = {}
        reasons: dict[str, list[str]] = {}
        for takeover in self.takeovers:
            state = self.states.get(takeover.key)
            if state is None or state.status in (LEFT, REFUSED):
                why = "not installed" if state is None else state.reason
                reasons.setdefault(f"{takeover.name} ({why})", [])
            else:
                names.setdefault(takeover.name, []).append(takeover.key)
        left = [text for text in reasons if text.partition(" ")[0] not in names]
        return (
            f"cute_quant {__version__} in {self.name} {self.version} takes over: "
            f"{', '.join(names) or 'nothing'}; leaves: {', '.join(left) or 'nothing'}"
        )

    def check(self, device: torch.device) -> Mapping[str, State]:
        """Compare the results of each call with the engine's own on a device.

        Calls that differ are given back. In a version of the engine that was not tested, calls that
        give its bits are taken over now. Modules that are missing are imported.
        """
        for takeover in self.takeovers:
            state = self.states.get(takeover.key)
            if state is not None and state.status in (WAITS, PROBATION, TAKEN):
                self._check(takeover, state, device)
        return self.states

    def import_all(self) -> None:
        """Import the modules of all calls, as the engine will, so that they are taken over."""
        for takeover in self.takeovers:
            if self.states.get(takeover.key, State(LEFT)).status == WAITS:
                try:
                    importlib.import_module(takeover.place.module)
                except ImportError as error:
                    self._refuse(takeover, f"its module is missing: {error}")

    def restore(self) -> None:
        """Give all calls back."""
        for takeover in self.takeovers:
            state = self.states.get(takeover.key)
            if takeover.key in self._callbacks:
                imports.forget(takeover.place.module, self._callbacks[takeover.key])
            if state is not None and state.status == TAKEN:
                self._give_back(takeover, state)
        self.states.clear()
        self._callbacks.clear()

    def taken(self) -> list[str]:
        """Return the keys of the calls that are taken over, or will be with their module."""
        return [key for key, state in self.states.items() if state.status in (WAITS, TAKEN)]

    def _await(self, takeover: Takeover) -> None:
        def callback(module: ModuleType) -> None:
            self._take(takeover, module)

        self._callbacks[takeover.key] = callback
        imports.when_imported(takeover.place.module, callback)

    def _take(self, takeover: Takeover, module: ModuleType) -> None:
        state = self.states[takeover.key]
        try:
            original = takeover.place.read(module)
        except (AttributeError, LookupError) as error:
            self._refuse(takeover, f"the engine has no such function: {error}")
            return
        reason = other_parameters(takeover.expected_parameters, original)
        if reason is not None:
            self._refuse(takeover, reason)
            return
        takeover.place.write(module, takeover.make(original))
        state.status, state.original = TAKEN, original

    def _check(self, takeover: Takeover, state: State, device: torch.device) -> None:
        try:
            module = importlib.import_module(takeover.place.module)
        except ImportError as error:
            self._refuse(takeover, f"its module is missing: {error}")
            return
        if state.status == PROBATION:
            self._take(takeover, module)
            if state.status == TAKEN and self._compare(takeover, state, device) is None:
                self._refuse(takeover, f"results were {state.checked}, in an untested version")
            return
        if state.status == TAKEN:
            self._compare(takeover, state, device)

    def _compare(self, takeover: Takeover, state: State, device: torch.device) -> bool | None:
        """Compare results; return whether they are equal, None where they were not compared."""
        if takeover.check is None or takeover.around or state.original is None:
            state.checked = "not compared: the engine has nothing to compare with"
            return None
        try:
            with paused():
                difference = takeover.check(takeover.compute, _own(state.original), device)
        except NotComparable as error:
            state.checked = f"not compared on {device}: {error}"
            return None
        except Exception as error:
            difference = f"{type(error).__name__}: {_one_line(error)}"
        if difference is not None:
            self._refuse(takeover, f"self-check failed on {device}: {difference}")
            return False
        state.checked = f"equal on {device}"
        return True

    def _refuse(self, takeover: Takeover, reason: str) -> None:
        state = self.states[takeover.key]
        if state.status == TAKEN:
            self._give_back(takeover, state)
        state.status, state.reason = REFUSED, reason
        self.log.warning("cute_quant does not take over %s: %s", takeover.key, reason)

    def _give_back(self, takeover: Takeover, state: State) -> None:
        module = importlib.import_module(takeover.place.module)
        assert state.original is not None
        takeover.place.write(module, state.original)


def _why_not(
    takeover: Takeover, selected: set[str], capability: tuple[int, int] | None
) -> str | None:
    if takeover.name not in selected:
        return "not selected"
    if capability is None:
        return None
    major, minor = capability
    if capability not in ARCHITECTURES:
        return f"no kernels for compute capability {major}.{minor}"
    if takeover.majors and major not in takeover.majors:
        majors = ", ".join(f"{m}.x" for m in takeover.majors)
        return f"the engine has it on compute capability {majors}, this is {major}.{minor}"
    return None


def _own(original: Function) -> Function:
    """Return the engine's function, whose errors say that there is nothing to compare with."""

    @functools.wraps(original)
    def own(*args: Any, **kwargs: Any) -> Any:
        try:
            return original(*args, **kwargs)
        except Exception as error:
            raise NotComparable(f"{type(error).__name__}: {_one_line(error)}") from error

    return own


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:120]


def other_parameters(ours: str, original: Function) -> str | None:
    """Return how the parameters of a replacement differ from those of the function that it is for.

    Names, order, kinds and defaults count; annotations do not.
    """
    theirs = parameters(original)
    if ours == theirs:
        return None
    return f"expected the parameters {ours}, it has {theirs}"
