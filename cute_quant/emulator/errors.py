"""What the emulator reports. Every one of them is a defect: of a kernel, or of the emulator."""


class EmulatorError(Exception):
    """Anything that stops an emulated kernel."""


class UnknownInstruction(EmulatorError):
    """PTX that the emulator has no semantics for."""


class MemoryFault(EmulatorError):
    """An access that a kernel must not make."""


class UndefinedValue(EmulatorError):
    """The use of a register that nothing defined."""


class Deadlock(EmulatorError):
    """Threads that wait for others which never come."""
