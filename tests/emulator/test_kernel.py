"""The public entry of the emulator: what callers pass wrongly is named, and errors come out."""

import re
import signal
import threading

import cutlass.cute as cute
import pytest
import torch
from cutlass import Float32, Int32
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from cute_quant import emulator, jit
from cute_quant.emulator import host
from tests.c_compiler import needs_c_compiler

ARCH = "sm_90a"
pytestmark = needs_c_compiler


class Add:
    """The kernel: y = x + n, in blocks of 32 threads with an element each."""

    def signature(self) -> tuple:
        length = cute.sym_int32(divisibility=32)
        x, y = (make_fake_tensor(Float32, (length,), stride=(1,)) for _ in range(2))
        return x, y, Int32(0), make_fake_stream(use_tvm_ffi_env_stream=True)

    @cute.jit
    def __call__(self, mX: cute.Tensor, mY: cute.Tensor, n: Int32, stream):
        grid = [cute.ceil_div(mX.shape[0], 32), 1, 1]
        self.kernel(mX, mY, n).launch(grid=grid, block=[32, 1, 1], stream=stream)

    @cute.kernel
    def kernel(self, mX: cute.Tensor, mY: cute.Tensor, n: Int32):
        i = cute.arch.block_idx()[0] * 32 + cute.arch.thread_idx()[0]
        mY[i] = mX[i] + Float32(n)


class AddTwice(Add):
    @cute.jit
    def __call__(self, mX: cute.Tensor, mY: cute.Tensor, n: Int32, stream):
        grid = [cute.ceil_div(mX.shape[0], 32), 1, 1]
        self.kernel(mX, mY, n).launch(grid=grid, block=[32, 1, 1], stream=stream)
        self.kernel(mX, mY, n).launch(grid=grid, block=[32, 1, 1], stream=stream)


@pytest.fixture(scope="module")
def add() -> emulator.EmulatedKernel:
    return emulator.compile(Add(), ARCH)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.arange(64, dtype=torch.float32)


@pytest.fixture
def y() -> torch.Tensor:
    return torch.full((64,), -1.0)


def test_a_call(add, x, y):
    add(x.requires_grad_(), y, 3, outputs=[y[:32]])
    assert torch.equal(y, x.detach() + 3)


# Arguments


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (torch._neg_view, ValueError, "lazily negated view"),
        (lambda t: torch.complex(t, t).conj(), ValueError, "lazily conjugated view"),
        (lambda t: torch.complex(t, t), ValueError, "expected a tensor of .*float32.* complex64"),
        (lambda t: t.to("meta"), ValueError, "expected a tensor on the CPU, got one on meta"),
        (lambda t: t.to_sparse(), ValueError, "expected a strided tensor, got layout"),
        (
            lambda t: torch._subclasses.FakeTensorMode().from_tensor(t),
            TypeError,
            "expected a tensor with memory, got FakeTensor",
        ),
    ],
)
def test_tensors_without_plain_memory(add, x, y, spoil, error, message):
    with pytest.raises(error, match=f"^mX: .*{message}"):
        add(spoil(x), y, 3)
    assert (y == -1).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.bool])
def test_dtypes_that_the_host_code_refuses(add, x, y, dtype):
    """By its own check, as on a GPU."""
    with pytest.raises(ValueError, match=r"mX.*dtype=float32"):
        add(x.to(dtype), y, 3)


@pytest.mark.parametrize("arguments", [slice(2), slice(4)])
def test_number_of_arguments(add, x, y, arguments):
    given = (x, y, 3, 4)[arguments]
    with pytest.raises(TypeError, match=rf"expected 3 \(mX, mY, n\), got {len(given)}"):
        add(*given)


def test_unknown_keywords(add, x, y):
    with pytest.raises(TypeError, match="'output'"):
        add(x, y, 3, output=(y,))


