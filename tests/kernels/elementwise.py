"""A kernel of one device function, which it applies to every element."""

import cuda.bindings.driver as cuda
import cutlass.cute as cute
from cutlass import Float32
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

THREADS = 256


class Apply:
    """Compute y = function(x), one element per thread."""

    def __init__(self, function):
        self.function = function

    def signature(self):
        n = cute.sym_int32(divisibility=THREADS)
        vector = make_fake_tensor(Float32, (n,), stride=(1,))
        return vector, vector, make_fake_stream(use_tvm_ffi_env_stream=True)

    @cute.jit
    def __call__(self, mX: cute.Tensor, mY: cute.Tensor, stream: cuda.CUstream):
        self.kernel(mX, mY).launch(
            grid=[mX.shape[0] // THREADS, 1, 1], block=[THREADS, 1, 1], stream=stream
        )

    @cute.kernel
    def kernel(self, mX: cute.Tensor, mY: cute.Tensor):
        thread, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        i = block * THREADS + thread
        mY[i] = self.function(mX[i])
