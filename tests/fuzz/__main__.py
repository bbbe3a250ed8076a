"""Run random calls in the emulator until one fails or the user interrupts: ``make fuzz``."""

from __future__ import annotations

import argparse
import itertools
import os
import tempfile
import time
from pathlib import Path


def main() -> int:
    """Run the sessions of one seed after the other, and say which one fails."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seed", type=int, default=int(time.time()), help="first seed (the time)")
    parser.add_argument("--seeds", type=int, help="how many seeds (until interrupted)")
    given = parser.parse_args()
    os.environ["CUTE_QUANT_CACHE"] = "off"
    from tests.fuzz import emulated
    from tests.kernels.emulated_gpu import Kernels

    count, started = 0, time.monotonic()
    seeds = itertools.count(given.seed)
    for seed in seeds if given.seeds is None else itertools.islice(seeds, given.seeds):
        with tempfile.TemporaryDirectory(prefix="cute_quant_") as root:
            for session in emulated.sessions(seed):
                kernels = Kernels(lambda root=root: Path(tempfile.mkdtemp(dir=root)))
                for case in session.cases(seed):
                    try:
                        session.run(kernels, case)
                    except AssertionError as error:
                        print(f"seed {seed}: {error}", flush=True)
                        return 1
                    count += 1
        print(f"seed {seed}: {count} calls, {time.monotonic() - started:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except KeyboardInterrupt:
        raise SystemExit(130) from None
