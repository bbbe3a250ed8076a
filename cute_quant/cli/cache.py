"""List, size and clear the disk cache of built kernels.

It lies in CUTE_QUANT_CACHE_DIR, by default in cute_quant of the user's cache directory.
CUTE_QUANT_CACHE=off switches it off, CUTE_QUANT_CACHE=readonly leaves it as it is.

examples:
  cute-quant cache list
  cute-quant cache size --json
  cute-quant cache clear
"""

from __future__ import annotations

import argparse
import json
import time

from cute_quant.jit import disk_cache
from cute_quant.jit.trusted_files import Untrusted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command to its parser."""
    parser.add_argument("action", choices=("list", "size", "clear"))
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    """Run the command, and return the exit status."""
    try:
        store = disk_cache.open_cache()
    except Untrusted as error:  # Nothing is wrong with the arguments.
        raise RuntimeError(str(error)) from error
    if store is None:
        raise RuntimeError(f"there is no cache: {disk_cache.why_none()}")
    report = _REPORTS[options.action](store)
    if options.json:
        print(json.dumps(report, indent=1))
    else:
        print(*_LINES[options.action](report), sep="\n")
    return 0


def _list(store: disk_cache.Cache) -> list[dict]:
    return [
        {
            "file": str(entry.path),
            "bytes": entry.bytes,
            "used": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry.used)),
            "record": entry.record,
        }
        for entry in store.entries()
    ]


def _size(store: disk_cache.Cache) -> dict:
    entries = store.entries()
    return {
        "directory": str(store.directory),
        "writable": store.writable,
        "kernels": len(entries),
        "bytes": sum(entry.bytes for entry in entries),
        "max_bytes": disk_cache.MAX_BYTES,
    }


def _clear(store: disk_cache.Cache) -> dict:
    if not store.writable:
        raise RuntimeError(f"{store.directory} is not writable: clear it as who wrote it")
    return {"directory": str(store.directory), "removed": store.clear()}


def _list_lines(report: list[dict]) -> list[str]:
    lines = []
    for entry in report:
        record = entry["record"]
        what = "corrupt" if record is None else f"{record['arch']:8} {record['name']}"
        lines.append(f"{entry['used']}  {entry['bytes']:7}  {what}")
    return lines or ["no kernels"]


_REPORTS = {"list": _list, "size": _size, "clear": _clear}
_LINES = {
    "list": _list_lines,
    "size": lambda report: [
        f"{report['kernels']} kernels, {report['bytes'] / 2**20:.1f} MiB of at most "
        f"{report['max_bytes'] / 2**20:.0f} MiB, in {report['directory']}"
        + ("" if report["writable"] else ", read-only")
    ],
    "clear": lambda report: [f"removed {report['removed']} kernels from {report['directory']}"],
}
