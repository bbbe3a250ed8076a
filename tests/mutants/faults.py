"""Faults that the tests must see: one change each, and the tests that concern it.

Left out, since nothing that a caller sees depends on them:

- a sum of squares, or an amax, that another order of the same additions or maxima gives;
- slots of masked experts one too many: the tile past the last slot has no rows;
- bits of an fp16 amax below its precision, which only the compare with the largest value reads;
- 32 bits for scales in blocks, of which checks allow no more in a matrix;
- the number of blocks along M in a layout, whose last mode no coordinate leaves;
- batch strides of scales that are checked twice;
- parents of a cache directory that does not exist yet, checked again when it is made;
- a product of a row's weight in float64, rounded twice to the same float32;
- the shape of counts in the key of a plan, which the shape of x implies;
- the lock around a compilation, which two threads may or may not need at the same time.
"""

from tests.mutants import contract_faults, dispatch_faults, jit_faults, kernels_faults

FAULTS = [
    *contract_faults.FAULTS,
    *dispatch_faults.FAULTS,
    *kernels_faults.FAULTS,
    *jit_faults.FAULTS,
]
