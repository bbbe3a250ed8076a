"""What each rank does in the tests of DTensor, on a mesh of 2 x 2."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)

import cute_quant as cq
from cute_quant import Indexed, Masked, PrefixSum, distributed
from tests.helpers import assert_same_bits


def mesh_of_four() -> DeviceMesh:
    """Return the mesh, made once in a process."""
    if not hasattr(mesh_of_four, "mesh"):
        distributed.register_shardings()
        mesh_of_four.mesh = init_device_mesh("cpu", (2, 2))
    return mesh_of_four.mesh


def retyped(t: DTensor, dtype: torch.dtype) -> DTensor:
    """Return a distributed tensor whose bytes are taken as another dtype of one byte."""
    local = t.to_local().view(dtype)
    return DTensor.from_local(
        local, t.device_mesh, t.placements, run_check=False, shape=t.shape, stride=t.stride()
    )


def whole(t: torch.Tensor) -> torch.Tensor:
    """Return a tensor of all ranks; gloo moves no floats of 8 bits, but bytes."""
    if not isinstance(t, DTensor):
        return t
    one_byte = t.dtype.itemsize == 1
    moved = retyped(t, torch.uint8) if one_byte else t
    local = moved.redistribute(placements=[Replicate()] * 2).to_local()
    return local.view(t.dtype) if one_byte else local


def distribute(t: torch.Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> DTensor:
    """Return a tensor that all ranks have as a distributed one."""
    if t.dtype.itemsize > 1:
        return distribute_tensor(t, mesh, placements)
    return retyped(distribute_tensor(t.view(torch.uint8), mesh, placements), t.dtype)


def normal(*shape: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).bfloat16()


def check(
    call: Callable[..., Any],
    inputs: tuple[torch.Tensor, ...],
    placements: tuple[tuple[Placement, Placement], ...],
    expected: tuple[Placement, Placement] | None = None,
) -> None:
    """Compare a call on distributed tensors with one on whole ones.

    Args:
        expected: placement of the results, if it is known.
    """
    mesh = mesh_of_four()
    given = [distribute(t, mesh, own) for t, own in zip(inputs, placements, strict=True)]
    results, wanted = call(*given), call(*inputs)
    if isinstance(results, torch.Tensor):
        results, wanted = (results,), (wanted,)
    for result, own in zip(results, wanted, strict=True):
        assert isinstance(result, DTensor)
        assert result.shape == own.shape and result.dtype == own.dtype
        if expected is not None:
            assert result.placements == expected, (result.placements, expected)
        assert_same_bits(whole(result), own)


PLACEMENTS = tuple(itertools.product((Replicate(), Shard(0), Shard(1)), repeat=2))
R, S0, S1, S2 = Replicate(), Shard(0), Shard(1), Shard(2)


def quantize_in_every_placement(rank: int) -> None:
    """Each format on each placement; where these are not possible, they are redistributed."""
    for fmt in (
        cq.DEEP_GEMM,
        cq.DEEP_GEMM_SM90,
        cq.MXFP8,
        cq.MXFP4.replace(scale_layout="row_major"),
        cq.ROWWISE_FP8,
        cq.GROUPWISE_FP8,
    ):
        for turn, placements in enumerate(PLACEMENTS):
            call = lambda x, fmt=fmt: cq.quantize(x, fmt)  # noqa: E731
            check(call, (normal(*((6, 2048), (5, 1024))[turn % 2]),), (placements,))


def quantize_stays_where_it_is(rank: int) -> None:
    """What can be sharded is not gathered."""
    x = normal(8, 4096)
    for fmt, placements in (
        (cq.DEEP_GEMM, (S0, S0)),
        (cq.DEEP_GEMM, (R, S0)),
        (cq.DEEP_GEMM, (S0, S1)),
        (cq.DEEP_GEMM, (S1, S1)),
        (cq.GROUPWISE_FP8, (R, S1)),
        (cq.MXFP4.replace(scale_layout="row_major"), (S1, S0)),
    ):
        check(lambda x, fmt=fmt: cq.quantize(x, fmt), (x,), (placements,), placements)
    words = normal(8, 3072)  # six words of a row do not fall into four
    mesh = mesh_of_four()
    q, sf = cq.quantize(distribute(words, mesh, [R, S1]))
    assert S1 not in q.placements and S1 not in sf.placements
    blocks = normal(512, 64)
    check(lambda x: cq.quantize(x, cq.MXFP8), (blocks,), ((S0, S0),), (S0, S0))
    batch = normal(4, 6, 512)
    check(cq.quantize, (batch,), ((S0, S1),), (S0, S1))


def formats_after_each_other(rank: int) -> None:
    """Formats of the same shapes do not take each other's shardings or dtypes."""
    mesh = mesh_of_four()
    x = normal(8, 1024)
    for _ in range(2):
        for fmt in (cq.GROUPWISE_FP8, cq.DEEP_GEMM, cq.INT8, cq.ROWWISE_FP8, cq.GROUPWISE_FP8):
            q, sf = cq.quantize(distribute(x, mesh, [R, S1]), fmt)
            own_q, own_sf = cq.quantize(x, fmt)
            assert q.dtype == own_q.dtype and sf.dtype == own_sf.dtype
            assert_same_bits(whole(q), own_q)
            assert_same_bits(whole(sf), own_sf)


