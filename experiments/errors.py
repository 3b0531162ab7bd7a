"""Errors that are a person's or a machine's doing. Each carries one line for that person; the command
line turns the class into an exit code and never shows a traceback for them."""


class LabError(Exception):
    """Base of the errors below."""


class SpecError(LabError):
    """A specification, a name or an option that means nothing here."""


class CorpusError(LabError):
    """Text that cannot be used: missing, empty, binary, not UTF-8, too short."""


class EnvironmentLacksError(LabError):
    """The machine lacks something that was asked for: a GPU, a kernel, a writable folder, room on disk."""


class RunFailedError(LabError):
    """A run that produced no usable result."""
