"""Faults that the tests must see: one change each, and the tests that concern it.

Left out, since nothing that a caller sees depends on them:

- a sum of squares, or an amax, that another order of the same additions or maxima gives;
- slots of masked experts one too many: the tile past the last slot has no rows;
- bits of an fp16 amax below its precision, which only the compare with the largest value reads;
- 32 bits for scales in blocks, of which checks allow no more in a matrix;
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
SCHEDULER = "kernels/scheduler.py"
ROW_DOMAINS = "kernels/row_domains.py"
STAGE = "kernels/stage.py"
LAYOUTS = "kernels/layouts.py"
COPY = "kernels/copy.py"
SCALES = "kernels/scales.py"
ENCODINGS = "kernels/encodings.py"
PTX = "kernels/ptx.py"
ARITHMETIC = "kernels/arithmetic.py"
QUANTIZE = "kernels/quantize.py"
SILU_MUL = "kernels/silu_mul.py"
RMS_NORM = "kernels/rms_norm.py"
DEQUANTIZE = "kernels/dequantize.py"

ON_INPUTS = "tests/contract/test_inputs.py"
ON_OUTPUTS = "tests/contract/test_outputs.py"
ON_REFERENCE = "tests/contract/test_reference.py"
ON_SILU = "tests/contract/test_silu_mul.py"
ON_NORM = "tests/contract/test_rms_norm.py"
ON_FORMATS = "tests/contract/test_formats.py"
ON_CHECKS = "tests/contract/test_checks.py"
ON_QUANTIZE_KERNEL = "tests/kernels/test_quantize.py"
ON_LAYOUTS = "tests/kernels/test_layouts.py"
ON_SIGMOID = "tests/kernels/test_arithmetic.py"
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
        [
            f"{ON_NORM}::test_magnitudes",
            f"{ON_NORM}::test_rows_of_zeros",
            f"{ON_NORM}::test_special_values",
        ],
    ),
]

OF_KERNELS = [
    Fault(
        "scheduler-last-chunk-of-experts",
        SCHEDULER,
        "for chunk in range(0, experts, EXPERTS_PER_CHUNK):",
        "for chunk in range(0, experts - 1, EXPERTS_PER_CHUNK):",
        [f"{ON_QUANTIZE_KERNEL}::test_masked_experts_of_several_chunks"],
    ),
    Fault(
        "scheduler-dedicated-tiles-shared-again",
        SCHEDULER,
        "row_tile = tile - begin + problem.dedicated_tiles",
        "row_tile = tile - begin",
        [f"{ON_QUANTIZE_KERNEL}::test_masked"],
    ),
    Fault(
        "scheduler-tiles-of-an-expert-rounded-down",
        SCHEDULER,
        "tiles = Int32((rows + (self.tile.rows - 1)) // self.tile.rows)",
        "tiles = Int32(rows // self.tile.rows)",
        [f"{ON_QUANTIZE_KERNEL}::test_masked"],
    ),
    Fault(
        "scheduler-row-tiles-rounded-down",
        SCHEDULER,
        "num_row_tiles=Int32((rows_to_write + (self.tile.rows - 1)) // self.tile.rows),",
        "num_row_tiles=Int32(rows_to_write // self.tile.rows),",
        [f"{ON_QUANTIZE_KERNEL}::test_shapes"],
    ),
    Fault(
        "scheduler-padding-rows-get-no-tile",
        SCHEDULER,
        "rows_to_write = cutlass.max(rows_to_write, scales.rows)",
        "rows_to_write = cutlass.max(rows_to_write, q.rows)",
        [f"{ON_QUANTIZE_KERNEL}::test_formats"],
    ),
    Fault(
        "scheduler-matrices-past-the-grid",
        SCHEDULER,
        "for batch in range(z, problem.batches, depth):",
        "for batch in range(z, depth, depth):",
        [f"{ON_QUANTIZE_KERNEL}::test_more_rows_and_matrices_than_the_grid_counts"],
    ),
    Fault(
        "scheduler-rows-past-the-grid",
        SCHEDULER,
        "for row_tile in range(row_cta, problem.num_row_tiles, num_row_ctas):",
        "for row_tile in range(row_cta, num_row_ctas, num_row_ctas):",
        [f"{ON_QUANTIZE_KERNEL}::test_more_rows_and_matrices_than_the_grid_counts"],
    ),
    Fault(
        "scheduler-prefix-sum-one-step-short",
        SCHEDULER,
        "for i in cutlass.range_constexpr(lanes.bit_length() - 1):",
        "for i in cutlass.range_constexpr(lanes.bit_length() - 2):",
        [f"{ON_QUANTIZE_KERNEL}::test_masked_experts_of_several_chunks"],
    ),
    Fault(
        "scheduler-expert-past-the-last",
        SCHEDULER,
        "if expert < problem.counts.shape[0]:",
        "if expert <= problem.counts.shape[0]:",
        [f"{ON_QUANTIZE_KERNEL}::test_masked"],
    ),
    Fault(
        "scheduler-shared-tiles-below-0",
        SCHEDULER,
        "return cutlass.max(tiles - problem.dedicated_tiles, Int32(0))",
        "return tiles - problem.dedicated_tiles",
        [
            f"{ON_QUANTIZE_KERNEL}::test_masked_experts_of_several_chunks",
            f"{ON_QUANTIZE_KERNEL}::test_masked",
        ],
    ),
    Fault(
        "scheduler-next-tile-of-the-cta",
        SCHEDULER,
        "next_tile += num_row_ctas",
        "next_tile += num_row_ctas + 1",
        [f"{ON_QUANTIZE_KERNEL}::test_masked"],
    ),
    Fault(
        "scheduler-short-tiles-miss-the-padding",
        SCHEDULER,
        "return problem.scales.rows_to_write(count)",
        "return Uint32(count)",
        [f"{ON_NORM_KERNEL}::test_masked_experts"],
    ),
    Fault(
        "rows-gather-past-the-tokens",
        ROW_DOMAINS,
        "exist = [here and row < tokens for",
        "exist = [here and row <= tokens for",
        [f"{ON_QUANTIZE_KERNEL}::test_gathered"],
    ),
    Fault(
        "rows-negative-count",
        ROW_DOMAINS,
        "return cutlass.min(Uint32(cutlass.max(count, Int32(0))), limit)",
        "return cutlass.min(Uint32(count), limit)",
        [f"{ON_QUANTIZE_KERNEL}::test_masked"],
    ),
    Fault(
        "rows-count-past-the-rows",
        ROW_DOMAINS,
        "return cutlass.min(Uint32(cutlass.max(count, Int32(0))), limit)",
        "return Uint32(cutlass.max(count, Int32(0)))",
        [f"{ON_QUANTIZE_KERNEL}::test_masked"],
    ),
    Fault(
        "rows-group-start-not-aligned",
        ROW_DOMAINS,
        "start = next_multiple(clamp(mEnds[group - 1], mn), alignment)",
        "start = clamp(mEnds[group - 1], mn)",
        [f"{ON_QUANTIZE_KERNEL}::test_prefix_sums"],
    ),
    Fault(
        "rows-group-end-included",
        ROW_DOMAINS,
        "if start <= indices[i] and indices[i] < end:",
        "if start <= indices[i] and indices[i] <= end:",
        [f"{ON_QUANTIZE_KERNEL}::test_prefix_sums"],
    ),
    Fault(
        "rows-first-32-groups-alone",
        ROW_DOMAINS,
        "for base in range(0, groups, LANES):",
        "for base in range(0, 1, LANES):",
        [f"{ON_QUANTIZE_KERNEL}::test_prefix_sums"],
    ),
    Fault(
        "rows-index-0-is-padding",
        ROW_DOMAINS,
        "return index >= 0",
        "return index > 0",
        [f"{ON_QUANTIZE_KERNEL}::test_indexed"],
    ),
    Fault(
        "rows-of-q-past-the-rows",
        ROW_DOMAINS,
        "indices[i] < problem.num_q_rows)",
        "indices[i] < num_rows)",
        [f"{ON_QUANTIZE_KERNEL}::test_more_rows_of_q"],
    ),
    Fault(
        "rows-aligned-start-in-32-signed-bits",
        ROW_DOMAINS,
        "step = Uint32(alignment)\n    return (row + step - 1) // step * step",
        "step = alignment\n    return Uint32((Int32(row) + step - 1) // step * step)",
        [f"{ON_QUANTIZE_KERNEL}::test_prefix_sums"],
    ),
    Fault(
        "stage-scales-of-a-batch-in-32-bits",
        STAGE,
        "start = self.start + Int64(batch) * self.stride",
        "start = self.start + batch * Int32(self.stride)",
        [f"{ON_QUANTIZE_KERNEL}::test_scales_past_32_bits"],
    ),
    Fault(
        "stage-last-column-without-padding",
        STAGE,
        "elements = layouts.unsigned(columns) * rows - Uint32(missing_rows)",
        "elements = layouts.unsigned(columns) * rows",
        [f"{ON_QUANTIZE_KERNEL}::test_more_rows_of_q"],
    ),
    Fault(
        "stage-every-matrix-is-the-last",
        STAGE,
        "elements = cutlass.select_(last, self.elements, Uint32(2**32 - 1))",
        "elements = self.elements",
        [f"{ON_QUANTIZE_KERNEL}::test_batches"],
    ),
    Fault(
        "stage-padding-of-masked-scales",
        STAGE,
        "return cutlass.min(round_up(count, SCALE_ROW_ALIGNMENT), self.rows)",
        "return cutlass.min(Uint32(count), self.rows)",
        [f"{ON_QUANTIZE_KERNEL}::test_masked"],
    ),
    Fault(
        "stage-groups-of-blocks-not-padded",
        STAGE,
        "groups = cute.round_up(groups, BLOCK_GROUPS)",
        "pass",
        [f"{ON_QUANTIZE_KERNEL}::test_formats"],
    ),
    Fault(
        "stage-scale-of-a-dead-row",
        STAGE,
        "scale = scale if row_exists and group_exists else type(scale)(0)",
        "scale = scale if group_exists else type(scale)(0)",
        [f"{ON_QUANTIZE_KERNEL}::test_more_rows_of_q"],
    ),
    Fault(
        "stage-scale-of-a-dead-group",
        STAGE,
        "scale = scale if row_exists and group_exists else type(scale)(0)",
        "scale = scale if row_exists else type(scale)(0)",
        [f"{ON_QUANTIZE_KERNEL}::test_shapes"],
    ),
    Fault(
        "stage-second-row-has-the-first-scale",
        STAGE,
        "result = choices[i] if index == i else result",
        "result = choices[0] if index == i else result",
        [f"{ON_QUANTIZE_KERNEL}::test_two_rows_a_thread"],
    ),
    Fault(
        "stage-words-past-the-row",
        STAGE,
        "predicate = predicate and copy.tile_coordinates(k, unit, unit_columns)[0] < k",
        "predicate = predicate and True",
        [f"{ON_QUANTIZE_KERNEL}::test_formats"],
    ),
    Fault(
        "stage-tiles-without-padding",
        STAGE,
        "padded = cute.round_up(groups, self.groups_per_unit)",
        "padded = groups",
        [f"{ON_QUANTIZE_KERNEL}::test_formats"],
    ),
    Fault(
        "stage-exact-products-of-rounded-scales",
        STAGE,
        "exact = self.fmt.power_of_two",
        "exact = True",
        [f"{ON_QUANTIZE_KERNEL}::test_shapes"],
    ),
    Fault(
        "stage-element-signed",
        STAGE,
        "                element = layouts.unsigned(element)",
        "                element = Int32(element)",
        [f"{ON_QUANTIZE_KERNEL}::test_scales_past_32_bits"],
    ),
    Fault(
        "layouts-row-major-in-32-bits",
        LAYOUTS,
        "stride=(_wide(groups) * cute.E(1), cute.E(1))",
        "stride=(groups * cute.E(1), cute.E(1))",
        [f"{ON_QUANTIZE_KERNEL}::test_scales_past_32_bits"],
    ),
    Fault(
        "layouts-row-offset-in-elements",
        LAYOUTS,
        "offset = Int64(Uint64(Uint32(index)) * Uint64(self.row_bytes))",
        "offset = Int64(Uint32(index) * self.row_bytes)",
        [f"{ON_QUANTIZE_KERNEL}::test_offsets_past_32_bits"],
    ),
    Fault(
        "layouts-row-offset-signed",
        LAYOUTS,
        "Int64(Uint64(Uint32(index)) * Uint64(self.row_bytes))",
        "Int64(Int32(Uint32(index) * self.row_bytes))",
        [f"{ON_QUANTIZE_KERNEL}::test_offsets_past_32_bits"],
    ),
    Fault(
        "layouts-ups-start",
        LAYOUTS,
        "offset = offset + Int64(first) * (m.element_type.width // 8)",
        "offset = offset + Int64(first)",
        [f"{ON_SILU_KERNEL}::test_variants"],
    ),
    Fault(
        "layouts-blocks-not-interleaved",
        LAYOUTS,
        "rows_stride = interleaved * BLOCK_GROUPS, BLOCK_GROUPS,",
        "rows_stride = BLOCK_GROUPS, BLOCK_LANES * BLOCK_GROUPS,",
        [f"{ON_LAYOUTS}::test_scales_in_blocks"],
    ),
    Fault(
        "layouts-column-warps",
        LAYOUTS,
        "modes.reverse()",
        "pass",
        [f"{ON_LAYOUTS}::test_warps_cover_a_cta_once"],
    ),
    Fault(
        "layouts-words-of-dequantize",
        LAYOUTS,
        "stride=(*strides, (1, stride))",
        "stride=(*strides, (stride, 1))",
        [f"{ON_QUANTIZE_KERNEL}::test_dequantize"],
    ),
    Fault(
        "layouts-batch-of-words-in-32-bits",
        LAYOUTS,
        "(Int64(step) * BYTES_PER_WORD for step in words.stride)",
        "(Int64(Int32(step) * BYTES_PER_WORD) for step in words.stride)",
        [f"{ON_QUANTIZE_KERNEL}::test_dequantize_scales_past_32_bits"],
    ),
    Fault(
        "copy-ragged-end-stored-whole",
        COPY,
        "deciding = cute.size(src) - 1 if const_expr(ragged) else 0",
        "deciding = 0",
        [f"{ON_QUANTIZE_KERNEL}::test_formats"],
    ),
    Fault(
        "copy-ragged-values-dropped",
        COPY,
        "elif const_expr(ragged) and row_predicate:",
        "elif const_expr(False) and row_predicate:",
        [f"{ON_QUANTIZE_KERNEL}::test_formats"],
    ),
    Fault(
        "copy-rows-that-do-not-exist",
        COPY,
        "if row_predicate and tXcX[deciding] < columns:",
        "if tXcX[deciding] < columns:",
        [f"{ON_QUANTIZE_KERNEL}::test_more_rows_of_q"],
    ),
    Fault(
        "copy-last-value-of-a-ragged-row",
        COPY,
        "if tXcX[i] < columns:",
        "if tXcX[i] < columns - 1:",
        [f"{ON_QUANTIZE_KERNEL}::test_formats"],
    ),
    Fault(
        "scales-subnormal-scale-is-0",
        SCALES,
        "bits = cutlass.max(byte << FLOAT32_MANTISSA_BITS, Uint32(SMALLEST_UE8M0))",
        "bits = byte << FLOAT32_MANTISSA_BITS",
        [f"{ON_QUANTIZE_KERNEL}::test_dequantize_every_scale"],
    ),
    Fault(
        "scales-fake-subnormal-scale-is-0",
        SCALES,
        "if const_expr(subnormal):",
        "if const_expr(False):",
        [f"{ON_QUANTIZE_KERNEL}::test_fake_quantize_smallest_scales"],
    ),
    Fault(
        "scales-nan-byte-is-inf",
        SCALES,
        "bits = bits if byte != Uint32(UE8M0_NAN) else Uint32(FLOAT32_NAN)",
        "bits = bits",
        [f"{ON_QUANTIZE_KERNEL}::test_dequantize"],
    ),
    Fault(
        "scales-amax-with-its-sign",
        SCALES,
        "return result & Uint32(MAGNITUDE_MASK if single else MAGNITUDE_MASK_X2)",
        "return result",
        [f"{ON_QUANTIZE_KERNEL}::test_random_bits"],
    ),
    Fault(
        "scales-half-of-the-pairs",
        SCALES,
        "result = ptx.max_u16x2(result, result << 16 | result >> 16)",
        "result = result",
        [f"{ON_QUANTIZE_KERNEL}::test_random_bits"],
    ),
    Fault(
        "scales-values-left-out-of-amax",
        SCALES,
        "for i in cutlass.range_constexpr(2, cute.size(words), 2):",
        "for i in cutlass.range_constexpr(4, cute.size(words), 2):",
        [f"{ON_QUANTIZE_KERNEL}::test_random_bits"],
    ),
    Fault(
        "scales-no-floor-of-exponents",
        SCALES,
        "bits = cutlass.min(bits, max_multiplier.bitcast(Uint32))",
        "pass",
        [f"{ON_QUANTIZE_KERNEL}::test_min_scale"],
    ),
    Fault(
        "scales-no-floor-of-floats",
        SCALES,
        "scale = cutlass.max(scale, min_scale)",
        "pass",
        [f"{ON_QUANTIZE_KERNEL}::test_min_scale"],
    ),
    Fault(
        "scales-inf-is-finite",
        SCALES,
        "return amax < Uint32(FLOAT32_INFINITY)",
        "return amax <= Uint32(FLOAT32_INFINITY)",
        [f"{ON_QUANTIZE_KERNEL}::test_every_pattern_as_amax"],
    ),
    Fault(
        "scales-not-finite-multiplier",
        SCALES,
        "return amax.bitcast(Float32) * Float32(0.0) + bits.bitcast(Float32)",
        "return bits.bitcast(Float32)",
        [f"{ON_QUANTIZE_KERNEL}::test_random_bits"],
    ),
    Fault(
        "scales-mantissa-of-the-largest",
        SCALES,
        "<< FLOAT32_MANTISSA_BITS | values.max_mantissa",
        "<< FLOAT32_MANTISSA_BITS",
        [f"{ON_QUANTIZE_KERNEL}::test_every_pattern_as_amax"],
    ),
    Fault(
        "scales-precision-of-bfloat16",
        SCALES,
        "BELOW_PRECISION = {BFloat16: 0xFFFF,",
        "BELOW_PRECISION = {BFloat16: 0,",
        [f"{ON_QUANTIZE_KERNEL}::test_every_pattern_as_amax"],
    ),
    Fault(
        "scales-byte-of-a-multiplier",
        SCALES,
        "Uint32(UE8M0_MAX << FLOAT32_MANTISSA_BITS | MANTISSA_MASK) - multiplier",
        "Uint32(UE8M0_MAX << FLOAT32_MANTISSA_BITS) - multiplier",
        [f"{ON_QUANTIZE_KERNEL}::test_random_bits"],
    ),
    Fault(
        "scales-nan-of-a-rounded-scale",
        SCALES,
        "return cutlass.min(bits, Uint32(FLOAT32_NAN)).bitcast(Float32)",
        "return bits.bitcast(Float32)",
        [f"{ON_QUANTIZE_KERNEL}::test_random_bits"],
    ),
    Fault(
        "scales-deepgemm-numerics-divide",
        SCALES,
        "if const_expr(reciprocal_of_max):",
        "if const_expr(False):",
        [f"{ON_QUANTIZE_KERNEL}::test_every_pattern_as_amax"],
    ),
    Fault(
        "encodings-rounded-twice",
        ENCODINGS,
        "rQ.store(rX.load().to(dtype))\n    return rQ",
        "rQ.store(rX.load().to(BFloat16).to(Float32).to(dtype))\n    return rQ",
        [f"{ON_QUANTIZE_KERNEL}::test_random_bits"],
    ),
    Fault(
        "encodings-int8-halves-swapped",
        ENCODINGS,
        "words[i] = ptx.pack_int8(rX[4 * i], rX[4 * i + 1], upper)",
        "words[i] = ptx.pack_int8(rX[4 * i + 1], rX[4 * i], upper)",
        [f"{ON_QUANTIZE_KERNEL}::test_formats"],
    ),
    Fault(
        "encodings-widened-with-the-other-half",
        ENCODINGS,
        "bits[2 * i + 1] = pairs[i] & Uint32(0xFFFF0000)",
        "bits[2 * i + 1] = pairs[i]",
        [f"{ON_QUANTIZE_KERNEL}::test_shapes"],
    ),
    Fault(
        "encodings-registers-not-zeroed",
        ENCODINGS,
        "cute.recast_tensor(tXrX, Uint32).fill(0)",
        "pass",
        [f"{ON_QUANTIZE_KERNEL}::test_formats"],
    ),
    Fault(
        "ptx-int8-truncated",
        PTX,
        "cvt.rni.s32.f32 $0, $1;",
        "cvt.rzi.s32.f32 $0, $1;",
        [f"{ON_QUANTIZE_KERNEL}::test_formats"],
    ),
    Fault(
        "ptx-int8-without-sign",
        PTX,
        "cvt.pack.sat.s8.s32.b32 $0, $1, $2, $3;",
        "cvt.pack.sat.u8.s32.b32 $0, $1, $2, $3;",
        [f"{ON_QUANTIZE_KERNEL}::test_formats"],
    ),
    Fault(
        "ptx-nan-loses-to-a-number",
        PTX,
        "max.NaN.xorsign.abs",
        "max.xorsign.abs",
        [f"{ON_QUANTIZE_KERNEL}::test_random_bits"],
    ),
    Fault(
        "ptx-sign-of-a-zero-product",
        PTX,
        "negative_zero = Uint32(0x80000000)",
        "negative_zero = Uint32(0)",
        [f"{ON_QUANTIZE_KERNEL}::test_random_bits"],
    ),
    Fault(
        "arithmetic-reciprocal-without-newton",
        ARITHMETIC,
        "error = cute.math.fma(Float32(0.0) - a, estimate, Float32(1.0))\n"
        "    return cute.math.fma(error, estimate, estimate)",
        "return estimate",
        [f"{ON_QUANTIZE_KERNEL}::test_multipliers_are_rounded_reciprocals"],
    ),
    Fault(
        "arithmetic-quotient-without-remainder",
        ARITHMETIC,
        "return cute.math.fma(remainder, reciprocal, estimate)",
        "return estimate",
        [f"{ON_QUANTIZE_KERNEL}::test_every_pattern_as_amax"],
    ),
    Fault(
        "arithmetic-sigmoid-without-the-rest",
        ARITHMETIC,
        "exponential = cute.math.fma(exponential, rest * LN_2, exponential)",
        "pass",
        [f"{ON_SIGMOID}::test_sigmoid"],
    ),
    Fault(
        "arithmetic-sigmoid-factor-without-low",
        ARITHMETIC,
        "self.low = cute.math.fma(Float32(to_float32(LOG2_E) - LOG2_E), factor, error)",
        "self.low = error",
        [f"{ON_SIGMOID}::test_sigmoid"],
    ),
    Fault(
        "arithmetic-sigmoid-exponent-unbounded",
        ARITHMETIC,
        "x = elementwise(lambda value: cute.arch.fmin(value, bound, abs=True), x)",
        "pass",
        [f"{ON_SIGMOID}::test_sigmoid"],
    ),
    Fault(
        "arithmetic-clamp-hides-nan",
        ARITHMETIC,
        "cute.arch.fmin(value, bound, nan=True)",
        "cute.arch.fmin(value, bound)",
        [f"{ON_SILU_KERNEL}::test_variants"],
    ),
    Fault(
        "arithmetic-warp-sum-of-half-a-warp",
        ARITHMETIC,
        "for i in range(LANES.bit_length() - 1):",
        "for i in range(LANES.bit_length() - 2):",
        [f"{ON_NORM_KERNEL}::test_variants"],
    ),
    Fault(
        "quantize-row-amax-of-the-last-tile",
        QUANTIZE,
        "amax = scaling.larger(stage.dtype)(amax, scaling.thread_amax(tXrV))",
        "amax = scaling.thread_amax(tXrV)",
        [f"{ON_QUANTIZE_KERNEL}::test_formats"],
    ),
    Fault(
        "quantize-second-row-from-the-first",
        QUANTIZE,
        "return Segment(column_tile, lane), [first_row + row for row in rows]",
        "return Segment(column_tile, lane), [first_row for row in rows]",
        [f"{ON_QUANTIZE_KERNEL}::test_two_rows_a_thread"],
    ),
    Fault(
        "quantize-batch-of-gathered-tokens",
        QUANTIZE,
        "return self if gathered else self.replace(x=self.x[batch])",
        "return self.replace(x=self.x[batch])",
        [f"{ON_QUANTIZE_KERNEL}::test_gathered"],
    ),
    Fault(
        "quantize-fake-of-rounded-scale",
        QUANTIZE,
        "factor = scaling.float32_of_multiplier(scale.multiplier, self.spec.fmt.ue8m0)",
        "factor = scale.multiplier",
        [f"{ON_QUANTIZE_KERNEL}::test_fake_quantize"],
    ),
    Fault(
        "silu-factor-of-a-dead-row",
        SILU_MUL,
        "    if row.exists:\n        weight = mWeight",
        "    if row.in_bounds:\n        weight = mWeight",
        [f"{ON_SILU_KERNEL}::test_factors_of_rows_that_do_not_exist"],
    ),
    Fault(
        "silu-beta-of-a-dead-row",
        SILU_MUL,
        "beta = activation.beta if row.exists else Float32(0.0)",
        "beta = activation.beta",
        [f"{ON_SILU_KERNEL}::test_variants"],
    ),
    Fault(
        "silu-up-not-bounded-below",
        SILU_MUL,
        "up = arithmetic.maximum(up, -activation.bound)",
        "pass",
        [f"{ON_SILU_KERNEL}::test_variants"],
    ),
    Fault(
        "silu-product-rounded-once",
        SILU_MUL,
        "product = self.round(self.round(gate * self.sigmoid(gate)) * up)",
        "product = self.round(gate * self.sigmoid(gate) * up)",
        [f"{ON_SILU_KERNEL}::test_variants"],
    ),
    Fault(
        "silu-weight-of-the-first-matrix",
        SILU_MUL,
        "weight = self.weight[batch, None] if",
        "weight = self.weight[0, None] if",
        [f"{ON_SILU_KERNEL}::test_batches"],
    ),
    Fault(
        "silu-weight-of-the-source",
        SILU_MUL,
        "weight = mWeight[Int32(row.index)]",
        "weight = mWeight[Int32(row.source)]",
        [f"{ON_SILU_KERNEL}::test_factors_of_rows_that_do_not_exist"],
    ),
    Fault(
        "silu-interleaved-order",
        SILU_MUL,
        "wide = [cute.make_tensor(wide[0].iterator + i, every_other) for i in range(2)]",
        "wide = [cute.make_tensor(wide[0].iterator + 1 - i, every_other) for i in range(2)]",
        [f"{ON_SILU_KERNEL}::test_variants"],
    ),
    Fault(
        "norm-offset-of-dead-rows",
        RMS_NORM,
        "offset = zero_unless(row.exists, inputs.offset)",
        "offset = inputs.offset",
        [f"{ON_NORM_KERNEL}::test_dead_rows"],
    ),
    Fault(
        "norm-factor-of-dead-rows",
        RMS_NORM,
        "factor = zero_unless(row.exists, factor)",
        "pass",
        [f"{ON_NORM_KERNEL}::test_dead_rows"],
    ),
    Fault(
        "norm-padding-scales-of-the-last-tile",
        RMS_NORM,
        "last = stage.tiles(k)",
        "last = cute.ceil_div(k, stage.tile.columns)",
        [f"{ON_NORM_KERNEL}::test_padding_scales"],
    ),
    Fault(
        "norm-eps-left-out",
        RMS_NORM,
        "factor = arithmetic.rsqrt(square * inputs.reciprocal + inputs.eps)",
        "factor = arithmetic.rsqrt(square * inputs.reciprocal)",
        [f"{ON_NORM_KERNEL}::test_variants"],
    ),
    Fault(
        "norm-barrier-of-a-loop",
        RMS_NORM,
        "cute.arch.sync_threads()  # all have read the partial results of the row before",
        "pass",
        [f"{ON_NORM_KERNEL}::test_batches"],
    ),
    Fault(
        "norm-barrier",
        RMS_NORM,
        "        cute.arch.sync_threads()\n        square",
        "        square",
        [f"{ON_NORM_KERNEL}::test_variants"],
    ),
    Fault(
        "norm-partials-not-zeroed",
        RMS_NORM,
        "shared[lane] = type(value)(0)",
        "shared[lane] = shared[lane]",
        [f"{ON_NORM_KERNEL}::test_shapes_of_blocks"],
    ),
    Fault(
        "norm-residual-of-the-first-matrix",
        RMS_NORM,
        "return self.replace(**{name: m and m[batch] for name, m in present.items()})",
        "return self.replace(**{name: m and m[0] for name, m in present.items()})",
        [f"{ON_NORM_KERNEL}::test_batches"],
    ),
    Fault(
        "norm-sum-not-rounded",
        RMS_NORM,
        "return [self.round(value) for value in sums]",
        "return sums",
        [f"{ON_NORM_KERNEL}::test_variants"],
    ),
    Fault(
        "norm-row-amax-of-a-warp",
        RMS_NORM,
        "amaxes = [arithmetic.thread_max(maxima.load())] * self.spec.tiles_per_thread",
        "amaxes = amaxes * self.spec.tiles_per_thread",
        [f"{ON_NORM_KERNEL}::test_formats"],
    ),
    Fault(
        "norm-amax-not-rounded",
        RMS_NORM,
        "amax = self.round(amax.bitcast(Float32) * factor)",
        "amax = amax.bitcast(Float32) * factor",
        [f"{ON_NORM_KERNEL}::test_variants"],
    ),
    Fault(
        "norm-square-of-the-first-tile",
        RMS_NORM,
        "for value in values[1:]:\n        squares = cute.math.fma(value, value, squares)",
        "for value in values[2:]:\n        squares = cute.math.fma(value, value, squares)",
        [f"{ON_NORM_KERNEL}::test_long_rows"],
    ),
    Fault(
        "dequantize-matrices-past-the-grid",
        DEQUANTIZE,
        "for batch in range(z, problem.q.tensor.shape[0], depth):",
        "for batch in range(z, depth, depth):",
        [f"{ON_QUANTIZE_KERNEL}::test_dequantize"],
    ),
    Fault(
        "dequantize-scale-of-the-first-tile",
        DEQUANTIZE,
        "scale = mS[row, groups((group, segment.tile))]",
        "scale = mS[row, groups((group, 0))]",
        [f"{ON_QUANTIZE_KERNEL}::test_dequantize"],
    ),
    Fault(
        "dequantize-rows-of-blocks",
        DEQUANTIZE,
        "cute.round_up(mn, BLOCK_ROWS), groups)",
        "mn, groups)",
        [f"{ON_QUANTIZE_KERNEL}::test_dequantize"],
    ),
    Fault(
        "dequantize-value-past-the-row",
        DEQUANTIZE,
        "if exists and tXcX[0] < cute.size(gQ):",
        "if exists:",
        [f"{ON_QUANTIZE_KERNEL}::test_dequantize"],
    ),
]

FAULTS = [*OF_REFERENCE, *OF_KERNELS]
