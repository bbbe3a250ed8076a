"""The contract in plain torch: quantize and dequantize without a kernel.

It is an oracle independent of the kernels: a scale exponent comes from a division in float64 and
`frexp`, not from bit arithmetic. Tensors on the CPU, and on a GPU that no kernel is built for, are
quantized by it, to the same bits.

A batch dimension is always there: tensors with other leading dimensions are flattened to one.
"""
