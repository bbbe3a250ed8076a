"""The host path: checks of arguments, grids, streams and errors of the exported function."""

import pytest
import torch
import tvm_ffi

from cute_quant.contract.tensors import last_column_rows
from cute_quant.emulator.errors import MemoryFault
from cute_quant.emulator.host import DLPACK_TYPES, DeviceTensor
from cute_quant.emulator.memory import Memory
from cute_quant.kernels.config import QuantizeSpec
from tests.helpers import UE8M0, poisoned_scales, poisoned_values
from tests.kernels.cases import special_groups
from tests.kernels.emulated_gpu import Gpu

BF16 = torch.bfloat16


class Call:
    """Arguments of a call, to be spoiled one at a time."""

    def __init__(self, kernel, mn=5, k=640, extra_rows=0):
        self.kernel = kernel
        self.memory = Memory()
        self.tensors = {
            "x": special_groups(mn, k, BF16, seed=1),
            "q": poisoned_values(mn + extra_rows, k, "cpu"),
            "sf": poisoned_scales(UE8M0, mn, k, "cpu"),
        }
        self.devices = dict.fromkeys(self.tensors, 0)

    def __call__(self, missing_rows=None, **options):
        self.addresses = {n: self.memory.add(n, t, n == "x") for n, t in self.tensors.items()}
        self.run_at(self.addresses, missing_rows, **options)

    def run_at(self, addresses, missing_rows=None, **options):
        tensors = [DeviceTensor(t, addresses[n], self.devices[n]) for n, t in self.tensors.items()]
        if missing_rows is None:
            sf = self.tensors["sf"]
            missing_rows = UE8M0.scale_rows(sf.shape[0]) - last_column_rows(sf)
        program, host = self.kernel.program, self.kernel.host
        host(
            program,
            self.memory,
            *tensors,
            None,
            None,
            None,
            None,
            missing_rows,
            1,
            1,
            94,
            **options,
        )


@pytest.fixture
def call(kernels):
    return Call(kernels.get(QuantizeSpec(BF16, UE8M0), "sm_100a"))


def test_stream_and_device(call):
    call(stream=0x5EED)
    launch = call.kernel.host.launches[-1]
    assert launch.stream == 0x5EED and launch.device == 0
    call.devices = dict.fromkeys(call.devices, 3)
    call.memory = Memory()
    call()
    assert call.kernel.host.launches[-1].device == 3


@pytest.mark.parametrize("rows_per_thread", [1, 2])
@pytest.mark.parametrize(
    ("mn", "groups", "extra", "warps"),
    [(1, 1, 0, 1), (4, 4, 0, 4), (5, 5, 3, 8), (33, 9, 31, 64), (33, 9, 0, 36), (17, 8, 1, 20)],
)
def test_grid(kernels, rows_per_thread, mn, groups, extra, warps):
    """`warps`: rows to write, those that pad the scales or q included."""
    gpu = Gpu(kernels, "sm_100a", rows_per_thread)
    k = 128 * groups
    x, q = special_groups(mn, k, BF16, seed=0), poisoned_values(mn + extra, k, "cpu")
    gpu.quantize(x, q, poisoned_scales(UE8M0, mn, k, "cpu", last_padding=False), UE8M0)
    launch = gpu.launched[-1].host.launches[-1]
    assert launch.block == (32, 4, 1)
    assert launch.grid == (-(-groups // 4), -(-warps // (4 * rows_per_thread)), 1)


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("x", lambda t: t.half(), "dtype=bfloat16"),
        ("x", lambda t: t[:, :72], "divisible by 16|shape"),
        ("x", lambda t: t.t(), "stride|shape|divisible"),
        ("x", lambda t: t[0], "ndim=2"),
        ("q", lambda t: t[:, :512], "shape"),
        ("q", lambda t: t.view(torch.uint8), "dtype=float8_e4m3fn"),
        ("sf", lambda t: t[:4], "shape"),
        ("sf", lambda t: t.view(torch.float32), "dtype=int32"),
    ],
)
def test_arguments_are_checked(call, name, spoil, message):
    call.tensors[name] = spoil(call.tensors[name])
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("dtype", DLPACK_TYPES, ids=str)
def test_dtypes_are_those_that_torch_exports(dtype):
    t = torch.empty(1, dtype=dtype)
    assert DeviceTensor(t, 0).tensor.dtype == tvm_ffi.from_dlpack(t).dtype


def test_number_of_arguments(call):
    with pytest.raises(TypeError, match="Expects 11 parameters"):
        call.kernel.host(call.kernel.program, call.memory, 1, 2)


def test_misaligned_pointers(call):
    call()
    for name, offset in (("x", 16), ("q", 8), ("sf", 2)):
        moved = call.addresses | {name: call.addresses[name] + offset}
        with pytest.raises(ValueError, match="Misaligned"):
            call.run_at(moved)


def test_tensors_on_different_devices(call):
    call.devices["q"] = 1
    with pytest.raises(ValueError, match="device"):
        call()


def test_errors_of_the_kernel_come_through_the_host_code(call):
    """A count of rows that the storage does not have."""
    call.tensors["sf"] = poisoned_scales(UE8M0, 5, 640, "cpu", last_padding=False)
    with pytest.raises(MemoryFault, match="past the end of 'sf'"):
        call(missing_rows=0)
    call.memory = Memory()
    call()


def test_no_write_to_x_or_past_q(call):
    call.tensors["q"] = torch.empty(0, dtype=torch.float8_e4m3fn).set_(
        call.tensors["q"].untyped_storage(), 0, (5, 640), (640, 1)
    )
    call()
