"""What can go wrong, one type per family. Every message says what, where, expected and got, and what to do.

The command line turns a family into its exit code; a library user catches `FastinterpError` or one family.
"""


class FastinterpError(Exception):
    """The root of all errors that fastinterp raises on purpose."""

    exit_code = 1


class UsageError(FastinterpError):
    """An argument that makes no sense, from the command line or from Python."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe that cannot be carried out. Attributes: path (`$.models[0]`), file, line (1-based), each or None."""

    def __init__(self, message: str, *, path: str | None = None, file: str | None = None, line: int | None = None):
        self.message, self.path, self.file, self.line = message, path, file, line
        place = f"{file}:{line}" if file and line else file
        where = f"{path} ({place})" if path and place else path or place
        super().__init__(f"{message} - at {where}" if where else message)


class MethodError(RecipeError):
    """A merge method that was given the wrong models or parameters."""


class BackendError(UsageError):
    """A backend or instruction set that was asked for by name and cannot be used here."""


class OutOfMemory(BackendError):
    """A device has too little memory for what was asked of it."""


class CheckpointError(FastinterpError):
    """A checkpoint that is missing, damaged or hostile. Attributes: file, tensor, each or None."""

    exit_code = 3

    def __init__(self, message: str, *, file: str | None = None, tensor: str | None = None):
        self.message, self.file, self.tensor = message, file, tensor
        super().__init__(f"{file}: {message}" if file else message)


class ShapeError(CheckpointError):
    """Checkpoints that do not fit together: shapes, dtypes or sets of tensors differ."""


class StorageError(FastinterpError):
    """The operating system could not read or write."""

    exit_code = 4


class OutputError(StorageError):
    """The output cannot be written, or must not be: it exists, holds an input, or the disk is full."""


class RankError(FastinterpError):
    """Another process of a merge that several share failed, or cannot be reached."""

    exit_code = 4
