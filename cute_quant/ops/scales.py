"""Scales allocated, converted, and checked against what a reader requires, DeepGEMM's by GPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cute_quant.contract import checks
from cute_quant.contract.blocks import check_block_format
from cute_quant.contract.blocks import empty_scales as empty_block_scales
from cute_quant.contract.dtypes import describe
from cute_quant.contract.formats import DEEP_GEMM, DEEP_GEMM_SM90, Format
from cute_quant.contract.reader_checks.arguments import check_arguments
from cute_quant.contract.reader_checks.quantized import Finding, Quantized
from cute_quant.contract.reader_checks.search import findings
from cute_quant.contract.readers import READERS
from cute_quant.contract.rows import Rows
from cute_quant.contract.scale_conversion import Conversion
from cute_quant.contract.torch_private import outside_of_graphs
from cute_quant.contract.upper_scales import make_upper_scale
from cute_quant.dispatch import convert_scales as conversions
from cute_quant.ops.arguments import check_bool, check_input, goes_to_tracer


def convert_scales(
    sf: torch.Tensor,
    fmt: Format,
    to: Format,
    shape: Sequence[int],
    *,
    rows: Rows | None = None,
    check: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Convert scales to another layout that holds the same numbers, in one pass.

    The values that they belong to stay as they are. Any layout converts to any other, and float32
    scales that are powers of two to UE8M0 and back. A float32 that is no power of two would be
    lost: it becomes the UE8M0 NaN, 255, so that the GEMM does not hide it, and so do NaN and Inf.
    The byte 255 becomes NaN, and the byte 0 becomes 2^-127, or 0 where the smallest scale of `fmt`
    is above that: rows that do not exist have it. Padding becomes 0, as operations leave it.

    In place of DeepGEMM's ``get_mn_major_tma_aligned_packed_ue8m0_tensor`` and
    ``get_mn_major_tma_aligned_tensor``, and FlashInfer's ``block_scale_interleave``. On a GPU this
    is one kernel on the current stream; the first call that takes it compiles it.

    Args:
        sf: scales in the dtype and shape of `fmt`, with any strides as for :func:`dequantize`.
        fmt: the format of `sf`. Float32 scales that are powers of two have one with
            ``round_scale=True``.
        to: the format of the result, with the same values and group size.
        shape: shape of the values, (..., mn, k); of FP4 the numbers, not the bytes.
        rows: which rows exist, as for :func:`quantize`; all others get the scale 0, dead rows of
            ``Masked`` experts too.
        check: whether to read the scales and the counts of `rows`, which synchronizes, and raise on
            float32 scales that are lost, and on counts out of range.
        out: to write into: the shape and strides of `to`, as for :func:`quantize`.

    Returns:
        `out`, or new scales: ``to.sf_dtype``, shape and strides as in :class:`Format`.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: an argument has a wrong value, shape, stride or device, or `to` cannot hold the
            scales of `fmt`.
        RuntimeError: as :func:`quantize`.
    """
    check_input("convert_scales", "sf", sf)
    check_bool("check", check)
    if out is not None and not isinstance(out, torch.Tensor):
        raise TypeError(f"out: expected a tensor or None, got {describe(out)}")
    call = Conversion(sf, fmt, to, checks.check_values_shape(shape), rows, out)
    if not goes_to_tracer([sf], check, "scales"):
        return conversions.run(call, check=check)
    # A schema cannot name what is wrong with these.
    checks.check_format(fmt)
    checks.check_format(to, "to")
    checks.check_row_kind(rows)
    return conversions.trace(call)


