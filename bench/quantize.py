"""A first table: the packed quantizer beside the streaming ceiling and torch's own copy.

python -m bench.quantize
"""

from __future__ import annotations

import sys
from functools import partial

import torch

from bench import timing
from bench.stream import Stream
from cute_quant import compile, quantize, reference
from cute_quant.formats import make_format, scale_floor

GROUP_SIZE = 128
K = 7168
ROWS = (1, 64, 512, 4096, 65536)
CHECKED_ROWS = 64


def check(x: torch.Tensor, q: torch.Tensor, sf: torch.Tensor) -> None:
    """Compare the first rows with the reference: a wrong kernel is not worth timing."""
    fmt = make_format(GROUP_SIZE, "ue8m0", False)
    rows = min(len(x), CHECKED_ROWS)
    expected_q = torch.empty(rows, x.shape[1], dtype=q.dtype)
    expected_sf = fmt.empty_scales(rows, x.shape[1], torch.device("cpu"))
    reference.quantize_into(x[:rows].cpu(), expected_q, expected_sf, fmt, scale_floor(fmt, 1e-10))
    same_q = torch.equal(q[:rows].cpu().view(torch.uint8), expected_q.view(torch.uint8))
    if not same_q or not torch.equal(sf[:rows].cpu(), expected_sf):
        raise RuntimeError(f"quantize differs from the reference at {tuple(x.shape)}")


def measure(mn: int) -> tuple[int, dict[str, float]]:
    """Bytes that the quantizer moves for (mn, K), and seconds of each provider."""
    nbytes = mn * K * 3 + mn * K // GROUP_SIZE
    stream = compile.function(Stream, compile.architecture(torch.cuda.current_device()))
    calls = {"quantize": [], "stream": [], "copy": []}
    for _ in range(timing.buffer_count(nbytes)):
        x = torch.randn(mn, K, dtype=torch.bfloat16, device="cuda")
        q, sf = quantize(x)
        check(x, q, sf)
        # As many bytes in all, half of them read and half of them written.
        source, target = (
            torch.empty(mn * K * 3 // 2, dtype=torch.uint8, device="cuda") for _ in "rw"
        )
        source.random_()
        calls["quantize"].append(partial(quantize, x, out=(q, sf)))
        calls["stream"].append(partial(stream, as_words(x), as_words(torch.empty_like(q))))
        calls["copy"].append(partial(target.copy_, source))
    graphs = {name: timing.capture(provider) for name, provider in calls.items()}
    return nbytes, timing.median_seconds(graphs)


def as_words(t: torch.Tensor) -> torch.Tensor:
    return t.view(torch.int32).flatten()


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("bench: needs a CUDA GPU of compute capability 9.0, 10.0 or 10.3")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bf16, K = {K}")
    print(f"{'M':>6}  {'quantize':>20}  {'stream':>20}  {'copy':>20}  quantize / stream")
    for mn in ROWS:
        nbytes, seconds = measure(mn)
        cells = [f"{s * 1e6:9.2f} us {nbytes / s / 1e9:5.0f} GB/s" for s in seconds.values()]
        ratio = seconds["quantize"] / seconds["stream"]
        print(f"{mn:6}  {'  '.join(cells)}  {ratio:.3f}", flush=True)


if __name__ == "__main__":
    main()
