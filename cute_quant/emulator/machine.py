"""Run a grid: registers, flow of control, lanes, access to memory.

All threads of as many blocks as fit into a batch step together; an instruction is one numpy
expression over them. Shared memory is a block's own, and in global memory any exchange between
threads is an error, so the order of blocks does not matter.

Every thread has its own program counter. Of those that can go on, the threads at the lowest one
run, the others wait; they reconverge where the counters meet. A shuffle holds a thread back until
the lanes it names have come (9.7.9 "shfl.sync"), or reports that they never will; so does a vote,
and a barrier until all threads of the block have come.
"""

from __future__ import annotations

import abc
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from cute_quant.emulator import isa, ptx
from cute_quant.emulator.errors import (
    Deadlock,
    EmulatorError,
    MemoryFault,
    UndefinedValue,
    UnknownInstruction,
)
from cute_quant.emulator.memory import Memory, SharedMemory, shared_address

WARP = 32
MAX_THREADS = 1024
"""Most threads of a block (CUDA programming guide, "Compute Capabilities")."""
THREADS_PER_BATCH = 1 << 15
GENERIC_SHARED = 1 << 62
"""Start of the window of shared memory among generic addresses (6.4.1.1): past all tensors."""
UNSIGNED = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}

# 9.7.9 "ld", "ld.global.nc", "st". Cache operators and eviction priorities are hints (9.7.9.1,
# 9.7.9.2); memory is checked so strictly that weak and non-coherent loads are plain ones.
_CACHE = r"(?:\.(?:ca|cg|cs|cv|lu|wb|wt))?"
_HINTS = (
    r"(?:\.L1::(?:evict_normal|evict_unchanged|evict_first|evict_last|no_allocate))?"
    r"(?:\.L2::evict_(?:normal|first|last))?(?P<policy>\.L2::cache_hint)?(?:\.L2::(?:64|128|256)B)?"
)
_SHAPE = r"(?:\.v(?P<count>[248]))?\.(?P<type>[bus](?:8|16|32|64)|f32|f64)"
_LOAD = re.compile(
    rf"ld(?:\.weak)?(?P<space>\.param|\.global|\.local)?{_CACHE}(?:\.nc)?{_HINTS}{_SHAPE}"
)
_STORE = re.compile(rf"st(?:\.weak)?(?P<space>\.global|\.local)?{_CACHE}{_HINTS}{_SHAPE}")
_LOAD_SHARED, _STORE_SHARED = (
    re.compile(rf"{access}(?:\.weak)?(?P<space>\.shared)(?:::cta)?{_SHAPE}")
    for access in ("ld", "st")
)
_CONVERT_ADDRESS = re.compile(r"cvta(\.to)?\.shared\.u64")
_BARRIER = re.compile(r"bar(?:\.cta)?\.sync|barrier(?:\.cta)?\.sync(?:\.aligned)?")
_SHUFFLE = re.compile(r"shfl\.sync\.(up|down|bfly|idx)\.b32")
# Instructions that move bits of their first operands, which may be undefined: compilers fill
# halves that nobody uses with anything.
_MOVES = {f"mov.b{width}": 1 for width in (16, 32, 64)} | {"prmt.b32": 2, "bfi.b32": 2}
_MOVES |= {f"cvt.u{to}.u{of}": 1 for to in (8, 16, 32) for of in (16, 32, 64)}
_VOTE = re.compile(r"vote\.sync\.(?:(all|any|uni)\.pred|(ballot)\.b32)")


class Program:
    """A kernel whose instructions are decoded.

    Raises:
        UnknownInstruction: one of them has no semantics here.
    """

    def __init__(self, kernel: ptx.Kernel):
        self.kernel = kernel
        self.parameters = {p.name: i for i, p in enumerate(kernel.parameters)}
        self.shared = {v.name: shared_address(i, v.alignment) for i, v in enumerate(kernel.shared)}
        self.steps = [self._decode(i) for i in kernel.instructions]
        self.waits = any(isinstance(step, _Wait) for step in self.steps)

    def _decode(self, instruction: ptx.Instruction) -> _Step:
        opcode = instruction.opcode
        try:
            if opcode in isa.OPERATIONS:
                return _Compute(instruction)
            if match := _LOAD.fullmatch(opcode):
                if match["space"] == ".param":
                    return _LoadParameter(instruction, match, self)
                if match["space"] == ".local":
                    return _LoadLocal(instruction, match)
                return _Load(instruction, match)
            if match := _LOAD_SHARED.fullmatch(opcode):
                return _Load(instruction, match)
            if (match := _STORE.fullmatch(opcode)) and match["space"] != ".param":
                if match["space"] == ".local":
                    return _StoreLocal(instruction, match)
                return _Store(instruction, match)
            if match := _STORE_SHARED.fullmatch(opcode):
                return _Store(instruction, match)
            if match := _CONVERT_ADDRESS.fullmatch(opcode):
                return _ConvertAddress(instruction, bool(match[1]))
            if _BARRIER.fullmatch(opcode):
                return _Barrier(instruction)
            if match := _SHUFFLE.fullmatch(opcode):
                return _Shuffle(instruction, match[1])
            if match := _VOTE.fullmatch(opcode):
                return _Vote(instruction, match[1] or match[2])
            if opcode in ("bra", "bra.uni"):
                return _Branch(instruction, self.kernel)
            if opcode in ("ret", "exit"):
                return _Exit(instruction)
            if opcode == "griddepcontrol.wait":
                return _Wait(instruction)
            if opcode == "griddepcontrol.launch_dependents":
                return _Step(instruction)  # a grid that runs alone has none to let go
            raise UnknownInstruction(f"unknown instruction {opcode}")
        except UnknownInstruction as error:
            place = f"line {instruction.line} of {self.kernel.label}: `{instruction.text}`"
            raise UnknownInstruction(f"{place}: {error}") from None


