"""Every private name of CuTe DSL that the package uses, and what it does with those of the host.

A version of CuTe DSL may rename them; ``NAMES`` lists them for the test that they exist.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import threading
import types
from collections.abc import Iterator, Sequence
from typing import Any

from cute_quant.jit.toolchain import Host

NAMES = {
    "cutlass._mlir": ("ir",),
    "cutlass._mlir.dialects": ("llvm",),
    "cutlass.base_dsl": ("BaseDSL",),
    "cutlass.base_dsl.dsl": ("argparse", "_get_diagnostic_arg_parser"),
    "cutlass.base_dsl.export": ("get_export_module",),
    "cutlass.base_dsl.tvm_ffi_builder": ("rename_tvm_ffi_function",),
    "cutlass.cutlass_dsl": ("T", "dsl_user_op"),
}
"""Names by module. Compiled functions have `_tvm_ffi_function` besides, those without an engine
`ir_module`, `function_name` and `export_provider.mlirExecutionEngine.dump_object_file_pic`."""

_thread = threading.local()


class _Parser(argparse.ArgumentParser):
    """A parser that reads no command line while this package compiles in the thread."""

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        shielded = args is None and getattr(_thread, "shielded", False)
        return super().parse_known_args([] if shielded else args, namespace)


@contextlib.contextmanager
def arguments_hidden() -> Iterator[None]:
    """Hide the command line of the process from CuTe DSL, in this thread.

    At each compilation it looks for an option ``-diagnostic`` in ``sys.argv``. To argparse
    ``-d cuda``, ``-host`` and ``-h`` of the caller's own program are forms of it or ask for help,
    and both end the process.
    """
    _replace_parser()
    before = getattr(_thread, "shielded", False)
    _thread.shielded = True
    try:
        yield
    finally:
        _thread.shielded = before


@functools.cache
def _replace_parser() -> None:
    # The name in the DSL's module alone: sys.argv, and argparse itself, are everybody's.
    module: Any = importlib.import_module("cutlass.base_dsl.dsl")
    module.argparse = types.SimpleNamespace(ArgumentParser=_Parser)
    # Since 4.8 the parser is kept, and a kernel of somebody else may have been compiled before.
    kept = getattr(module, "_get_diagnostic_arg_parser", None)
    if kept is not None:
        kept.cache_clear()


def raw_function(compiled: Any) -> Any:
    """Return a compiled function without the wrapper that sorts keyword arguments."""
    return compiled._tvm_ffi_function


def emit_object(compiled: Any, symbol: str, host: Host, path: str) -> None:
    """Write a relocatable object with host code for the oldest processor of a kind.

    ``compiled.export_to_c`` does the same for the processor that it runs on, AVX-512 included, and
    takes no other.

    Args:
        compiled: what ``cute.compile`` made without an engine.
        symbol: of the function.
        host: what runs the host code.
        path: of the object. LLVM ends the process if it cannot write all of it.
    """
    from cutlass.base_dsl.export import get_export_module
    from cutlass.base_dsl.tvm_ffi_builder import rename_tvm_ffi_function

    original = compiled.function_name
    module = get_export_module(
        compiled.ir_module,
        f"__cute_internal_{symbol}",
        preserve_symbols={f"__tvm_ffi_{original}"},
    )
    rename_tvm_ffi_function(module, original, symbol)
    compiled.export_provider.mlirExecutionEngine.dump_object_file_pic(
        module,
        path,
        f"__tvm_ffi_{symbol}",
        host_triple=host.triple,
        host_cpu=host.cpu,
        host_features="",
    )
