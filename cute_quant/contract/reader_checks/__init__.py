"""Everything that can be wrong between quantized values and a GEMM that reads them."""
