"""Environment variables that CuTe DSL reads, and what each means for kept kernels.

Variables are named without their prefix ``CUTE_DSL_``.
"""

from __future__ import annotations

import os

PREFIX = "CUTE_DSL_"

CODE = frozenset(
    {
        "AUTO_M2S",
        "COMPILER_BACKEND",
        "COMPILER_OPT",
        "DEBUG",
        "ENABLE_ASSERTIONS",
        "ENABLE_PYIR",
        "LINEINFO",
        "LOC_TRACEBACKS",
        "TOLERATE_M2M",
        "USE_EXTENSION_COMPILER",
    }
)
"""Variables that change what is generated. They are part of a key, and so is one that is in none
of these lists."""

OUTPUT = frozenset(
    {
        "KEEP",
        "KEEP_CUBIN",
        "KEEP_IR",
        "KEEP_PTX",
        "KEEP_SASS",
        "PRINT_AFTER_PREPROCESSOR",
        "PRINT_IR",
    }
)
"""Variables that ask to keep or print something, which only compiling does."""

REFUSED = frozenset({"DRYRUN"})
"""Variables under which nothing is compiled."""

NEUTRAL = frozenset(
    {
        "ARCH",  # Every compilation names its architecture,
        "ENABLE_TVM_FFI",  # and the kind of function.
        "CACHE_DIR",
        "DEBUG_LEAVES",
        "DISABLE_FILE_CACHING",
        "DUMP_DIR",
        "ENABLE_OPTIMIZATION_WARNINGS",
        "FILTER_STACKTRACE",
        "JIT_CACHE_MAX_ELEMS",
        "JIT_TIME_PROFILING",
        "LIBS",
        "LOG_AUTOTUNE",
        "LOG_LEVEL",
        "LOG_TO_CONSOLE",
        "LOG_TO_FILE",
        "NO_CACHE",
        "SHOW_STACKTRACE",
        "VERIFY_TRACE",
        "WARNINGS_AS_ERRORS",
        "WARNINGS_IGNORE",
    }
)
"""Variables that the generated code does not depend on."""

_OFF = ("", "0", "false", "off", "no")


def compiled_in() -> dict[str, str]:
    """Return the variables that are set and that the generated code depends on."""
    return {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(PREFIX) and name.removeprefix(PREFIX) not in OUTPUT | REFUSED | NEUTRAL
    }


def asks_for_output() -> bool:
    """Return whether CuTe DSL is asked to keep or print something."""
    return any(map(_is_on, OUTPUT))


def refused() -> str | None:
    """Return the name of a variable under which nothing is compiled, None if none is set."""
    return next((PREFIX + name for name in sorted(REFUSED) if _is_on(name)), None)


def _is_on(name: str) -> bool:
    return os.environ.get(PREFIX + name, "").strip().lower() not in _OFF
