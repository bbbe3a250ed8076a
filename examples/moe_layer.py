"""A DeepSeek-style mixture of experts: two grouped GEMMs of DeepGEMM, each with a fused prologue.

    tokens -> norm + quantize -> GEMM gate_up -> silu * mul + quantize -> GEMM down -> combine

Each prologue is one kernel of `cute_quant`. `contiguous` stacks the tokens of all experts along M,
as for prefill; `masked` has max_m rows for each expert, as for decode. Neither synchronizes, so one
CUDA graph captures the layer, the permutation of tokens included.

    python examples/moe_layer.py

prints errors against a layer in bf16, and times beside unfused quantization. DeepGEMM compiles each
of its kernels for some seconds when it is first called. Without a GPU or DeepGEMM it says so, and
prints the errors of a small layer on the CPU, whose GEMMs are torch's.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch._dynamo
from torch import Tensor
from torch.nn import functional as F

import cute_quant as cq
from cute_quant.integrations.deep_gemm import per_token_cast_to_fp8

try:
    import deep_gemm
except ImportError:
    deep_gemm = None

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 7168, 2048, 32, 8
TOKENS = (64, 512, 4096)
EPS = 1e-6
BLOCK_M = 128
"""Rows of an output tile of the masked GEMM; max_m has to be a multiple."""

Fp8 = tuple[Tensor, Tensor]
"""Values and scales, as DeepGEMM takes an operand."""


class MoeLayer(NamedTuple):
    """Weights: bfloat16, and for the GEMMs FP8 with a scale for each block of 128x128."""

    norm: Tensor  # (hidden,)
    gate_up: Tensor  # (experts, 2 intermediate, hidden), gates first
    down: Tensor  # (experts, hidden, intermediate)
    gate_up_fp8: Fp8
    down_fp8: Fp8
    fmt: cq.Format  # of activations


class Routing(NamedTuple):
    """The router's choice for each token: (tokens, top_k)."""

    ids: Tensor  # int64, of experts, all different
    weights: Tensor  # float32


class Placement(NamedTuple):
    """The rows of the GEMMs that routed tokens are copied to."""

    index: Tensor  # (M,) or (experts, max_m), int32: the token of each row, -1 if none
    layout: Tensor  # int32, for DeepGEMM: the expert of each row, (M,), or rows of each, (experts,)
    rows: cq.Indexed | cq.Masked  # the same for the quantizer
    places: Tensor  # (tokens, top_k), int64: the row of each routed token


# The layer: (tokens, hidden), bfloat16, to the same.


def contiguous(layer: MoeLayer, tokens: Tensor, routing: Routing, quantizers: Quantizers) -> Tensor:
    placement = place_contiguous(routing.ids, len(layer.down))
    m, gemm = len(placement.index), deep_gemm.m_grouped_fp8_gemm_nt_contiguous
    a = quantizers.norm(layer, tokens, placement)
    gate_up = tokens.new_empty(m, layer.gate_up.shape[1])
    gemm(a, layer.gate_up_fp8, gate_up, placement.layout)
    a = quantizers.activation(layer, gate_up, placement)
    down = tokens.new_empty(m, layer.down.shape[1])
    gemm(a, layer.down_fp8, down, placement.layout)
    return combine(down, placement, routing)


