"""Wait for all ranks of a host. Count, signal, wait.

Each rank has a counter for each rank, in memory that all see, and counts its barriers behind them.
It writes the number of this barrier to its counter at each rank, after all that it wrote before,
and reads its own memory until no counter there is less. A signal is one store over NVLink, where a
flag that is set and taken back needs answers.
"""

import cuda.bindings.driver as cuda
import cutlass.cute as cute
from cutlass import Int32, Int64, const_expr
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from cute_quant.kernels import ptx
from cute_quant.kernels.config import LANES, BarrierSpec


class Barrier:
    """Entry point: counters of this rank, addresses of those of all ranks."""

    def __init__(self, spec: BarrierSpec):
        self.spec = spec

    def signature(self) -> tuple:
        """Return stand-ins for the arguments, with the sizes that vary."""
        return (
            make_fake_tensor(Int32, (cute.sym_int32(),), stride=(1,)),
            make_fake_tensor(Int64, (cute.sym_int32(),), stride=(1,)),
            Int32(0),
            Int64(0),
            make_fake_stream(use_tvm_ffi_env_stream=True),
        )

    @cute.jit
    def __call__(
        self,
        mCounters: cute.Tensor,  # (ranks + 1,)
        mPeers: cute.Tensor,  # (ranks,)
        rank: Int32,
        timeout: Int64,  # in nanoseconds
        stream: cuda.CUstream,
    ):
        """Launch the kernel."""
        self.kernel(mCounters, mPeers, rank, timeout).launch(
            grid=[1, 1, 1], block=[LANES, 1, 1], stream=stream, use_pdl=self.spec.pdl
        )

    @cute.kernel
    def kernel(self, mCounters: cute.Tensor, mPeers: cute.Tensor, rank: Int32, timeout: Int64):
        """Signal all ranks, and wait for their signals, a lane those of each 32nd one."""
        if const_expr(self.spec.pdl):
            cute.arch.griddepcontrol_wait()
        lane, _, _ = cute.arch.thread_idx()
        ranks = mPeers.shape[0]
        number = mCounters[ranks] + 1
        cute.arch.sync_warp()
        for peer in range(lane, ranks, LANES):
            ptx.store_release(mPeers[peer] + Int64(rank) * (Int32.width // 8), number)
        own = mCounters.iterator.toint()
        for peer in range(lane, ranks, LANES):
            wait(own + Int64(peer) * (Int32.width // 8), number, timeout)
        if const_expr(self.spec.pdl):
            # Not before: dependents would hold the SMs for as long as another rank is late.
            cute.arch.griddepcontrol_launch_dependents()
        if lane == 0:
            mCounters[ranks] = number


@cute.jit
def wait(address: Int64, number: Int32, timeout: Int64):
    """Read a counter until it is not less than a number; counters wrap around."""
    start = ptx.nanoseconds()
    while ptx.load_acquire(address) - number < 0:
        if ptx.nanoseconds() - start > timeout:
            ptx.trap()
