"""Checkpoints of Hugging Face: directories of safetensors in, quantized ones out.

``quantize_checkpoint`` reads shard by shard and writes what ``conventions`` says that engines read.
"""

from cute_quant.checkpoint.conventions import CONVENTIONS, Convention
from cute_quant.checkpoint.conversion import Conversion, plan_checkpoint, quantize_checkpoint
from cute_quant.checkpoint.selection import DEFAULT_KEEP, Plan

__all__ = [
    "CONVENTIONS",
    "DEFAULT_KEEP",
    "Convention",
    "Conversion",
    "Plan",
    "plan_checkpoint",
    "quantize_checkpoint",
]
