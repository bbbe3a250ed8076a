"""The host code: the function that CuTe DSL exports, over a stand-in for the CUDA runtime.

The object file is linked with `runtime.c` in place of the DSL's runtime library and loaded as any
user would load it. It checks its arguments, computes the grid and packs the parameters; the launch
then comes back to Python and runs under the emulator. Tensors are handed over as DLPack capsules
that claim to be on a CUDA device and point to addresses of the emulator.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import shutil
import subprocess
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tvm_ffi

from cute_quant.emulator import machine
from cute_quant.emulator.errors import EmulatorError
from cute_quant.emulator.memory import Memory

C_COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
CUDA = 2  # kDLCUDA
LAUNCH_FAILURE = 719  # cudaErrorLaunchFailure
DLPACK_TYPES = {
    torch.bfloat16: (4, 16),
    torch.float16: (2, 16),
    torch.float32: (2, 32),
    torch.float64: (2, 64),
    torch.int8: (0, 8),
    torch.int32: (0, 32),
    torch.int64: (0, 64),
    torch.uint8: (1, 8),
    torch.bool: (6, 8),
    torch.float8_e4m3fn: (10, 8),
    torch.float8_e5m2: (12, 8),
    torch.float8_e8m0fnu: (14, 8),
    torch.float4_e2m1fn_x2: (17, 4),
}


@dataclass(frozen=True)
class Launch:
    """A launch as the host code asked for it."""

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    stream: int
    device: int
    arguments: tuple[bytes, ...]


class _LaunchConfig(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared_bytes", ctypes.c_size_t),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("attribute_count", ctypes.c_uint32),
    ]


_LOAD = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)
_LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.POINTER(_LaunchConfig),
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_void_p),
)


class _LaunchAttribute(ctypes.Structure):
    """The cudaLaunchAttribute of driver_types.h, whose value is a union of 64 bytes."""

    _fields_ = [("id", ctypes.c_int32), ("pad", ctypes.c_char * 4), ("value", ctypes.c_int32 * 16)]


PROGRAMMATIC_STREAM_SERIALIZATION = 6


class HostFunction:
    """The host function of a compiled kernel, called as on a GPU."""

    _count = itertools.count()

    def __init__(self, compiled: Any, directory: Path):
        """Export, link and load the function, which needs a C compiler.

        Args:
            compiled: what ``cute.compile`` returned, with its cubin kept.
            directory: for the object file and the library.
        """
        self.cubin = compiled.__cubin__
        self.launches: list[Launch] = []
        self.error: BaseException | None = None
        self._lock = threading.Lock()  # held by a call, whose program and error are kept here
        self._run: Callable[..., None]
        self._program: machine.Program
        name = f"emulated_{next(self._count)}"
        object_file, library = directory / f"{name}.o", directory / f"{name}.so"
        compiled.export_to_c(str(object_file), function_name=name, export_only_tvm_ffi_symbols=True)
        source = Path(__file__).with_name("runtime.c")
        # -Bsymbolic: the runtime linked in is used, even where the real one is loaded too.
        options = ["-shared", "-fPIC", "-O1", "-Wl,-Bsymbolic"]
        command = [str(C_COMPILER), *options, "-o", str(library), str(object_file), str(source)]
        linked = subprocess.run(command, capture_output=True, text=True)
        if linked.returncode:
            raise EmulatorError(f"{C_COMPILER} failed:\n{linked.stderr}")
        self._callbacks = _LOAD(self._loaded), _LAUNCH(self._launched)
        self._library = ctypes.CDLL(str(library))
        self._library.emulator_connect(*self._callbacks)
        self._function = tvm_ffi.load_module(str(library))[name]

    def __call__(
        self,
        program: machine.Program,
        memory: Memory,
        *arguments: Any,
        stream: int = 0,
        **options: Any,
    ) -> None:
        """Call the function; its launches run to their end before it returns.

        Args:
            program: what runs in place of the machine code.
            memory: that holds the tensors.
            *arguments: as on a GPU; tensors as `DeviceTensor`.
            stream: the handle that the environment says is current.
            **options: of ``machine.run``.
        """
        on_device = [a.tensor if isinstance(a, DeviceTensor) else a for a in arguments]
        with self._lock:
            self._program, self.error = program, None
            self._run = functools.partial(machine.run, program, memory=memory, **options)
            try:
                with tvm_ffi.use_raw_stream(tvm_ffi.device("cuda:0"), stream):
                    self._function(*on_device)
            except Exception:
                if self.error is None:
                    raise
            finally:
                del self._run  # it holds the tensors
            if self.error is not None:
                raise self.error

    def _loaded(self, image: int) -> int:
        return self._guard(self._check_image, image)

    def _check_image(self, image: int) -> None:
        # A fatbin: 16 bytes of header, of which the last eight say how much follows.
        size = 16 + int.from_bytes(ctypes.string_at(image + 8, 8), "little")
        if self.cubin not in ctypes.string_at(image, size):
            raise EmulatorError("the object holds other machine code than was compiled")

    def _launched(self, config: Any, kernel: bytes, arguments: Any) -> int:
        return self._guard(self._launch, config.contents, kernel.decode(), arguments)

    def _launch(self, config: _LaunchConfig, kernel: str, arguments: Any) -> None:
        expected = self._program.kernel
        sizes = [p.size for p in expected.parameters]
        launch = Launch(
            kernel,
            tuple(config.grid),
            tuple(config.block),
            config.shared_bytes,
            config.stream or 0,
            self._library.emulator_device(),
            tuple(ctypes.string_at(arguments[i], size) for i, size in enumerate(sizes)),
        )
        self.launches.append(launch)
        if kernel != expected.name:
            raise EmulatorError(f"launch of {kernel}, expected {expected.name}")
        attributes = ctypes.cast(config.attributes, ctypes.POINTER(_LaunchAttribute))
        dependent = any(
            attributes[i].id == PROGRAMMATIC_STREAM_SERIALIZATION and attributes[i].value[0]
            for i in range(config.attribute_count)
        )
        if dependent != self._program.waits:
            launched = "launched" if dependent else "not launched"
            waits = "waits" if self._program.waits else "does not wait"
            raise EmulatorError(
                f"{expected.label}: {launched} as a programmatic dependent, and its code "
                f"{waits} for the grid before"
            )
        if launch.shared_bytes:
            raise EmulatorError(
                f"{expected.label}: {launch.shared_bytes} bytes of dynamic shared memory"
            )
        self._run(launch.grid, launch.block, launch.arguments)

    def _guard(self, function: Callable[..., None], *arguments: Any) -> int:
        # An exception cannot pass through C: it is kept and raised once the call has returned.
        try:
            function(*arguments)
        except BaseException as error:  # an interrupt too, which ctypes would drop
            self.error = error
            return LAUNCH_FAILURE
        return 0


class _DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class _DLManagedTensor(ctypes.Structure):
    _fields_ = [
        ("tensor", _DLTensor),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.CFUNCTYPE(None, ctypes.c_void_p)),
    ]


_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


class DeviceTensor:
    """A CPU tensor that claims to be on a CUDA device, at an address of the emulator."""

    def __init__(self, tensor: torch.Tensor, address: int, device: int = 0):
        code, bits = DLPACK_TYPES[tensor.dtype]
        extents = ctypes.c_int64 * tensor.ndim
        self._managed = _DLManagedTensor(
            _DLTensor(
                address,
                CUDA,
                device,
                tensor.ndim,
                code,
                bits,
                8 * tensor.element_size() // bits,
                extents(*tensor.shape),
                extents(*tensor.stride()),
                0,
            )
        )
        self._device = device
        self.tensor = tvm_ffi.from_dlpack(self)  # borrows from this object

    def __dlpack__(self, **_: Any) -> Any:
        return _new_capsule(ctypes.addressof(self._managed), b"dltensor", None)

    def __dlpack_device__(self) -> tuple[int, int]:
        return CUDA, self._device
