"""Quantize a checkpoint: read rows, quantize them, write them, and go on where a run ended.

No tensor is in memory as a whole. A shard stands under its name only when it is complete, the index
after all shards, and ``config.json``, without which no reader opens the directory, last.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import cute_quant
from cute_quant.checkpoint import conventions, output_directory, source
from cute_quant.checkpoint.conventions import Part
from cute_quant.checkpoint.selection import Plan, make_plan
from cute_quant.checkpoint.shards import (
    AtomicFile,
    Layout,
    write_json,
    write_tensor,
)
from cute_quant.checkpoint.source import StoredTensor
from cute_quant.contract.dtypes import E4M3_MAX, E4M3_NAN, FLOAT32_MAX, SOURCE_BLOCK, ceil_div
from cute_quant.contract.formats import DEEP_GEMM_SM90
from cute_quant.contract.upper_scales import factors_of_amax
from cute_quant.jit import progress
from cute_quant.ops.rows import tensor_amax
from cute_quant.ops.weights import dequantize_blocks

SLAB_VALUES = 2**23
"""Most values of a tensor that are in memory at once, but at least ``SOURCE_BLOCK`` rows."""

Slab = tuple[slice, ...]
"""Rows of one matrix, as an index of a tensor."""


@dataclass(frozen=True)
class Conversion:
    """The outcome of a conversion.

    Attributes:
        output: the directory.
        quantized, kept: numbers of tensors.
        bytes_read, bytes_written: of tensors.
        resumed: shards that an earlier run completed.
        left_out: files of the source with weights in another format, which are not copied.
    """

    output: str
    quantized: int
    kept: int
    bytes_read: int
    bytes_written: int
    resumed: int
    left_out: tuple[str, ...]


def plan_checkpoint(
    directory: str | os.PathLike[str], fmt: str = "fp8", *, keep: Sequence[str] = ()
) -> Plan:
    """Decide what `quantize_checkpoint` does with each tensor, reading headers alone.

    Args:
        directory: as for :func:`quantize_checkpoint`.
        fmt: as for :func:`quantize_checkpoint`.
        keep: as for :func:`quantize_checkpoint`.

    Raises:
        ValueError, ModuleNotFoundError: as :func:`quantize_checkpoint`.
    """
    convention = conventions.find(fmt)
    if isinstance(keep, str) or not all(isinstance(pattern, str) for pattern in keep):
        raise TypeError(f"keep: expected a sequence of patterns, got {keep!r}")
    return make_plan(source.open_checkpoint(_path("directory", directory)), convention, keep)


def quantize_checkpoint(
    directory: str | os.PathLike[str],
    output: str | os.PathLike[str],
    fmt: str = "fp8",
    *,
    keep: Sequence[str] = (),
    device: torch.device | str | None = None,
    allow_non_finite: bool = False,
) -> Conversion:
    """Quantize the linear layers of a Hugging Face checkpoint.

    Weights in bfloat16, float16 or float32 are quantized by :func:`cute_quant.quantize_blocks` or
    :func:`cute_quant.quantize`. Those of an FP8 checkpoint, e4m3 with float32 scales of blocks of
    128 x 128, are requantized by :func:`cute_quant.requantize_blocks`. What ``DEFAULT_KEEP`` and
    `keep` name, and all that is no linear layer, is copied, and so are other files.

    A run that was interrupted goes on with the shards that are not complete when it is called
    again. Rows are read, quantized and written in turn, so memory does not grow with the tensors.

    Args:
        directory: with config.json, and model.safetensors or shards and their index.
        output: a directory that does not exist, is empty, or was begun by the same call.
        fmt: a name in ``CONVENTIONS``.
        keep: patterns, as of fnmatch, of modules to leave as they are, such as "o_proj" or
            "layers.0.*": each is compared with the end of a name, from a dot on. A * is of one
            part between dots, but one that is a part by itself is of one or more.
        device: to quantize on; by default the current GPU, or the CPU where there is none. The
            bytes are the same.
        allow_non_finite: whether to go on where a weight is Inf or NaN. Its block or group becomes
            NaN, and in nvfp4 the whole tensor with those that it is fused with.

    Returns:
        What was done.

    Raises:
        ValueError: the source is no such checkpoint, a weight is not finite, the output holds
            something else, or an argument has a wrong value.
        TypeError: an argument has another type than the signature says.
        ModuleNotFoundError: safetensors is not installed.
        OSError: a file cannot be read or written, such as on a full disk. The call may be repeated.
        RuntimeError: another run writes to the output.
    """
    plan = plan_checkpoint(directory, fmt, keep=keep)
    target = _path("output", output)
    if not isinstance(allow_non_finite, bool):
        raise TypeError(f"allow_non_finite: expected True or False, got {allow_non_finite!r}")
    output_directory.check_outside(plan.checkpoint.directory, target)
    convert = _Converter(plan, target, _device(device), allow_non_finite)
    with output_directory.begun(target, _request(plan, keep)):
        resumed = convert.shards()
        convert.other_files()
    checkpoint = plan.checkpoint
    return Conversion(
        str(target),
        len(plan.quantized),
        len(plan.kept),
        sum(tensor.bytes for tensor in checkpoint.tensors.values()),
        convert.total_size,
        resumed,
        tuple(map(str, checkpoint.left_out)),
    )


def _path(name: str, path: str | os.PathLike[str]) -> Path:
    if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str):
        raise TypeError(f"{name}: expected a path, got {path!r}")
    return Path(path)


def _device(device: torch.device | str | None) -> torch.device:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not isinstance(device, str | torch.device):
        raise TypeError(f"device: expected a name or a torch.device, got {device!r}")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device: expected cpu or cuda, got {device!r}: {error}") from None
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: expected cpu, where there is no GPU, got {str(found)!r}")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ValueError(f"device: expected one of {count} GPUs, got {str(found)!r}")
    if found.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected cpu or cuda, got {str(found)!r}")
    return found


def _request(plan: Plan, keep: Sequence[str]) -> dict[str, Any]:
    """Return what has to be equal for a run to go on where another ended."""
    return {
        "version": cute_quant.__version__,
        "format": plan.convention.name,
        "keep": sorted(set(keep)),
        "source": plan.checkpoint.identity(),
    }


class _Converter:
    """The steps of one conversion.

    Attributes:
        total_size: bytes of all tensors of the result.
    """

    def __init__(
        self, plan: Plan, output: Path, device: torch.device, allow_non_finite: bool
    ) -> None:
        self._plan = plan
        self._output = output
        self._device = device
        self._allow_non_finite = allow_non_finite
        self._by_shard = _by_shard(plan)
        self._layouts = _layouts(plan, self._by_shard)
        self._open = functools.lru_cache(2)(functools.partial(source.reader, plan.checkpoint))
        self._amax: dict[str, torch.Tensor] = {}
        self.total_size = sum(sum(layout.sizes.values()) for layout in self._layouts.values())

    def shards(self) -> int:
        """Write all shards; return how many an earlier run has written."""
        done, resumed = 0, 0
        total = len(self._plan.quantized) + len(self._plan.kept)
        try:
            for shard, layout in self._layouts.items():
                path = self._output / shard
                mine = self._by_shard[shard]
                if path.exists():
                    if not layout.is_at(path):
                        raise ValueError(f"output: expected the shard that was written as {shard}")
                    resumed += 1
                    done += len(mine)
                    continue
                with AtomicFile(path) as file:
                    file.write(layout.header)
                    written = len(layout.header)
                    for tensor in mine:
                        progress.bar(done, total, tensor.name)
                        write = functools.partial(write_tensor, file)
                        taken = tensor.name in self._plan.quantized
                        convert = self._quantize if taken else self._copy
                        written += convert(tensor, layout, write)
                        done += 1
                    assert written == layout.size, (written, layout.size)
        finally:
            progress.end_bar()
        return resumed

    def other_files(self) -> None:
        """Copy files, and write the index and the config."""
        checkpoint = self._plan.checkpoint
        for name in checkpoint.files:
            there, here = checkpoint.directory / name, self._output / name
            with there.open("rb") as copied, AtomicFile(here) as file:
                shutil.copyfileobj(copied, file)
        if checkpoint.index is not None:
            names = {
                name: shard for shard, layout in self._layouts.items() for name in layout.sizes
            }
            metadata = {**(checkpoint.index.get("metadata") or {}), "total_size": self.total_size}
            index = {**checkpoint.index, "metadata": metadata}
            index["weight_map"] = dict(sorted(names.items()))
            write_json(self._output / source.INDEX, index)
        config = {key: v for key, v in checkpoint.config.items() if key != "compression_config"}
        said = self._plan.convention.quantization_config(self._plan.kept_modules)
        write_json(self._output / source.CONFIG, {**config, "quantization_config": said})

    def _copy(
        self, tensor: StoredTensor, layout: Layout, write: Callable[[int, torch.Tensor], int]
    ) -> int:
        """Copy a tensor; return the number of bytes."""
        file, place = self._open(tensor.shard), layout.start(tensor.name)
        if not tensor.shape:
            return write(place, file.get_tensor(tensor.name))
        rows = file.get_slice(tensor.name)
        step = max(1, SLAB_VALUES * tensor.shape[0] // max(1, torch.Size(tensor.shape).numel()))
        written = 0
        for first in range(0, tensor.shape[0], step):
            written += write(place + written, rows[first : first + step])
        return written

    def _quantize(
        self, tensor: StoredTensor, layout: Layout, write: Callable[[int, torch.Tensor], int]
    ) -> int:
        """Write the parts of a quantized weight; return the number of bytes."""
        values, scales, *upper = self._plan.parts[tensor.name]
        encode = None
        written = 0
        for part in upper:
            encode = factors_of_amax(self._fused_amax(tensor.name)).encode
            written += write(layout.start(part.name), encode)
        for slab in _slabs(tensor.shape):
            w, w_sf = self._read(tensor, slab)
            self._check_finite(tensor, slab, w, w_sf)
            results = self._plan.convention.quantize(w, w_sf, encode)
            for part, result in zip((values, scales), results, strict=True):
                place = layout.start(part.name) + _place(part, tensor, slab)
                written += write(place, result.view(torch.uint8))
        return written

    def _read(self, tensor: StoredTensor, slab: Slab) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return rows of a weight and, if it is FP8, the scales of their blocks."""
        w = self._open(tensor.shard).get_slice(tensor.name)[slab].to(self._device)
        scale = self._plan.scales.get(tensor.name)
        if scale is None:
            return w, None
        *batch, rows = slab
        of_rows = slice(rows.start // SOURCE_BLOCK, ceil_div(rows.stop, SOURCE_BLOCK))
        w_sf = self._open(scale.shard).get_slice(scale.name)[(*batch, of_rows)]
        return w, w_sf.to(self._device)

    def _fused_amax(self, name: str) -> torch.Tensor:
        """Return the largest magnitude of a weight and of those that it is fused with."""
        if name not in self._amax:
            fused = self._plan.fused[name]
            amax = torch.stack([self._tensor_amax(self._plan.quantized[n]) for n in fused]).amax(0)
            self._amax.update(dict.fromkeys(fused, amax))
        return self._amax[name]

    def _tensor_amax(self, tensor: StoredTensor) -> torch.Tensor:
        amax = torch.zeros(1, device=self._device)
        for slab in _slabs(tensor.shape):
            w, w_sf = self._read(tensor, slab)
            self._check_finite(tensor, slab, w, w_sf)
            amax = torch.maximum(amax, tensor_amax(_products(w, w_sf)))
        return amax

    def _check_finite(
        self, tensor: StoredTensor, slab: Slab, w: torch.Tensor, w_sf: torch.Tensor | None
    ) -> None:
        if self._allow_non_finite or _surely_finite(w, w_sf):
            return
        bad = ~_products(w, w_sf).isfinite()
        if not bad.any():
            return
        starts = [part.start for part in slab] + [0]
        index = [int(i) + start for i, start in zip(bad.nonzero()[0], starts, strict=True)]
        raise ValueError(
            f"source: expected finite weights, got Inf or NaN at {index} of {tensor}; "
            f"--allow-non-finite (allow_non_finite=True) goes on"
        )


def _surely_finite(w: torch.Tensor, w_sf: torch.Tensor | None) -> bool:
    """Return whether no weight is Inf or NaN, False if this has to be computed."""
    if w_sf is None:
        return bool(w.isfinite().all())
    nan = (w.view(torch.uint8) & E4M3_NAN) == E4M3_NAN
    return not nan.any() and bool((w_sf.abs() <= FLOAT32_MAX / E4M3_MAX).all())


def _products(w: torch.Tensor, w_sf: torch.Tensor | None) -> torch.Tensor:
    """Return weights in a dtype of arithmetic: FP8 ones times the scales of their blocks."""
    if w_sf is None:
        return w
    return dequantize_blocks(w, w_sf, DEEP_GEMM_SM90, dtype=torch.float32)


def _by_shard(plan: Plan) -> dict[str, list[StoredTensor]]:
    """Return what is read of each shard; one that only holds scales is none of the result."""
    tensors: dict[str, list[StoredTensor]] = defaultdict(list)
    for tensor in (*plan.quantized.values(), *plan.kept.values()):
        tensors[tensor.shard].append(tensor)
    return {shard: tensors[shard] for shard in plan.checkpoint.shards if shard in tensors}


def _layouts(plan: Plan, by_shard: Mapping[str, Sequence[StoredTensor]]) -> dict[str, Layout]:
    """Return where the tensors of each shard of the result lie."""
    layouts = {}
    for shard, read in by_shard.items():
        tensors: dict[str, tuple[str, Sequence[int]]] = {}
        for tensor in read:
            parts = plan.parts.get(tensor.name, (tensor,))
            tensors |= {part.name: (part.dtype, part.shape) for part in parts}
        layouts[shard] = Layout(tensors, plan.checkpoint.metadata[shard])
    return layouts


def _slabs(shape: Sequence[int]) -> Iterator[Slab]:
    """Yield indices of rows of one matrix, whole blocks of them, that are in memory at once."""
    *batch, n, k = shape
    step = max(1, SLAB_VALUES // (SOURCE_BLOCK * max(1, k))) * SOURCE_BLOCK
    for number in range(torch.Size(batch).numel()):
        matrix = [slice(number, number + 1)] * len(batch)
        for first in range(0, n if k else 0, step):
            yield (*matrix, slice(first, min(first + step, n)))


def _place(part: Part, tensor: StoredTensor, slab: Slab) -> int:
    """Return the distance of a slab's first byte from the first one of its part."""
    matrix = slab[0].start if len(slab) > 1 else 0
    *_, rows, columns = part.shape
    row: int = matrix * rows + slab[-1].start // part.weight_rows
    return row * columns * source.ITEM_BYTES[part.dtype]
