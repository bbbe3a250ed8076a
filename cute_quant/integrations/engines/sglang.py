"""The plug-in of SGLang: what it takes over, and how SGLang's registry of hooks is told.

SGLang loads it by the entry point group ``sglang.srt.plugins``, in every process.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

from cute_quant.integrations.engines import sglang_calls as calls
from cute_quant.integrations.engines import sglang_checks as checks
from cute_quant.integrations.engines import sglang_worker as worker
from cute_quant.integrations.engines.engine import Engine
from cute_quant.integrations.engines.takeover import (
    Attribute,
    Check,
    Function,
    Method,
    Takeover,
)

_QUANTIZATION = "sglang.kernels.ops.quantization"
_FP8 = f"{_QUANTIZATION}.fp8_kernel"
_INT8 = f"{_QUANTIZATION}.int8_kernel"
_MODEL_RUNNER = "sglang.srt.model_executor.model_runner"
_BLACKWELL = (10, 12)


@dataclass(frozen=True)
class Hook(Attribute):
    """A function that SGLang's registry of hooks replaces, here and where it was imported."""

    def read(self, module: ModuleType) -> Function:
        """Return the function.

        Raises:
            LookupError: SGLang has none, where a library that it comes from is missing.
        """
        function = super().read(module)
        if function is None:
            raise LookupError(f"{self.name} is None, a library is missing")
        return function

    def write(self, module: ModuleType, function: Function) -> None:
        """Register the function, and have it applied; SGLang's own is put back without."""
        from sglang.srt.plugins.hook_registry import HookRegistry, HookSource, HookType

        path = f"{self.module}.{self.name}"
        if not hasattr(function, "__wrapped__") or path in HookRegistry._patched:
            super().write(module, function)
            HookRegistry._hooks.pop(path, None)
            HookRegistry._patched.discard(path)
            return
        source = HookSource("cute_quant", "cute_quant")
        HookRegistry.register(path, function, HookType.REPLACE, source=source)
        HookRegistry.apply_hooks()


def _capability() -> tuple[int, int] | None:
    from sglang.srt.utils import get_device_capability, is_cuda

    if not is_cuda():
        return None
    major, minor = get_device_capability()
    return None if major is None or minor is None else (major, minor)


def _why_not() -> str | None:
    from sglang.srt import utils

    running = [name for name in ("hip", "xpu", "npu", "musa") if getattr(utils, f"is_{name}")()]
    return f"SGLang runs on {running[0]}" if running else None


def _takeover(
    name: str, module: str, compute: Function, check: Check, majors: tuple[int, ...] = ()
) -> Takeover:
    return Takeover(name, Hook(module, compute.__name__), compute, check, majors)


TAKEOVERS = (
    _takeover("group_quant", _FP8, calls.sglang_per_token_group_quant_fp8, checks.group_quant),
    _takeover(
        "group_quant", _FP8, calls.sglang_per_token_group_quant_fp8_row_padded, checks.row_padded
    ),
    _takeover(
        "group_quant",
        f"{_QUANTIZATION}.per_token_group_quant",
        calls.per_token_group_quant,
        checks.per_token_group_quant,
    ),
    _takeover("per_token", _FP8, calls.sglang_per_token_quant_fp8, checks.per_token),
    _takeover("per_token", _FP8, calls.scaled_fp8_quant, checks.scaled_fp8),
    _takeover(
        "silu",
        "sglang.kernels.ops.moe.ep_moe_kernels",
        calls.silu_and_mul_masked_post_quant_fwd,
        checks.silu_masked_with_alpha,
    ),
    _takeover(
        "silu",
        "sglang.kernels.ops.moe.dsv4",
        calls.silu_and_mul_masked_post_quant,
        checks.silu_masked,
    ),
    _takeover(
        "silu",
        "sglang.kernels.ops.activation.silu_and_mul_clamp",
        calls.silu_and_mul_contig_post_quant,
        checks.silu_contiguous,
    ),
    _takeover("int8", _INT8, calls.sglang_per_token_group_quant_int8, checks.group_quant_int8),
    _takeover("int8", _INT8, calls.per_token_group_quant_int8, checks.group_quant_int8),
    _takeover("int8", _INT8, calls.per_token_quant_int8, checks.rows_int8),
    _takeover(
        "mxfp8",
        "sglang.srt.layers.quantization.fp8_utils",
        calls.flashinfer_mxfp8_quantize,
        checks.mxfp8,
        _BLACKWELL,
    ),
    _takeover(
        "nvfp4",
        "sglang.srt.layers.quantization.fp4_utils",
        calls.fp4_quantize,
        checks.nvfp4,
        _BLACKWELL,
    ),
    *(
        Takeover("warm_up", Method(_MODEL_RUNNER, "ModelRunner", hook.__name__), hook, around=True)
        for hook in (worker.load_model, worker.forward)
    ),
)

ENGINE = Engine(
    "sglang",
    tested=("0.5.23",),
    variable="CUTE_QUANT_SGLANG",
    takeovers=TAKEOVERS,
    capability=_capability,
    why_not=_why_not,
)


def install() -> None:
    """Take over what ``CUTE_QUANT_SGLANG`` selects; the entry point of the plug-in."""
    ENGINE.install()
