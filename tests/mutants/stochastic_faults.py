"""Faults in the quantizers of gradients, in the contract and in device code."""

from tests.mutants.fault import Fault

CONTRACT_PHILOX = "contract/philox.py"
REFERENCE_PROLOGUES = "contract/reference/prologues.py"
REFERENCE_VALUES = "contract/reference/values.py"
PHILOX = "kernels/philox.py"
PROBLEM = "kernels/problem.py"
ENCODINGS = "kernels/encodings.py"
ROWS = "kernels/quantize_rows.py"
LAUNCH = "dispatch/launch.py"
TORCH_OPS = "dispatch/torch_ops.py"

PLAN = "dispatch/plan.py"
BACKWARD = "kernels/silu_mul_backward.py"

ON_BACKWARD = "tests/contract/test_silu_mul_backward.py"
ON_BACKWARD_KERNEL = "tests/kernels/test_silu_mul_backward.py"
ON_CONTRACT = "tests/contract/test_stochastic.py"
ON_KERNELS = "tests/kernels/test_stochastic.py"

FAULTS = [
    Fault(
        "philox-nine-rounds",
        CONTRACT_PHILOX,
        "ROUNDS = 10",
        "ROUNDS = 9",
        [f"{ON_CONTRACT}::test_known_answers"],
    ),
    Fault(
        "philox-offset-of-32-bits",
        CONTRACT_PHILOX,
        "+ (offset >> 32 << OFFSET_SHIFT)",
        "+ 0 * offset",
        [f"{ON_CONTRACT}::test_words_of_elements"],
    ),
    Fault(
        "philox-neighbours-share-their-bits",
        CONTRACT_PHILOX,
        "swapped = (words << 16 | words >> 16) & WORD",
        "swapped = words",
        [f"{ON_CONTRACT}::test_words_of_elements"],
    ),
    Fault(
        "reference-truncates-fractions",
        REFERENCE_VALUES,
        "units = (magnitudes / step * 2**bits).round().long()",
        "units = (magnitudes / step * 2**bits).long()",
        [f"{ON_CONTRACT}::test_fractions_below_normal_values_are_rounded"],
    ),
    Fault(
        "reference-draw-one-too-large",
        REFERENCE_VALUES,
        "(random >> 32 - bits)) >> bits",
        "(random >> 32 - bits) + 1) >> bits",
        [f"{ON_CONTRACT}::test_share_of_draws_that_round_up"],
    ),
    Fault(
        "philox-kernel-all-octets-alike",
        PHILOX,
        "yield self._call(octet + i)",
        "yield self._call(octet)",
        [f"{ON_KERNELS}::test_formats"],
    ),
    Fault(
        "philox-kernel-high-word-of-the-offset",
        PHILOX,
        "first=Uint32(offset >> 32) << OFFSET_SHIFT,",
        "first=Uint32(offset >> 32),",
        [f"{ON_KERNELS}::test_formats"],
    ),
    Fault(
        "stochastic-matrices-alike",
        PROBLEM,
        "rng = rng.slice_batch(batch)",
        "rng = rng",
        [f"{ON_KERNELS}::test_rows"],
    ),
    Fault(
        "stochastic-subnormal-values",
        ENCODINGS,
        "steps = Uint32(cutlass.max(magnitude.bitcast(Int32), below))",
        "steps = magnitude.bitcast(Uint32)",
        [f"{ON_KERNELS}::test_formats"],
    ),
    Fault(
        "stochastic-nan",
        ENCODINGS,
        "words[i] = word if number else nan_word",
        "words[i] = word",
        [f"{ON_KERNELS}::test_formats"],
    ),
    Fault(
        "stochastic-saturation",
        ENCODINGS,
        "magnitude = cute.arch.fmin(magnitude, Float32(facts.max))\n            total",
        "total",
        [f"{ON_KERNELS}::test_formats"],
    ),
    Fault(
        "stochastic-tiles-of-a-row-alike",
        ROWS,
        "words = words_of(random, segment, t)",
        "words = words_of(random, segments[0], t)",
        [f"{ON_KERNELS}::test_rows_that_are_one_group"],
    ),
    Fault(
        "stochastic-plan-of-nearest",
        LAUNCH,
        'key += ("rng_state", _looks(rng_state))',
        "pass",
        [f"{ON_KERNELS}::test_both_roundings_of_one_call"],
    ),
    Fault(
        "stochastic-operator-forgets-the-state",
        TORCH_OPS,
        "end += (call.rng_state,)",
        "end += (None,)",
        [f"{ON_CONTRACT}::test_compiled"],
    ),
    Fault(
        "backward-reference-slope",
        REFERENCE_PROLOGUES,
        "slope = sigmoid * (1 + argument * torch.sigmoid(-argument))",
        "slope = sigmoid * (1 + bounded_gate * torch.sigmoid(-argument))",
        [f"{ON_BACKWARD}::test_they_are_the_gradients_of_torch"],
    ),
    Fault(
        "backward-reference-infinite-gates",
        REFERENCE_PROLOGUES,
        "(prologue.alpha * bounded_gate).clamp(-MAX_ARGUMENT, MAX_ARGUMENT)",
        "prologue.alpha * bounded_gate",
        [f"{ON_BACKWARD}::test_special_values"],
    ),
    Fault(
        "backward-reference-ups-below-their-bound",
        REFERENCE_PROLOGUES,
        "masked_fill(up.abs() > limit, 0.0)",
        "masked_fill(up > limit, 0.0)",
        [f"{ON_BACKWARD}::test_they_are_the_gradients_of_torch"],
    ),
    Fault(
        "backward-kernel-ups-below-their-bound",
        BACKWARD,
        "clear_beyond(of_ups, rU, activation.bound, both_sides=True)",
        "clear_beyond(of_ups, rU, activation.bound, both_sides=False)",
        [f"{ON_BACKWARD_KERNEL}::test_variants"],
    ),
    Fault(
        "backward-kernel-beta-of-rows-that-do-not-exist",
        BACKWARD,
        "beta = activation.beta if row.exists else Float32(0.0)",
        "beta = activation.beta",
        [f"{ON_BACKWARD_KERNEL}::test_variants"],
    ),
    Fault(
        "backward-kernel-infinite-gates",
        BACKWARD,
        "argument = arithmetic.maximum(argument, Float32(-LARGEST_ARGUMENT))",
        "argument = argument",
        [f"{ON_BACKWARD_KERNEL}::test_variants"],
    ),
    Fault(
        "backward-kernel-writes-scales-of-gaps",
        BACKWARD,
        "Stage(Float32, spec.fmt, spec.tile, spec.domain.keeps_gaps)",
        "Stage(Float32, spec.fmt, spec.tile)",
        [f"{ON_BACKWARD_KERNEL}::test_gaps_that_are_kept"],
    ),
    Fault(
        "backward-gates-and-ups-share-a-vector",
        PLAN,
        "ragged=(prologue.part or k) % launch.tile.values_per_thread != 0,",
        "ragged=k % launch.tile.values_per_thread != 0,",
        [f"{ON_BACKWARD_KERNEL}::test_variants"],
    ),
    Fault(
        "backward-alignment-of-the-gradient",
        PLAN,
        "load_bytes = alignment(grad.data_ptr(), view, grad.element_size(), LOAD_BYTES)",
        "load_bytes = LOAD_BYTES",
        [f"{ON_BACKWARD_KERNEL}::test_variants"],
    ),
]
