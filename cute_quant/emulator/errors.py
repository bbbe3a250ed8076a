"""Errors of the emulator: each reports a defect, of a kernel or of the emulator."""


class EmulatorError(Exception):
    """Base of the errors that stop an emulated kernel."""


class UnknownInstruction(EmulatorError):
    """PTX that the emulator has no semantics for."""


class MemoryFault(EmulatorError):
    """An access out of bounds, misaligned, of undefined bytes, or in a race."""


class UndefinedValue(EmulatorError):
    """The use of a register that nothing defined."""


class Deadlock(EmulatorError):
    """Threads that wait for others which never come."""
