"""Faults in plans, launches and operators."""

from tests.mutants.fault import Fault

PLAN = "dispatch/plan.py"
LAUNCH = "dispatch/launch.py"
TORCH_OPS = "dispatch/torch_ops.py"
OPERATORS = "dispatch/operators.py"
REPEATS = "dispatch/repeats.py"
REACHABLE = "dispatch/reachable.py"
CALL_RANGE = "dispatch/call_range.py"
PRESETS = "dispatch/presets.py"
SELECTION = "cli/selection.py"
KERNEL_RESULTS = "cli/kernel_results.py"

ON_INPUTS = "tests/contract/test_inputs.py"
ON_CHECKS = "tests/contract/test_checks.py"
ON_PLAN = "tests/dispatch/test_plan.py"
ON_REPEATS = "tests/dispatch/test_repeats.py"
ON_LAUNCH = "tests/dispatch/test_launch.py"
ON_TORCH_OPS = "tests/dispatch/test_torch_ops.py"
ON_TORCH_FP4 = "tests/dispatch/test_torch_fp4.py"
ON_WARM_UP = "tests/dispatch/test_warm_up.py"
ON_AHEAD_OF_TIME = "tests/jit/test_ahead_of_time.py"
ON_CLI = "tests/cli/test_cli.py"
ON_OPERATORS = "tests/dispatch/test_gradients.py"
ON_QUANTIZE_KERNEL = "tests/kernels/test_quantize.py"

