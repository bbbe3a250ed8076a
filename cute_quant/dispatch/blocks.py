"""Calls on weights in square blocks: views of their tensors, kernels, launches."""

from __future__ import annotations

import functools

import torch

from cute_quant.contract import blocks
from cute_quant.contract.contents import check_source_blocks
from cute_quant.contract.dtypes import LOAD_BYTES, SOURCE_BLOCK, STORE_BYTES
from cute_quant.contract.formats import Format
from cute_quant.contract.reference import blocks as block_reference
from cute_quant.contract.tensors import (
    check_disjoint,
    check_no_tangents,
    check_real,
    flat_batch,
    region,
    region_of_scales,
)
from cute_quant.contract.torch_private import in_dual_level
from cute_quant.contract.upper_scales import UpperScale
from cute_quant.dispatch import launch, plan
from cute_quant.dispatch.call_range import (
    DEQUANTIZE_BLOCKS,
    QUANTIZE_BLOCKS,
    REQUANTIZE_BLOCKS,
    CallRange,
)
from cute_quant.dispatch.plan import (
    Gpu,
    View,
    alignment,
    compiled,
    matrix_view,
    missing_scale_rows,
    view_of_scales,
)
from cute_quant.jit import lookup
from cute_quant.kernels import architectures, heuristics
from cute_quant.kernels.config import (
    Access,
    BlocksSpec,
    DequantizeSpec,
    Domain,
    RequantizeSpec,
)


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
    of_rows = not blocks.stored_once(fmt)
    _check_regions({"w": w}, q, sf, mn_major=fmt.mn_major and of_rows)
    if not launch.has_kernels(w):
        launch.run(block_reference.quantize_into, (w, fmt, q, sf), [])
    elif w.numel():
        _launch_blocks(w, None, fmt, q, sf)
    return q, sf


