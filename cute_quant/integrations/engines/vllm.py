"""The plug-in of vLLM: what it takes over, and how vLLM's own functions are found.

vLLM loads it by the entry point group ``vllm.general_plugins``, in every process.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

from cute_quant.integrations.engines import vllm_calls as calls
from cute_quant.integrations.engines import vllm_checks as checks
from cute_quant.integrations.engines import vllm_worker as worker
from cute_quant.integrations.engines.engine import Engine
from cute_quant.integrations.engines.takeover import Attribute, Function, Method, Takeover

_FP8_UTILS = "vllm.model_executor.layers.quantization.utils.fp8_utils"
_MXFP8_UTILS = "vllm.model_executor.layers.quantization.utils.mxfp8_utils"
_INT8_UTILS = "vllm.model_executor.layers.quantization.utils.int8_utils"
_FUSED_ACTIVATIONS = "vllm.model_executor.layers.fusion.fused_act_quant"
_HOPPER, _BLACKWELL = (9,), (10, 12)


@dataclass(frozen=True)
class OutOfTree:
    """A method of a ``CustomOp`` of vLLM, overridden in a subclass that is registered out of tree.

    vLLM makes objects of that class in place of its own.
    """

    module: str
    owner: str
    name: str

    def read(self, module: ModuleType) -> Function:
        """Return the method of vLLM's own class.

        Raises:
            LookupError: another plug-in has registered a class.
        """
        from vllm.model_executor.custom_op import op_registry_oot

        base = getattr(module, self.owner)
        registered = op_registry_oot.get(self.owner)
        if registered is not None and not issubclass(registered, _OutOfTreeMark):
            raise LookupError(f"{registered.__qualname__} is registered for it")
        method: Function = base.__dict__[self.name]
        return method

    def write(self, module: ModuleType, function: Function) -> None:
        """Override the method; with vLLM's own method, do not any more."""
        from vllm.model_executor.custom_op import CustomOp, op_registry_oot

        base = getattr(module, self.owner)
        ours: Any = op_registry_oot.get(self.owner)
        if ours is None:
            ours = type(self.owner, (_OutOfTreeMark, base), {"__module__": __name__})
            CustomOp.register_oot(ours, name=self.owner)
            # It is switched on and off by the name of vLLM's own.
            ours.name = base.name
        if function is not base.__dict__[self.name]:
            setattr(ours, self.name, function)
            return
        if self.name in ours.__dict__:
            delattr(ours, self.name)
        if not any(name.startswith("forward_") for name in ours.__dict__):
            del op_registry_oot[self.owner]


class _OutOfTreeMark:
    """The base of classes that this package registers."""


@dataclass(frozen=True)
class FusedActivation(Attribute):
    """A function of vLLM's table of fused activations."""

    def write(self, module: ModuleType, function: Function) -> None:
        """Replace the function in its module and in the table."""
        original = self.read(module)
        super().write(module, function)
        table = module._FUSED_ACT_QUANT
        for key, producer in table.items():
            if producer is original:
                table[key] = function


def _capability() -> tuple[int, int] | None:
    from vllm.platforms import current_platform

    # Read by NVML: CUDA must not be initialized before processes are forked.
    found = current_platform.get_device_capability() if current_platform.is_cuda() else None
    return None if found is None else (found.major, found.minor)


def _why_not() -> str | None:
    from vllm.platforms import current_platform

    others = ("rocm", "xpu", "tpu", "cpu")
    running = [name for name in others if getattr(current_platform, f"is_{name}")()]
    return f"vLLM runs on {running[0]}" if running else None


def _attribute(name: str, module: str, compute: Function, **options: Any) -> Takeover:
    return Takeover(name, Attribute(module, compute.__name__), compute, **options)


TAKEOVERS = (
    *(
        Takeover(
            "linear",
            OutOfTree("vllm.model_executor.layers.quantization.input_quant_fp8", "QuantFP8", name),
            calls.quant_fp8_forward,
            checks.quant_fp8,
        )
        for name in ("forward_cuda", "forward_native")
    ),
    _attribute(
        "group_quant", _FP8_UTILS, calls.per_token_group_quant_fp8, check=checks.group_quant
    ),
    _attribute(
        "packed",
        _FP8_UTILS,
        calls.per_token_group_quant_fp8_packed_for_deepgemm,
        check=checks.packed,
        majors=_BLACKWELL,
    ),
    _attribute(
        "silu",
        _FP8_UTILS,
        calls.silu_mul_quant_fp8_packed_triton,
        check=checks.silu_packed,
        majors=_BLACKWELL,
    ),
    _attribute(
        "silu",
        _FP8_UTILS,
        calls.silu_mul_per_token_group_quant_fp8_colmajor,
        check=checks.silu_column_major,
        majors=_HOPPER,
    ),
    _attribute(
        "silu",
        "vllm.model_executor.layers.fused_moe.experts.batched_deep_gemm_moe",
        calls.persistent_masked_m_silu_mul_quant,
        check=checks.silu_masked,
    ),
    Takeover(
        "silu",
        FusedActivation(_FUSED_ACTIVATIONS, "_silu_and_mul_fp8_dynamic_128"),
        calls.silu_and_mul_fp8_dynamic_128,
        checks.fused_activation,
    ),
    Takeover(
        "silu",
        FusedActivation(_FUSED_ACTIVATIONS, "_silu_and_mul_nvfp4_dynamic"),
        calls.silu_and_mul_nvfp4_dynamic,
        checks.fused_activation,
        majors=_BLACKWELL,
    ),
    _attribute(
        "mxfp8", _MXFP8_UTILS, calls.mxfp8_e4m3_quantize, check=checks.mxfp8, majors=_BLACKWELL
    ),
    _attribute(
        "nvfp4",
        "vllm._custom_ops",
        calls.scaled_fp4_quant,
        check=checks.nvfp4,
        majors=_BLACKWELL,
    ),
    _attribute("per_token", "vllm._custom_ops", calls.scaled_fp8_quant, check=checks.scaled_fp8),
    _attribute(
        "int8", _INT8_UTILS, calls.per_token_group_quant_int8, check=checks.group_quant_int8
    ),
    _attribute("int8", _INT8_UTILS, calls.per_token_quant_int8, check=checks.rows_int8_of_triton),
    _attribute("int8", "vllm._custom_ops", calls.scaled_int8_quant, check=checks.scaled_int8),
    _attribute("deepep", _MXFP8_UTILS, calls.swizzle_mxfp8_scale, check=checks.swizzle),
    Takeover(
        "norm",
        Method("vllm.compilation.passes.pass_manager", "PostGradPassManager", "configure"),
        worker.configure_passes,
        around=True,
        counter=worker.fused,
    ),
    Takeover(
        "warm_up",
        Method("vllm.v1.worker.gpu_worker", "Worker", "load_model"),
        worker.load_model,
        around=True,
    ),
    Takeover(
        "warm_up",
        Attribute("vllm.model_executor.warmup.kernel_warmup", "kernel_warmup"),
        worker.kernel_warmup,
        around=True,
    ),
)

ENGINE = Engine(
    "vllm",
    tested=("0.33.0",),
    variable="CUTE_QUANT_VLLM",
    takeovers=TAKEOVERS,
    capability=_capability,
    why_not=_why_not,
)


def install() -> None:
    """Take over what ``CUTE_QUANT_VLLM`` selects; the entry point of the plug-in."""
    ENGINE.install()
    if ENGINE.installed:
        worker.add_to_compile_key(ENGINE)