def row_domains(rank: int) -> None:
    """Experts are sharded with their counts, marked rows with their marks."""
    masked_m = torch.tensor([3, 0, 6, 2], dtype=torch.int32)
    x = normal(4, 6, 512)
    live = torch.arange(6) < masked_m[:, None]

    def masked(x, masked_m):
        q, sf = cq.quantize(x, cq.GROUPWISE_FP8, rows=Masked(masked_m))
        return q.view(torch.uint8), sf

    mesh = mesh_of_four()
    for placements in ((S0, S0), (R, S0), (S1, S0)):
        own = [S0 if p == S0 else R for p in placements]
        results = masked(distribute(x, mesh, placements), distribute(masked_m, mesh, own))
        for result, expected in zip(results, masked(x, masked_m), strict=True):
            assert result.placements == tuple(own)
            assert_same_bits(whole(result)[live], expected[live])
    m_indices = torch.tensor([0, 0, -1, 1, 2, -1, -1, 3], dtype=torch.int32)
    rows = normal(8, 512)
    check(lambda x, m: cq.quantize(x, rows=Indexed(m)), (rows, m_indices), ((S0, S0),) * 2)
    ends = torch.tensor([3, 6], dtype=torch.int32)
    check(lambda x, e: cq.quantize(x, rows=PrefixSum(e, 4)), (rows, ends), ((S0, R), (R, R)))
    index = torch.tensor([5, -1, 0, 0, 7, 2], dtype=torch.int32)
    check(lambda x, i: cq.quantize(x, index=i), (rows, index), ((S0, S1), (R, S0)))
    places = torch.arange(16, dtype=torch.int32).view(8, 2)
    call = lambda x, p: cq.quantize(x, scatter=p, num_rows=16)  # noqa: E731
    check(call, (rows, places), ((S0, R), (R, S0)))


def numbers_of_rows_and_groups_along_them(rank: int) -> None:
    """Random numbers are those of whole tensors; gradients are sharded by rows, as their inputs."""
    x, state = normal(8, 512), torch.tensor([3, 4])
    call = lambda x, s: cq.quantize(x, cq.GROUPWISE_FP8, rng_state=s)  # noqa: E731
    for placements in ((S0, S0), (S0, S1), (R, R)):
        check(call, (x, state), (placements, (R, R)), (R, R))
    grad, gate_up = normal(8, 256), normal(8, 512, seed=2)
    call = lambda g, x: cq.silu_mul_backward_quantize(g, x, cq.GROUPWISE_FP8)  # noqa: E731
    check(call, (grad, gate_up), ((S0, S0), (S0, S0)), (S0, S0))
    check(call, (grad, gate_up), ((S1, R), (S1, R)))
    columns = lambda x: cq.quantize_columns(x, cq.DEEP_GEMM_SM90)  # noqa: E731
    check(columns, (normal(256, 256),), ((S0, R),), (R, R))


