"""Kernels compiled or loaded before calls take them."""

from __future__ import annotations

import collections
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch

from cute_quant.contract import blocks as block_contract
from cute_quant.contract.calls import ResultShape
from cute_quant.contract.checks import check_format
from cute_quant.contract.columns import ColumnCall, check_transposed
from cute_quant.contract.dtypes import (
    BYTES_PER_WORD,
    INPUT_DTYPES,
    LOAD_BYTES,
    STORE_BYTES,
    align,
    ceil_div,
    describe,
)
from cute_quant.contract.format_choices import MAX_COLUMNS
from cute_quant.contract.formats import DEEP_GEMM, Format
from cute_quant.contract.prologues import FUSED, make_silu_mul
from cute_quant.contract.rows import DENSE, KINDS, Masked, Rows
from cute_quant.contract.scale_conversion import Conversion
from cute_quant.contract.tensors import MAX_SIZE
from cute_quant.contract.upper_scales import ENCODE
from cute_quant.contract.upper_scales import KINDS as UPPER_KINDS
from cute_quant.dispatch import blocks, columns, convert_scales, launch, reachable
from cute_quant.dispatch.call_range import (
    BOTH,
    CONVERT_SCALES,
    OF_COLUMNS,
    OPERATIONS,
    QUANTIZE,
    STOCHASTIC,
    CallRange,
)
from cute_quant.dispatch.plan import Gpu
from cute_quant.jit import keys, lookup, progress, workers
from cute_quant.kernels.config import QuantizerSpec, Spec


class WarmKernel(NamedTuple):
    """A kernel that is ready.

    Attributes:
        name: of the spec, as in the disk cache and ``cute-quant build --list``.
        source: one of ``cute_quant.jit.lookup.SOURCES``.
    """

    name: str
    arch: str
    source: str


class WarmUp(Sequence[WarmKernel]):
    """The kernels that a warm-up made ready.

    Attributes:
        kernels: all of them, those that were compiled first.
        seconds: that it took.
    """

    def __init__(self, kernels: Iterable[WarmKernel], seconds: float) -> None:
        self.kernels = tuple(
            sorted(kernels, key=lambda kernel: (kernel.source != lookup.COMPILED, kernel))
        )
        self.seconds = seconds

    def __getitem__(self, index: int) -> WarmKernel:  # type: ignore[override]
        return self.kernels[index]

    def __len__(self) -> int:
        return len(self.kernels)

    def count(self, value: object) -> int:
        """Return how many kernels come from a source, or equal a kernel."""
        return sum(value in (kernel, kernel.source) for kernel in self.kernels)

    def __repr__(self) -> str:
        count = collections.Counter(kernel.source for kernel in self.kernels)
        sources = ", ".join(f"{count[s]} {s}" for s in lookup.SOURCES if count[s])
        architectures = ", ".join(sorted({kernel.arch for kernel in self.kernels}))
        if not self.kernels:
            return "no kernels"
        plural = "" if len(self.kernels) == 1 else "s"
        return (
            f"{len(self.kernels)} kernel{plural} for {architectures} in {self.seconds:.1f} s: "
            f"{sources}"
        )


