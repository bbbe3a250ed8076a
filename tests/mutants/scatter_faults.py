"""Faults in rows that are scattered: their places, and the rows that nothing is written to."""

from tests.mutants.fault import Fault

SCATTER = "kernels/scatter.py"
ROW_DOMAINS = "kernels/row_domains.py"
CONTENTS = "contract/contents.py"
REFERENCE_QUANTIZE = "contract/reference/quantize.py"
REFERENCE_ROWS = "contract/reference/rows.py"
CALLS = "contract/calls.py"
LAUNCH = "dispatch/launch.py"
STAGE = "kernels/stage.py"
SCHEDULER = "kernels/scheduler.py"
REACHABLE = "dispatch/reachable.py"

ON_KERNEL = "tests/kernels/test_scatter.py"
ON_CONTRACT = "tests/contract/test_scatter.py"
EVERY_BYTE = f"{ON_KERNEL}::test_every_byte"
PACKED_PREFIX_SUM = f"{EVERY_BYTE}[sm_100a-prefix_sum-e4m3:128:e8m0:row_major_packed-520]"

FAULTS = [
    Fault(
        "scatter-place-past-the-last-row",
        ROW_DOMAINS,
        "    exists = row < rows\n",
        "    exists = row <= rows\n",
        [f"{ON_KERNEL}::test_a_row_that_is_named_twice_is_a_race", ON_KERNEL],
    ),
    Fault(
        "scatter-place-of-an-expert-past-its-count",
        ROW_DOMAINS,
        "exists = place >= 0 and row < Uint32(read_count(problem, matrix))",
        "exists = place >= 0 and row < rows and matrix < problem.batches",
        [f"{ON_KERNEL}::test_rows_and_matrices_of_the_result_with_strides"],
    ),
    Fault(
        "scatter-place-between-groups",
        ROW_DOMAINS,
        "        exists = places_in_groups(problem, row)\n",
        "        pass\n",
        [PACKED_PREFIX_SUM],
    ),
    Fault(
        "scatter-groups-of-the-first-lanes-only",
        ROW_DOMAINS,
        "            found = found or (inside and lane == i)\n",
        "            found = (found and base == 0) or (inside and lane == i)\n",
        [f"{ON_KERNEL}::test_more_groups_than_a_warp_has_lanes"],
    ),
    Fault(
        "scatter-window-of-one-group",
        ROW_DOMAINS,
        "            alive = alive | (Uint32(2**32 - 1) >> (LANES - (high - low))) << low\n",
        "            alive = (Uint32(2**32 - 1) >> (LANES - (high - low))) << low\n",
        [f"{ON_KERNEL}::test_a_lane_has_two_groups_of_a_window"],
    ),
    Fault(
        "scatter-one-window-less",
        SCATTER,
        "return windows if self.clears_rows else windows - self.first_window(problem)",
        "return windows - self.first_window(problem)",
        [PACKED_PREFIX_SUM],
    ),
    Fault(
        "scatter-clears-gaps-that-are-kept",
        SCATTER,
        "return self.domain.counted and not self.domain.keeps_gaps",
        "return self.domain.counted",
        [f"{ON_KERNEL}::test_gaps_that_are_kept"],
    ),
    Fault(
        "scatter-draws-of-one-row-for-all",
        "kernels/quantize.py",
        "[problem.random_of_row(row.index) for row in rows]",
        "[problem.random_of_row(rows[0].index - rows[0].index) for row in rows]",
        [f"{ON_KERNEL}::test_stochastic_rounding"],
    ),
    Fault(
        "scatter-only-as-many-scales-as-lanes",
        SCATTER,
        "for first in range(0, problem.index.shape[1], lanes):",
        "for first in range(0, 1, lanes):",
        [f"{ON_KERNEL}::test_more_places_than_a_group_has_lanes"],
    ),
    Fault(
        "scatter-last-group-of-fewer-lanes",
        STAGE,
        "teller = first_lane if const_expr(rows.of_lanes) else segment",
        "teller = segment",
        [PACKED_PREFIX_SUM, EVERY_BYTE],
    ),
    Fault(
        "scatter-clears-values-of-masked-rows",
        SCATTER,
        "            if const_expr(not self.domain.masked):\n                gQ",
        "            if const_expr(True):\n                gQ",
        [f"{ON_KERNEL}::test_rows_and_matrices_of_the_result_with_strides", ON_KERNEL],
    ),
    Fault(
        "scatter-keeps-row-scales-of-missing-rows",
        SCATTER,
        "            clear_row_scale(problem, row)\n",
        "            pass\n",
        [ON_KERNEL],
    ),
    Fault(
        "scatter-first-windows-again",
        SCHEDULER,
        "        step = num_row_ctas * num_column_ctas\n",
        "        step = num_column_ctas\n",
        [f"{ON_KERNEL}::test_a_grid_that_is_not_large_enough", ON_KERNEL],
    ),
    Fault(
        "scatter-key-without-the-rows-of-the-result",
        LAUNCH,
        'key += ("scatter", _looks(scatter), num_rows, type(num_rows))',
        'key += ("scatter", _looks(scatter))',
        ["tests/dispatch/test_warm_up.py::test_scattered_calls"],
    ),
    Fault(
        "scatter-reference-writes-unnamed-rows",
        REFERENCE_QUANTIZE,
        "        written = written & named\n",
        "        pass\n",
        [f"{ON_CONTRACT}::test_every_byte"],
    ),
    Fault(
        "scatter-reference-of-rows-that-do-not-exist",
        REFERENCE_ROWS,
        "    return exist, source.where(exist, -1)\n",
        "    return exist, source\n",
        [f"{ON_CONTRACT}::test_every_byte"],
    ),
    Fault(
        "scatter-reference-clears-gaps",
        REFERENCE_QUANTIZE,
        "        written_scales[:, :mn] = live\n",
        "        pass\n",
        [f"{ON_CONTRACT}::test_gaps_that_are_kept"],
    ),
    Fault(
        "scatter-reference-draws-of-the-result",
        REFERENCE_QUANTIZE,
        "        random = random_of_elements(call.rng_state, *source.shape)\n",
        "        shape = call.result_shape\n"
        "        random = random_of_elements(call.rng_state, 1, shape.mn, shape.k)\n"
        "        random = random[:, -source.shape[1] :]\n",
        [f"{ON_CONTRACT}::test_stochastic_rounding"],
    ),
    Fault(
        "scatter-of-gradients",
        "contract/checks.py",
        '        raise ValueError("scatter: expected None for gradients',
        '        str("scatter: expected None for gradients',
        [f"{ON_CONTRACT}::test_gradients_are_not_scattered"],
    ),
    Fault(
        "scatter-check-of-rows-named-twice",
        CONTENTS,
        "    if (times > 1).any():\n",
        "    if (times > 2).any():\n",
        [f"{ON_CONTRACT}::test_check_reads_places"],
    ),
    Fault(
        "scatter-places-may-be-overwritten",
        LAUNCH,
        '    for name, t in (("index", call.index), ("scatter", call.scatter)):\n',
        '    for name, t in (("index", call.index),):\n',
        [f"{ON_CONTRACT}::test_places_may_not_lie_in_the_result"],
    ),
    Fault(
        "scatter-warm-up-without-residuals",
        REACHABLE,
        "    every_row = calls.scattered or (calls.kind == DENSE and not calls.gathered)\n",
        "    every_row = calls.kind == DENSE and not calls.gathered\n",
        ["tests/dispatch/test_warm_up.py::test_scattered_calls"],
    ),
]
