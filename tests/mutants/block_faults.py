"""Faults in weights in square blocks: contract, dispatch and kernels."""

from tests.mutants.fault import Fault

BLOCKS = "contract/blocks.py"
CONTENTS = "contract/contents.py"
REFERENCE_BLOCKS = "contract/reference/blocks.py"
DISPATCH = "dispatch/blocks.py"
OPERATORS = "dispatch/block_ops.py"
KERNEL = "kernels/blocks.py"
TILE = "kernels/block_tile.py"
STAGE = "kernels/stage.py"
REQUANTIZE = "kernels/requantize.py"
DEQUANTIZE = "kernels/dequantize.py"
LAYOUTS = "kernels/layouts.py"

ON_CONTRACT = "tests/contract/test_blocks.py"
ON_DISPATCH = "tests/dispatch/test_blocks.py"
ON_KERNEL = "tests/kernels/test_blocks.py"
SHAPES = [f"{ON_KERNEL}::test_sizes_of_no_whole_block"]
STRIDES = [f"{ON_KERNEL}::test_every_stride"]
PLACES = [f"{ON_KERNEL}::test_each_value_counts_in_its_block_alone"]
IN_BLOCKS = [f"{ON_KERNEL}::test_requantize_in_blocks"]
IN_GROUPS = [f"{ON_KERNEL}::test_requantize_in_groups_of_rows"]
FORMATS = [f"{ON_CONTRACT}::test_every_format"]
CHECKPOINT = [f"{ON_CONTRACT}::test_check_names_what_a_checkpoint_has_wrong"]

