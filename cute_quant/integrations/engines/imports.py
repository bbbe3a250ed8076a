"""Wait for a module to be imported, and replace functions where other modules imported them."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

Callback = Callable[[ModuleType], None]


class _Finder(importlib.abc.MetaPathFinder):
    """A finder that finds what the others find, and calls back once the module has run."""

    def __init__(self) -> None:
        self.callbacks: dict[str, list[Callback]] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self.callbacks:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                self._call_after(spec.loader)
                return spec
        return None

    def _call_after(self, loader: importlib.abc.Loader) -> None:
        execute = loader.exec_module

        def execute_and_call(module: ModuleType) -> None:
            execute(module)
            for callback in self.callbacks.pop(module.__name__, ()):
                callback(module)

        # A loader is made for one module.
        loader.exec_module = execute_and_call  # type: ignore[method-assign]


_finder = _Finder()


def when_imported(name: str, callback: Callback) -> None:
    """Call back with a module once it is imported, at once if it is."""
    if name in sys.modules:
        callback(sys.modules[name])
        return
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
    _finder.callbacks.setdefault(name, []).append(callback)


def forget(name: str, callback: Callback) -> None:
    """Do not call back any more."""
    waiting = _finder.callbacks.get(name, [])
    if callback in waiting:
        waiting.remove(callback)


def replace_everywhere(package: str, old: object, new: object) -> list[str]:
    """Replace an object in the modules of a package; return the names under which it was found.

    A name that a module imported with ``from`` is a variable of its own.
    """
    found = []
    for name, module in list(sys.modules.items()):
        if name != package and not name.startswith(f"{package}."):
            continue
        for attribute, value in list(vars(module).items()):
            if value is old:
                setattr(module, attribute, new)
                found.append(f"{name}.{attribute}")
    return found
