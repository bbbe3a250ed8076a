"""Faults in groups along rows: contract, dispatch, layouts and kernels."""

from tests.mutants.fault import Fault

COLUMNS = "contract/columns.py"
REFERENCE_COLUMNS = "contract/reference/columns.py"
DISPATCH = "dispatch/columns.py"
OPERATORS = "dispatch/column_ops.py"
KERNEL = "kernels/columns.py"
PROLOGUES = "kernels/column_prologues.py"
GRIDS = "kernels/grids.py"
LAYOUTS = "kernels/layouts.py"
ENCODINGS = "kernels/encodings.py"
SCALES = "kernels/scales.py"
DOMAINS = "kernels/row_domains.py"

ON_CONTRACT = "tests/contract/test_columns.py"
ON_DISPATCH = "tests/dispatch/test_columns.py"
ON_KERNEL = "tests/kernels/test_columns.py"
FORMATS = [f"{ON_KERNEL}::test_every_format"]
BOTH = [f"{ON_KERNEL}::test_both"]
SIZES = [f"{ON_KERNEL}::test_sizes_of_no_whole_tile"]
PLACES = [f"{ON_KERNEL}::test_each_value_counts_in_its_groups_alone"]
DEAD_ROWS = [f"{ON_KERNEL}::test_rows_that_do_not_exist_are_zeros_beside_what_is_not_finite"]
EXPERTS = [f"{ON_KERNEL}::test_experts"]

GATED = [f"{ON_CONTRACT}::test_gated_activations"]
GATED_KERNELS = [f"{ON_KERNEL}::test_gated"]
STOCHASTIC = [f"{ON_KERNEL}::test_stochastic"]
DRAWS = [f"{ON_CONTRACT}::test_stochastic_rounding"]
WARM_UP = ["tests/dispatch/test_warm_up.py::test_a_warm_up_of_columns"]