@pytest.mark.parametrize(
    ("outputs", "error", "message"),
    [
        (torch.empty(3), TypeError, "outputs: expected a tuple or list of tensors, got a tensor"),
        (None, TypeError, "outputs: expected a tuple or list of tensors, got None"),
        ("mY", TypeError, "outputs: expected a tuple or list of tensors, got 'mY'"),
        (["mY"], TypeError, r"outputs\[0\]: expected a tensor, got 'mY'"),
        (
            [torch.empty(3)],
            ValueError,
            r"outputs\[0\]: expected one of the tensors mX, mY .* shape \(3,\)",
        ),
    ],
    ids=["tensor", "None", "str", "names", "other"],
)
def test_outputs(add, x, y, outputs, error, message):
    with pytest.raises(error, match=message):
        add(x, y, 3, outputs=outputs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"only": 3}, "only: expected blocks as a list"),
        ({"only": (0, 0, 0)}, "only: expected blocks as a list"),
        ({"only": [(0, 0)]}, "only: expected blocks as a list"),
        ({"only": [(2, 0, 0)]}, r"only: expected a block of the grid \(2, 1, 1\), got \(2, 0, 0\)"),
        ({"watch": 3}, "watch: expected a block and a thread"),
        ({"watch": ((0, 0, 0),)}, "watch: expected a block and a thread"),
        ({"watch": ((0, 0, -1), (0, 0, 0))}, "watch: expected a block of the grid"),
        ({"watch": ((0, 0, 0), (32, 0, 0))}, "watch: expected a thread of the block"),
    ],
    ids=str,
)
def test_selected_blocks_and_threads(add, x, y, options, message):
    with pytest.raises(ValueError, match=message):
        add(x, y, 3, **options)
    assert (y == -1).all()


# Kernels


@pytest.mark.parametrize("build", [emulator.compile, jit.build])
@pytest.mark.parametrize("arch", ["sm_80", (9, 0), None])
def test_unknown_targets(build, arch):
    expected = r"arch: expected one of sm_89, .*sm_120f, got " + re.escape(repr(arch))
    with pytest.raises(ValueError, match=expected):
        build(Add(), arch)


@pytest.mark.parametrize("build", [emulator.compile, jit.build])
@pytest.mark.parametrize("kernel", [Add, lambda x: x, None])
def test_what_is_no_kernel(build, kernel):
    expected = "kernel: expected an object with signature and __call__, got "
    with pytest.raises(TypeError, match=expected + re.escape(repr(kernel))):
        build(kernel, ARCH)


def test_two_launches():
    with pytest.raises(emulator.EmulatorError, match=r"^expected one kernel, got 2: .*Add.*, .*"):
        emulator.compile(AddTwice(), ARCH)


# Errors while a kernel runs


def test_messages_begin_with_the_place(add, x, y):
    with pytest.raises(emulator.MemoryFault) as caught:
        add(x, y, 3, outputs=(x,))
    message = str(caught.value)
    assert re.match(r"block \(0, 0, 0\) thread \(0, 0, 0\): line \d+ of (\S+): `ld\.", message)
    label = re.search(r"line \d+ of (\S+):", message)[1]
    assert "Add" in label and len(label) <= 40
    assert "that nobody wrote" in message and "'mX'" in message


def test_interrupts_come_out(add, x, y, monkeypatch):
    def interrupt(*_, **__):
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(host.machine, "run", interrupt)
        with pytest.raises(KeyboardInterrupt):
            add(x, y, 3)
    add(x, y, 3)
    assert torch.equal(y, x + 3)


def test_calls_from_several_threads(add):
    results = []

    def call(n: int) -> None:
        x, y = torch.full((4096,), float(n)), torch.empty(4096)
        try:
            for _ in range(5):
                add(x, y, n, outputs=(y,))
                results.append(bool((y == 2 * n).all()))
        except Exception as error:
            results.append(error)

    threads = [threading.Thread(target=call, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 20