def warm_up(
    fmt: Format = DEEP_GEMM,
    *,
    k: int | Iterable[int],
    max_rows: int,
    operations: str | Iterable[str] = QUANTIZE,
    dtype: torch.dtype = torch.bfloat16,
    rows: Iterable[type[Rows] | str | None] = (None,),
    gathered: bool = False,
    scattered: bool = False,
    batched: bool = False,
    alignment: int = LOAD_BYTES,
    interleaved: bool = False,
    clamp: float | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
    rounding: str = FUSED,
    weight_dtype: torch.dtype | None = None,
    upper_scale: str = ENCODE,
    stochastic: bool = False,
    to: Format | None = None,
    column_fmt: Format | None = None,
    transposed: bool = False,
    device: torch.device | str | int | None = None,
) -> WarmUp:
    """Compile, or load, every kernel that calls of a range take, and launch each once.

    Size, strides and alignment of a call's tensors choose its kernel. After this no call in the
    range compiles or loads anything, so each may be captured in a CUDA graph. What is missing is
    compiled by several processes, into the disk cache if there is one. A terminal shows progress.

    Args:
        fmt: the format of the calls.
        k: columns of their results, one number or several.
        max_rows: most rows of a result, all leading dimensions, and more rows of an `out`,
            included.
        operations: names: "quantize", "silu_mul_quantize", "silu_mul_backward_quantize" (k being
            its columns of gates and ups), "rms_norm_quantize", "dequantize", "fake_quantize",
            "quantize_blocks" and "requantize_blocks", whose weights may be contiguous along k or n,
            "dequantize_blocks", "convert_scales", of scales that lie as `fmt` says, and
            "quantize_columns", "quantize_both", "silu_mul_quantize_both" and
            "silu_mul_backward_quantize_both", whose rows are those of None and ``PrefixSum``.
        dtype: of the inputs: bfloat16, float16 or float32; of the result of ``dequantize`` and
            ``dequantize_blocks``. Scales and the weights of checkpoints have dtypes of their own.
        rows: row domains: some of None, ``Masked``, ``PrefixSum`` and ``Indexed``.
        gathered: whether there are calls with `index` too.
        scattered: whether there are calls with `scatter` too.
        batched: whether there are calls with leading dimensions too.
        alignment: a power of two up to 32. Rows of all inputs and results start at multiples of
            that many bytes, or lie as in a contiguous tensor. torch allocates memory at multiples
            of 512.
        interleaved: as of ``silu_mul_quantize``, whose calls may have a weight.
        clamp: the same; only whether there is one matters.
        alpha: the same; only whether it is 1 matters.
        beta: the same; only whether it is 0 matters.
        rounding: as of ``silu_mul_quantize`` and ``rms_norm_quantize``.
        weight_dtype: of the weight of ``rms_norm_quantize``, by default `dtype`. Calls may have
            `residual` and `normalized`.
        upper_scale: the argument that calls give the scale over e4m3 scales as: "encode_scale",
            "decode_scale" or "amax". Only formats with such scales, and without `row_scale`, have
            calls that depend on it.
        stochastic: whether calls of operations that take an `rng_state` have one.
        to: as of ``convert_scales``, and only for it.
        column_fmt: as of operations on both directions, and only for them.
        transposed: as of them and ``quantize_columns``.
        device: that the calls run on, by default the current CUDA device. On the CPU,
            and on a GPU without kernels, there is nothing to compile.

    Returns:
        The kernels, and where each came from. Its repr is one line.

    Raises:
        TypeError, ValueError: an argument is wrong.
        RuntimeError: a kernel is missing and cannot be compiled.
    """
    weight_dtype = dtype if weight_dtype is None else weight_dtype
    for name, given in (("dtype", dtype), ("weight_dtype", weight_dtype)):
        if given not in INPUT_DTYPES:
            raise ValueError(f"{name}: expected one of {INPUT_DTYPES}, got {describe(given)}")
    if upper_scale not in UPPER_KINDS:
        raise ValueError(f"upper_scale: expected one of {UPPER_KINDS}, got {describe(upper_scale)}")
    activation = make_silu_mul(
        interleaved=interleaved, clamp=clamp, alpha=alpha, beta=beta, rounding=rounding, weight=None
    )
    kinds = [_kind(r) for r in rows]
    checked = _checked(fmt, _columns(k), max_rows, alignment)
    calls = [
        checked._replace(
            operation=operation,
            dtype=dtype,
            kind=kind,
            gathered=index,
            scattered=scatter,
            batched=leading,
            interleaved=activation.interleaved,
            clamped=activation.clamp is not None,
            scaled=activation.alpha != 1.0,
            shifted=activation.beta != 0.0,
            rounding=rounding,
            weight_dtype=weight_dtype,
            stochastic=stochastic and operation in STOCHASTIC,
            to=to if operation == CONVERT_SCALES else None,
            column_fmt=column_fmt if operation in BOTH else None,
            transposed=transposed and operation in OF_COLUMNS,
        ).with_upper_scale(upper_scale)
        for operation in _operations(operations)
        for kind in kinds
        for index in {False, gathered}
        for scatter in {False, scattered}
        for leading in ({True} if kind == Masked.kind else {False, batched})
    ]
    check_transposed(transposed)
    for of_one in calls:
        of_one.check_columns()
    gpu = _cuda_device(device)
    if gpu is None or lookup.find_architecture(gpu.index) is None:
        return WarmUp([], 0.0)
    return on_device([c for c in calls if c.possible], gpu)


def _checked(fmt: Format, k: tuple[int, ...], max_rows: int, alignment: int) -> CallRange:
    check_format(fmt)
    _check_int("max_rows", max_rows, 1, MAX_SIZE)
    _check_int("alignment", alignment, 1, LOAD_BYTES)
    if alignment & (alignment - 1):
        raise ValueError(f"alignment: expected a power of two up to {LOAD_BYTES}, got {alignment}")
    return CallRange(QUANTIZE, fmt, torch.bfloat16, k, max_rows, alignment=alignment)


