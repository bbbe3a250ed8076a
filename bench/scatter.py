"""Measure rows that are scattered to several places: a mixture of experts' dispatch on one GPU.

    python -m bench.scatter [--columns K] [--tokens T,...] [--copies N]

Each token goes to `copies` rows of the result. Beside the time of ``quantize(x, scatter=...)``:
that of the gather ``quantize(x, index=...)``, which reads a token again for each copy, and that of
the fastest kernel that only streams as many bytes, each token read once and each copy written, in
the same proportion. Calls are captured as those of `bench.masked`, and every row is compared with a
gather's before it is timed.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable

import torch

from bench import environment
from bench.ceiling import ELEMENTS, Ceiling, Words, allocate
from bench.masked import ALIGNMENT, DEVICE, Call, poison, random
from bench.problem import UE8M0
from bench.shapes import MAIN_COLUMN, positive_numbers
from bench.stream import Traffic
from bench.targets import verdict
from cute_quant import Masked, PrefixSum, quantize
from cute_quant.contract.rows import Rows
from cute_quant.lab import timing

TOKENS = (1, 8, 64, 512, 2048, 4096)
COPIES = 8
EXPERTS = 64
BOUND = 1.10
"""Asked for at 2048 tokens, 16384 rows of the result."""
JUDGED_TOKENS = 2048


def routed(tokens: int, copies: int, kind: str) -> tuple[Rows | None, torch.Tensor, int]:
    """Return a row domain, the places of tokens in it, and the rows of a matrix of the result."""
    count = tokens * copies
    if kind == "dense":
        return None, torch.randperm(count).view(tokens, copies), count
    expert = torch.rand(tokens, EXPERTS).argsort(1)[:, :copies].flatten()
    counts = expert.bincount(minlength=EXPERTS)
    order = expert.argsort(stable=True)
    rank = torch.empty(count, dtype=torch.int64)
    first = counts.cumsum(0) - counts
    rank[order] = torch.arange(count) - first[expert[order]]
    if kind == "masked":
        max_m = -(-int(counts.max()) // 4) * 4
        places = expert * max_m + rank
        return Masked(counts.int().to(DEVICE)), places.view(tokens, copies), max_m
    aligned = -(-counts // ALIGNMENT) * ALIGNMENT
    starts = aligned.cumsum(0) - aligned
    places = starts[expert] + rank
    ends = (starts + counts).int().to(DEVICE)
    return PrefixSum(ends, ALIGNMENT), places.view(tokens, copies), int(aligned.sum())


def calls(tokens: int, copies: int, k: int, kind: str) -> tuple[Call, Call, int]:
    """Return a scatter, the gather of the same rows, and the bytes that the scatter moves."""
    rows, places, mn = routed(tokens, copies, kind)
    batch = (EXPERTS,) if kind == "masked" else ()
    index = torch.full((EXPERTS * mn if batch else mn,), -1, dtype=torch.int32)
    index[places] = torch.arange(tokens, dtype=torch.int32).unsqueeze(1).expand(tokens, copies)
    x = random(tokens, k)
    q = torch.empty((*batch, mn, k), dtype=UE8M0.values, device=DEVICE)
    sf = UE8M0.empty_scales(batch, mn, k, torch.device(DEVICE))
    scatter = places.to(DEVICE, torch.int32)
    index = index.view(*batch, mn).to(DEVICE)
    out = (q, sf)
    run = functools.partial(quantize, x, UE8M0, rows=rows, scatter=scatter, out=out)
    gather = functools.partial(quantize, x, UE8M0, rows=rows, index=index, out=out)

    def check(other: Callable[[], object], own: Callable[[], object]) -> str:
        held = []
        for call in (other, own):
            poison(q, sf)
            call()
            held.append([_storage(t).clone() for t in out])
        wrong = sum(int((a != b).sum()) for a, b in zip(*held, strict=True))
        return f"{wrong} bytes" if wrong else ""

    cleared = 0 if kind != "prefix_sum" else mn - tokens * copies
    moved = tokens * k * 2 + (tokens * copies + cleared) * (k + UE8M0.groups(k))
    checked = functools.partial(check, gather, run)
    return Call(run, checked), Call(gather, lambda: ""), moved


def _storage(t: torch.Tensor) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=t.device).set_(t.untyped_storage())


def streaming(nbytes: int, copies: int) -> Words:
    """Return memory for a kernel that moves as many bytes, `copies` written for two read."""
    traffic = Traffic(words_in=2, words_out=copies)
    per_vector = 4 * (traffic.words_in + traffic.words_out)
    return allocate(traffic, -(-nbytes // per_vector) * ELEMENTS)


def measure(tokens: int, copies: int, k: int, kind: str) -> dict[str, float]:
    """Return the seconds of a scatter, of the gather and of the stream."""
    torch.cuda.empty_cache()
    *_, moved = calls(tokens, copies, k, kind)
    made: dict[str, list[Call]] = {"scatter": [], "gather": []}
    buffers = timing.buffer_count(moved)
    for _ in range(buffers):
        scatter, gather, _ = calls(tokens, copies, k, kind)
        for name, call in (("scatter", scatter), ("gather", gather)):
            made[name].append(call)
    graphs = {}
    for name, some in made.items():
        found = some[0].difference()
        if found:
            raise RuntimeError(f"{kind}, {tokens} tokens, {name}: {found} differ")
        graphs[name] = timing.capture([call.run for call in some], timing.launch_count(moved))
    fastest = Ceiling([streaming(moved, copies) for _ in range(buffers)])
    graphs["stream"] = timing.capture(fastest.calls(), timing.launch_count(moved))
    return timing.median_seconds(graphs)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.scatter",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--columns", type=int, default=MAIN_COLUMN, metavar="K", help="default: %(default)s")
    add("--tokens", type=positive_numbers, default=TOKENS, metavar="T,...")
    add("--copies", type=int, default=COPIES, choices=(1, 2, 4, 8), help="default: %(default)s")
    add("--commit", help="name of the measured version, where there is no git to ask")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench.scatter: needs a CUDA GPU of compute capability 9.0, 10.0 or 10.3")
    torch.manual_seed(0)
    machine = environment.describe("python -m bench.scatter", options.commit)
    print(f"{machine['gpu']}, {machine['commit']}, k = {options.columns}, microseconds a call")
    timing.warm_up()
    names = ("scatter", "gather", "stream")
    print(f"{'':10} {'tokens':>7} " + " ".join(f"{name:>8}" for name in names) + "  /stream")
    verdicts = []
    for kind in ("dense", "masked", "prefix_sum"):
        for tokens in options.tokens:
            seconds = measure(tokens, options.copies, options.columns, kind)
            ratio = seconds["scatter"] / seconds["stream"]
            times = " ".join(f"{seconds[name] * 1e6:8.2f}" for name in names)
            print(f"{kind:10} {tokens:7} {times}  {ratio:7.2f}", flush=True)
            if tokens == JUDGED_TOKENS and options.copies == COPIES:
                verdicts.append(verdict(f"scatter / stream, {kind}", ratio, BOUND, True))
    print("\n".join(verdicts))


if __name__ == "__main__":
    main()
