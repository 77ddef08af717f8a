"""The exceptions, one type per kind of failure. A message says what failed, where, expected and got, and the remedy.

The command line exits with the exit code of the type; users of the library catch `FastinterpError` or one type.
"""


class FastinterpError(Exception):
    """The base class of the exceptions of fastinterp. `except fastinterp.FastinterpError` catches all of them.

    exit_code  what the command line ends with: 2 to 4, by the kind of error
    """

    exit_code = 1


class UsageError(FastinterpError):
    """An invalid argument, from the command line or from Python; exit code 2."""

    exit_code = 2


class RecipeError(UsageError):
    """An invalid recipe; exit code 2.

    message  what is wrong, without the place
    path     the key in the recipe, `$.models[0]`; or None
    file     its file, or None
    line     in the file, from 1; or None
    """

    def __init__(self, message: str, *, path: str | None = None, file: str | None = None, line: int | None = None):
        self.message, self.path, self.file, self.line = message, path, file, line
        source = f"{file}:{line}" if file and line else file
        where = f"{path} ({source})" if path and source else path or source
        super().__init__(f"{message} - at {where}" if where else message)


class MethodError(RecipeError):
    """Models or parameters that the merge method does not accept; exit code 2. Attributes: those of `RecipeError`."""


class BackendError(UsageError):
    """A device or instruction set that was asked for and is not available, or a device that failed; exit code 2."""


class OutOfMemory(BackendError):
    """A device has too little memory."""


class CheckpointError(FastinterpError):
    """A checkpoint that is missing, damaged, malicious, or of a kind that is not read; exit code 3.

    message  what is wrong, without the file
    file     the file or folder, or None
    tensor   the name of the tensor, or None
    """

    exit_code = 3

    def __init__(self, message: str, *, file: str | None = None, tensor: str | None = None):
        self.message, self.file, self.tensor = message, file, tensor
        super().__init__(f"{file}: {message}" if file else message)


class UnreadableError(CheckpointError):
    """A file or folder of a checkpoint that may be sound: the operating system could not open it, read it or look."""


class ShapeError(CheckpointError):
    """Models whose shapes, dtypes or sets of tensors do not fit together; exit code 3. Attributes: those of
    `CheckpointError`.
    """


class StorageError(FastinterpError):
    """The operating system could not read or write; exit code 4."""

    exit_code = 4


NO_MEMORY = "not enough memory. Allow more (ulimit -v, control groups), or use a larger machine"


class OutputError(StorageError):
    """The output cannot be written, or must not be: it exists, has an input in it, or the disk is full; exit code 4."""


class RankError(FastinterpError):
    """Another process of a distributed merge failed, or cannot be reached."""

    exit_code = 4