def _operations(operations: str | Iterable[str]) -> list[str]:
    names = [operations] if isinstance(operations, str) else list(operations)
    for operation in names:
        if operation not in OPERATIONS:
            raise ValueError(f"operations: expected some of {OPERATIONS}, got {operation!r}")
    return names


def _cuda_device(device: torch.device | str | int | None) -> torch.device | None:
    """Return a CUDA device with its index, None for the CPU."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    found = torch.device(device)
    if found.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected a CUDA device or the CPU, got {found}")
    if found.type == "cpu":
        return None
    return torch.device("cuda", torch.cuda.current_device() if found.index is None else found.index)


def _columns(k: int | Iterable[int]) -> tuple[int, ...]:
    try:
        columns = (k,) if isinstance(k, int) else tuple(k)
    except TypeError:
        raise TypeError(f"k: expected an int or several, got {describe(k)}") from None
    for count in columns:
        _check_int("k", count, 1, MAX_COLUMNS)
    if not columns:
        raise ValueError("k: expected at least one number, got none")
    return columns


def _check_int(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an int, got {describe(value)}")
    if not low <= value <= high:
        raise ValueError(f"{name}: expected {low} to {high}, got {value}")


def _kind(rows: object) -> str:
    """Return the kind of rows that is named by a class of row domains, a text, or None."""
    kind = DENSE if rows is None else getattr(rows, "kind", rows)
    if not isinstance(kind, str) or kind not in (DENSE, *KINDS):
        raise ValueError(
            f"rows: expected some of None, Masked, PrefixSum, PrefixSumWithGaps and "
            f"Indexed, got {describe(rows)}"
        )
    return kind


def on_device(calls: Iterable[CallRange], device: torch.device) -> WarmUp:
    """Make the kernels of calls on a device ready: compile or load them, and launch each."""
    gpu = Gpu(lookup.architecture(device.index), lookup.multiprocessors(device.index))
    found: dict[Spec, reachable.Variant] = {}
    for of_one in calls:
        found |= reachable.specs(of_one, gpu)
    started = time.perf_counter()
    ready = list(_ready([(spec, gpu.arch) for spec in found]))
    with torch.cuda.device(device):
        _launch_each(found, gpu.arch, device)
        torch.cuda.synchronize(device)
    return WarmUp(ready, time.perf_counter() - started)


def in_cache(kernels: Iterable[tuple[Spec, str]]) -> WarmUp:
    """Compile kernels for architectures into the disk cache, with or without a GPU."""
    started = time.perf_counter()
    return WarmUp(list(_ready(list(dict.fromkeys(kernels)))), time.perf_counter() - started)


def _ready(tasks: Sequence[tuple[Spec, str]]) -> Iterator[WarmKernel]:
    """Load or compile kernels.

    Raises:
        RuntimeError: one of them is missing, and nothing may be compiled, or that failed.
    """
    compiled = _compiled_by_workers([task for task in tasks if lookup.find(*task) is None])
    try:
        for done, (spec, arch) in enumerate(tasks):
            name = keys.spec_name(spec)
            progress.bar(done, len(tasks), f"{name} {arch}")
            source = lookup.resolve(spec, arch).source
            yield WarmKernel(name, arch, compiled.get((spec, arch), source))
    finally:
        progress.end_bar()


def _compiled_by_workers(missing: Sequence[tuple[Spec, str]]) -> Mapping[tuple[Spec, str], str]:
    """Have processes fill the disk cache, where there is one; return what they did.

    Two compilations in one process abort it.
    """
    processes = workers.count_for(len(missing))
    if processes < 2 or not lookup.keeps():
        return {}
    lookup.check_may_compile(*missing[0])
    sources = {}
    try:
        for number, source in workers.results(lookup.keep, missing, processes):
            sources[missing[number]] = source
            name = keys.spec_name(missing[number][0])
            progress.bar(len(sources), len(missing), f"{name} {missing[number][1]}")
    finally:
        progress.end_bar()
    return sources


def _launch_each(found: Mapping[Spec, reachable.Variant], arch: str, device: torch.device) -> None:
    """Launch each kernel once: the first launch loads its machine code, which no capture allows."""
    launches: dict[reachable.Variant, launch.Launch] = {}
    for spec, variant in found.items():
        batched = isinstance(spec, QuantizerSpec) and spec.domain.batched
        if batched and not variant.calls.batched:
            # Rows are too many for one dimension of a grid: no small call takes this kernel.
            continue
        if variant not in launches:
            launches[variant] = _small_launch(variant, device)
        lookup.function(spec, arch)(*launches[variant].arguments)


def _small_launch(variant: reachable.Variant, device: torch.device) -> launch.Launch:
    """Return the launch of a call of one row, whose tensors any kernel of a variant takes.

    The stride of a single row does not matter, so it is as aligned as a kernel may want it.
    """
    calls, fmt, dtype = variant.calls, variant.calls.fmt, variant.calls.dtype
    leading = (1, 1) if calls.batched else (1,)
    shape = ResultShape(leading[:-1], 1, variant.k)
    match calls.operation:
        case "dequantize":
            q = _zeros((*leading, fmt.value_columns(variant.k)), fmt.values, device)
            sf = fmt.empty_scales(*shape, device)
            upper = variant.upper_scale((*leading, variant.k), sf.view(-1))
            return launch.bind(lambda: launch.dequantize(q, sf, fmt, dtype, upper))
        case "dequantize_blocks":
            q = _zeros((*leading, fmt.value_columns(variant.k)), fmt.values, device)
            sf = block_contract.empty_scales(fmt, shape, device)
            return launch.bind(lambda: blocks.dequantize(q, sf, fmt, dtype))
        case "quantize_blocks":
            w, q = small_weights(variant, device)
            return launch.bind(lambda: blocks.quantize(w, fmt, q, None))
        case "requantize_blocks":
            w, q = small_weights(variant, device)
            size = variant.source_block
            number = [ceil_div(columns, size) for columns in w.shape[-2:]]
            w_sf = torch.zeros((*w.shape[:-2], *number), device=device)
            upper = variant.upper_scale(tuple(w.shape), w_sf)
            return launch.bind(lambda: blocks.requantize(w, w_sf, fmt, upper, q, None))
        case "convert_scales":
            return launch.bind(lambda: convert_scales.run(small_conversion(variant, device)))
    if calls.operation in OF_COLUMNS:
        columns_call = small_columns(variant, device)
        return launch.bind(lambda: columns.run(columns_call))
    x_rows = (1,) if calls.gathered or calls.scattered else leading
    x = torch.zeros((*x_rows, variant.input_columns), dtype=calls.dtype, device=device)
    call = variant.call(x, (*leading, variant.k), x)
    if calls.operation == "fake_quantize":
        return launch.bind(lambda: launch.fake_quantize(call, None))
    return launch.bind(lambda: launch.quantize(call))


def small_weights(
    variant: reachable.Variant, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weights, and memory for their values, that any kernel of a variant takes.

    All rows and columns start at multiples of the widest vectors.
    """
    matrices = (1,) if variant.calls.batched else ()
    k, n, fmt = variant.k, LOAD_BYTES, variant.calls.fmt
    columns = fmt.value_columns(k)
    q = _zeros((*matrices, n, align(columns, LOAD_BYTES)), fmt.values, device)[..., :columns]
    if variant.along_n:
        return _zeros((*matrices, k, n), variant.input_dtype, device).mT, q
    w = _zeros((*matrices, n, align(k, LOAD_BYTES)), variant.input_dtype, device)
    return w[..., :k], q