FAULTS = [
    Fault(
        "columns-draws-of-rows",
        "contract/philox.py",
        "COLUMN_DRAWS = 2**31",
        "COLUMN_DRAWS = 0",
        DRAWS,
    ),
    Fault(
        "columns-draws-of-rows-in-a-kernel",
        "kernels/philox.py",
        "row=self.row | Uint32(COLUMN_DRAWS)",
        "row=self.row",
        STOCHASTIC,
    ),
    Fault(
        "columns-nan-of-a-drawn-group",
        KERNEL,
        "encodings.put_nans(nans, tXrQ)",
        "encodings.put_nans([nan & 0 for nan in nans], tXrQ)",
        [f"{ON_KERNEL}::test_stochastic", f"{ON_KERNEL}::test_gated"],
    ),
    Fault(
        "columns-nan-of-a-drawn-group-transposed",
        KERNEL,
        "number = tXrM[i] == tXrM[i]",
        "number = Boolean(True)",
        STOCHASTIC,
    ),
    Fault(
        "columns-halves-of-a-word",
        "kernels/philox.py",
        "return word if i % 2 else word << 16 | word >> 16",
        "return word",
        STOCHASTIC,
    ),
    Fault(
        "columns-scale-of-a-multiplier-that-is-nan",
        SCALES,
        "GroupScale(multiplier, ue8m0_scale(multiplier) if fmt.ue8m0 else multiplier)",
        "GroupScale(multiplier, ue8m0_scale(multiplier) & 0x7F if fmt.ue8m0 else multiplier)",
        STOCHASTIC,
    ),
    Fault(
        "columns-few-values-of-a-call-of-philox",
        "kernels/heuristics.py",
        "return max(values, VALUES_PER_CALL) if stochastic else values",
        "return values",
        STOCHASTIC,
    ),
    Fault(
        "columns-of-gates",
        REFERENCE_COLUMNS,
        "source = computed(source, call.prologue)",
        "source = source[..., : call.shape.k]",
        GATED,
    ),
    Fault(
        "columns-gates-twice",
        KERNEL,
        "copy_vectors(waiting[i], tXrX[i])",
        "copy_vectors(tXrX[i], waiting[i])",
        GATED_KERNELS,
    ),
    Fault(
        "columns-padding-past-the-ups",
        KERNEL,
        "column_tiles = column_tiles - k // (2 * BLOCK_TILE)",
        "column_tiles = k // (2 * BLOCK_TILE)",
        GATED_KERNELS,
    ),
    Fault(
        "columns-padding-over-the-ups",
        KERNEL,
        "cutlass.select_(column_tile < tiles, column_tile, Int32(NO_TILE))",
        "column_tile + Int32(0)",
        GATED_KERNELS,
    ),
    Fault(
        "columns-tiles-in-the-same-memory",
        KERNEL,
        "        # The ups go through the same shared memory.\n        cute.arch.barrier()\n",
        "",
        GATED_KERNELS,
    ),
    Fault(
        "columns-pairs-of-half-a-tile",
        DISPATCH,
        "k % (2 * BLOCK_TILE) == 0",
        "k % BLOCK_TILE == 0",
        GATED_KERNELS,
    ),
    Fault(
        "columns-gaps-that-are-kept",
        COLUMNS,
        "isinstance(rows, PrefixSum) and not isinstance(rows, PrefixSumWithGaps)",
        "isinstance(rows, PrefixSum)",
        [f"{ON_CONTRACT}::test_what_gated_activations_refuse"],
    ),
    Fault(
        "columns-that-divide",
        COLUMNS,
        "if fmt.divides or fmt.truncates or fmt.in_bf16:",
        "if fmt.divides and fmt.truncates or fmt.in_bf16:",
        [f"{ON_CONTRACT}::test_numerics_that_divide_or_truncate_are_refused"],
    ),
    Fault(
        "columns-range-without-ragged-rows",
        "dispatch/reachable.py",
        "return (STORE_BYTES, STORE_BYTES + 1) if calls.max_rows >= STORE_BYTES else",
        "return (STORE_BYTES,) if calls.max_rows >= STORE_BYTES else",
        WARM_UP,
    ),
    Fault(
        "columns-remedy-of-one-direction",
        "dispatch/call_range.py",
        "column_fmt=None if call.along_k is None else call.columns.fmt,",
        "column_fmt=None,",
        WARM_UP,
    ),
    Fault(
        "columns-dead-rows-count",
        REFERENCE_COLUMNS,
        "of_columns = source.where(live.unsqueeze(2), 0.0).mT",
        "of_columns = source.mT",
        [f"{ON_CONTRACT}::test_rows_that_do_not_exist_are_zeros_beside_what_is_not_finite"],
    ),
    Fault(
        "columns-dead-rows-are-nan",
        REFERENCE_COLUMNS,
        "codes = codes.where(live.unsqueeze(1), 0)",
        "codes = codes.where(live.any(), 0)",
        [f"{ON_CONTRACT}::test_rows_that_do_not_exist_are_zeros_beside_what_is_not_finite"],
    ),
    Fault(
        "columns-scales-of-groups-without-rows",
        REFERENCE_COLUMNS,
        "scales = scales.where(_groups_with_rows(live, fmt).unsqueeze(1), 0)",
        "scales = scales + 0",
        [f"{ON_CONTRACT}::test_experts"],
    ),
    Fault(
        "columns-experts-in-one-word",
        COLUMNS,
        "return fmt.group_size * fmt.groups_per_unit",
        "return fmt.group_size",
        [f"{ON_CONTRACT}::test_what_is_refused"],
    ),
    Fault(
        "columns-words-of-large-groups",
        COLUMNS,
        "if fmt.packed and fmt.group_size != WORD_GROUP_SIZE:",
        "if fmt.packed and fmt.group_size not in GROUP_SIZES:",
        [f"{ON_CONTRACT}::test_what_is_refused"],
    ),
    Fault(
        "columns-words-anywhere",
        COLUMNS,
        "sf.data_ptr() % BYTES_PER_WORD:",
        "sf.data_ptr() % 1:",
        [f"{ON_CONTRACT}::test_what_is_refused"],
    ),
    Fault(
        "columns-overlapping-padding-of-rows",
        DISPATCH,
        'region_of_scales("out sf", sf, mn_major=fmt.mn_major)',
        'region_of_scales("out sf", sf, mn_major=False)',
        [f"{ON_CONTRACT}::test_memory_that_overlaps_is_refused"],
    ),
    Fault(
        "columns-fake-of-the-transpose",
        OPERATORS,
        "columns.values_shape(shape, call.transposed) if of_columns else shape",
        "columns.values_shape(shape, False) if of_columns else shape",
        [f"{ON_DISPATCH}::test_fakes_are_like_results"],
    ),
    Fault(
        "columns-missing-rows-forgotten",
        DISPATCH,
        "missing_rows, row_floor = missing_scale_rows(row_sf, row_fmt), row_fmt.floor",
        "missing_rows, row_floor = 0, row_fmt.floor",
        BOTH,
    ),
    Fault(
        "columns-ragged-transpose",
        DISPATCH,
        "ragged=q.shape[-1] % q_values != 0",
        "ragged=x.shape[-1] % values != 0",
        SIZES,
    ),
    Fault(
        "columns-first-barrier",
        KERNEL,
        "tXrX, part.place, shared.of_rows)\n        cute.arch.barrier()",
        "tXrX, part.place, shared.of_rows)",
        PLACES,
    ),
    Fault(
        "columns-second-barrier",
        KERNEL,
        "- BLOCK_TILE, tile, shared, problem)\n        cute.arch.barrier()",
        "- BLOCK_TILE, tile, shared, problem)",
        PLACES,
    ),
    Fault(
        "grids-rows-of-the-first",
        GRIDS,
        "problem.replace(first_batch=first_batch, first_row_tile=first_row_tile)",
        "problem.replace(first_batch=first_batch)",
        [f"{ON_KERNEL}::test_more_tiles_than_a_grid_counts"],
    ),
    Fault(
        "columns-pairs-of-one-row",
        PROLOGUES,
        "copy_vectors(of_ups, waiting[len(tXrX)])",
        "copy_vectors(of_ups, waiting[0])",
        GATED_KERNELS,
    ),
    Fault(
        "columns-batch-of-the-first-launch",
        KERNEL,
        "problem = problem.slice_batch(problem.first_batch + batch)",
        "problem = problem.slice_batch(batch)",
        [f"{ON_KERNEL}::test_more_tiles_than_a_grid_counts"],
    ),
    Fault(
        "columns-last-warp-of-a-group",
        KERNEL,
        "for i in range(1, warps):",
        "for i in range(1, warps - 1):",
        PLACES,
    ),
    Fault(
        "columns-other-rows-of-lanes",
        KERNEL,
        "range_constexpr((LANES // self.lanes).bit_length() - 1)",
        "range_constexpr((LANES // self.lanes).bit_length() - 2)",
        PLACES,
    ),
    Fault(
        "columns-half-of-a-row",
        KERNEL,
        "amax = stage.larger(amax, cute.arch.shuffle_sync_bfly(amax, offset=LANES // 2))",
        "amax = stage.larger(amax, amax)",
        [f"{ON_KERNEL}::test_each_value_counts_in_its_groups_alone"],
    ),
    Fault(
        "columns-bits-above-the-byte-of-nan",
        KERNEL,
        "word = word | (stored[i] & 0xFF) << 8 * i",
        "word = word | stored[i] << 8 * i",
        FORMATS,
    ),
    Fault(
        "columns-words-past-the-last-column",
        KERNEL,
        "word = word if column < problem.k else Uint32(0)",
        "word = word + Uint32(0)",
        SIZES,
    ),
    Fault(
        "columns-scales-past-the-last-group",
        KERNEL,
        "if column < problem.k and row < problem.scales.shape[0]:",
        "if column < problem.k:",
        FORMATS,
    ),
    Fault(
        "columns-scales-of-dead-groups",
        KERNEL,
        "stored.append(scale.scale if first < end else type(scale.scale)(0))",
        "stored.append(scale.scale)",
        EXPERTS,
    ),
    Fault(
        "columns-scales-of-dead-rows",
        KERNEL,
        "                row_index < end,\n",
        "                row_index < problem.num_rows,\n",
        BOTH,
    ),
    Fault(
        "columns-dead-rows-of-a-nan",
        KERNEL,
        "encodings.clear_unless(part.exist[i], tXrQ)",
        "encodings.clear_unless(Boolean(True), tXrQ)",
        DEAD_ROWS,
    ),
    Fault(
        "columns-dead-rows-of-a-nan-transposed",
        KERNEL,
        "cutlass.select_(hold[first + j], Uint32(0xFF << 8 * j), Uint32(0))",
        "cutlass.select_(hold[first], Uint32(0xFF << 8 * j), Uint32(0))",
        DEAD_ROWS,
    ),
    Fault(
        "columns-multiplier-of-a-nan-beside",
        ENCODINGS,
        "factors = bits[2 * i + 1] & Uint32(0xFFFF0000) | bits[2 * i] >> 16",
        "factors = bits[2 * i + 1] | bits[2 * i] >> 16",
        FORMATS,
    ),
    Fault(
        "columns-sign-of-an-amax",
        SCALES,
        "amaxes.append(result & mask)",
        "amaxes.append(result)",
        FORMATS,
    ),
    Fault(
        "columns-experts-of-one-warp",
        DOMAINS,
        "return cute.arch.warp_reduction(last, cutlass.max)",
        "return cute.arch.warp_reduction(last, cutlass.max, threads_in_group=2)",
        EXPERTS,
    ),
    Fault(
        "columns-conflicts-of-banks",
        LAYOUTS,
        "((HALF_WARP_COLUMNS, LANES // lanes, lanes // HALF_WARP_COLUMNS), BLOCK_WARPS),",
        "((min(lanes, 32), LANES // lanes, 1), BLOCK_WARPS),",
        ["tests/kernels/test_layouts.py::test_a_tile_is_transposed_without_bank_conflicts"],
    ),
    Fault(
        "columns-vectors-of-one-lane",
        LAYOUTS,
        "stride=(BLOCK_TILE, (1, lanes * vector, vector)),",
        "stride=(BLOCK_TILE, (1, vector, values)),",
        ["tests/kernels/test_layouts.py::test_columns_are_shared_without_bank_conflicts"],
    ),
]
