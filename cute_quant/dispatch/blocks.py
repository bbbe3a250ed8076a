"""Blocks of weights: views, launches, and the operators that torch knows."""

from __future__ import annotations

import torch

from cute_quant.contract import block_reference, blocks
from cute_quant.contract.dtypes import LOAD_BYTES, STORE_BYTES
from cute_quant.contract.formats import Format
from cute_quant.contract.tensors import (
    Region,
    check_disjoint,
    check_no_tangents,
    check_real,
    flat_batch,
    last_column_rows,
    region,
    span,
)
from cute_quant.contract.torch_private import in_dual_level
from cute_quant.dispatch import launch
from cute_quant.dispatch.plan import Function, View, alignment, matrix_view
from cute_quant.jit import lookup
from cute_quant.kernels import architectures, heuristics
from cute_quant.kernels.config import Access, BlocksSpec, Spec


def quantize(
    w: torch.Tensor, fmt: Format, q: torch.Tensor | None, sf: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run ``cute_quant.quantize_blocks`` on tensors with memory."""
    shape = blocks.check_quantize_blocks(w, fmt, q, sf)
    _check_memory({"w": w, "out q": q, "out sf": sf})
    if q is None:
        q = torch.empty(shape.values(fmt), dtype=fmt.values, device=w.device)
    if sf is None:
        sf = blocks.empty_scales(fmt, shape, w.device)
    _check_regions({"w": w}, q, sf, fmt)
    if not launch.has_kernels(w):
        launch.run(block_reference.quantize_into, (w, fmt, q, sf), [])
    elif w.numel():
        launch_blocks(w, None, fmt, q, sf)
    return q, sf


def launch_blocks(
    w: torch.Tensor, w_sf: torch.Tensor | None, fmt: Format, q: torch.Tensor, sf: torch.Tensor
) -> None:
    """Launch the kernel of blocks on weights, or on e4m3 with the scales of its blocks."""
    arch = lookup.architecture(w.get_device())
    spec = choose_spec(w, fmt, q, arch)
    views = (
        matrix_view(w.mT if spec.transposed else w, batched=True),
        None if w_sf is None else _matrices(w_sf, 2),
        matrix_view(q, batched=True),
        _matrices(sf, fmt.scale_dims),
    )
    operands = [
        None if view is None else view.of(t) for view, t in zip(views, (w, w_sf, q, sf), strict=True)
    ]
    missing_rows = 0
    if fmt.mn_major and not blocks.stored_once(fmt):
        missing_rows = fmt.scale_rows(q.shape[-2]) - last_column_rows(sf)
    launch.run(_function(spec, arch), (*operands, missing_rows, fmt.floor), [q, sf])


def choose_spec(w: torch.Tensor, fmt: Format, q: torch.Tensor, arch: str) -> BlocksSpec:
    """Choose the spec of the kernel for weights and memory for their quantized values."""
    transposed = blocks.is_transposed(w)
    values = heuristics.block_values(w.dtype, fmt, arch)
    source = w.mT if transposed else w
    per_byte = fmt.value_type.per_byte
    q_values = STORE_BYTES * per_byte if transposed else values
    load_bytes = min(LOAD_BYTES, values * w.element_size())
    store_bytes = min(STORE_BYTES, q_values // per_byte)
    return BlocksSpec(
        w.dtype,
        fmt.kernel_format,
        values,
        Access(
            alignment(w.data_ptr(), matrix_view(source, batched=True), w.itemsize, load_bytes),
            ragged=source.shape[-1] % values != 0,
        ),
        Access(
            store_bytes=alignment(
                q.data_ptr(), matrix_view(q, batched=True), q.itemsize, store_bytes
            ),
            ragged=w.shape[-1] % q_values != 0,
        ),
        transposed,
        architectures.named(arch).pdl,
    )


def _function(spec: Spec, arch: str) -> Function:
    """Return a compiled kernel.

    Raises:
        RuntimeError: the kernel is missing and cannot be compiled.
    """
    try:
        return lookup.function(spec, arch)
    except lookup.NotBuilt as error:
        raise RuntimeError(
            f"{error}: call the operation before, on tensors of the same dtype and alignment"
        ) from None


def _matrices(sf: torch.Tensor, inner: int) -> View:
    """Return the view of scales with one batch dimension before the `inner` last ones."""
    batch, stride = flat_batch("sf", sf.shape, sf.stride(), inner)
    return View((batch, *sf.shape[-inner:]), (stride, *sf.stride()[-inner:]))


def _check_memory(tensors: dict[str, torch.Tensor | None]) -> None:
    check_real(tensors)
    if in_dual_level():
        check_no_tangents(tensors)


def _check_regions(
    reads: dict[str, torch.Tensor], q: torch.Tensor, sf: torch.Tensor, fmt: Format
) -> None:
    """Check that the memory that a call writes overlaps nothing else of it."""
    nbytes = span(sf)
    if fmt.mn_major and not blocks.stored_once(fmt) and sf.numel():
        nbytes += (last_column_rows(sf) - sf.shape[-2]) * sf.element_size()
    check_disjoint(
        [region(name, t) for name, t in reads.items()],
        [region("out q", q), Region("out sf", sf.data_ptr(), nbytes)],
    )