class _Step:
    """An instruction made ready to run. This one does nothing.

    Attributes:
        missing: says of a thread that waits here for ever, for whom.
    """

    missing: str

    def __init__(self, instruction: ptx.Instruction):
        self.instruction = instruction
        self.guard = instruction.guard

    def operands(self, count: int) -> tuple[Any, ...]:
        """Return the operands of the instruction, which has to have so many."""
        given = self.instruction.operands
        if len(given) != count:
            raise UnknownInstruction(f"expected {count} operands, got {len(given)}")
        return given

    def execute(self, batch: Batch, chosen: np.ndarray) -> None:
        """Run for the `chosen` threads."""

    def follow(self, batch: Batch, pc: int, active: np.ndarray, chosen: np.ndarray) -> None:
        """Move the `active` threads on; `chosen` are those of them whose guard is true."""
        batch.arrive(pc + 1, active)


class _Wait(_Step):
    """Wait for the grid before (9.7.13 "griddepcontrol.wait"), whose results are seen from here."""

    def execute(self, batch: Batch, chosen: np.ndarray) -> None:
        batch.waited = batch.waited | chosen


class _Compute(_Step):
    def __init__(self, instruction: ptx.Instruction):
        super().__init__(instruction)
        self.operation = isa.OPERATIONS[instruction.opcode]
        self.target, *self.sources = self.operands(1 + len(self.operation.operands))
        types = {self.operation.result, *self.operation.operands}
        self.packed = len(types) == 1 and self.operation.result.endswith("x2")
        vectors = instruction.opcode.startswith("mov.")
        first = self.target
        if isinstance(first, ptx.Pair) and instruction.opcode.startswith("setp."):
            if len(self.operation.operands) == 3:
                raise UnknownInstruction("two results of a combined comparison")
            first = first.first
        _check_width(first, self.operation.result, self.operation.resizes, vectors)
        for source, type_ in zip(self.sources, self.operation.operands, strict=True):
            _check_width(source, type_, self.operation.resizes, vectors)

    def execute(self, batch: Batch, chosen: np.ndarray) -> None:
        typed = list(zip(self.sources, self.operation.operands, strict=True))
        undefined = None
        if moves := _MOVES.get(self.instruction.opcode):
            moved, rest = typed[:moves], [batch.read(s, t, chosen) for s, t in typed[moves:]]
            if any(batch.is_undefined(source) for source, _ in moved):
                bits = [batch.undefined_bits(s, t) for s, t in moved]
                undefined = self.operation.compute(*bits, *rest)
            sources = [*(batch.read(s, t, batch.nobody) for s, t in moved), *rest]
        elif self.packed and any(map(batch.is_undefined, self.sources)):
            # Each half is computed from its own halves: compilers leave one open
            # that nobody uses.
            undefined = _undefined_halves(batch, typed)
            sources = [batch.read(s, t, batch.nobody) for s, t in typed]
        else:
            sources = [batch.read(s, t, chosen) for s, t in typed]
        result = self.operation.compute(*sources)
        if isinstance(self.target, ptx.Pair):
            # 9.7.6 "setp": the second result is the complement.
            batch.write(self.target.first, result, chosen)
            batch.write(self.target.second, ~result, chosen)
        else:
            batch.write(self.target, result, chosen, undefined)


def _undefined_halves(batch: Batch, typed: list[tuple[object, str]]) -> np.ndarray:
    """Ones for each half of a packed result that some undefined bit of the operands goes into."""
    bits = [batch.undefined_bits(source, type_) for source, type_ in typed]
    half = UNSIGNED[4 * bits[0].itemsize]
    undefined = np.bitwise_or.reduce(bits).view(half) != 0
    return np.where(undefined, ~half(0), half(0)).view(bits[0].dtype)


