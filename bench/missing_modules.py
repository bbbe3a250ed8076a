"""Stand in for modules that are not installed, for code that imports more than it calls.

A stand-in is a class, so that it can be a base, an annotation, a subscript and a decorator. What is
called of it returns None, but a decorator returns what it decorates.
"""

from __future__ import annotations

import abc
import dataclasses
import importlib.abc
import importlib.machinery
import re
import sys
from collections.abc import Sequence
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch._ops import _OpNamespace


class _Meta(abc.ABCMeta):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return stand_in(name)

    def __getitem__(cls, key: object) -> Any:
        return cls

    def __or__(cls, other: object) -> Any:
        return cls

    def __ror__(cls, other: object) -> Any:
        return cls

    def __iter__(cls) -> Any:
        return iter(())

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if "__stand_in__" not in cls.__dict__:
            return super().__call__(*args, **kwargs)
        decorates = cls.__name__[0].islower() and len(args) == 1 and not kwargs
        if decorates and isinstance(args[0], (type, FunctionType)):
            return args[0]
        return stand_in(cls.__name__)


def stand_in(name: str) -> Any:
    """Return a class that stands in for an attribute."""
    return _Meta(
        name,
        (),
        {
            "__stand_in__": True,
            "__init__": lambda self, *args, **kwargs: None,
            "__init_subclass__": classmethod(lambda cls, **kwargs: None),
        },
    )


class Module(ModuleType):
    """A module whose attributes are stand-ins."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []
        self.__version__ = "0"
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = stand_in(name)
        setattr(self, name, value)
        return value


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds, as the last one, what no other has found, of the packages it stands in for."""

    def __init__(self, packages: Sequence[str]) -> None:
        self.packages = set(packages)

    def find_spec(self, name: str, path: object, target: object = None) -> Any:
        return spec_of_stand_in(name) if name.partition(".")[0] in self.packages else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def spec_of_stand_in(name: str) -> importlib.machinery.ModuleSpec:
    """Return the spec of a module whose attributes are stand-ins."""
    return importlib.machinery.ModuleSpec(name, _Finder(()), is_package=True)


def install(packages: Sequence[str]) -> None:
    """Have imports of these packages, where they are missing, succeed."""
    sys.meta_path.append(_Finder(packages))
    if "pydantic" in packages:
        _install_pydantic()
    if "regex" in packages:
        sys.modules.setdefault("regex", re)


class _Operators(_OpNamespace):
    """Operators of vLLM's extension, where none of its GEMMs is supported."""

    def __getattr__(self, name: str) -> Any:
        if "supports" in name:
            return lambda *args: False
        return super().__getattr__(name)


def replace(extensions: Sequence[str]) -> None:
    """Have modules of vLLM's extensions, and their operators that say what is supported."""
    for name in extensions:
        sys.modules[name] = Module(name)
    torch.ops._C.__class__ = _Operators


def _install_pydantic() -> None:
    """Stand in for pydantic: its dataclasses are those of Python, and nothing is validated."""

    def dataclass(cls: type | None = None, *, config: object = None, **options: Any) -> Any:
        def decorate(cls: type) -> type:
            return dataclasses.dataclass(**options)(cls)

        return decorate if cls is None else decorate(cls)

    def field(default: Any = dataclasses.MISSING, **options: Any) -> Any:
        known = {name: options[name] for name in ("default_factory", "init") if name in options}
        if default is ... or (default is dataclasses.MISSING and not known):
            default = None if "default_factory" not in known else dataclasses.MISSING
        return dataclasses.field(default=default, **known)

    def decorator(*_: Any, **__: Any) -> Any:
        return lambda function: function

    pydantic, inner = Module("pydantic"), Module("pydantic.dataclasses")
    pydantic.Field, inner.dataclass = field, dataclass  # type: ignore[attr-defined]
    for name in ("field_validator", "model_validator", "field_serializer", "model_serializer"):
        setattr(pydantic, name, decorator)
    pydantic.dataclasses = inner  # type: ignore[attr-defined]
    sys.modules.setdefault("pydantic", pydantic)
    sys.modules.setdefault("pydantic.dataclasses", inner)