@outside_of_graphs
def check_scales(
    q: torch.Tensor,
    sf: torch.Tensor,
    fmt: Format,
    reader: str,
    *,
    rows: Rows | None = None,
    encode_scale: torch.Tensor | None = None,
    decode_scale: torch.Tensor | None = None,
    amax: torch.Tensor | None = None,
    x: torch.Tensor | None = None,
) -> list[Finding]:
    """Find what is wrong between a producer of quantized values and the GEMM that reads them.

    Looks at dtypes, shapes, strides, alignment, padding, scales that are no powers of two, NaN, an
    upper scale of the other convention, and scales that are not in blocks. With `x` it also sees
    that values and scales belong to it. It reads values and scales, so it synchronizes: it is for
    finding a mistake, not for serving. Nothing is found in what operations return for a reader.

    Args:
        q: values, (..., mn, k), of any producer; bytes of two for FP4.
        sf: their scales. For "deep_gemm_sm90" and "deep_gemm_sm100", float32 scales of groups of
            128 may be those of square blocks of weights, (..., ceil(N / 128), ceil(K / 128)), as
            :func:`quantize_blocks` returns them: q is the B operand then, and `rows` is None.
        fmt: the format that they are said to have.
        reader: "deep_gemm_sm90" or "deep_gemm_sm100", whose dense, masked, contiguous and psum
            GEMMs `rows` tells apart; "deep_gemm_sm90_k_grouped" or "deep_gemm_sm100_k_grouped",
            with q and sf as these take them; "scaled_mm" (cuBLAS), "cutlass" or "trtllm_8x4".
        rows: which rows exist, as for :func:`quantize`. None for k-grouped readers.
        encode_scale: the scale over e4m3 scales that values are multiplied back with, as for
            :func:`dequantize`; with ``PrefixSum`` or ``Indexed`` rows also (G,), one for each
            group, as for :func:`quantize`. Each is judged by the rows under it.
        decode_scale: as `encode_scale`. With ``row_scale``, the scales of rows.
        amax: as `encode_scale`.
        x: what was quantized, (..., mn, k), on the device of q, where it is at hand. Dead rows and
            groups that are not finite are left out. None for k-grouped readers.

    Returns:
        A finding for each mistake: a `rule` and a `text`, one sentence. Empty if all is right.

    Raises:
        TypeError: an argument is no tensor with memory, Format or row domain, or the upper scale or
            `x` has a wrong dtype.
        ValueError: there is no such reader, or `rows`, the upper scale or the device of `x` do not
            fit. A wrong shape of `x` is a finding.
        RuntimeError: a tensor is inside a transform of ``torch.func``.
    """
    for name, t in (("q", q), ("sf", sf), ("x", x)):
        if not isinstance(t, torch.Tensor) and not (t is None and name == "x"):
            raise TypeError(f"{name}: expected a torch.Tensor, got {describe(t)}")
    checks.check_format(fmt)
    if not isinstance(reader, str) or reader not in READERS:
        raise ValueError(f"reader: expected one of {tuple(READERS)}, got {describe(reader)}")
    checks.check_row_kind(rows)
    upper = make_upper_scale(encode_scale=encode_scale, decode_scale=decode_scale, amax=amax)
    given = Quantized(q, sf, fmt, READERS[reader], reader, rows, upper, x)
    with torch.no_grad():
        check_arguments(given)
        return findings(given)


def empty_scales(
    fmt: Format,
    shape: Sequence[int],
    *,
    blocks: bool = False,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Return uninitialized memory for the scales of values, as `out` of an operation takes it.

    Args:
        fmt: the format of values and scales.
        shape: shape of the values, (..., mn, k).
        blocks: whether they are scales of square blocks, as :func:`quantize_blocks` writes them.
        device: device of the scales, by default torch's.

    Returns:
        ``fmt.sf_dtype``, shape and strides as :class:`Format` says, in storage that holds all
        padding; float32 scales of blocks as :func:`quantize_blocks` says.

    Raises:
        TypeError: `fmt` is no Format, `shape` is no sequence, or `blocks` is no bool.
        ValueError: `shape` has less than 2 dimensions, or too many columns, or there are no such
            blocks.
    """
    checks.check_format(fmt)
    check_bool("blocks", blocks)
    sizes = checks.check_values_shape(shape)
    if blocks:
        check_block_format(fmt)
        return empty_block_scales(fmt, sizes, device)
    return fmt.empty_scales(*sizes, device)


def deep_gemm_format(device: torch.device | str | int | None = None) -> Format:
    """Return the format that DeepGEMM reads on a CUDA device.

    Args:
        device: a CUDA device, by default the current one.

    Returns:
        ``DEEP_GEMM`` on compute capability 10, ``DEEP_GEMM_SM90`` on 9.

    Raises:
        ValueError: `device` is no CUDA device.
        RuntimeError: DeepGEMM has no GEMMs for the GPU.
    """
    try:
        kind = torch.device("cuda" if device is None else device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device: expected a CUDA device, got {describe(device)}") from None
    if kind.type != "cuda":
        raise ValueError(f"device: expected a CUDA device, got {kind}")
    try:
        major, minor = torch.cuda.get_device_capability(kind)
    except (AssertionError, RuntimeError) as error:
        raise RuntimeError(f"device: expected a CUDA device that is there, got {kind}") from error
    formats = {9: DEEP_GEMM_SM90, 10: DEEP_GEMM}
    if major not in formats:
        raise RuntimeError(
            f"device: expected compute capability 9 or 10, which DeepGEMM has GEMMs for, "
            f"got {major}.{minor}"
        )
    return formats[major]
