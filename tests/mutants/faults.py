"""Faults that the tests must see: one change each, and the tests that concern it.

Left out, since nothing that a caller sees depends on them:

- bits of an fp16 amax below its precision: the compare with the largest value alone reads them;
- 32 bits, with a sign, for scales in blocks: checks allow no more than these in a matrix;
- the number of blocks along M in a layout: no coordinate leaves the last mode;
- batch strides of scales that are checked twice;
- parents of a cache directory that does not exist yet: they are checked when it is made;
- a product of a row's weight in float64: it rounds to the same float32;
- the shape of counts in the key of a plan: that of x implies it, or the kernel takes any;
- the lock around a compilation: no test makes two threads need it at the same time for sure.
"""

from tests.mutants import (
    block_faults,
    checkpoint_faults,
    column_faults,
    contract_faults,
    dispatch_faults,
    distributed_faults,
    engine_faults,
    jit_faults,
    kernels_faults,
    nn_faults,
    scales_faults,
    scatter_faults,
    stochastic_faults,
)

FAULTS = [
    *contract_faults.FAULTS,
    *dispatch_faults.FAULTS,
    *distributed_faults.FAULTS,
    *kernels_faults.FAULTS,
    *block_faults.FAULTS,
    *column_faults.FAULTS,
    *scales_faults.FAULTS,
    *scatter_faults.FAULTS,
    *stochastic_faults.FAULTS,
    *nn_faults.FAULTS,
    *jit_faults.FAULTS,
    *checkpoint_faults.FAULTS,
    *engine_faults.FAULTS,
]