def fused_operations(rank: int) -> None:
    """Norm and SwiGLU, a residual that is updated in place, and what they refuse."""
    x, weight, factors = normal(8, 1024), normal(512, seed=2), torch.rand(8)
    for placements in PLACEMENTS:
        for interleaved in (False, True):
            options = {"fmt": cq.GROUPWISE_FP8, "interleaved": interleaved}
            call = lambda x, options=options: cq.silu_mul_quantize(x, **options)  # noqa: E731
            check(call, (x,), (placements,), placements if interleaved else None)
        norm = lambda x, w: cq.rms_norm_quantize(x[:, :512], w)  # noqa: E731
        check(norm, (x, weight), (placements, (R, S0)))
    call = lambda x, f: cq.silu_mul_quantize(x, weight=f)  # noqa: E731
    check(call, (x, factors), ((S0, S0), (S0, R)))
    mesh = mesh_of_four()
    x = x[:, :512].contiguous()
    for own in ((S0, S0), (R, R)):
        residual = normal(8, 512, seed=3)
        given = distribute(residual.clone(), mesh, own)
        results = cq.rms_norm_quantize(
            distribute(x, mesh, [R, S0]), distribute(weight, mesh, [R, R]), residual=given
        )
        expected = cq.rms_norm_quantize(x, weight, residual=residual)
        assert results[2] is given and given.placements == own
        for result, t in zip(results, expected, strict=True):
            assert_same_bits(whole(result), t)
    given = distribute(normal(8, 512, seed=3), mesh, [R, S0])
    words = "residual_out: expected one placement on all dimensions of the mesh"
    refuse(words, cq.rms_norm_quantize, distribute(x, mesh, [R, S0]), weight, given)
    out = cq.quantize(distribute(x, mesh, [S0, S0]))
    refuse("q: expected a tensor that is not sharded", cq.quantize, *out)


def refuse(words: str, operation: Callable[..., Any], *tensors: torch.Tensor) -> None:
    """Check that what is written keeps its placement, or the call raises."""
    mesh = mesh_of_four()
    try:
        if operation is cq.quantize:
            operation(distribute(normal(8, 512), mesh, [S0, S0]), out=tensors)
        else:
            x, weight, residual = tensors
            operation(x, distribute(weight, mesh, [R, R]), residual=residual)
    except Exception as error:
        assert words in str(error), error
    else:
        raise AssertionError("nothing raised")


def back_and_blocks(rank: int) -> None:
    """What multiplies values back, weights in blocks, and the largest magnitude."""
    x = normal(4, 256, 1024)
    # gloo cannot gather floats of 8 bits, so they are sharded as they may be.
    every = ((S0, R), (S1, S1), (R, S2), (S0, S1))
    for fmt, placements in ((cq.INT8, every), (cq.DEEP_GEMM, ((S0, R), (S1, S1), (S0, S1)))):
        results = cq.quantize(x, fmt)
        for own in placements:
            check(lambda x, fmt=fmt: cq.fake_quantize(x, fmt), (x,), (own,))
            back = lambda q, sf, fmt=fmt: cq.dequantize(q, sf, fmt)  # noqa: E731
            check(back, results, (own, own))
    w = normal(512, 512)
    for fmt in (cq.DEEP_GEMM, cq.DEEP_GEMM_SM90, cq.MXFP8):
        for own in PLACEMENTS:
            check(lambda w, fmt=fmt: cq.quantize_blocks(w, fmt), (w,), (own,))
    for per_matrix in (False, True):
        amax = lambda x, p=per_matrix: cq.tensor_amax(x, per_matrix=p)  # noqa: E731
        check(amax, (x,), ((S0, S1),))
    amax = cq.tensor_amax(x, per_matrix=True)
    call = lambda x, a: cq.quantize(x, cq.NVFP4, amax=a)  # noqa: E731
    check(call, (x, amax), ((S0, S0), (S0, R)))


def partial_sums_are_added_first(rank: int) -> None:
    """The x of a row-parallel GEMM: the sum is quantized, not its parts."""
    mesh = mesh_of_four()
    x = torch.arange(8 * 512).remainder(13).sub(6).view(8, 512).bfloat16()
    part = DTensor.from_local(x * (rank + 1), mesh, [Partial(), Partial()])
    q, sf = cq.quantize(part)
    expected = cq.quantize(x * 10)
    for result, t in zip((q, sf), expected, strict=True):
        assert_same_bits(whole(result), t)


def compiled(rank: int) -> None:
    """A compiled function of distributed tensors."""
    mesh = mesh_of_four()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def call(x):
        q, sf = cq.quantize(x * 2, cq.GROUPWISE_FP8)
        return q, sf

    for placements in ((S0, S0), (S0, S1), (R, S1)):
        x = normal(8, 1024)
        results = call(distribute(x, mesh, placements))
        for result, t in zip(results, cq.quantize(x * 2, cq.GROUPWISE_FP8), strict=True):
            assert isinstance(result, DTensor)
            assert_same_bits(whole(result), t)
