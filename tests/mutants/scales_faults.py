"""Faults in conversions of scales, in what explains their layouts, and in checks for readers."""

from tests.mutants.fault import Fault

CONVERSION = "contract/scale_conversion.py"
SCALE_LAYOUTS = "contract/scale_layouts.py"
SCALE_STORAGE = "contract/scale_storage.py"
READERS = "contract/readers.py"
READER_CHECKS = "contract/reader_checks.py"
DISPATCH = "dispatch/convert_scales.py"
KERNEL = "kernels/convert_scales.py"
LAYOUTS = "kernels/layouts.py"
ROW_DOMAINS = "kernels/row_domains.py"
EXPLANATION = "lab/explanation.py"

ON_CONVERT = "tests/kernels/test_convert_scales.py"
ON_LAYOUTS = "tests/contract/test_scale_layouts.py"
ON_READERS = "tests/contract/test_reader_checks.py"
ON_EXPLANATION = "tests/lab/test_explanation.py"

BY_HAND = [f"{ON_CONVERT}::test_every_pair_of_layouts_by_hand"]
ON_GPU = [f"{ON_CONVERT}::test_every_pair_of_layouts_on_an_emulated_gpu"]

FAULTS = [
    Fault(
        "convert-reference-lost-scales-are-finite",
        CONVERSION,
        "bytes_ = (bits >> FLOAT32_MANTISSA_BITS).where(powers, UE8M0_NAN)",
        "bytes_ = bits >> FLOAT32_MANTISSA_BITS & 0xFF",
        [f"{ON_CONVERT}::test_float32_that_are_no_powers_of_two"],
    ),
    Fault(
        "convert-reference-smallest-power-is-lost",
        CONVERSION,
        "bytes_.where(bits != SMALLEST_UE8M0, 0)",
        "bytes_",
        [f"{ON_CONVERT}::test_float32_that_are_no_powers_of_two"],
    ),
    Fault(
        "convert-zero-is-a-power-of-two",
        CONVERSION,
        "return 0 if self.fmt.floor > 0 else SMALLEST_UE8M0",
        "return SMALLEST_UE8M0",
        [f"{ON_CONVERT}::test_the_byte_0"],
    ),
    Fault(
        "convert-reference-rows-all-exist",
        CONVERSION,
        "scales = scales.where(rows_that_exist(rows, shape.mn).unsqueeze(2), 0)",
        "pass",
        [f"{ON_CONVERT}::test_rows_that_do_not_exist_have_the_scale_0"],
    ),
    Fault(
        "convert-check-passes-all",
        CONVERSION,
        "if lost.any():",
        "if lost.all():",
        [f"{ON_CONVERT}::test_check_names_place_and_value"],
    ),
    Fault(
        "convert-check-of-dead-rows",
        CONVERSION,
        "lost &= rows_that_exist(rows, shape.mn).unsqueeze(2)",
        "pass",
        [f"{ON_CONVERT}::test_check_names_place_and_value"],
    ),
    Fault(
        "convert-any-float-to-powers",
        CONVERSION,
        "if to.power_of_two and not fmt.power_of_two:",
        "if to.ue8m0 and not fmt.power_of_two:",
        [f"{ON_CONVERT}::test_bad_arguments"],
    ),
    Fault(
        "convert-other-values",
        CONVERSION,
        'for name in ("values", "group_size"):',
        'for name in ("group_size",):',
        [f"{ON_CONVERT}::test_bad_arguments"],
    ),
    Fault(
        "scales-view-without-offset",
        SCALE_STORAGE,
        "sf.storage_offset() * per_element,",
        "0,",
        [f"{ON_CONVERT}::test_strides_of_the_source"],
    ),
    Fault(
        "scales-offset-of-one-mode",
        SCALE_LAYOUTS,
        "index, part = divmod(index, extent)",
        "part = index % extent",
        [f"{ON_LAYOUTS}::test_every_place_once"],
    ),
    Fault(
        "convert-load-past-the-row",
        DISPATCH,
        "(sf.shape[-1] % BYTES_PER_WORD == 0 and sf.stride(-1) == 1)",
        "sf.stride(-1) == 1",
        ON_GPU,
    ),
    Fault(
        "convert-load-of-spread-columns",
        DISPATCH,
        "(sf.shape[-1] % BYTES_PER_WORD == 0 and sf.stride(-1) == 1)",
        "sf.shape[-1] % BYTES_PER_WORD == 0",
        [f"{ON_CONVERT}::test_strides_of_the_source"],
    ),
    Fault(
        "convert-store-past-the-row",
        DISPATCH,
        "ragged = not to.packed and result.shape[-1] % BYTES_PER_WORD != 0",
        "ragged = False",
        ON_GPU,
    ),
    Fault(
        "convert-address-is-aligned",
        DISPATCH,
        "math.gcd(nbytes, sf.data_ptr(), *offsets)",
        "math.gcd(nbytes, *offsets)",
        [f"{ON_CONVERT}::test_addresses_that_are_not_aligned"],
    ),
    Fault(
        "convert-missing-rows-forgotten",
        DISPATCH,
        "missing_rows = to.scale_rows(shape.mn) - last_column_rows(result)",
        "missing_rows = 0",
        [f"{ON_CONVERT}::test_a_last_column_without_padding_rows"],
    ),
    Fault(
        "convert-overlap-is-not-seen",
        DISPATCH,
        "check_disjoint(reads, [region_of_scales(",
        "check_disjoint([], [region_of_scales(",
        [f"{ON_CONVERT}::test_bad_arguments"],
    ),
    Fault(
        "convert-kernel-reads-padding",
        KERNEL,
        "loaded[0] = loaded[0] & (Uint32(0xFFFFFFFF) >> shift)",
        "pass",
        [f"{ON_CONVERT}::test_padding_of_the_source_is_not_read"],
    ),
    Fault(
        "convert-kernel-lost-scales-are-finite",
        KERNEL,
        "byte = Uint32(UE8M0_NAN)\n    if (bits & Uint32(NOT_A_POWER_OF_TWO)) == 0:",
        "byte = Uint32(UE8M0_NAN)\n    if (bits & Uint32(0x80000000)) == 0:",
        [f"{ON_CONVERT}::test_float32_that_are_no_powers_of_two"],
    ),
    Fault(
        "convert-kernel-smallest-power",
        KERNEL,
        "elif bits == Uint32(SMALLEST_UE8M0):",
        "elif bits == Uint32(0):",
        [f"{ON_CONVERT}::test_float32_that_are_no_powers_of_two"],
    ),
    Fault(
        "convert-kernel-zero-of-no-row",
        KERNEL,
        "return bits if exists else Uint32(0)",
        "return bits",
        [f"{ON_CONVERT}::test_padding_rows_are_0_where_the_byte_0_is_a_scale"],
    ),
    Fault(
        "convert-kernel-zero",
        KERNEL,
        "bits = bits if byte != 0 else zero",
        "pass",
        [f"{ON_CONVERT}::test_the_byte_0"],
    ),
    Fault(
        "convert-kernel-last-column-of-every-matrix",
        KERNEL,
        "if last_column and batch == problem.result.shape[0] - 1:",
        "if last_column:",
        [f"{ON_CONVERT}::test_a_last_column_without_padding_rows"],
    ),
    Fault(
        "convert-kernel-first-batches-alone",
        KERNEL,
        "batch = problem.first_batch + batch",
        "pass",
        [f"{ON_CONVERT}::test_more_matrices_than_a_grid_counts"],
    ),
    Fault(
        "convert-kernel-masked-rows-of-the-first",
        KERNEL,
        "row_domains.clamp(problem.counts[batch], num_rows)",
        "row_domains.clamp(problem.counts[0], num_rows)",
        [f"{ON_CONVERT}::test_rows_that_do_not_exist_have_the_scale_0"],
    ),
    Fault(
        "convert-kernel-groups-start-unaligned",
        ROW_DOMAINS,
        "        start = next_multiple(end, alignment)\n    return",
        "        start = end\n    return",
        [f"{ON_CONVERT}::test_rows_that_do_not_exist_have_the_scale_0"],
    ),
    Fault(
        "convert-threads-of-blocks",
        LAYOUTS,
        "step = block_lanes(result) if result.block_rows == LANES * CONVERT_ROWS else 1",
        "step = 1",
        ON_GPU,
    ),
    Fault(
        "convert-layout-of-float-words",
        SCALE_LAYOUTS,
        "byte_stride = 1 if fmt.packed else None",
        "byte_stride = None",
        BY_HAND,
    ),
    Fault(
        "explain-padding-is-a-scale",
        EXPLANATION,
        "padding = row >= mn or group >= fmt.groups(k)",
        "padding = row >= mn",
        [f"{ON_EXPLANATION}::test_a_drawing_has_places_and_padding"],
    ),
    Fault(
        "explain-offset-for-element",
        EXPLANATION,
        "element, byte = divmod(offset, fmt.groups_per_column)",
        "element, byte = offset, offset % 4",
        [f"{ON_EXPLANATION}::test_command"],
    ),
    Fault(
        "readers-packed-for-sm90",
        READERS,
        "(Readable((E4M3,), (128,), FLOAT32, _TRANSFORMED),), k_multiple=16",
        "(Readable((E4M3,), (32, 128), E8M0, (BLOCKED, MN_MAJOR_PACKED)),), k_multiple=16",
        [f"{ON_READERS}::test_the_format_is_none_that_the_reader_takes"],
    ),
    Fault(
        "readers-padding-groups",
        READER_CHECKS,
        "real[: shape.mn, :groups] = True",
        "real[: shape.mn] = True",
        [f"{ON_READERS}::test_padding"],
    ),
    Fault(
        "readers-padding-rows-of-the-last-column",
        READER_CHECKS,
        "count = int(inner.count_nonzero() + last.count_nonzero())",
        "count = int(inner.count_nonzero())",
        [f"{ON_READERS}::test_padding"],
    ),
    Fault(
        "readers-dead-rows-may-be-anything",
        READER_CHECKS,
        "yield from _powers_of_two(scales, given.reader)",
        "yield from _powers_of_two(scales[live][None], given.reader)",
        [f"{ON_READERS}::test_scales_that_are_no_powers_of_two"],
    ),
    Fault(
        "readers-nan-of-dead-rows",
        READER_CHECKS,
        "nan &= live.unsqueeze(2)",
        "nan &= ~live.unsqueeze(2)",
        [f"{ON_READERS}::test_nan"],
    ),
    Fault(
        "readers-stride-of-one-column",
        READER_CHECKS,
        "if any(wrong) or (deep_gemm and sf.numel() and not exact):",
        "if any(wrong):",
        [f"{ON_READERS}::test_strides"],
    ),
    Fault(
        "readers-amax-of-the-reader",
        READER_CHECKS,
        "amax = (products * factor).amax()",
        "amax = (products / factor).amax()",
        [f"{ON_READERS}::test_nothing_is_found_in_results"],
    ),
    Fault(
        "readers-producer-mixed-up",
        READER_CHECKS,
        "largest < LEAST_PRODUCT:",
        "largest < 0:",
        [f"{ON_READERS}::test_encode_and_decode_scale_mixed_up"],
    ),
    Fault(
        "readers-swizzle-without-padding",
        READER_CHECKS,
        "if _error(given, unswizzled, row_major, shape, live) <= ERROR:",
        "if False:",
        [f"{ON_READERS}::test_a_swizzle_that_is_none"],
    ),
    Fault(
        "readers-row-major-with-padding",
        READER_CHECKS,
        "not _in_order(sf)[:, shape.mn * groups :].any()",
        "not _in_order(sf).any()",
        [f"{ON_READERS}::test_a_swizzle_that_is_none"],
    ),
    Fault(
        "readers-address",
        READER_CHECKS,
        "if t.numel() and t.data_ptr() % TMA_BYTES:",
        "if t.numel() and t.data_ptr() % 4:",
        [f"{ON_READERS}::test_alignment"],
    ),
    Fault(
        "readers-k-grouped-columns",
        READER_CHECKS,
        "if not sm90 and mn % BYTES_PER_WORD:",
        "if False:",
        [f"{ON_READERS}::test_k_grouped"],
    ),
]