FAULTS = [
    Fault(
        "blocks-rows-of-a-block-counted-down",
        REFERENCE_BLOCKS,
        "return scales.repeat_interleave(size, -2)[..., :n, :]",
        "return scales.repeat(1, size, 1)[..., :n, :]",
        FORMATS,
    ),
    Fault(
        "blocks-nan-of-a-short-block-dropped",
        REFERENCE_BLOCKS,
        "padded = pad(w, (0, -k % size, 0, -n % size))",
        "padded = pad(w.nan_to_num(), (0, -k % size, 0, -n % size))",
        FORMATS,
    ),
    Fault(
        "blocks-exponents-as-floats",
        REFERENCE_BLOCKS,
        "floats = ue8m0_to_float32(scales) if fmt.power_of_two else scales",
        "floats = scales",
        FORMATS,
    ),
    Fault(
        "blocks-requantized-in-half-precision",
        REFERENCE_BLOCKS,
        "w = w8.float() * by_column",
        "w = (w8.float() * by_column).half().float()",
        [f"{ON_CONTRACT}::test_requantize_in_blocks"],
    ),
    Fault(
        "blocks-nvfp4-allowed",
        BLOCKS,
        "if fmt.upper_scale:",
        "if fmt.row_scale:",
        [f"{ON_CONTRACT}::test_quantize_refuses"],
    ),
    Fault(
        "blocks-strides-of-both-free",
        BLOCKS,
        "known(n > 1) and known(along_n != 1)",
        "known(n > 1) and known(along_n == 0)",
        [f"{ON_CONTRACT}::test_quantize_refuses"],
    ),
    Fault(
        "blocks-scales-of-any-shape",
        BLOCKS,
        "if not any(same_sizes(sf.shape, blocks) for blocks in expected.values()):",
        "if not any(len(sf.shape) == len(blocks) for blocks in expected.values()):",
        [f"{ON_CONTRACT}::test_dequantize_refuses"],
    ),
    Fault(
        "blocks-row-scale-requantized",
        BLOCKS,
        "elif fmt.row_scale or fmt.whole_row:",
        "elif fmt.whole_row:",
        [f"{ON_CONTRACT}::test_requantize_refuses"],
    ),
    Fault(
        "blocks-overlapping-padding",
        DISPATCH,
        "mn_major=fmt.mn_major and of_rows)\n    if not launch.has_kernels(w):",
        "mn_major=False)\n    if not launch.has_kernels(w):",
        [f"{ON_CONTRACT}::test_memory_that_overlaps_is_refused"],
    ),
    Fault(
        "blocks-scales-of-w-not-read",
        DISPATCH,
        'reads = {"w8": w8, "w_sf": w_sf}',
        'reads = {"w_sf": w_sf}',
        [f"{ON_CONTRACT}::test_requantize_refuses"],
    ),
    Fault(
        "blocks-missing-rows-forgotten",
        DISPATCH,
        "else missing_scale_rows(sf, fmt)",
        "else 0",
        [f"{ON_KERNEL}::test_every_format"],
    ),
    Fault(
        "blocks-ragged-rows-of-q",
        DISPATCH,
        "ragged=w.shape[-1] % q_values != 0,",
        "ragged=source.shape[-1] % values != 0,",
        SHAPES,
    ),
    Fault(
        "blocks-upper-scale-of-the-first-matrix",
        DISPATCH,
        "View((matrices,), (int(upper.tensor.numel() > 1),))",
        "View((matrices,), (0,))",
        IN_GROUPS,
    ),
    Fault(
        "blocks-fake-scales-of-rows",
        OPERATORS,
        "if sf is None and in_blocks and blocks.stored_once(fmt):",
        "if sf is None and not in_blocks and blocks.stored_once(fmt):",
        [f"{ON_DISPATCH}::test_fakes_are_like_results"],
    ),
    Fault(
        "blocks-warm-up-of-aligned-weights",
        "dispatch/reachable.py",
        "x_columns = 1 if variant.along_n else variant.input_columns",
        "x_columns = variant.input_columns",
        [f"{ON_DISPATCH}::test_a_warm_up_has_every_kernel_of_a_range"],
    ),
    Fault(
        "blocks-warm-up-along-k-alone",
        "dispatch/reachable.py",
        "along_n = (False, True)",
        "along_n = (False,)",
        [f"{ON_DISPATCH}::test_a_warm_up_has_every_kernel_of_a_range"],
    ),
    Fault(
        "blocks-batch-of-the-first-launch",
        KERNEL,
        "problem = problem.slice_batch(problem.first_batch + batch)",
        "problem = problem.slice_batch(batch)",
        [f"{ON_KERNEL}::test_more_tiles_than_a_grid_counts"],
    ),
    Fault(
        "blocks-row-tile-of-the-first-launch",
        KERNEL,
        "row_tile = problem.first_row_tile + row_tile\n",
        "row_tile = row_tile + 0\n",
        [f"{ON_KERNEL}::test_more_tiles_than_a_grid_counts"],
    ),
    Fault(
        "blocks-padding-without-ctas",
        KERNEL,
        "padded_k = cute.round_up(k, unit)",
        "padded_k = cute.round_up(k, self.size)",
        SHAPES,
    ),
    Fault(
        "blocks-barrier",
        KERNEL,
        "            amaxes[warp, group] = amax\n        cute.arch.barrier()",
        "            amaxes[warp, group] = amax",
        PLACES,
    ),
    Fault(
        "blocks-transposed-barrier",
        TILE,
        "rows // per_byte))\n    cute.arch.barrier()",
        "rows // per_byte))",
        STRIDES,
    ),
    Fault(
        "blocks-last-row-of-a-thread",
        KERNEL,
        "for i in cutlass.range_constexpr(1, self.rows):\n            amax = stage",
        "for i in cutlass.range_constexpr(1, self.rows - 1):\n            amax = stage",
        PLACES,
    ),
    Fault(
        "blocks-lanes-of-other-rows",
        KERNEL,
        "range_constexpr((LANES // lanes).bit_length() - 1)",
        "range_constexpr((LANES // lanes).bit_length() - 2)",
        PLACES,
    ),
    Fault(
        "blocks-last-warp-of-a-block",
        KERNEL,
        "for warp in cutlass.range_constexpr(1, warps):",
        "for warp in cutlass.range_constexpr(1, warps - 1):",
        PLACES,
    ),
    Fault(
        "blocks-scales-transposed",
        KERNEL,
        "(group, row_block) if const_expr(self.spec.transposed) else (row_block, group)",
        "(row_block, group)",
        PLACES,
    ),
    Fault(
        "blocks-scale-past-the-last-block",
        KERNEL,
        "row_index < problem.n and column < cute.ceil_div(problem.k, self.size)",
        "row_index < problem.n",
        SHAPES,
    ),
    Fault(
        "blocks-padding-rows-have-scales",
        STAGE,
        "scale = scale if row_exists and group < groups else type(scale)(0)",
        "scale = scale if group < groups else type(scale)(0)",
        SHAPES,
    ),
    Fault(
        "blocks-rows-past-the-storage",
        STAGE,
        "layouts.unsigned(element) < scales.elements\n        if predicate:\n            scale",
        "layouts.unsigned(element) <= scales.elements\n        if predicate:\n            scale",
        [f"{ON_KERNEL}::test_every_format"],
    ),
    Fault(
        "blocks-scale-of-w-past-the-last",
        KERNEL,
        "and column < scales.shape[1]:",
        "and column <= scales.shape[1]:",
        IN_BLOCKS,
    ),
    Fault(
        "blocks-scale-of-w-below-the-last",
        KERNEL,
        "or row < scales.shape[0]",
        "or row <= scales.shape[0]",
        IN_BLOCKS,
    ),
    Fault(
        "blocks-rows-of-w-that-do-not-exist",
        KERNEL,
        "exist = [row < problem.w.rows for row in rows]",
        "exist = [row <= problem.w.rows for row in rows]",
        SHAPES,
    ),
    Fault(
        "blocks-transposed-rows-of-q",
        TILE,
        "copy.store(tXrQ, gQ, to, row_index < num_rows, access)",
        "copy.store(tXrQ, gQ, to, row_index <= num_rows, access)",
        SHAPES,
    ),
    Fault(
        "blocks-amaxes-of-other-columns",
        LAYOUTS,
        "stride=((1, BLOCK_WARPS), warps))",
        "stride=((1, warps), warps))",
        PLACES,
    ),
    Fault(
        "blocks-second-tile-of-a-warp",
        LAYOUTS,
        "stride=(cute.E(0), (lanes * cute.E(0), cute.E(1))))",
        "stride=(cute.E(0), (0 * cute.E(0), cute.E(1))))",
        STRIDES,
    ),
    Fault(
        "blocks-rows-of-the-second-warp",
        LAYOUTS,
        "stride=((cute.E(1), rows * cute.E(0)), BLOCK_TILE // BLOCK_WARPS * cute.E(0)),",
        "stride=((cute.E(1), rows * cute.E(0)), rows * cute.E(0)),",
        PLACES,
    ),
    Fault(
        "blocks-rows-of-one-scale",
        LAYOUTS,
        "(*shape, (size, blocks), groups), stride=(*stride, (0, block_stride), group_stride)",
        "(*shape, (size, blocks), groups), stride=(*stride, (0, 0 * block_stride), group_stride)",
        [f"{ON_KERNEL}::test_dequantize"],
    ),
    Fault(
        "blocks-dequantized-by-rows",
        DEQUANTIZE,
        "layout = layouts.rows_of_square_blocks(mS.layout, self.fmt.group_size)",
        "layout = layouts.rows_of_square_blocks(mS.layout, 128)",
        [f"{ON_KERNEL}::test_dequantize"],
    ),
    Fault(
        "requantize-groups-of-the-source",
        REQUANTIZE,
        "_, block = layouts.lanes(tile.lanes_per_group(size))(segment.lane)",
        "_, block = layouts.lanes(tile.lanes_per_group(64))(segment.lane)",
        IN_GROUPS,
    ),
    Fault(
        "requantize-scales-of-the-first-matrix",
        REQUANTIZE,
        "scales=self.scales[batch, None, None]",
        "scales=self.scales[0, None, None]",
        IN_GROUPS,
    ),
    Fault(
        "requantize-scale-past-the-last-column",
        REQUANTIZE,
        "if self.predicate and tXcX[0] < k:",
        "if self.predicate and tXcX[0] < k + 128:",
        IN_GROUPS,
    ),
    Fault(
        "requantize-first-block-of-a-tile",
        KERNEL,
        "row, column = (tile[i] * blocks + block[i] for i in range(2))",
        "row, column = (tile[i] * blocks + 0 * block[i] for i in range(2))",
        IN_BLOCKS,
    ),
    Fault(
        "requantize-scales-of-the-transpose",
        KERNEL,
        "            row, column = column, row\n",
        "            pass\n",
        IN_BLOCKS,
    ),
    Fault(
        "requantize-blocks-of-one-size",
        DISPATCH,
        "SOURCE_BLOCK if w_sf is None else blocks.block_size(w, w_sf)",
        "SOURCE_BLOCK",
        IN_BLOCKS,
    ),
    Fault(
        "requantize-blocks-taken-for-large-ones",
        BLOCKS,
        "return SOURCE_BLOCK if fits_most else min(BLOCK_SIZES)",
        "return SOURCE_BLOCK",
        [f"{ON_CONTRACT}::test_requantize_in_blocks"],
    ),
    Fault(
        "checkpoint-negative-scales",
        CONTENTS,
        "~(w_sf.isfinite() & (w_sf >= 0))",
        "~w_sf.isfinite()",
        CHECKPOINT,
    ),
    Fault(
        "checkpoint-nan-of-one-sign",
        CONTENTS,
        "codes = (w8.view(torch.uint8) & E4M3_NAN)",
        "codes = w8.view(torch.uint8)",
        CHECKPOINT,
    ),
    Fault(
        "checkpoint-infinite-products",
        CONTENTS,
        "w_sf, products.isinf())",
        "w_sf, products.isnan())",
        CHECKPOINT,
    ),
    Fault(
        "checkpoint-upper-scale-unread",
        CONTENTS,
        "_check_upper_scale(Call(products, fmt, upper=upper))",
        "pass",
        CHECKPOINT,
    ),
    Fault(
        "names-of-two-accesses-alike",
        "jit/keys.py",
        "words += [prefix + word for word in _distinctive(choice)]",
        "words += _distinctive(choice)",
        [f"{ON_DISPATCH}::test_kernels_of_a_range_have_names_of_their_own"],
    ),
    Fault(
        "warm-up-without-small-source-blocks",
        "dispatch/reachable.py",
        "source_blocks = calls.source_blocks if requantized else (SOURCE_BLOCK,)",
        "source_blocks = (SOURCE_BLOCK,)",
        ["tests/dispatch/test_warm_up.py::test_nothing_is_compiled_after_a_warm_up[weights]"],
    ),
    Fault(
        "warm-up-of-aligned-scales-alone",
        "dispatch/reachable.py",
        "sf = _scales(calls.fmt, sizes, x_bytes, apart=True)",
        "sf = _scales(calls.fmt, sizes, LOAD_BYTES, apart=True)",
        [
            "tests/dispatch/test_warm_up.py::"
            "test_nothing_is_compiled_after_a_warm_up[scales of experts]"
        ],
    ),
]