def _check_width(operand: object, type_: str, resizes: bool, vectors: bool) -> None:
    """Check that an operand has the width of a type (PTX ISA 9.4), a vector that of all elements.

    Raises:
        UnknownInstruction: it has not.
    """
    width = isa.TYPES[type_].width
    if isinstance(operand, ptx.Immediate):
        allowed = {"b": (0, width), "f": (width,)}.get(type_[0], (0,))
        if operand.float_width not in ((0,) if type_ == "f16" else allowed):
            raise UnknownInstruction(f"constant of another type than {type_}")
        return
    if isinstance(operand, ptx.Register):
        fits = operand.width == width or (resizes and operand.width > width)
    elif isinstance(operand, ptx.Special):
        fits = width == 32
    elif isinstance(operand, ptx.Symbol):
        fits = vectors and width in (32, 64)
    elif isinstance(operand, ptx.Vector):
        part = f"b{width // len(operand.elements)}"
        fits = vectors and part in isa.TYPES
        if fits:
            for element in operand.elements:
                _check_width(element, part, False, False)
    else:
        fits = isinstance(operand, ptx.Sink)
    if not fits:
        raise UnknownInstruction(f"operand {operand} for the type {type_}")


class _Access(_Step):
    """A load or a store: its address, its state space and the registers of its values."""

    def __init__(
        self, instruction: ptx.Instruction, match: re.Match[str], address: int, value: int
    ):
        super().__init__(instruction)
        operands = self.operands(3 if match.groupdict().get("policy") else 2)
        self.address = operands[address]
        if not isinstance(self.address, ptx.Address):
            raise UnknownInstruction(f"operand {self.address} for an address")
        self.count = int(match["count"] or 1)
        self.space = match["space"]
        self.type = match["type"]
        self.size = isa.TYPES[self.type].width // 8
        values = operands[value]
        self.values = values.elements if isinstance(values, ptx.Vector) else (values,)
        limit = 16 if self.space == ".shared" else 32
        if len(self.values) != self.count or self.count * self.size > limit:
            raise UnknownInstruction(f"{len(self.values)} values of {self.size} bytes")
        for v in self.values:
            _check_width(v, self.type, True, False)

    def check_base(self) -> None:
        base = self.address.base
        # 6.4.1: names of variables are addresses, and those of shared memory may have 32 bits.
        short = isinstance(base, ptx.Symbol) or getattr(base, "width", 0) == 32
        if self.space != ".shared" or not short:
            _check_width(base, "u64", False, False)

    def addresses(self, batch: Batch, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        at = np.flatnonzero(chosen)
        base = batch.read(self.address.base, "u64", chosen)[at]
        return at, base + np.uint64(self.address.offset & (1 << 64) - 1)

    def parts(
        self, batch: Batch, at: np.ndarray, addresses: np.ndarray
    ) -> Iterator[tuple[Memory | SharedMemory, np.ndarray, np.ndarray, np.ndarray]]:
        """Yield each memory, which of the threads `at` access it, where, and their numbers."""
        if self.space is None:  # 6.4.1.1 "Generic Addressing"
            shared = addresses >= np.uint64(GENERIC_SHARED)
            addresses = np.where(shared, addresses - np.uint64(GENERIC_SHARED), addresses)
        else:
            shared = np.full(len(at), self.space == ".shared")
        if shared.any():
            some = np.flatnonzero(shared)
            yield batch.shared, some, addresses[some], at[some]
        if not shared.all():
            some = np.flatnonzero(~shared)
            early = np.flatnonzero(~batch.waited[at[some]])
            if len(early):
                thread = batch.describe(at[some[early[0]]])
                raise EmulatorError(f"{thread}: before griddepcontrol.wait")
            yield batch.memory, some, addresses[some], batch.numbers[at[some]]

    def unpack(self, batch: Batch, data: np.ndarray, at: np.ndarray, chosen: np.ndarray) -> None:
        """Write rows of bytes to the registers of the threads `at`."""
        elements: isa.Array = data.view(isa.TYPES[self.type].dtype)  # (threads, count)
        for value, element in zip(self.values, elements.T, strict=True):
            result = np.zeros(batch.size, elements.dtype)
            result[at] = element
            batch.write(value, result, chosen)

    def pack(self, batch: Batch, at: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        """Return rows of bytes from the registers of the threads `at`."""
        elements = [batch.read(v, self.type, chosen)[at] for v in self.values]
        return np.stack(elements, 1).view(np.uint8)


class _Load(_Access):
    def __init__(self, instruction: ptx.Instruction, match: re.Match[str]):
        super().__init__(instruction, match, address=1, value=0)
        self.check_base()

    def execute(self, batch: Batch, chosen: np.ndarray) -> None:
        at, addresses = self.addresses(batch, chosen)
        width = self.count * self.size
        data = np.empty((len(at), width), np.uint8)
        for memory, some, places, threads in self.parts(batch, at, addresses):
            data[some] = memory.load(places, width, threads, batch.describer(at[some]))
        self.unpack(batch, data, at, chosen)


class _LoadParameter(_Access):
    def __init__(self, instruction: ptx.Instruction, match: re.Match[str], program: Program):
        super().__init__(instruction, match, address=1, value=0)
        name = getattr(self.address.base, "name", None)
        if name not in program.parameters:
            raise UnknownInstruction(f"unknown parameter {name}")
        self.parameter = program.parameters[name]
        end = self.address.offset + self.count * self.size
        if self.address.offset < 0 or end > program.kernel.parameters[self.parameter].size:
            raise UnknownInstruction("load past the parameter")

    def execute(self, batch: Batch, chosen: np.ndarray) -> None:
        at = np.flatnonzero(chosen)
        begin, end = self.address.offset, self.address.offset + self.count * self.size
        data = np.frombuffer(batch.arguments[self.parameter][begin:end], np.uint8)
        self.unpack(batch, np.tile(data, (len(at), 1)), at, chosen)


class _Store(_Access):
    def __init__(self, instruction: ptx.Instruction, match: re.Match[str]):
        super().__init__(instruction, match, address=0, value=1)
        self.check_base()

    def execute(self, batch: Batch, chosen: np.ndarray) -> None:
        at, addresses = self.addresses(batch, chosen)
        data = self.pack(batch, at, chosen)
        for memory, some, places, threads in self.parts(batch, at, addresses):
            memory.store(places, data[some], threads, batch.describer(at[some]))


class _Local(_Access):
    """An access to a thread's own memory, whose addresses count from its first variable (6.4.1)."""

    def places(self, batch: Batch, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the threads, and the bytes that each accesses."""
        at = np.flatnonzero(chosen)
        width = self.count * self.size
        first = batch.read(self.address.base, "u64", chosen)[at].astype(np.int64)
        first += self.address.offset
        wrong = (first < 0) | (first + width > batch.local.shape[1]) | (first % width != 0)
        if wrong.any():
            bad = int(np.argmax(wrong))
            raise MemoryFault(f"{batch.describe(at[bad])}: access of {width} bytes to local memory")
        return at, first[:, None] + np.arange(width)


class _LoadLocal(_Local):
    def __init__(self, instruction: ptx.Instruction, match: re.Match[str]):
        super().__init__(instruction, match, address=1, value=0)
        self.check_base()

    def execute(self, batch: Batch, chosen: np.ndarray) -> None:
        at, places = self.places(batch, chosen)
        undefined = ~batch.local_written[at[:, None], places].all(1)
        if undefined.any():
            bad = at[np.argmax(undefined)]
            raise MemoryFault(f"{batch.describe(bad)}: load of local bytes that nobody wrote")
        self.unpack(batch, batch.local[at[:, None], places], at, chosen)


class _StoreLocal(_Local):
    def __init__(self, instruction: ptx.Instruction, match: re.Match[str]):
        super().__init__(instruction, match, address=0, value=1)
        self.check_base()

    def execute(self, batch: Batch, chosen: np.ndarray) -> None:
        at, places = self.places(batch, chosen)
        batch.local[at[:, None], places] = self.pack(batch, at, chosen)
        batch.local_written[at[:, None], places] = True


class _ConvertAddress(_Step):
    """Convert between an address of shared memory and a generic one (9.7.9 "cvta")."""

    def __init__(self, instruction: ptx.Instruction, to_shared: bool):
        super().__init__(instruction)
        self.to_shared = to_shared
        self.target, self.source = self.operands(2)
        _check_width(self.target, "u64", False, False)
        _check_width(self.source, "u64", False, not to_shared)

    def execute(self, batch: Batch, chosen: np.ndarray) -> None:
        address, window = batch.read(self.source, "u64", chosen), np.uint64(GENERIC_SHARED)
        if not self.to_shared:
            batch.write(self.target, address + window, chosen)
            return
        outside = np.flatnonzero(chosen & (address < window))
        if len(outside):
            at = outside[0]
            problem = f"{int(address[at]):#x} is no address of shared memory"
            raise MemoryFault(f"{batch.describe(at)}: {problem}")
        batch.write(self.target, address - window, chosen)


class _Meeting(_Step, abc.ABC):
    """An instruction at which threads wait for others."""

    def follow(self, batch: Batch, pc: int, active: np.ndarray, chosen: np.ndarray) -> None:
        batch.arrive(pc + 1, active & ~batch.held)
        if batch.held.any():
            batch.parked[pc] = batch.held
            batch.held = batch.nobody


class _Barrier(_Meeting):
    """Wait for all threads of a block, all of them at one instruction (9.7.13 "barrier.sync").

    Hardware takes warps that come to another instruction of the same number for present, and does
    not wait for threads that have exited. Whoever writes a barrier means neither.
    """

    missing = "threads of its block never come here"

    def __init__(self, instruction: ptx.Instruction):
        super().__init__(instruction)
        (number,) = self.operands(1)
        if not isinstance(number, ptx.Immediate) or not 0 <= number.value < 16:
            raise UnknownInstruction(f"operand {number} for a barrier")

    def execute(self, batch: Batch, chosen: np.ndarray) -> None:
        masks = np.stack([chosen, batch.everyone, batch.exited & batch.everyone])
        come, members, left = masks.reshape(3, batch.blocks, -1)
        alone = come & left.any(1, keepdims=True)
        if alone.any():
            at = int(np.flatnonzero(alone)[0])
            raise Deadlock(f"{batch.describe(at)}: threads of its block have exited")
        complete = ~(come ^ members).any(1)
        batch.shared.end_epoch(complete)
        batch.held = (come & ~complete[:, None]).ravel()


class _Collective(_Meeting):
    """An instruction of lanes together: each waits for all lanes that its membermask names."""

    members: object
    missing = "lanes of its membermask never come here"

    def execute(self, batch: Batch, chosen: np.ndarray) -> None:
        members = batch.read(self.members, "b32", chosen).reshape(-1, WARP)
        lane = np.arange(WARP, dtype=np.uint32)
        executing = chosen.reshape(-1, WARP)
        is_member = (members[:, :, None] >> lane & 1).astype(bool)  # (warp, thread, lane)
        outsiders = executing & ~is_member[:, lane, lane]
        if outsiders.any():
            at = int(np.flatnonzero(outsiders)[0])
            mask = int(members.flat[at])
            raise EmulatorError(f"{batch.describe(at)}: not in its own membermask {mask:#010x}")
        come = executing[:, None, :] & (members[:, :, None] == members[:, None, :])
        missing = is_member & ~batch.exited.reshape(-1, WARP)[:, None, :] & ~come
        batch.held = chosen & missing.any(2).ravel()
        chosen = chosen & ~batch.held
        if chosen.any():
            self.exchange(batch, chosen, come & is_member)

    @abc.abstractmethod
    def exchange(self, batch: Batch, chosen: np.ndarray, takes_part: np.ndarray) -> None:
        """Give the `chosen` threads their results.

        Args:
            batch: the threads.
            chosen: (threads,), bool.
            takes_part: (warp, thread, lane), bool: the lanes that each thread is together with.
        """


class _Shuffle(_Collective):
    """Exchange registers between the lanes of a warp (9.7.9 "shfl.sync")."""

    def __init__(self, instruction: ptx.Instruction, mode: str):
        super().__init__(instruction)
        self.mode = mode
        self.target, self.value, *self.controls, self.members = self.operands(5)
        result = self.target.first if isinstance(self.target, ptx.Pair) else self.target
        for operand in (result, self.value, *self.controls, self.members):
            _check_width(operand, "b32", False, False)

    def exchange(self, batch: Batch, chosen: np.ndarray, takes_part: np.ndarray) -> None:
        index, clamp = (
            batch.read(operand, "b32", chosen).reshape(-1, WARP) for operand in self.controls
        )
        lane = np.arange(WARP, dtype=np.uint32)
        value = batch.read(self.value, "b32", chosen).reshape(-1, WARP)
        segment = clamp >> np.uint32(8) & 31
        last = (lane & segment) | (clamp & 31 & ~segment)
        if self.mode == "up":
            source = lane.astype(np.int64) - (index & 31)
            inside = source >= last
        elif self.mode == "down":
            source = lane.astype(np.int64) + (index & 31)
            inside = source <= last
        elif self.mode == "bfly":
            source = lane ^ (index & 31)
            inside = source <= last
        else:
            source = (lane & segment) | (index & 31 & ~segment)
            inside = source <= last
        source = np.where(inside, source, lane).astype(np.intp)
        result = np.take_along_axis(value, source, 1).ravel()
        # What an inactive lane holds is undefined, and an error once something uses it.
        defined = np.take_along_axis(takes_part, source[:, :, None], 2).ravel()
        undefined = np.where(defined, np.uint32(0), ~np.uint32(0))
        target = self.target
        if isinstance(target, ptx.Pair):
            batch.write(target.second, inside.ravel(), chosen)
            target = target.first
        batch.write(target, result, chosen, undefined)


class _Vote(_Collective):
    """Combine a predicate over the lanes of a warp (9.7.13 "vote.sync")."""

    def __init__(self, instruction: ptx.Instruction, mode: str):
        super().__init__(instruction)
        self.mode = mode
        self.target, self.value, self.members = self.operands(3)
        _check_width(self.target, "b32" if mode == "ballot" else "pred", False, False)
        _check_width(self.value, "pred", False, False)
        _check_width(self.members, "b32", False, False)

    def exchange(self, batch: Batch, chosen: np.ndarray, takes_part: np.ndarray) -> None:
        value = batch.read(self.value, "pred", chosen).reshape(-1, 1, WARP)
        agrees, differs = value & takes_part, ~value & takes_part
        if self.mode == "ballot":
            result = np.packbits(agrees, axis=2, bitorder="little").view(np.uint32)
        elif self.mode == "any":
            result = agrees.any(2)
        elif self.mode == "all":
            result = ~differs.any(2)
        else:
            result = ~(agrees.any(2) & differs.any(2))
        batch.write(self.target, result.ravel(), chosen)


class _Branch(_Step):
    """Jump to a label (9.7.12 "bra")."""

    def __init__(self, instruction: ptx.Instruction, kernel: ptx.Kernel):
        super().__init__(instruction)
        (label,) = self.operands(1)
        if not isinstance(label, ptx.Symbol) or label.name not in kernel.labels:
            raise UnknownInstruction(f"unknown label {label}")
        self.target = kernel.labels[label.name]

    def follow(self, batch: Batch, pc: int, active: np.ndarray, chosen: np.ndarray) -> None:
        batch.arrive(self.target, chosen)
        batch.arrive(pc + 1, active & ~chosen)


class _Exit(_Step):
    """End the thread (9.7.12 "ret", "exit", which are the same in a kernel)."""

    def follow(self, batch: Batch, pc: int, active: np.ndarray, chosen: np.ndarray) -> None:
        batch.exited = batch.exited | chosen
        batch.arrive(pc + 1, active & ~chosen)
        # Nobody waits any longer for those that left.
        for place, mask in batch.parked.items():
            batch.ready[place] = mask
        batch.parked = {}


class Batch:
    """The threads of some blocks, padded to whole warps, and their registers and memory.

    Args:
        program: what they run.
        grid: blocks of the launch, by dimension.
        block: threads of a block, by dimension.
        arguments: the bytes of each kernel parameter.
        memory: of the device.
        blocks: numbers of the blocks in the grid.
    """

    def __init__(
        self,
        program: Program,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        arguments: Sequence[bytes],
        memory: Memory,
        blocks: np.ndarray,
    ):
        self.program = program
        self.arguments = arguments
        self.memory = memory
        threads = block[0] * block[1] * block[2]
        padded = -(-threads // WARP) * WARP
        self.blocks = len(blocks)
        self.size = len(blocks) * padded
        in_block = np.tile(np.arange(padded), len(blocks))
        in_grid = np.repeat(blocks, padded)
        self.numbers = (in_grid * threads + in_block).astype(np.int32)
        self.everyone = in_block < threads
        self.nobody = np.zeros(self.size, bool)
        self.thread = _coordinates(in_block, block)
        self.block = _coordinates(in_grid, grid)
        self.special = {
            f"%{name}.{axis}": values.astype(np.uint32)
            for name, coordinates in (
                ("tid", self.thread),
                ("ctaid", self.block),
                ("ntid", [np.full(self.size, n) for n in block]),
                ("nctaid", [np.full(self.size, n) for n in grid]),
            )
            for axis, values in zip("xyz", coordinates, strict=True)
        }
        self.special["%laneid"] = (in_block % WARP).astype(np.uint32)
        self.special["%warpid"] = (in_block // WARP).astype(np.uint32)
        size = (self.size, program.kernel.local_size)
        variables = ((v.name, program.shared[v.name], v.size) for v in program.kernel.shared)
        self.shared = SharedMemory(variables, len(blocks), padded)
        self.local, self.local_written = np.zeros(size, np.uint8), np.zeros(size, bool)
        self.registers: dict[str, np.ndarray] = {}
        self.undefined: dict[str, np.ndarray] = {}  # bits, of registers not wholly defined
        self.ready: dict[int, np.ndarray] = {0: self.everyone}  # program counter -> threads
        self.parked: dict[int, np.ndarray] = {}  # threads that wait for others
        self.held = self.nobody
        self.exited = ~self.everyone
        self.waited = self.nobody if program.waits else self.everyone
        self.current = program.kernel.instructions[0]

    def run(self, watched: int | None = None) -> None:
        """Run all threads to their end, and print what the `watched` one does.

        Raises:
            EmulatorError: the kernel does what it must not.
        """
        steps = self.program.steps
        while self.ready:
            pc = min(self.ready)
            active = self.ready.pop(pc)
            if pc == len(steps):
                raise EmulatorError(f"{self.program.kernel.label}: ran past its last instruction")
            step = steps[pc]
            self.current = step.instruction
            chosen = active
            if step.guard is not None:
                chosen = active & self.read(step.guard, "pred", active)
            if chosen.any():
                step.execute(self, chosen)
                if watched is not None and chosen[watched]:
                    self._print(watched)
            step.follow(self, pc, active, chosen)
        if self.parked:
            pc = min(self.parked)
            self.current = steps[pc].instruction
            at = int(np.flatnonzero(self.parked[pc])[0])
            raise Deadlock(f"{self.describe(at)}: {steps[pc].missing}")

    def arrive(self, pc: int, threads: np.ndarray) -> None:
        """Let threads go on at a program counter, with those that are there already."""
        if threads is not self.everyone:
            if not threads.any():
                return
            for waiting in (self.ready, self.parked):
                if pc in waiting:
                    threads = threads | waiting.pop(pc)
            if (threads == self.everyone).all():
                threads = self.everyone
        self.ready[pc] = threads

    def read(self, operand: object, type_: str, chosen: np.ndarray) -> np.ndarray:
        """Return the operand of every thread as elements of a type.

        Raises:
            UndefinedValue: one of the `chosen` threads has not defined it.
        """
        dtype, width = isa.TYPES[type_]
        unsigned = UNSIGNED[width]
        if isinstance(operand, ptx.Register):
            if self.is_undefined(operand):
                bad = self.undefined_bits(operand, type_).astype(bool) & chosen
                if bad.any():
                    at = int(np.flatnonzero(bad)[0])
                    raise UndefinedValue(f"{self.describe(at)}: {operand.name} is undefined")
            bits = self.registers.get(operand.name)
            if bits is None:
                bits = np.zeros(self.size, unsigned)
            bits = bits if operand.width == width else bits.astype(unsigned)
            return ~bits if operand.negated else bits.view(dtype)
        if isinstance(operand, ptx.Immediate):
            mask = (1 << width) - 1
            return np.full(self.size, operand.value & mask, unsigned).view(dtype)
        if isinstance(operand, ptx.Special):
            return self.special[operand.name].view(dtype)
        if isinstance(operand, ptx.Symbol):
            for addresses in (self.program.kernel.local, self.program.shared):
                if operand.name in addresses:
                    return np.full(self.size, addresses[operand.name], unsigned).view(dtype)
        if isinstance(operand, ptx.Vector):  # 9.7.9 "mov": packs, low elements first
            part = width // len(operand.elements)
            elements = [self.read(e, f"b{part}", chosen) for e in operand.elements]
            return np.stack(elements, 1).view(unsigned)[:, 0].view(dtype)
        raise UnknownInstruction(f"{self.describe(0)}: operand {operand}")

    def is_undefined(self, operand: object) -> bool:
        """Return whether some thread has some bit of it undefined."""
        if isinstance(operand, ptx.Vector):
            return any(self.is_undefined(element) for element in operand.elements)
        return isinstance(operand, ptx.Register) and (
            operand.name not in self.registers or operand.name in self.undefined
        )

    def undefined_bits(self, operand: object, type_: str) -> np.ndarray:
        """Return ones for those bits of what `read` returns that nothing defined."""
        width = isa.TYPES[type_].width
        unsigned = UNSIGNED[width]
        if isinstance(operand, ptx.Register):
            if operand.name not in self.registers:
                return np.full(self.size, ~unsigned(0))
            undefined = self.undefined.get(operand.name)
            if undefined is not None:
                return undefined.astype(unsigned)
        elif isinstance(operand, ptx.Vector):
            part = f"b{width // len(operand.elements)}"
            elements = [self.undefined_bits(e, part) for e in operand.elements]
            return np.stack(elements, 1).view(unsigned)[:, 0]
        return np.zeros(self.size, unsigned)

    def write(
        self,
        operand: object,
        values: np.ndarray,
        chosen: np.ndarray,
        undefined: np.ndarray | None = None,
    ) -> None:
        """Give the `chosen` threads their elements of `values`.

        Args:
            operand: a register, a vector of them, or none.
            values: (threads,).
            chosen: (threads,), bool.
            undefined: ones for those bits of `values` that are not defined; none by default.
        """
        if isinstance(operand, ptx.Sink):
            return
        if isinstance(operand, ptx.Vector):  # 9.7.9 "mov": unpacks
            width = 8 * values.itemsize // len(operand.elements)
            for i, element in enumerate(operand.elements):
                part: isa.Array = values.view(UNSIGNED[width]).reshape(self.size, -1)[:, i]
                bits_left: isa.Array | None = None
                if undefined is not None:
                    bits_left = undefined.view(UNSIGNED[width]).reshape(self.size, -1)[:, i]
                self.write(element, np.ascontiguousarray(part), chosen, bits_left)
            return
        if not isinstance(operand, ptx.Register):
            raise UnknownInstruction(f"{self.describe(0)}: result to {operand}")
        unsigned = UNSIGNED[operand.width]
        if values.nbytes < self.size * np.dtype(unsigned).itemsize:
            # 9.4.1: results extend to wider registers by the sign of their type.
            is_signed = values.dtype.kind == "i"
            values = values.astype(SIGNED[operand.width] if is_signed else unsigned)
        bits: isa.Array = values.view(unsigned)
        name = operand.name
        if chosen is self.everyone and undefined is None:
            self.registers[name] = bits
            self.undefined.pop(name, None)
            return
        type_ = "pred" if operand.width == ptx.PREDICATE else f"b{operand.width}"
        undefined = unsigned(0) if undefined is None else undefined.astype(unsigned)
        undefined = np.where(chosen, undefined, self.undefined_bits(operand, type_))
        before = self.registers.get(name)
        self.registers[name] = bits if before is None else np.where(chosen, bits, before)
        self.undefined.pop(name, None)
        if undefined[self.everyone].any():
            self.undefined[name] = undefined

    def index(self, block: tuple[int, int, int], thread: tuple[int, int, int]) -> int | None:
        """Return where a thread is in this batch, None if it is not."""
        at = self.everyone.copy()
        for values, value in zip((*self.block, *self.thread), (*block, *thread), strict=True):
            at &= values == value
        return int(np.argmax(at)) if at.any() else None

    def describe(self, at: int) -> str:
        """Describe a thread and the instruction that it is at."""
        block, thread = (
            "(" + ", ".join(str(int(axis[at])) for axis in place) + ")"
            for place in (self.block, self.thread)
        )
        line = f"line {self.current.line} of {self.program.kernel.label}"
        return f"block {block} thread {thread}: {line}: `{self.current.text}`"

    def describer(self, threads: np.ndarray) -> Callable[[int], str]:
        """Return the function that describes a thread by its index in `threads`."""
        return lambda i: self.describe(threads[i])

    def values(self, at: int) -> dict[str, int]:
        """Return the registers of one thread, those that it has defined."""
        return {
            name: int(bits[at])
            for name, bits in self.registers.items()
            if name not in self.undefined or not self.undefined[name][at]
        }

    def _print(self, at: int) -> None:
        registers = self.values(at)
        results = [
            f"{operand.name} = {registers[operand.name]:#x}"
            for operand in _flatten(self.current.operands[:1])
            if isinstance(operand, ptx.Register) and operand.name in registers
        ]
        print(f"{self.current.line:5}  {self.current.text:72}  {', '.join(results)}")


def _flatten(operands: Iterable[object]) -> Iterator[object]:
    for operand in operands:
        yield from operand.elements if isinstance(operand, ptx.Vector) else (operand,)


def _coordinates(linear: np.ndarray, extents: tuple[int, int, int]) -> list[np.ndarray]:
    x, y, _ = extents
    return [linear % x, linear // x % y, linear // (x * y)]


def run(
    program: Program,
    grid: tuple[int, int, int],
    block: tuple[int, int, int],
    arguments: Sequence[bytes],
    memory: Memory,
    *,
    only: Sequence[tuple[int, int, int]] | None = None,
    watch: tuple[tuple[int, int, int], tuple[int, int, int]] | None = None,
) -> None:
    """Launch a kernel and run it to its end.

    Args:
        program: the kernel.
        grid: blocks of the launch, by dimension.
        block: threads of a block, by dimension.
        arguments: the bytes of each kernel parameter.
        memory: of the device, with the tensors that the arguments point to.
        only: blocks to run, those of the others being left out; all by default.
        watch: a block and a thread whose instructions are printed with their results.

    Raises:
        EmulatorError: the launch does not fit the kernel, or the kernel does what it must not.
        ValueError: a block of `only` or `watch` is not in the grid, or a thread not in its block.
    """
    kernel = program.kernel
    if kernel.block is not None and tuple(block) != kernel.block:
        raise EmulatorError(f"{kernel.label}: block {block}, compiled for {kernel.block}")
    threads = math.prod(block)
    allowed = min(kernel.max_threads or MAX_THREADS, MAX_THREADS)
    if threads > allowed:
        raise EmulatorError(f"{kernel.label}: block {block}, at most {allowed} threads are allowed")
    sizes, expected = [len(a) for a in arguments], [p.size for p in kernel.parameters]
    if sizes != expected:
        raise EmulatorError(f"{kernel.label}: arguments of {sizes} bytes, expected {expected}")
    if min(*grid, *block) < 1:
        raise EmulatorError(f"{kernel.label}: empty grid {grid} or block {block}")
    _check_inside("only", "block", only or (), "grid", grid)
    if watch is not None:
        _check_inside("watch", "block", watch[:1], "grid", grid)
        _check_inside("watch", "thread", watch[1:], "block", block)
    memory.begin_launch()
    if only is None:
        blocks = np.arange(grid[0] * grid[1] * grid[2])
    else:
        blocks = np.array([x + grid[0] * (y + grid[1] * z) for x, y, z in only])
    per_batch = max(1, THREADS_PER_BATCH // threads)
    with np.errstate(all="ignore"):
        for start in itertools.count(0, per_batch):
            if start >= len(blocks):
                break
            chosen = blocks[start : start + per_batch]
            batch = Batch(program, grid, block, arguments, memory, chosen)
            batch.run(None if watch is None else batch.index(*watch))


def _check_inside(
    name: str,
    kind: str,
    coordinates: Iterable[tuple[int, int, int]],
    whole: str,
    extents: tuple[int, int, int],
) -> None:
    """Check the coordinates of blocks in the grid, or of threads in their block."""
    for place in coordinates:
        if not all(0 <= at < extent for at, extent in zip(place, extents, strict=True)):
            raise ValueError(
                f"{name}: expected a {kind} of the {whole} {tuple(extents)}, got {place}"
            )
