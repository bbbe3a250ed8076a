"""SGLang where there is neither a GPU nor its driver, nor the extensions that it compiles.

Its layers choose kernels by the platform when they are imported. What is compiled does not exist
here; DeepEP is a stub, and so is what draws pictures, which configurations of models import.
"""

from __future__ import annotations

import importlib.machinery
import sys
from types import ModuleType
from typing import Any
from unittest import mock

STUBS = (
    "deep_ep",
    "uvicorn",
    "torchvision",
    "torchvision.io",
    "torchvision.transforms",
    "torchvision.transforms.functional",
    "torchvision.transforms.v2",
    "torchvision.transforms.v2.functional",
)


class _Stub(ModuleType):
    """A module whose names are all there and do nothing."""

    def __init__(self, name: str):
        super().__init__(name)
        self.__path__: list[str] = []
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)
        self.__version__ = "0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return mock.MagicMock()


def pretend() -> None:
    """Have SGLang's modules imported without what they do not need; call it before them."""
    for name in STUBS:
        sys.modules.setdefault(name, _Stub(name))
