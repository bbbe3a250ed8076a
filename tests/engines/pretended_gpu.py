"""A CUDA platform for vLLM where there is neither a GPU nor its driver.

vLLM's layers choose kernels by the platform. What they call of compiled extensions does not exist
here, and DeepGEMM is a product in float32.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from bench.missing_modules import Module, replace
from bench.vllm_archive import EXTENSIONS
from cute_quant import DEEP_GEMM, DEEP_GEMM_SM90, convert_scales, dequantize


class DeepGemm(Module):
    """Products of quantized matrices, which note what they were given."""

    __version__ = "2.8.1"

    def __init__(self, packs: bool) -> None:
        super().__init__("deep_gemm")
        self.packs = packs
        self.calls: list[tuple[torch.Tensor, torch.Tensor]] = []

    def fp8_gemm_nt(self, a: Any, b: Any, d: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        self.calls.append(a)
        d.copy_(_dequantized(*a) @ _dequantized_blocks(*b).mT)

    def m_grouped_fp8_gemm_nt_masked(
        self, a: Any, b: Any, d: torch.Tensor, masked_m: torch.Tensor, *args: Any, **kwargs: Any
    ) -> None:
        for e, rows in enumerate(masked_m.tolist()):
            product = _dequantized(a[0][e], a[1][e]) @ _dequantized_blocks(b[0][e], b[1][e]).mT
            d[e, :rows] = product[:rows]

    def transform_sf_into_required_layout(
        self, sf: torch.Tensor, *args: Any, is_sfa: bool = False, **kwargs: Any
    ) -> Any:
        """Pack the scales of activations where the GEMM does; those of weights stay float32."""
        if not (is_sfa and self.packs):
            return sf
        rows = DEEP_GEMM_SM90.replace(scale_layout="row_major", round_scale=True)
        return convert_scales(
            sf.contiguous(), rows, DEEP_GEMM, (*sf.shape[:-1], 128 * sf.shape[-1])
        )

    def get_mk_alignment_for_contiguous_layout(self) -> int:
        return 128


def _dequantized(q: torch.Tensor, sf: torch.Tensor) -> torch.Tensor:
    fmt = DEEP_GEMM if sf.dtype is torch.int32 else DEEP_GEMM_SM90
    return dequantize(q, sf, fmt, dtype=torch.float32)


def _dequantized_blocks(q: torch.Tensor, sf: torch.Tensor) -> torch.Tensor:
    scales = sf.repeat_interleave(128, 0).repeat_interleave(128, 1)
    return q.float() * scales[: q.shape[0], : q.shape[1]]


def pretend(major: int, minor: int = 0) -> DeepGemm:
    """Have vLLM run on a GPU of a compute capability; call it before its layers are imported."""
    replace((*EXTENSIONS, "deep_ep"))
    deep_gemm = sys.modules["deep_gemm"] = DeepGemm(packs=major >= 10)

    from vllm import platforms
    from vllm.platforms.cuda import CudaPlatformBase
    from vllm.platforms.interface import DeviceCapability

    class Platform(CudaPlatformBase):
        device_type = "cpu"
        dispatch_key = "CPU"

        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
            return DeviceCapability(major, minor)

        @classmethod
        def get_device_name(cls, device_id: int = 0) -> str:
            return "pretended"

        @classmethod
        def get_device_total_memory(cls, device_id: int = 0) -> int:
            return 2**36

        @classmethod
        def device_count(cls) -> int:
            return 1

        @classmethod
        def get_device_communicator_cls(cls) -> str:
            module = "vllm.distributed.device_communicators.base_device_communicator"
            return f"{module}.DeviceCommunicatorBase"

    platforms._current_platform = Platform()
    return deep_gemm
