"""Inference engines that are installed, and which of their calls are taken over.

Results of each call are compared with the engine's own function on this machine's GPU, or on the
CPU, where most of an engine's functions have no kernel. CUTE_QUANT_VLLM selects calls, as in
serving. The exit code is 1 if a call that is selected failed its self-check.

examples:
  cute-quant engines
  cute-quant engines --engine vllm --json
  CUTE_QUANT_VLLM=linear,silu cute-quant engines
"""

from __future__ import annotations

import argparse
import importlib
import json
from typing import Any

import torch

from cute_quant.integrations.engines import ENGINES
from cute_quant.integrations.engines.engine import REFUSED, Engine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command to its parser."""
    parser.add_argument(
        "--engine", action="append", choices=ENGINES, help="may be given several times; default all"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    """Run the command, and return the exit status."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reports = [report(_engine(name), device) for name in options.engine or ENGINES]
    if options.json:
        print(json.dumps(reports, indent=1))
    else:
        for found in reports:
            _print(found)
    missing = [r["engine"] for r in reports if r["version"] is None and options.engine]
    refused = [call for r in reports for call in r["calls"] if call["status"] == REFUSED]
    return int(bool(missing or refused))


def report(engine: Engine, device: torch.device) -> dict[str, Any]:
    """Take an engine's calls over, compare their results, and describe what came of it.

    Raises:
        ValueError: the environment selects what there is not.
    """
    found: dict[str, Any] = {"engine": engine.name, "version": engine.version, "calls": []}
    if engine.version is None:
        return found | {"state": "not installed"}
    if not engine.selected():
        return found | {"state": f"off: {engine.variable} is 0"}
    engine.install()
    engine.import_all()
    engine.check(device)
    tested = f"tested with {', '.join(engine.tested)}"
    found["state"] = "tested" if engine.is_tested else f"not tested: {tested}"
    for takeover in engine.takeovers:
        state = engine.states[takeover.key]
        found["calls"].append(
            {
                "name": takeover.name,
                "call": takeover.key,
                "status": state.status,
                "reason": state.reason,
                "compared": state.checked,
            }
        )
    return found


def _engine(name: str) -> Engine:
    engine: Engine = importlib.import_module(ENGINES[name]).ENGINE
    return engine


def _print(found: dict[str, Any]) -> None:
    version = "" if found["version"] is None else f" {found['version']}"
    print(f"{found['engine']}{version}: {found['state']}")
    for call in found["calls"]:
        print(f"  {call['name']:12} {call['status']:8} {call['call']}")
        print(f"  {'':12} {'':8} {call['reason'] or call['compared']}")