def requantize(
    w8: torch.Tensor,
    w_sf: torch.Tensor,
    fmt: Format,
    upper: UpperScale | None,
    q: torch.Tensor | None,
    sf: torch.Tensor | None,
    *,
    check: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run ``cute_quant.requantize_blocks`` on tensors with memory.

    With `check` values and scales are read, which synchronizes, and refused where they do not fit.
    """
    shape = blocks.check_requantize_blocks(w8, w_sf, fmt, upper, q, sf)
    reads = {"w8": w8, "w_sf": w_sf}
    if upper is not None:
        reads[upper.kind] = upper.tensor
    _check_memory({**reads, "out q": q, "out sf": sf})
    if q is None:
        q = torch.empty(shape.values(fmt), dtype=fmt.values, device=w8.device)
    if sf is None and blocks.quantized_by_row(fmt):
        sf = fmt.empty_scales(*shape, w8.device)
    elif sf is None:
        sf = blocks.empty_scales(fmt, shape, w8.device)
    of_rows = blocks.quantized_by_row(fmt) or not blocks.stored_once(fmt)
    _check_regions(reads, q, sf, mn_major=fmt.mn_major and of_rows)
    if check:
        check_source_blocks(w8, w_sf, fmt, upper)
    if not launch.has_kernels(w8):
        launch.run(block_reference.requantize_into, (w8, w_sf, fmt, upper, q, sf), [])
    elif w8.numel() and blocks.quantized_by_row(fmt):
        _launch_groups(w8, w_sf, fmt, upper, q, sf)
    elif w8.numel():
        _launch_blocks(w8, w_sf, fmt, q, sf)
    return q, sf


def dequantize(q: torch.Tensor, sf: torch.Tensor, fmt: Format, dtype: torch.dtype) -> torch.Tensor:
    """Run ``cute_quant.dequantize_blocks`` on tensors with memory."""
    if not blocks.stored_once(fmt):
        return launch.dequantize(q, sf, fmt, dtype)
    shape = blocks.check_dequantize_blocks(q, sf, fmt, dtype)
    _check_memory({"q": q, "sf": sf})
    y = torch.empty((*shape.batch_shape, shape.mn, shape.k), dtype=dtype, device=q.device)
    if not launch.has_kernels(q):
        launch.run(block_reference.dequantize_into, (q, sf, fmt, y), [])
    elif q.numel():
        arch = lookup.architecture(q.get_device())
        spec = choose_dequantize_spec(q, y, fmt, arch)
        operands = (
            matrix_view(q, batched=True).of(q),
            view_of_scales(sf, 2).of(sf),
            None,
            matrix_view(y, batched=True).of(y),
        )
        calls = functools.partial(CallRange.of_weights, DEQUANTIZE_BLOCKS, q, fmt, y)
        launch.run(compiled(spec, arch, lambda: calls().remedy(arch)), operands, [y])
    return y


def _launch_blocks(
    w: torch.Tensor, w_sf: torch.Tensor | None, fmt: Format, q: torch.Tensor, sf: torch.Tensor
) -> None:
    """Launch the kernel of blocks on weights, or on e4m3 with the scales of its blocks."""
    arch = lookup.architecture(w.get_device())
    spec = choose_spec(
        w, fmt, q, arch, SOURCE_BLOCK if w_sf is None else blocks.block_size(w, w_sf)
    )
    operands = (
        matrix_view(w.mT if spec.transposed else w, batched=True).of(w),
        None if w_sf is None else view_of_scales(w_sf, 2).of(w_sf),
        matrix_view(q, batched=True).of(q),
        view_of_scales(sf, 2 if blocks.stored_once(fmt) else fmt.scale_dims).of(sf),
    )
    missing_rows = 0 if blocks.stored_once(fmt) else missing_scale_rows(sf, fmt)
    operation = QUANTIZE_BLOCKS if w_sf is None else REQUANTIZE_BLOCKS
    calls = functools.partial(CallRange.of_weights, operation, w, fmt, q)
    function = compiled(spec, arch, lambda: calls().remedy(arch))
    launch.run(function, (*operands, missing_rows, fmt.floor), [q, sf])


def _launch_groups(
    w8: torch.Tensor,
    w_sf: torch.Tensor,
    fmt: Format,
    upper: UpperScale | None,
    q: torch.Tensor,
    sf: torch.Tensor,
) -> None:
    """Launch the kernel of groups of rows on e4m3 with the scales of its blocks."""
    device = w8.get_device()
    arch = lookup.architecture(device)
    gpu = Gpu(arch, lookup.multiprocessors(device))
    kind = None if upper is None else upper.kind
    spec = choose_requantize_spec(w8, fmt, q, kind, gpu, blocks.block_size(w8, w_sf))
    given = None
    if upper is not None:
        matrices = flat_batch("w8", w8.shape, w8.stride())[0]
        given = View((matrices,), (int(upper.tensor.numel() > 1),)).of(upper.tensor)
    operands = (
        matrix_view(w8, batched=True).of(w8),
        view_of_scales(w_sf, 2).of(w_sf),
        matrix_view(q, batched=True).of(q),
        view_of_scales(sf, fmt.scale_dims).of(sf),
        given,
        None,
        None,
        None,
    )
    numbers = missing_scale_rows(sf, fmt), 1, 1, fmt.floor
    calls = functools.partial(CallRange.of_weights, REQUANTIZE_BLOCKS, w8, fmt, q, upper)
    function = compiled(spec, arch, lambda: calls().remedy(arch))
    launch.run(function, (*operands, *numbers), [q, sf])


def choose_spec(
    w: torch.Tensor, fmt: Format, q: torch.Tensor, arch: str, source_block: int = SOURCE_BLOCK
) -> BlocksSpec:
    """Choose the spec of the kernel for weights and memory for their quantized values."""
    transposed = blocks.is_transposed(w)
    values = heuristics.block_values(w.dtype, fmt, arch, transposed=transposed)
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
        source_block,
        architectures.named(arch).pdl,
    )


def choose_requantize_spec(
    w8: torch.Tensor,
    fmt: Format,
    q: torch.Tensor,
    upper: str | None,
    gpu: Gpu,
    source_block: int = SOURCE_BLOCK,
) -> RequantizeSpec:
    """Choose the spec of the kernel that requantizes in groups of rows."""
    view, target = matrix_view(w8, batched=True), architectures.named(gpu.arch)
    matrices, n, k = view.shape
    tile = heuristics.wide_shape(matrices, n, k, fmt, False, gpu.sms, gpu.arch).tile
    values = tile.values_per_thread
    load_bytes, store_bytes = values, values // fmt.value_type.per_byte
    access = Access(
        alignment(w8.data_ptr(), view, w8.itemsize, load_bytes),
        alignment(q.data_ptr(), matrix_view(q, batched=True), q.itemsize, store_bytes),
        ragged=w8.shape[-1] % values != 0,
    )
    return RequantizeSpec(
        w8.dtype,
        fmt.kernel_format,
        tile,
        Domain(batched=True),
        access,
        upper,
        source_block,
        target.pdl,
    )


def choose_dequantize_spec(
    q: torch.Tensor, y: torch.Tensor, fmt: Format, arch: str
) -> DequantizeSpec:
    """Choose the spec of the kernel that multiplies weights by the scales of their blocks."""
    spec = plan.choose_dequantize_spec(q, y, fmt, None, arch)
    return spec._replace(square=blocks.stored_once(fmt))


def _check_memory(tensors: dict[str, torch.Tensor | None]) -> None:
    check_real(tensors)
    if in_dual_level():
        check_no_tangents(tensors)


def _check_regions(
    reads: dict[str, torch.Tensor], q: torch.Tensor, sf: torch.Tensor, *, mn_major: bool
) -> None:
    """Check that the memory that a call writes overlaps nothing else of it.

    Args:
        reads: what it reads, by the names of the arguments.
        q: values to write.
        sf: scales to write.
        mn_major: whether there is one for each row, and these have padding.
    """
    check_disjoint(
        [region(name, t) for name, t in reads.items()],
        [region("out q", q), region_of_scales("out sf", sf, mn_major=mn_major)],
    )
