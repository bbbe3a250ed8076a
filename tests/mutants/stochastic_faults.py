"""Faults in stochastic rounding, in the contract and in device code."""

from tests.mutants.fault import Fault

CONTRACT_PHILOX = "contract/philox.py"
REFERENCE = "contract/reference.py"
PHILOX = "kernels/philox.py"
PROBLEM = "kernels/problem.py"
ENCODINGS = "kernels/encodings.py"
LAUNCH = "dispatch/launch.py"
TORCH_OPS = "dispatch/torch_ops.py"

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
        REFERENCE,
        "units = (magnitudes / step * 2**bits).round().long()",
        "units = (magnitudes / step * 2**bits).long()",
        [f"{ON_CONTRACT}::test_every_byte", f"{ON_CONTRACT}::test_every_row_domain"],
    ),
    Fault(
        "reference-draw-one-too-large",
        REFERENCE,
        "(random >> 32 - bits)) >> bits",
        "(random >> 32 - bits) + 1) >> bits",
        [f"{ON_CONTRACT}::test_share_of_draws_that_round_up"],
    ),
    Fault(
        "philox-kernel-all-octets-alike",
        PHILOX,
        "for word in self._call(octet + i):",
        "for word in self._call(octet):",
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
]