def masked(layer: MoeLayer, tokens: Tensor, routing: Routing, quantizers: Quantizers) -> Tensor:
    placement = place_masked(routing.ids, len(layer.down))
    shape, gemm = placement.index.shape, deep_gemm.m_grouped_fp8_gemm_nt_masked
    expected_m = -(-routing.ids.numel() // len(layer.down))  # on average; it selects a tile
    a = quantizers.norm(layer, tokens, placement)
    gate_up = tokens.new_empty(*shape, layer.gate_up.shape[1])
    gemm(a, layer.gate_up_fp8, gate_up, placement.layout, expected_m)
    a = quantizers.activation(layer, gate_up, placement)
    down = tokens.new_empty(*shape, layer.down.shape[1])
    gemm(a, layer.down_fp8, down, placement.layout, expected_m)
    return combine(down, placement, routing)


def combine(down: Tensor, placement: Placement, routing: Routing) -> Tensor:
    """Return the weighted sum of the rows of each token.

    An embedding bag gathers them and adds in float32, in one kernel, and reads no padding row.
    """
    rows, weights = down.flatten(0, -2), routing.weights.to(down.dtype)
    return F.embedding_bag(placement.places, rows, per_sample_weights=weights, mode="sum")


def bf16(layer: MoeLayer, tokens: Tensor, routing: Routing) -> Tensor:
    """Compute the layer without quantization, expert by expert."""
    y = torch_rms_norm(tokens, layer.norm)
    result = torch.zeros_like(tokens, dtype=torch.float32)
    for expert, (gate_up, down) in enumerate(zip(layer.gate_up, layer.down, strict=True)):
        token, choice = (routing.ids == expert).nonzero(as_tuple=True)
        rows = torch_silu_mul(y[token] @ gate_up.t()) @ down.t()
        result[token] += rows * routing.weights[token, choice, None]
    return result.to(tokens.dtype)


# Placement of tokens. Sizes allow any routing, since the host does not know this one.


def place_contiguous(ids: Tensor, experts: int) -> Placement:
    """Sort rows by expert, the rows of each padded to DeepGEMM's alignment."""
    alignment = deep_gemm.utils.layout.get_mk_alignment_for_contiguous_layout()
    counts, ranks = count(ids, experts)
    padded = (counts + alignment - 1) // alignment * alignment
    places = (padded.cumsum(0) - padded)[ids] + ranks
    most = ids.numel() + min(experts, ids.numel()) * (alignment - 1)
    m = most // alignment * alignment
    m_indices = scatter(ids, places, m)
    return Placement(scatter(tokens_of(ids), places, m), m_indices, cq.Indexed(m_indices), places)


def place_masked(ids: Tensor, experts: int) -> Placement:
    """Reserve a row for every token in each expert, which gets a token at most once."""
    max_m = -(-len(ids) // BLOCK_M) * BLOCK_M
    counts, ranks = count(ids, experts)
    places, masked_m = ids * max_m + ranks, counts.int()
    index = scatter(tokens_of(ids), places, experts * max_m).view(experts, max_m)
    return Placement(index, masked_m, cq.Masked(masked_m), places)


def count(ids: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Return tokens per expert, (experts,), and the rank of each token in its expert, as `ids`."""
    routed = torch.arange(experts, device=ids.device)[:, None] == ids.flatten()
    ranks = routed.cumsum(1).gather(0, ids.view(1, -1)) - 1
    return routed.sum(1), ranks.view_as(ids)


def tokens_of(ids: Tensor) -> Tensor:
    return torch.arange(len(ids), device=ids.device)[:, None].expand_as(ids)


def scatter(values: Tensor, places: Tensor, size: int) -> Tensor:
    """Return int32 (size,): `values` at their places, -1 elsewhere."""
    result = torch.full((size,), -1, dtype=torch.int32, device=places.device)
    return result.scatter_(0, places.flatten(), values.flatten().int())


# Prologues of the GEMMs


class Fused:
    """One kernel per prologue, which skips padding rows."""

    def __init__(self, rounding: str = "fused"):
        self.rounding = rounding

    # The routing is given here, so the norm itself can gather, and no row is written twice. Where
    # an engine computes the routing, it needs normalized rows before it knows an index. It calls
    # rms_norm_quantize(x, weight, residual=residual, normalized=True) once a token, and then
    # gathers q and sf: half the bytes of bf16, and what it sends to other GPUs.
    def norm(self, layer: MoeLayer, tokens: Tensor, placement: Placement) -> Fp8:
        return cq.rms_norm_quantize(
            tokens,
            layer.norm,
            layer.fmt,
            eps=EPS,
            rounding=self.rounding,
            rows=placement.rows,
            index=placement.index,
        )

    def activation(self, layer: MoeLayer, gate_up: Tensor, placement: Placement) -> Fp8:
        return cq.silu_mul_quantize(gate_up, layer.fmt, rounding=self.rounding, rows=placement.rows)


class Unfused:
    """torch in bf16, then a kernel that only quantizes.

    torch skips no rows: it normalizes each token once, and multiplies padding rows too.

    Args:
        compile: applied to torch's functions.
    """

    def __init__(self, compile: Callable[[Callable], Callable] = lambda function: function):
        self.rms_norm, self.silu_mul = compile(torch_rms_norm), compile(torch_silu_mul)

    def norm(self, layer: MoeLayer, tokens: Tensor, placement: Placement) -> Fp8:
        y = self.rms_norm(tokens, layer.norm)
        return cq.quantize(y, layer.fmt, rows=placement.rows, index=placement.index)

    def activation(self, layer: MoeLayer, gate_up: Tensor, placement: Placement) -> Fp8:
        y = self.silu_mul(gate_up)
        return cq.quantize(y, layer.fmt, rows=placement.rows)


class DeepGemmCasts:
    """torch in bf16, then DeepGEMM's cast, in torch too."""

    def norm(self, layer: MoeLayer, tokens: Tensor, placement: Placement) -> Fp8:
        y = torch_rms_norm(tokens, layer.norm)[placement.index.clamp(min=0)]
        return self.cast(layer, y, placement)

    def activation(self, layer: MoeLayer, gate_up: Tensor, placement: Placement) -> Fp8:
        return self.cast(layer, torch_silu_mul(gate_up), placement)

    def cast(self, layer: MoeLayer, x: Tensor, placement: Placement) -> Fp8:
        # On Blackwell DeepGEMM packs these scales, those of padding too, which have to be sound.
        x = x.where(placement.index[..., None] >= 0, 0)
        cast = deep_gemm.utils.math.per_token_cast_to_fp8
        q, sf = cast(x.flatten(0, -2), layer.fmt.ue8m0)
        return q.view(x.shape), sf.view(*x.shape[:-1], -1)


Quantizers = Fused | Unfused | DeepGemmCasts


def torch_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, EPS)


def torch_silu_mul(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


# Without DeepGEMM


class TorchDeepGemm:
    """The DeepGEMM calls of the layer, in torch.

    A GEMM reads and writes whole blocks of rows, and skips blocks without a token.
    """

    def __init__(self) -> None:
        self.utils = SimpleNamespace(
            layout=SimpleNamespace(get_mk_alignment_for_contiguous_layout=lambda: BLOCK_M),
            math=SimpleNamespace(
                per_token_cast_to_fp8=per_token_cast_to_fp8,
            ),
        )

    def m_grouped_fp8_gemm_nt_contiguous(self, a: Fp8, b: Fp8, d: Tensor, m_indices: Tensor):
        x, weights = dequantize_rows(*a), dequantize_blocks(*b)
        blocks = zip(x.split(BLOCK_M), d.split(BLOCK_M), m_indices.split(BLOCK_M), strict=True)
        for rows, result, indices in blocks:
            if indices[0] >= 0:
                result.copy_(rows @ weights[indices[0]].t())

    def m_grouped_fp8_gemm_nt_masked(
        self, a: Fp8, b: Fp8, d: Tensor, masked_m: Tensor, expected_m: int
    ):
        x, weights = dequantize_rows(*a), dequantize_blocks(*b)
        for expert, count in enumerate(masked_m.tolist()):
            rows = slice(-(-count // BLOCK_M) * BLOCK_M)
            d[expert, rows] = (x[expert, rows] @ weights[expert].t()).to(d.dtype)


def format_of(sf: Tensor) -> cq.Format:
    return cq.DEEP_GEMM if sf.dtype is torch.int32 else cq.DEEP_GEMM_SM90


def dequantize_rows(q: Tensor, sf: Tensor) -> Tensor:
    """Return activations in float32, whether their scales are packed or float32."""
    return cq.dequantize(q, sf, format_of(sf), dtype=torch.float32)


def dequantize_blocks(q: Tensor, sf: Tensor) -> Tensor:
    return cq.dequantize_blocks(q, sf, format_of(sf), dtype=torch.float32)


# Inputs, errors, times


def random_layer(
    hidden: int, intermediate: int, experts: int, fmt: cq.Format, device: str
) -> MoeLayer:
    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.bfloat16, device=device)

    gate_up = randn(experts, 2 * intermediate, hidden).mul_(hidden**-0.5)
    down = randn(experts, hidden, intermediate).mul_(intermediate**-0.5)
    norm = 1 + randn(hidden) / 8
    quantized = cq.quantize_blocks(gate_up, fmt), cq.quantize_blocks(down, fmt)
    return MoeLayer(norm, gate_up, down, *quantized, fmt)


def route(scores: Tensor, top_k: int) -> Routing:
    """The largest of scores (tokens, experts), weighted as DeepSeek does."""
    weights, ids = scores.sigmoid().topk(top_k)
    return Routing(ids, weights / weights.sum(-1, keepdim=True))


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill what torch allocates with NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def capture(call: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """Return a CUDA graph of a call, replayed once, and the tensor it writes its result to."""
    call()  # compiles, which no capture allows
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    graph.replay()
    return graph, result


def milliseconds(graphs: list[torch.cuda.CUDAGraph]) -> list[float]:
    """Return the median milliseconds of a replay of each graph, in interleaved rounds."""
    replays, times = 10, [[] for _ in graphs]
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(7):
        for graph, rounds in zip(graphs, times, strict=True):
            start.record()
            for _ in range(replays):
                graph.replay()
            end.record()
            end.synchronize()
            rounds.append(start.elapsed_time(end) / replays)
    return [statistics.median(rounds) for rounds in times]


def table_row(forward: Callable, *inputs: object) -> str:
    """Return errors and times of `forward`, one of the two layouts, as a row of the table."""
    expected = bf16(*inputs)
    with poisoned_memory():
        ours = forward(*inputs, Fused())
        others = [forward(*inputs, other) for other in (Fused("unfused"), DeepGemmCasts())]
    errors = [f"{100 * relative_error(result, expected):.3f} %" for result in (ours, *others)]
    graph, replayed = capture(lambda: forward(*inputs, Fused()))
    if not torch.equal(replayed, ours):
        raise RuntimeError("a replay in clean memory differs from a call in poisoned memory")
    graphs, note = [graph, capture(lambda: forward(*inputs, Unfused()))[0]], []
    try:
        torch.compiler.reset()  # each shape is compiled for itself
        compiled = Unfused(lambda function: torch.compile(function, dynamic=False))
        graphs.append(capture(lambda: forward(*inputs, compiled))[0])
    except torch._dynamo.exc.TorchDynamoException as error:
        note = [type(error).__name__]
    times = [f"{time:.3f} ms" for time in milliseconds(graphs)]
    cells = (str(len(inputs[1])), forward.__name__, *errors, *times, *note)
    return "".join(f"{cell:>14}" for cell in cells)


def missing() -> str | None:
    """Return what the layer lacks to run on DeepGEMM; None if it lacks nothing."""
    if not torch.cuda.is_available():
        return "There is no GPU"
    try:
        cq.deep_gemm_format()
    except RuntimeError:
        return f"DeepGEMM has no GEMMs for {torch.cuda.get_device_name()}"
    if deep_gemm is None:
        return "DeepGEMM (github.com/deepseek-ai/DeepGEMM) is not installed"
    return None


def main() -> None:
    torch.manual_seed(0)
    lacking = missing()
    if lacking is not None:
        print(f"{lacking}, so this is a small layer on the CPU, with GEMMs of torch.")
        print_errors_on_cpu()
        return
    layer = random_layer(HIDDEN, INTERMEDIATE, EXPERTS, cq.deep_gemm_format(), "cuda")
    print(f"{torch.cuda.get_device_name()}; hidden {HIDDEN}, intermediate {INTERMEDIATE},")
    print(f"{EXPERTS} experts, {TOP_K} a token; errors against bf16, times of a CUDA graph\n")
    errors, times = ("fused", "rounded", "DeepGEMM cast"), ("fused", "unfused", "compiled")
    print("".join(f"{title:>14}" for title in ("tokens", "layout", *errors, *times)))
    for tokens in TOKENS:
        x = torch.randn(tokens, HIDDEN, dtype=torch.bfloat16, device="cuda")
        scores = torch.randn(tokens, EXPERTS, device="cuda") + torch.randn(EXPERTS, device="cuda")
        for forward in (contiguous, masked):
            print(table_row(forward, layer, x, route(scores, TOP_K)), flush=True)


def print_errors_on_cpu() -> None:
    global deep_gemm
    deep_gemm = TorchDeepGemm()
    hidden, intermediate, experts, top_k, tokens = 512, 256, 6, 2, 64
    print(f"hidden {hidden}, intermediate {intermediate}, {experts} experts, {top_k} a token\n")
    print("".join(f"{title:>14}" for title in ("format", "layout", "fused", "DeepGEMM cast")))
    for name in ("DEEP_GEMM_SM90", "DEEP_GEMM"):
        layer = random_layer(hidden, intermediate, experts, cq.NAMED_FORMATS[name], "cpu")
        x = torch.randn(tokens, hidden, dtype=torch.bfloat16)
        routing = route(torch.randn(tokens, experts), top_k)
        reference = bf16(layer, x, routing)
        for forward in (contiguous, masked):
            results = (forward(layer, x, routing, each) for each in (Fused(), DeepGemmCasts()))
            errors = (f"{100 * relative_error(result, reference):.3f} %" for result in results)
            print("".join(f"{cell:>14}" for cell in (name, forward.__name__, *errors)))


if __name__ == "__main__":
    main()
