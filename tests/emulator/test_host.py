"""The host path: checks of arguments, grids, streams and errors of the exported function."""

import pytest
import torch

from cute_quant.formats import VALUE_DTYPE, last_column_rows
from tests.emulator.cases import poisoned_rows, special_groups
from tests.emulator.errors import MemoryFault
from tests.emulator.host import C_COMPILER, DeviceTensor
from tests.emulator.memory import Memory
from tests.helpers import UE8M0, poisoned_scales

pytestmark = pytest.mark.skipif(
    C_COMPILER is None, reason="no C compiler to link the host code with; launched directly instead"
)
BF16 = torch.bfloat16


class Call:
    """Arguments of a call, to be spoiled one at a time."""

    def __init__(self, kernel, mn=5, k=640, extra_rows=0):
        self.kernel = kernel
        self.memory = Memory()
        self.tensors = {
            "x": special_groups(mn, k, BF16, seed=1),
            "q": poisoned_rows(mn + extra_rows, k, k),
            "sf": poisoned_scales(kernel.fmt, mn, k, "cpu"),
        }
        self.devices = dict.fromkeys(self.tensors, 0)

    def __call__(self, last_rows=None, floor=94, **options):
        self.addresses = {n: self.memory.add(n, t, n == "x") for n, t in self.tensors.items()}
        self.run_at(self.addresses, last_rows, floor, **options)

    def run_at(self, addresses, last_rows=None, floor=94, **options):
        tensors = [DeviceTensor(t, addresses[n], self.devices[n]) for n, t in self.tensors.items()]
        last_rows = last_column_rows(self.tensors["sf"]) if last_rows is None else last_rows
        program, host = self.kernel.program, self.kernel.host
        host(program, self.memory, *tensors, last_rows, floor, **options)


@pytest.fixture
def call(kernel_of):
    return Call(kernel_of(BF16, UE8M0, "sm_100a"))


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
def test_grid(kernel_of, rows_per_thread, mn, groups, extra, warps):
    """`warps`: rows to write, those that pad the scales or q included."""
    kernel = kernel_of(BF16, UE8M0, "sm_100a", rows_per_thread)
    x = special_groups(mn, 128 * groups, BF16, seed=0)
    q = poisoned_rows(mn + extra, 128 * groups, 128 * groups)
    kernel(x, q, poisoned_scales(UE8M0, mn, 128 * groups, "cpu", last_padding=False), 94)
    launch = kernel.host.launches[-1]
    assert launch.block == (32, 4, 1)
    assert launch.grid == (-(-groups // 4), -(-warps // (4 * rows_per_thread)), 1)


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("x", lambda t: t.half(), "dtype=bfloat16"),
        ("x", lambda t: t[:, :64], "divisible by 128|shape"),
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


def test_number_of_arguments(call):
    with pytest.raises(TypeError, match="Expects 5 parameters"):
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
        call(last_rows=8)
    call.memory = Memory()
    call()


def test_no_write_to_x_or_past_q(call):
    call.tensors["q"] = torch.empty(0, dtype=VALUE_DTYPE).set_(
        call.tensors["q"].untyped_storage(), 0, (5, 640), (640, 1)
    )
    call()
