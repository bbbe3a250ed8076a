"""Bounds of single tensors, each at both sides, where no memory is needed."""

import re

import pytest
import torch

from cute_quant import DEEP_GEMM_SM90, ROWWISE_FP8, Masked, quantize, rms_norm_quantize
from cute_quant.contract.tensors import check_disjoint_rows, check_matrices, span


def far_apart(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(0, dtype=dtype, device="meta").as_strided(shape, strides)


@pytest.mark.parametrize(("dtype", "most"), [(torch.half, 2**30 - 1), (torch.float32, 2**29 - 1)])
def test_most_bytes_between_rows(dtype, most):
    check_matrices("x", far_apart((2, 128), (most, 1), dtype), 128)
    with pytest.raises(ValueError, match="x: expected a row stride up to 2147483647 bytes"):
        check_matrices("x", far_apart((2, 128), (most + 1, 1), dtype), 128)


@pytest.mark.parametrize(("dtype", "most"), [(torch.int8, 2**31 - 1), (torch.float32, 2**29 - 1)])
def test_most_bytes_between_rows_that_are_written(dtype, most):
    check_disjoint_rows("q", far_apart((2, 128), (most, 1), dtype))
    with pytest.raises(ValueError, match=r"q: expected strides .* at most 2147483647 bytes apart"):
        check_disjoint_rows("q", far_apart((2, 128), (most + 1, 1), dtype))


@pytest.mark.parametrize(
    ("shape", "strides"),
    [((3, 8), (8, 1)), ((2, 3, 8), (24, 8, 1)), ((3, 2, 8), (8, 24, 1)), ((2, 3, 8), (8, 16, 1))],
)
def test_rows_that_overlap_by_one(shape, strides):
    check_disjoint_rows("q", torch.empty(64).as_strided(shape, strides))
    for axis in range(len(shape) - 1):
        closer = tuple(stride - (i == axis) for i, stride in enumerate(strides))
        with pytest.raises(ValueError, match=re.escape("q: expected strides (..., 8 or more, 1)")):
            check_disjoint_rows("q", torch.empty(64).as_strided(shape, closer))


def test_memory_of_a_tensor_has_its_last_element():
    t = torch.empty(100, dtype=torch.int32)
    assert span(t) == 400
    assert span(t.as_strided((3, 4), (20, 1))) == 4 * (40 + 3 + 1)
    assert span(t[:0]) == 0 and span(t[:1]) == 4


def test_most_rows_of_experts():
    """A CTA of whole rows has as few as one, and the tiles of all experts are counted together."""
    x = far_apart((6, 2**28, 8), (0, 8, 1), torch.bfloat16)
    weight = torch.empty(8, dtype=torch.bfloat16, device="meta")
    masked_m = torch.empty(8, dtype=torch.int32, device="meta")
    rms_norm_quantize(x, weight, rows=Masked(masked_m[:6]))
    with pytest.raises(ValueError, match="x: expected up to 7 matrices, got 8"):
        rms_norm_quantize(x[:1].expand(8, -1, -1), weight, rows=Masked(masked_m))
    quantize(x, ROWWISE_FP8, rows=Masked(masked_m[:6]))
    with pytest.raises(ValueError, match="x: expected up to 7 matrices, got 8"):
        quantize(x[:1].expand(8, -1, -1), ROWWISE_FP8, rows=Masked(masked_m))
    quantize(x[:1].expand(8, -1, -1), DEEP_GEMM_SM90, rows=Masked(masked_m))