FAULTS = [
    Fault(
        "plan-alignment-of-a-batch",
        PLAN,
        "for stride in view.strides[:-1]))",
        "for stride in view.strides[-2:-1]))",
        [f"{ON_PLAN}::test_loads_are_as_wide_as_the_matrices_of_a_batch_are_aligned"],
    ),
    Fault(
        "plan-alignment-of-an-address",
        PLAN,
        "return math.gcd(limit, address, *(",
        "return math.gcd(limit, *(",
        [f"{ON_PLAN}::test_loads_are_as_wide_as_x_is_aligned"],
    ),
    Fault(
        "plan-alignment-of-ups",
        PLAN,
        "LOAD_BYTES if prologue.interleaved else math.gcd(LOAD_BYTES, k * dtype.itemsize)",
        "LOAD_BYTES",
        [f"{ON_PLAN}::test_loads_are_as_wide_as_the_ups_are_aligned"],
    ),
    Fault(
        "plan-alignment-of-weights",
        PLAN,
        "load_bytes = math.gcd(LOAD_BYTES, prologue.weight.data_ptr())",
        "load_bytes = LOAD_BYTES",
        [f"{ON_PLAN}::test_loads_are_as_wide_as_what_lies_beside_x_is_aligned"],
    ),
    Fault(
        "plan-alignment-of-a-residual",
        PLAN,
        "load_bytes = alignment(t.data_ptr(), view, t.element_size(), load_bytes)",
        "pass",
        [f"{ON_PLAN}::test_loads_are_as_wide_as_what_lies_beside_x_is_aligned"],
    ),
    Fault(
        "plan-offset-of-0",
        PLAN,
        "prologue.weight_offset or -0.0",
        "prologue.weight_offset",
        [f"{ON_PLAN}::test_no_offset_keeps_the_sign_of_a_weight"],
    ),
    Fault(
        "plan-bound-not-rounded",
        PLAN,
        "clamp_limit(prologue, dtype)",
        "prologue.clamp",
        [f"{ON_PLAN}::test_numbers_of_a_gated_activation"],
    ),
    Fault(
        "plan-eps-and-offset-swapped",
        PLAN,
        "numbers = prologue.eps, prologue.weight_offset or -0.0",
        "numbers = prologue.weight_offset or -0.0, prologue.eps",
        [f"{ON_PLAN}::test_numbers_of_a_norm"],
    ),
    Fault(
        "plan-alpha-and-beta-swapped",
        PLAN,
        "numbers = bound, prologue.alpha, prologue.beta",
        "numbers = bound, prologue.beta, prologue.alpha",
        [f"{ON_PLAN}::test_numbers_of_a_gated_activation"],
    ),
    Fault(
        "plan-factors-of-the-first-matrix",
        PLAN,
        "return View((math.prod(weight.shape[:-1]), mn), (mn, 1))",
        "return View((math.prod(weight.shape[:-1]), mn), (0, 1))",
        [f"{ON_PLAN}::test_factors_of_a_batch_have_its_stride"],
    ),
    Fault(
        "plan-scales-of-the-first-matrix",
        PLAN,
        "stride = scales.strides[-inner - 1] if shape.batch_shape else 0",
        "stride = 0",
        [f"{ON_PLAN}::test_kernels_take_a_batch_of_matrices"],
    ),
    Fault(
        "plan-floor-of-the-default",
        PLAN,
        "numbers = row_alignment, launch.row_ctas, call.fmt.floor,",
        "numbers = row_alignment, launch.row_ctas, fmt.floor,",
        [
            f"{ON_CHECKS}::test_plans_are_kept_for_what_they_hold",
            f"{ON_QUANTIZE_KERNEL}::test_no_min_scale",
        ],
    ),
    Fault(
        "plan-alignment-of-groups",
        PLAN,
        "row_alignment = 1 if rows is None else rows.alignment",
        "row_alignment = 1",
        [f"{ON_PLAN}::test_plans_are_of_the_alignment_of_groups"],
    ),
    Fault(
        "plan-padding-of-scales-not-counted",
        PLAN,
        "sf_bytes=math.prod(padded) * fmt.sf_dtype.itemsize,",
        "sf_bytes=math.prod(sf_view.shape) * fmt.sf_dtype.itemsize,",
        [f"{ON_PLAN}::test_memory_of_results_counts_their_padding"],
    ),
    Fault(
        "plan-rows-of-a-short-row",
        PLAN,
        "ragged=(prologue.part or k) % launch.tile.values_per_thread != 0,",
        "ragged=False,",
        [f"{ON_QUANTIZE_KERNEL}::test_formats"],
    ),
    Fault(
        "plan-stride-of-a-single-row",
        PLAN,
        "    if rows <= 1 and (",
        "    if False and (",
        [f"{ON_PLAN}::test_the_stride_of_a_single_row_does_not_matter"],
    ),
    Fault(
        "launch-key-without-alignment",
        LAUNCH,
        "t.requires_grad, aligned",
        "t.requires_grad",
        [f"{ON_PLAN}::test_plans_are_of_the_alignment_of_all_tensors"],
    ),
    Fault(
        "launch-key-without-alignment-of-q",
        LAUNCH,
        "(fmt, *map(_looks, (x, q, sf, index)))",
        "(fmt, q if q is None else q.shape, *map(_looks, (x, sf, index)))",
        [f"{ON_PLAN}::test_plans_are_of_the_alignment_of_all_tensors"],
    ),
    Fault(
        "launch-key-without-index",
        LAUNCH,
        "(fmt, *map(_looks, (x, q, sf, index)))",
        "(fmt, index is None, *map(_looks, (x, q, sf)))",
        [f"{ON_PLAN}::test_plans_are_of_the_shape_of_an_index"],
    ),
    Fault(
        "launch-key-without-device",
        LAUNCH,
        "t.dtype, t.device, t.is_neg()",
        "t.dtype, t.is_neg()",
        [f"{ON_PLAN}::test_plans_are_of_a_device"],
    ),
    Fault(
        "launch-key-without-alignment-of-groups",
        LAUNCH,
        "key += (rows.kind, alignment, type(alignment), _looks(rows.data))",
        "key += (rows.kind, _looks(rows.data))",
        [f"{ON_PLAN}::test_plans_are_of_the_alignment_of_groups"],
    ),
    Fault(
        "launch-key-without-options",
        LAUNCH,
        "key += (type(prologue), prologue.options, *map(_looks, tensors))",
        "key += (type(prologue), *map(_looks, tensors))",
        [f"{ON_CHECKS}::test_plans_tell_prologues_apart"],
    ),
    Fault(
        "launch-recent-q-of-any-alignment",
        LAUNCH,
        "and recent.q_offset == q.data_ptr() % STORE_BYTES",
        "and True",
        [f"{ON_PLAN}::test_plans_are_of_the_alignment_of_all_tensors"],
    ),
    Fault(
        "launch-recent-x-of-any-alignment",
        LAUNCH,
        "and recent.x_offset == x.data_ptr() % LOAD_BYTES\n        ):",
        "):",
        [f"{ON_CHECKS}::test_plans_tell_alignments_apart"],
    ),
    Fault(
        "launch-recent-overlap",
        LAUNCH,
        "(q_start < end and start < q_end)\n        or (sf_start",
        "(q_start < start and end < q_end)\n        or (sf_start",
        [f"{ON_PLAN}::test_recent_calls_overlap_nothing"],
    ),
    Fault(
        "launch-autograd-of-a-warm-call",
        LAUNCH,
        "increment_version((q, sf))",
        "pass",
        [f"{ON_PLAN}::test_autograd_knows_what_is_written"],
    ),
    Fault(
        "launch-autograd-of-a-call",
        LAUNCH,
        "    # Autograd refuses to use what it saved of them.\n    increment_version(written)",
        "    pass",
        [f"{ON_PLAN}::test_autograd_knows_what_is_written"],
    ),
    Fault(
        "launch-tangents-of-values",
        LAUNCH,
        "check_no_tangents(tensors)\n    y = torch.empty",
        "pass\n    y = torch.empty",
        [f"{ON_PLAN}::test_there_are_no_tangents_of_values"],
    ),
    Fault(
        "launch-missing-rows",
        LAUNCH,
        "    if plan.scale_rows > plan.mn:\n"
        "        missing_rows = plan.scale_rows - last_column_rows(sf)\n"
        "    further",
        "    further",
        [f"{ON_QUANTIZE_KERNEL}::test_more_rows_of_q"],
    ),
    Fault(
        "launch-padding-on-the-cpu",
        LAUNCH,
        'region_of_scales("out sf", sf, mn_major=padded)',
        'region_of_scales("out sf", sf, mn_major=False)',
        [
            f"{ON_INPUTS}::test_outputs_overlap_nothing",
            f"{ON_CHECKS}::test_out_overlaps",
            f"{ON_PLAN}::test_memory_of_results_counts_their_padding_on_the_cpu",
        ],
    ),
    Fault(
        "launch-other-threads-are-bound",
        LAUNCH,
        "(captured := _captures.get(threading.get_ident()))",
        "(captured := next(iter(_captures.values())))",
        [f"{ON_LAUNCH}::test_other_threads_are_not_bound"],
    ),
    Fault(
        "operators-gradients-of-what-is-returned",
        OPERATORS,
        "torch.library.register_autograd(operator, refuse, setup_context=refuse, lib=library)",
        "pass",
        [f"{ON_OPERATORS}::test_operators_have_no_gradient"],
    ),
    Fault(
        "torch-ops-fake-dtype-of-dequantize",
        TORCH_OPS,
        "return q.new_empty((*shape.batch_shape, shape.mn, shape.k), dtype=dtype)",
        "return q.new_empty((*shape.batch_shape, shape.mn, shape.k), dtype=torch.float32)",
        [f"{ON_TORCH_OPS}::test_opcheck_dequantize"],
    ),
    Fault(
        "torch-ops-fake-strides-of-scales",
        TORCH_OPS,
        "return x.new_empty_strided(sf_shape, strides, dtype=fmt.sf_dtype)",
        "return x.new_empty(sf_shape, dtype=fmt.sf_dtype)",
        [f"{ON_TORCH_OPS}::test_fake_tensors_have_the_shapes_dtypes_and_strides"],
    ),
    Fault(
        "torch-ops-residual-twice",
        TORCH_OPS,
        "residual = None if prologue.residual_out is prologue.residual else prologue.residual",
        "residual = prologue.residual",
        [f"{ON_TORCH_OPS}::test_compiled_residual_is_updated_in_place"],
    ),
    Fault(
        "operators-vmap",
        OPERATORS,
        "    torch.library.register_vmap(operator, _refuse_vmap, lib=library)\n",
        "",
        [f"{ON_TORCH_OPS}::test_vmap_of_operators_is_refused"],
    ),
    Fault(
        "launch-recent-upper-scale-of-any-kind",
        LAUNCH,
        "            and recent.kind == kind\n"
        "            and recent.matches(*tensors)\n"
        "            and recent.x_offset == x.data_ptr() % LOAD_BYTES\n"
        "        ):",
        "            and recent.matches(*tensors)\n"
        "            and recent.x_offset == x.data_ptr() % LOAD_BYTES\n"
        "        ):",
        [f"{ON_PLAN}::test_recent_calls_are_of_one_kind_of_upper_scale"],
    ),
    Fault(
        "launch-recent-upper-scale-as-given",
        LAUNCH,
        "return upper.tensor if view is None else upper.tensor.as_strided(*view)",
        "return upper.tensor",
        [f"{ON_PLAN}::test_warm_calls_with_an_upper_scale_need_no_key"],
    ),
    Fault(
        "launch-recent-upper-scale-in-sf",
        LAUNCH,
        "if (q_start < end and start < q_end) or (sf_start < end and start < sf_end):\n"
        "            return None\n"
        "        over_groups",
        "if q_start < end and start < q_end:\n            return None\n        over_groups",
        [f"{ON_PLAN}::test_recent_calls_overwrite_no_upper_scale"],
    ),
    Fault(
        "launch-warm-scales-of-rows-lost",
        LAUNCH,
        "        return q, sf, row_scales\n    over_groups",
        "        return q, sf\n    over_groups",
        [f"{ON_PLAN}::test_warm_calls_return_scales_of_rows"],
    ),
    Fault(
        "launch-key-without-kind-of-upper-scale",
        LAUNCH,
        "key += (kind, _looks(given))",
        "key += (_looks(given),)",
        [f"{ON_PLAN}::test_recent_calls_are_of_one_kind_of_upper_scale"],
    ),
    Fault(
        "launch-upper-scale-overwritten",
        LAUNCH,
        "reads.append(region(call.upper.kind, call.upper.tensor))",
        "pass",
        [f"{ON_PLAN}::test_recent_calls_overwrite_no_upper_scale"],
    ),
    Fault(
        "plan-upper-scale-of-the-first-matrix",
        PLAN,
        "size, stride = (math.prod(shape.batch_shape), int(t.numel() > 1)) if batched else (1, 1)",
        "size, stride = (math.prod(shape.batch_shape), 0) if batched else (1, 1)",
        [f"{ON_PLAN}::test_kernels_take_one_number_or_one_of_each_matrix"],
    ),
    Fault(
        "torch-ops-view-of-the-callers-values",
        TORCH_OPS,
        "operator_out(*inputs, q, as_stored(sf),",
        "operator_out(*inputs, as_stored(q), as_stored(sf),",
        [f"{ON_TORCH_FP4}::test_compiled_with_out"],
    ),
    Fault(
        "torch-ops-any-kind-of-upper-scale",
        TORCH_OPS,
        "if kind not in KINDS or upper is None:",
        "if (kind is None) != (upper is None):",
        [f"{ON_TORCH_FP4}::test_operators_check_their_upper_scale"],
    ),
    Fault(
        "torch-ops-scales-of-rows-lost",
        TORCH_OPS,
        "if returns and call.fmt.row_scale:",
        "if False:",
        [f"{ON_TORCH_FP4}::test_operators_that_return_have_no_scales_of_rows"],
    ),
    Fault(
        "torch-ops-a-byte-for-each-value",
        TORCH_OPS,
        "return call.x.new_empty(shape.values(call.fmt), dtype=",
        "return call.x.new_empty((*shape.batch_shape, shape.mn, shape.k), dtype=",
        [f"{ON_TORCH_FP4}::test_fakes_have_the_shapes_dtypes_and_strides"],
    ),
    Fault(
        "reachable-a-byte-for-each-value",
        REACHABLE,
        "return columns // per_byte * dtype.itemsize",
        "return columns * dtype.itemsize",
        [f"{ON_WARM_UP}::test_nothing_is_compiled_after_a_warm_up"],
    ),
    Fault(
        "reachable-one-upper-scale-for-all-groups",
        REACHABLE,
        "of_groups = (False, True)",
        "of_groups = (False,)",
        [f"{ON_WARM_UP}::test_a_warm_up_has_an_upper_scale_of_each_group"],
    ),
    Fault(
        "call-range-scales-of-rows-not-given",
        CALL_RANGE,
        "upper=DECODE if self.operation == DEQUANTIZE else None",
        "upper=None",
        [f"{ON_WARM_UP}::test_nothing_is_compiled_after_a_warm_up"],
    ),
    Fault(
        "presets-fp4-of-short-rows-alone",
        PRESETS,
        "FP4_COLUMNS = COLUMNS[:2]",
        "FP4_COLUMNS = COLUMNS[:1]",
        [f"{ON_AHEAD_OF_TIME}::test_presets_have_all_of_their_calls_on_any_gpu"],
    ),
    Fault(
        "selection-gpus-of-twice-as-many-sms",
        SELECTION,
        "for part in (2, 3))",
        "for part in (2,))",
        [f"{ON_CLI}::test_build_has_what_calls_take_on_any_gpu"],
    ),
    Fault(
        "check-no-single-row",
        KERNEL_RESULTS,
        "    *((1, COLUMNS >> i) for i in range(2, 5)),\n",
        "",
        [f"{ON_CLI}::test_check_has_a_size_for_each_tile_on_any_gpu"],
    ),
    Fault(
        "check-few-rows-of-large-gpus",
        PRESETS,
        "FEW_ROWS, MANY_ROWS = 7, 203",
        "FEW_ROWS, MANY_ROWS = 19, 203",
        [f"{ON_CLI}::test_check_calls_what_asks_for_kernels_of_few_sms"],
    ),
    Fault(
        "repeats-options",
        REPEATS,
        "        if (\n            repeat.options == options\n            and ",
        "        if (\n            ",
        [f"{ON_REPEATS}::test_formats_are_compared"],
    ),
    Fault(
        "repeats-keywords",
        REPEATS,
        "            and repeat.keywords == keywords\n"
        "            and repeat.matches(*tensors)\n            and repeat.offsets",
        "            and repeat.matches(*tensors)\n            and repeat.offsets",
        [f"{ON_REPEATS}::test_options_are_compared"],
    ),
    Fault(
        "repeats-alignment",
        REPEATS,
        "            and repeat.offsets == _offsets(tensors)\n",
        "",
        [f"{ON_REPEATS}::test_looks_are_compared"],
    ),
    Fault(
        "repeats-looks",
        REPEATS,
        "            and repeat.matches(*tensors)\n            and repeat.offsets",
        "            and repeat.offsets",
        [f"{ON_REPEATS}::test_looks_are_compared"],
    ),
    Fault(
        "repeats-overlap",
        REPEATS,
        "    if _overlaps(repeat, tensors):\n        return None\n",
        "",
        [f"{ON_REPEATS}::test_overlap_is_refused_again"],
    ),
    Fault(
        "repeats-binding",
        REPEATS,
        "if recent is None or not launch.launches_now():",
        "if recent is None:",
        [f"{ON_REPEATS}::test_what_is_bound_is_not_launched"],
    ),
    Fault(
        "repeats-views",
        REPEATS,
        "t if view is None else view.of(t)",
        "t",
        [f"{ON_REPEATS}::test_a_repeat_launches_the_same"],
    ),
    Fault(
        "repeats-place",
        REPEATS,
        "i if i < len(operands) else i + len(numbers)",
        "i",
        [f"{ON_REPEATS}::test_a_repeat_launches_the_same"],
    ),
    Fault(
        "repeats-tensor-twice",
        REPEATS,
        "if len(sources) < len(tensors) + 2 or not",
        "if not",
        [f"{ON_REPEATS}::test_a_tensor_that_is_given_twice"],
    ),
    Fault(
        "operators-autograd-is-not-told",
        OPERATORS,
        "increment_version([t for i in written if (t := arguments[i]) is not None])",
        "pass",
        [f"{ON_REPEATS}::test_writes_are_told_to_autograd"],
    ),
    Fault(
        "repeats-inference",
        REPEATS,
        "            and repeat.matches(*tensors)\n        ):\n            return\n",
        "        ):\n            return\n",
        [f"{ON_REPEATS}::test_inference_after_training"],
    ),
    Fault(
        "launch-recent-of-other-looks",
        LAUNCH,
        "if any(other.plan is plan and other.matches(*tensors) for other in recent):",
        "if any(other.plan is plan for other in recent):",
        [f"{ON_REPEATS}::test_functions_find_tensors_of_inference_mode_again"],
    ),
    Fault(
        "operators-gradients-of-what-is-written",
        OPERATORS,
        "            refuse()\n",
        "            pass\n",
        [f"{ON_OPERATORS}::test_operators_that_write_have_no_gradient"],
    ),
    Fault(
        "operators-registered-twice",
        OPERATORS,
        "    _libraries[name] = library\n",
        "    _libraries.setdefault(name, library)\n",
        [f"{ON_OPERATORS}::test_modules_of_operators_can_be_loaded_again"],
    ),
    Fault(
        "operators-traced-by-dynamo",
        OPERATORS,
        "library.impl(name, outside_of_graphs(run), ",
        "library.impl(name, run, ",
        [f"{ON_TORCH_OPS}::test_dynamo_leaves_operators_alone"],
    ),
]
