"""Faults that the tests must see: one change each, and the tests that concern it.

Left out, since nothing that a caller sees depends on them:

- a sum of squares, or an amax, that another order of the same additions or maxima gives;
- slots of masked experts one too many: the tile past the last slot has no rows;
- bits of an fp16 amax below its precision, which only the compare with the largest value reads;
- the sign of a count of blocked rows, of which checks allow fewer than 2^31;
- batch strides of scales that are checked twice;
- parents of a cache directory that does not exist yet, checked again when it is made;
- a product of a row's weight in float64, rounded twice to the same float32;
- the shape of counts in the key of a plan, which the shape of x implies;
- the lock around a compilation, which two threads may or may not need at the same time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

PACKAGE = "cute_quant"


class Fault(NamedTuple):
    """A fault to plant.

    Attributes:
        file: of the package.
        before, after: text that the file has exactly once, and what replaces it.
        tests: files, functions or cases, as pytest names them, the fastest first; one must fail.
    """

    id: str
    file: str
    before: str
    after: str
    tests: Sequence[str]

    def planted(self, source: str) -> str:
        """Return the source of the file with this fault.

        Raises:
            ValueError: the text to be replaced is not there, or more than once.
        """
        count = source.count(self.before)
        if count != 1:
            raise ValueError(
                f"{self.id}: expected {self.before!r} once in {self.file}, found it {count} times"
            )
        return source.replace(self.before, self.after)


REFERENCE = "contract/reference.py"
FORMATS = "contract/formats.py"
CHOICES = "contract/format_choices.py"
CHECKS = "contract/checks.py"
TENSORS = "contract/tensors.py"
PROLOGUES = "contract/prologues.py"
ROWS = "contract/rows.py"
PLAN = "dispatch/plan.py"
LAUNCH = "dispatch/launch.py"
TORCH_OPS = "dispatch/torch_ops.py"
HEURISTICS = "kernels/heuristics.py"

ON_INPUTS = "tests/contract/test_inputs.py"
ON_OUTPUTS = "tests/contract/test_outputs.py"
ON_REFERENCE = "tests/contract/test_reference.py"
ON_SILU = "tests/contract/test_silu_mul.py"
ON_NORM = "tests/contract/test_rms_norm.py"
ON_FORMATS = "tests/contract/test_formats.py"
ON_CHECKS = "tests/contract/test_checks.py"
ON_QUANTIZE_KERNEL = "tests/kernels/test_quantize.py"
ON_SILU_KERNEL = "tests/kernels/test_silu_mul.py"
ON_NORM_KERNEL = "tests/kernels/test_rms_norm.py"

OF_REFERENCE = [
    Fault(
        "reference-smallest-scale-is-0",
        REFERENCE,
        "bits.where(exponents != 0, 0x400000)",
        "bits",
        [f"{ON_INPUTS}::test_dequantize_every_code_and_scale"],
    ),
    Fault(
        "reference-nan-scale-is-inf",
        REFERENCE,
        "return scales.where(exponents != UE8M0_NAN, torch.nan)",
        "return scales",
        [f"{ON_INPUTS}::test_dequantize_every_code_and_scale"],
    ),
    Fault(
        "reference-float-scale-of-inf",
        REFERENCE,
        "scales.clamp(min=fmt.floor).where(amax.isfinite(), torch.nan)",
        "scales.clamp(min=fmt.floor)",
        [f"{ON_INPUTS}::test_every_format"],
    ),
    Fault(
        "reference-float-scale-without-floor",
        REFERENCE,
        "scales.clamp(min=fmt.floor).where(",
        "scales.where(",
        [f"{ON_INPUTS}::test_floors_of_floats"],
    ),
    Fault(
        "reference-exponent-of-power-of-two",
        REFERENCE,
        "(mantissa == 0.5).int()",
        "0",
        [f"{ON_REFERENCE}::test_known_values"],
    ),
    Fault(
        "reference-exponent-without-floor",
        REFERENCE,
        "exponent.clamp(min=fmt.floor).where(",
        "exponent.where(",
        [f"{ON_REFERENCE}::test_known_values"],
    ),
    Fault(
        "reference-quotient-in-float32",
        REFERENCE,
        "torch.frexp(amax.double() / fmt.value_type.max)",
        "torch.frexp(amax.float() / fmt.value_type.max)",
        [f"{ON_INPUTS}::test_amax_beside_each_step_of_the_scale"],
    ),
    Fault(
        "reference-deepgemm-numerics-divide",
        REFERENCE,
        "amax.float() * (1.0 / largest) if fmt.reciprocal else amax.float() / largest",
        "amax.float() / largest",
        [f"{ON_REFERENCE}::test_float32_scale_of_deepgemm_is_a_rounded_product"],
    ),
    Fault(
        "reference-ieee-numerics-multiply",
        REFERENCE,
        "amax.float() * (1.0 / largest) if fmt.reciprocal else amax.float() / largest",
        "amax.float() * (1.0 / largest)",
        [f"{ON_REFERENCE}::test_float32_scale_is_the_rounded_quotient"],
    ),
    Fault(
        "reference-values-divided",
        REFERENCE,
        "values = _in_groups(x.float(), fmt) * multipliers.unsqueeze(-1)",
        "values = _in_groups(x.float(), fmt) / (1.0 / multipliers.unsqueeze(-1))",
        [f"{ON_REFERENCE}::test_exact_oracle_of_float32_scales"],
    ),
    Fault(
        "reference-nan-codes",
        REFERENCE,
        "codes.where(finite.unsqueeze(-1), fmt.value_type.nan_byte)",
        "codes.where(finite.unsqueeze(-1), 0xFF)",
        [f"{ON_REFERENCE}::test_one_special_value_poisons_its_group_alone"],
    ),
    Fault(
        "reference-index-of-one-past-the-last",
        REFERENCE,
        "live = (index >= 0) & (index < tokens)",
        "live = (index >= 0) & (index <= tokens)",
        [f"{ON_INPUTS}::test_rows"],
    ),
    Fault(
        "reference-group-starts-not-aligned",
        REFERENCE,
        "starts = pad(align(ends, rows.alignment)[:-1], (1, 0))",
        "starts = pad(ends[:-1], (1, 0))",
        [f"{ON_INPUTS}::test_rows"],
    ),
    Fault(
        "reference-group-has-its-end",
        REFERENCE,
        "(row < ends[:, None])",
        "(row <= ends[:, None])",
        [f"{ON_INPUTS}::test_rows"],
    ),
    Fault(
        "reference-group-0-is-padding",
        REFERENCE,
        "live = live & (rows.m_indices >= 0)",
        "live = live & (rows.m_indices > 0)",
        [f"{ON_INPUTS}::test_rows"],
    ),
    Fault(
        "reference-count-beyond-the-rows",
        REFERENCE,
        "masked.masked_m.long().clamp(0, mn), alignment)",
        "masked.masked_m.long().clamp(min=0), alignment)",
        [f"{ON_INPUTS}::test_rows"],
    ),
    Fault(
        "reference-masked-padding-not-zeroed",
        REFERENCE,
        "below_count(rows, mn, fmt.scale_rows(mn), SCALE_ROW_ALIGNMENT)",
        "below_count(rows, mn, fmt.scale_rows(mn))",
        [f"{ON_INPUTS}::test_rows"],
    ),
    Fault(
        "reference-extra-rows-of-q",
        REFERENCE,
        "bytes_[:, mn:].zero_()",
        "bytes_[:, mn + 1 :].zero_()",
        [f"{ON_INPUTS}::test_every_format"],
    ),
    Fault(
        "reference-inner-padding-rows",
        REFERENCE,
        "inner.masked_fill_(written[:-1], 0)",
        "inner[:-1].masked_fill_(written[:-2], 0)",
        [f"{ON_INPUTS}::test_every_format"],
    ),
    Fault(
        "reference-last-padding-rows",
        REFERENCE,
        "last.masked_fill_(written[-1, :last_padding], 0)",
        "pass",
        [f"{ON_INPUTS}::test_every_format"],
    ),
    Fault(
        "reference-scale-of-a-dead-row",
        REFERENCE,
        "scales = ue8m0_to_float32(scales).where(scales > 0, 0.0)",
        "scales = ue8m0_to_float32(scales)",
        [f"{ON_INPUTS}::test_rows"],
    ),
    Fault(
        "reference-blocks-not-interleaved",
        REFERENCE,
        "return blocks.permute(0, 1, 4, 3, 2, 5).reshape(batch, rows * groups)",
        "return blocks.permute(0, 1, 4, 2, 3, 5).reshape(batch, rows * groups)",
        [f"{ON_INPUTS}::test_blocked_scales_are_those_that_torch_makes"],
    ),
    Fault(
        "reference-blocks-read-not-interleaved",
        REFERENCE,
        "return blocks.permute(0, 1, 4, 3, 2, 5).reshape(t.shape[0], rows, groups)",
        "return blocks.permute(0, 1, 3, 4, 2, 5).reshape(t.shape[0], rows, groups)",
        [
            f"{ON_INPUTS}::test_formats_share_their_values_and_numbers",
        ],
    ),
    Fault(
        "reference-bytes-of-a-word-reversed",
        REFERENCE,
        "torch.arange(0, 32, 8, device=sf.device)",
        "torch.arange(24, -8, -8, device=sf.device)",
        [f"{ON_REFERENCE}::test_dequantize_is_close"],
    ),
    Fault(
        "reference-gates-and-ups-swapped",
        REFERENCE,
        "gate, up = gate_up[..., 0::2], gate_up[..., 1::2]",
        "up, gate = gate_up[..., 0::2], gate_up[..., 1::2]",
        [f"{ON_SILU}::test_interleaving", f"{ON_SILU}::test_options"],
    ),
    Fault(
        "reference-alpha-left-out",
        REFERENCE,
        "values = (up * gate * torch.sigmoid(alpha * gate)).float()",
        "values = (up * gate * torch.sigmoid(gate)).float()",
        [f"{ON_SILU}::test_options"],
    ),
    Fault(
        "reference-beta-of-0-is-added",
        REFERENCE,
        "up = up if beta == 0 else up + beta",
        "up = up + beta",
        [f"{ON_SILU}::test_zeros_keep_their_sign"],
    ),
    Fault(
        "reference-ups-not-clamped-below",
        REFERENCE,
        "return gate.clamp(max=limit), up.clamp(-limit, limit)",
        "return gate.clamp(max=limit), up.clamp(max=limit)",
        [f"{ON_SILU}::test_options"],
    ),
    Fault(
        "reference-gates-clamped-below",
        REFERENCE,
        "return gate.clamp(max=limit), up.clamp(-limit, limit)",
        "return gate.clamp(-limit, limit), up.clamp(-limit, limit)",
        [f"{ON_SILU}::test_options"],
    ),
    Fault(
        "reference-product-in-float32",
        REFERENCE,
        "gate, up = _clamp(gate.double(), up.double(), limit)",
        "gate, up = _clamp(gate.float(), up.float(), limit)",
        [f"{ON_SILU}::test_every_gate"],
    ),
    Fault(
        "reference-unfused-shift-not-rounded",
        REFERENCE,
        "(up.float() + beta).to(up.dtype)",
        "up + beta",
        [f"{ON_SILU}::test_options"],
    ),
    Fault(
        "reference-norm-without-residual",
        REFERENCE,
        "total = total + prologue.residual.view(x.shape).float()",
        "total = total + 0.0",
        [f"{ON_NORM}::test_options"],
    ),
    Fault(
        "reference-norm-offset-left-out",
        REFERENCE,
        "weight = weight + prologue.weight_offset",
        "weight = weight + 0.0",
        [f"{ON_NORM}::test_weight_offset_is_what_gemma_computes"],
    ),
    Fault(
        "reference-norm-sum-not-rounded",
        REFERENCE,
        "total = total.to(x.dtype).float()",
        "total = total.float()",
        [f"{ON_NORM}::test_unfused_is_what_torch_computes", f"{ON_NORM}::test_options"],
    ),
    Fault(
        "reference-norm-squares-beyond-float32",
        REFERENCE,
        "square = squares.masked_fill(squares > FLOAT32_MAX, torch.inf) / r.shape[-1] + eps",
        "square = squares / r.shape[-1] + eps",
        [f"{ON_NORM}::test_magnitudes", f"{ON_NORM}::test_special_values"],
    ),
    Fault(
        "reference-norm-subnormal-root",
        REFERENCE,
        "square.masked_fill(square < SMALLEST_NORMAL, 0.0).sqrt()",
        "square.sqrt()",
        [f"{ON_NORM}::test_magnitudes", f"{ON_NORM}::test_rows_of_zeros", f"{ON_NORM}::test_special_values"],
    ),
]

FAULTS = [*OF_REFERENCE]
