"""A plug-in of pytest for an engine's own tests: with its calls taken over, and without.

`upstream` starts pytest with it, in a checkout of the engine without its `conftest.py`. Without a
GPU the engine sees one that is pretended, tensors for CUDA are made on the CPU, and few
parameters of each test are tried.
"""

from __future__ import annotations

import collections
import importlib
import itertools
import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.overrides import TorchFunctionMode

from bench import missing_modules

ENGINE = os.environ["UPSTREAM_ENGINE"]
REPORT, MOST = Path(os.environ["UPSTREAM_REPORT"]), int(os.environ["UPSTREAM_MOST"])
SECONDS = int(os.environ["UPSTREAM_SECONDS"])
ON_GPU = torch.cuda.is_available()

TOO_SLOW = "too slow"
KINDS = {
    TOO_SLOW: re.compile("not done in [0-9]+ s"),
    "not possible here": re.compile(
        "_OpNamespace|NVIDIA driver|active drivers|compiled with CUDA|No CUDA GPUs|libcuda|"
        "Accelerator expected|accelerator device when none|dummy base class|"
        "Invalid scaling configuration|from the 'CPU' backend"
    ),
}
"""Failures that are none of the results, by their message."""

outcomes: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
calls: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
reasons: dict[str, str] = {}
missing: list[str] = []


class CudaOnCpu(TorchFunctionMode):
    """Makes tensors that are asked for on CUDA on the CPU."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if function is torch.Tensor.cuda:
            return args[0]
        kwargs = {name: _on_cpu(value) for name, value in (kwargs or {}).items()}
        return function(*map(_on_cpu, args), **kwargs)


def _on_cpu(value: Any) -> Any:
    if isinstance(value, (str, torch.device)) and str(value).partition(":")[0] == "cuda":
        return torch.device("cpu")
    return value


def pytest_configure(config: pytest.Config) -> None:
    # What modules of tests import and the tests here do not call.
    missing_modules.install(("anthropic", "astor", "httpx", "tblib", "uvicorn", "watchfiles"))
    if not ON_GPU:
        _pretend()
    elif ENGINE == "vllm":
        _replace_missing_extensions()
    # Calls are taken over when their module is imported, before a test imports them from there.
    _engine().install()
    _pause_for_references()


def _engine() -> Any:
    return importlib.import_module(f"cute_quant.integrations.engines.{ENGINE}").ENGINE


def _counts() -> collections.Counter[str]:
    """Return how many calls were computed or traced so far."""
    return collections.Counter(
        {t.place.name: t.counter.calls + t.counter.traced for t in _engine().takeovers}
    )


def _pretend() -> None:
    import triton_on_cpu

    triton_on_cpu.mend()
    if ENGINE == "vllm":
        import pretended_gpu

        pretended_gpu.pretend(*map(int, os.environ["PRETENDED_GPU"].split(".")))
    else:
        import pretended_sglang

        pretended_sglang.pretend()
    CudaOnCpu().__enter__()
    for name in ("synchronize", "manual_seed", "manual_seed_all", "empty_cache", "set_device"):
        setattr(torch.cuda, name, lambda *_: None)
    torch.accelerator.empty_cache = torch.cuda.empty_cache
    default = torch.set_default_device
    torch.set_default_device = lambda device: default(_on_cpu(device))


def _replace_missing_extensions() -> None:
    from bench.vllm_archive import EXTENSIONS

    for name in EXTENSIONS:
        try:
            importlib.import_module(name)
        except ImportError as error:
            missing.append(f"{name}: {error}")
            missing_modules.replace([name])


def _pause_for_references() -> None:
    """Have vLLM's tests get its own Triton kernels where they ask for a reference.

    They do so by a patch, under which its platform is no CUDA.
    """
    from cute_quant.integrations.engines import takeover

    enter, leave = mock._patch.__enter__, mock._patch.__exit__
    pauses: dict[int, Any] = {}

    def enter_paused(self: Any) -> Any:
        if self.attribute == "is_cuda_alike" and self.kwargs.get("return_value") is False:
            pauses[id(self)] = takeover.paused()
            pauses[id(self)].__enter__()
        return enter(self)

    def leave_paused(self: Any, *error: Any) -> Any:
        if id(self) in pauses:
            pauses.pop(id(self)).__exit__(*error)
        return leave(self, *error)

    mock._patch.__enter__, mock._patch.__exit__ = enter_paused, leave_paused


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep some parameters of each test, from all of them."""
    kept = []
    for _, group in itertools.groupby(items, key=_name):
        tests = list(group)
        step = max(1, -(-len(tests) // MOST)) if MOST else 1
        kept += tests[::step]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = kept


def _name(item: Any) -> str:
    return str(item.nodeid).partition("[")[0]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Stop a test that takes too long, such as a large one in Triton's interpreter."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"not done in {SECONDS} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    before = _counts()
    try:
        return (yield)
    finally:
        signal.alarm(0)
        calls[_name(item)].update(_counts() - before)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        crash = getattr(report.longrepr, "reprcrash", None)
        reason = crash.message if crash else str(report.longrepr or "")
        name, kind = _name(report), str(report.outcome)
        if report.failed:
            kind = next((word for word, found in KINDS.items() if found.search(reason)), kind)
        outcomes[name][kind] += 1
        if kind not in ("passed", TOO_SLOW):
            reasons[name] = _short(reason)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.outcome != "passed":
        outcomes[report.nodeid]["not imported" if report.failed else "skipped"] += 1
        reasons[report.nodeid] = _short(str(report.longrepr))


def _short(reason: str) -> str:
    """Return the line of an error: the last one of a traceback, the first one of a message."""
    lines = [line.strip() for line in reason.splitlines() if line.strip()]
    errors = [line.removeprefix("E").strip() for line in lines if line.startswith("E ")]
    line = errors[-1] if errors else (lines or [""])[0]
    return line[:160]


def pytest_sessionfinish() -> None:
    found = {"outcomes": outcomes, "reasons": reasons, "missing": missing, "calls": calls}
    REPORT.write_text(json.dumps(found))


@pytest.fixture
def default_vllm_config() -> Iterator[Any]:
    """VLLM's fixture of this name."""
    from vllm.config import VllmConfig, set_current_vllm_config

    config = VllmConfig()
    with set_current_vllm_config(config):
        yield config


@pytest.fixture
def workspace_init() -> Iterator[None]:
    """VLLM's fixture of this name."""
    from vllm.v1.worker import workspace

    workspace.init_workspace_manager(torch.device("cuda", 0) if ON_GPU else torch.device("cpu"))
    yield
    workspace.reset_workspace_manager()


@pytest.fixture
def disable_deepgemm_ue8m0(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """VLLM's fixture of this name."""
    from vllm.utils.deep_gemm import is_deep_gemm_e8m0_used

    monkeypatch.setenv("VLLM_USE_DEEP_GEMM_E8M0", "0")
    is_deep_gemm_e8m0_used.cache_clear()
    yield
    is_deep_gemm_e8m0_used.cache_clear()


@pytest.fixture(autouse=True)
def reset_default_torch_device() -> Iterator[None]:
    yield
    torch.set_default_device(None)
