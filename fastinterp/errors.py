"""The exceptions, one type per kind of failure. A message says what failed, where, expected and got, and the remedy.

The command line exits with the exit code of the type; users of the library catch `FastinterpError` or one type.
"""


class FastinterpError(Exception):
    """The base class of the exceptions of fastinterp."""

    exit_code = 1


class UsageError(FastinterpError):
    """An invalid argument, from the command line or from Python."""

    exit_code = 2


class RecipeError(UsageError):
    """An invalid recipe. Attributes: path (`$.models[0]`), file, line (1-based), each or None."""

    def __init__(self, message: str, *, path: str | None = None, file: str | None = None, line: int | None = None):
        self.message, self.path, self.file, self.line = message, path, file, line
        source = f"{file}:{line}" if file and line else file
        where = f"{path} ({source})" if path and source else path or source
        super().__init__(f"{message} - at {where}" if where else message)


class MethodError(RecipeError):
    """Models or parameters that the merge method does not accept."""


class BackendError(UsageError):
    """A backend or instruction set that was requested by name and is not available, or a device that failed."""


class OutOfMemory(BackendError):
    """A device has too little memory."""


class CheckpointError(FastinterpError):
    """A checkpoint that is missing, damaged or malicious. Attributes: file, tensor, each or None."""

    exit_code = 3

    def __init__(self, message: str, *, file: str | None = None, tensor: str | None = None):
        self.message, self.file, self.tensor = message, file, tensor
        super().__init__(f"{file}: {message}" if file else message)


class UnreadableError(CheckpointError):
    """A file or folder of a checkpoint that may be sound: the operating system could not open it, read it or look."""


class ShapeError(CheckpointError):
    """Checkpoints whose shapes, dtypes or sets of tensors are not compatible."""


class StorageError(FastinterpError):
    """The operating system could not read or write."""

    exit_code = 4


NO_MEMORY = "not enough memory. Allow more (ulimit -v, control groups), or use a larger machine"


class OutputError(StorageError):
    """The output cannot be written, or must not be: it exists, contains an input, or the disk is full."""


class RankError(FastinterpError):
    """Another process of a distributed merge failed, or cannot be reached."""

    exit_code = 4
