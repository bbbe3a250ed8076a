"""Faults in checkpoints: what is read, chosen, written, and where a run goes on."""

from tests.mutants.fault import Fault

CONVENTIONS = "checkpoint/conventions.py"
CONVERSION = "checkpoint/conversion.py"
OUTPUT = "checkpoint/output_directory.py"
SELECTION = "checkpoint/selection.py"
SHARDS = "checkpoint/shards.py"
SOURCE = "checkpoint/source.py"

ON_CONVERSION = "tests/checkpoint/test_conversion.py"
ON_RESUME = "tests/checkpoint/test_resume.py"
ON_SELECTION = "tests/checkpoint/test_selection.py"
ON_SHARDS = "tests/checkpoint/test_shards.py"
ON_SOURCE = "tests/checkpoint/test_source.py"

FAULTS = [
    Fault(
        "checkpoint-scales-of-a-slab-at-rows-of-the-weight",
        CONVERSION,
        "slab[-1].start // part.weight_rows",
        "slab[-1].start",
        [f"{ON_CONVERSION}::test_slabs_of_rows_change_nothing"],
    ),
    Fault(
        "checkpoint-every-expert-at-the-place-of-the-first",
        CONVERSION,
        "row: int = matrix * rows + ",
        "row: int = ",
        [f"{ON_CONVERSION}::test_stacked_experts"],
    ),
    Fault(
        "checkpoint-scales-of-the-first-rows",
        CONVERSION,
        "of_rows = slice(rows.start // SOURCE_BLOCK, ",
        "of_rows = slice(0, ",
        [f"{ON_CONVERSION}::test_slabs_of_fp8"],
    ),
    Fault(
        "checkpoint-scales-read-from-the-shard-of-the-weight",
        CONVERSION,
        "self._open(scale.shard)",
        "self._open(tensor.shard)",
        [f"{ON_CONVERSION}::test_fp8_checkpoints"],
    ),
    Fault(
        "checkpoint-slabs-that-cut-blocks",
        CONVERSION,
        "step = max(1, SLAB_VALUES // (SOURCE_BLOCK * max(1, k))) * SOURCE_BLOCK",
        "step = max(1, SLAB_VALUES // max(1, k) + 96)",
        [f"{ON_CONVERSION}::test_slabs_of_rows_change_nothing"],
    ),
    Fault(
        "checkpoint-global-scale-of-each-projection",
        CONVERSION,
        "fused = self._plan.fused[name]",
        "fused = [name]",
        [f"{ON_CONVERSION}::test_groups"],
    ),
    Fault(
        "checkpoint-index-in-a-slab",
        CONVERSION,
        "starts = [part.start for part in slab] + [0]",
        "starts = [0 for part in slab] + [0]",
        [f"{ON_CONVERSION}::test_the_first_that_is_not_finite_is_named"],
    ),
    Fault(
        "checkpoint-nan-of-fp8-overlooked",
        CONVERSION,
        "return not nan.any() and ",
        "return ",
        [f"{ON_CONVERSION}::test_fp8_that_is_not_finite"],
    ),
    Fault(
        "checkpoint-overflow-of-fp8-overlooked",
        CONVERSION,
        "(w_sf.abs() <= FLOAT32_MAX / E4M3_MAX).all()",
        "w_sf.isfinite().all()",
        [f"{ON_CONVERSION}::test_fp8_that_is_not_finite"],
    ),
    Fault(
        "checkpoint-total-size-of-the-source",
        CONVERSION,
        '{**(checkpoint.index.get("metadata") or {}), "total_size": self.total_size}',
        '{"total_size": self.total_size, **(checkpoint.index.get("metadata") or {})}',
        [f"{ON_CONVERSION}::test_the_index"],
    ),
    Fault(
        "checkpoint-goes-on-for-another-command",
        OUTPUT,
        "other = [key for key in request if found.get(key) != request[key]]",
        "other = [key for key in request if key not in found]",
        [f"{ON_RESUME}::test_another_command"],
    ),
    Fault(
        "checkpoint-source-by-its-size",
        SOURCE,
        "[stat.st_size, stat.st_mtime_ns]",
        "[stat.st_size]",
        [f"{ON_RESUME}::test_a_source_that_changed"],
    ),
    Fault(
        "checkpoint-writes-into-anything",
        OUTPUT,
        "    if not path.exists():\n        _check_empty(output)",
        "    if False:\n        _check_empty(output)",
        [f"{ON_RESUME}::test_a_directory_with_something_else"],
    ),
    Fault(
        "checkpoint-output-inside-of-the-source",
        OUTPUT,
        "if here == there or here in there.parents:",
        "if here == there:",
        [f"{ON_RESUME}::test_the_source_itself"],
    ),
    Fault(
        "checkpoint-takes-a-shard-by-its-name",
        CONVERSION,
        "if not layout.is_at(path):",
        "if False:",
        [f"{ON_RESUME}::test_a_shard_that_changed"],
    ),
    Fault(
        "checkpoint-two-runs-at-once",
        OUTPUT,
        "fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "pass",
        [f"{ON_RESUME}::test_two_runs_at_once"],
    ),
    Fault(
        "checkpoint-manifest-left",
        OUTPUT,
        "        path.unlink(missing_ok=True)\n        sync_directory(output)",
        "        sync_directory(output)",
        [f"{ON_CONVERSION}::test_files"],
    ),
    Fault(
        "checkpoint-name-before-the-bytes",
        SHARDS,
        "os.fsync(self._file.fileno())",
        "pass",
        [f"{ON_SHARDS}::test_a_name_stands_after_the_bytes"],
    ),
    Fault(
        "checkpoint-partial-files-left",
        SHARDS,
        "self._partial.unlink(missing_ok=True)",
        "pass",
        [f"{ON_SHARDS}::test_what_fails_leaves_nothing"],
    ),
    Fault(
        "checkpoint-narrow-dtypes-first",
        SHARDS,
        "(-ITEM_BYTES[tensors[name][0]], name)",
        "name",
        [f"{ON_SHARDS}::test_tensors_are_aligned"],
    ),
    Fault(
        "checkpoint-shared-head-not-named",
        SELECTION,
        "modules |= {ALWAYS_LISTED, *_listed(checkpoint.config)}",
        "modules |= {*_listed(checkpoint.config)}",
        [f"{ON_SELECTION}::test_a_head_that_shares_weights_is_named"],
    ),
    Fault(
        "checkpoint-part-of-a-fused-matrix-kept",
        SELECTION,
        "    _check_fusions(quantized, kept)\n",
        "",
        [f"{ON_SELECTION}::test_a_part_of_what_engines_fuse"],
    ),
    Fault(
        "checkpoint-pattern-inside-of-a-component",
        SELECTION,
        "fnmatchcase(parts[-1], last)",
        'fnmatchcase(parts[-1], f"*{last}")',
        [f"{ON_SELECTION}::test_a_pattern_that_matches_nothing"],
    ),
    Fault(
        "checkpoint-transposed-experts-taken",
        SELECTION,
        "if batch and sizes and side not in sizes:",
        "if False:",
        [f"{ON_SELECTION}::test_stacked_experts_that_are_transposed"],
    ),
    Fault(
        "checkpoint-scales-of-another-shape",
        SELECTION,
        "if scale.shape != expected:",
        "if len(scale.shape) != len(expected):",
        [f"{ON_SELECTION}::test_scales_that_do_not_fit"],
    ),
    Fault(
        "checkpoint-powers-of-two-not-announced",
        CONVENTIONS,
        '{**FP8_CONFIG, "scale_fmt": "ue8m0"}',
        "{**FP8_CONFIG}",
        [f"{ON_CONVERSION}::test_the_config"],
    ),
    Fault(
        "checkpoint-index-believed",
        SOURCE,
        "if weight_map is not None and weight_map.get(tensor.name) != shard:",
        "if False:",
        [f"{ON_SOURCE}::test_what_is_wrong_is_named"],
    ),
]