def small_columns(variant: reachable.Variant, device: torch.device) -> ColumnCall:
    """Return a call on columns of few rows that any kernel of a variant takes."""
    calls, k = variant.calls, variant.k
    leading = (1, STORE_BYTES) if calls.batched else (STORE_BYTES,)

    def memory(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        *rows, columns = shape
        return _zeros((*rows, align(columns, LOAD_BYTES)), dtype, device)[..., :columns]

    x = memory(*leading, variant.input_columns, dtype=calls.dtype)
    of_values = (*leading[:-1], k, STORE_BYTES) if calls.transposed else (*leading, k)
    fmt = calls.fmt if calls.column_fmt is None else calls.column_fmt
    q = memory(*of_values, dtype=fmt.values)
    row_q = memory(*leading, k, dtype=calls.fmt.values)
    return variant.column_call(x, q, row_q)


def small_conversion(variant: reachable.Variant, device: torch.device) -> Conversion:
    """Return a call that converts the scales of a row, which any kernel of a variant takes.

    Its groups are those of whole vectors.
    """
    calls = variant.calls
    assert calls.to is not None
    unit = 1 if calls.fmt.whole_row else calls.fmt.group_size * BYTES_PER_WORD
    leading = (1, 1) if calls.batched else (1,)
    shape = ResultShape(leading[:-1], 1, align(variant.k, unit))
    sf = calls.fmt.empty_scales(*shape, device)
    rows = variant.rows((*leading, shape.k), sf.view(-1))
    return Conversion(sf, calls.fmt, calls.to, shape, rows)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return zeros of any dtype; CUDA fills no tensor of float4."""
    if dtype.itemsize > 1:
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.zeros(shape, dtype=torch.uint8, device=device).view(dtype)
