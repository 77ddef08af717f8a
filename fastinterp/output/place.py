"""The place of an output: a folder, or a file in one, and what is there."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from fastinterp.checkpoint.journal_file import journal_path
from fastinterp.checkpoint.names import quote
from fastinterp.errors import OutputError
from fastinterp.output import refusals
from fastinterp.output.leftovers import entries, left_by_runs
from fastinterp.output.names import place_of
from fastinterp.output.old_checkpoint import old_checkpoint
from fastinterp.presence import exists, is_folder, is_there
from fastinterp.urls import mistyped


class Place:
    """Where an output goes. The arguments are those of OutFolder.

    name  as it was given
    path  the folder, links resolved
    file  the name of the file in it, if the output is one file
    Raises: OutputError, if no file can be called so.
    """

    def __init__(
        self, path: str | os.PathLike[str], inputs: Sequence[str | os.PathLike[str]], names: Iterable[str] = ()
    ):
        self.name = os.fspath(path)
        if not self.name:
            raise OutputError("the name of the output folder is empty. Give the name of a new folder")
        if (meant := mistyped(self.name)) and not os.path.exists(self.name.partition("/")[0]):
            raise OutputError(f"{quote(self.name)} is no address, and hardly the name of a folder.{meant}")
        folder, self.file = place_of(path)
        try:
            self.path = Path(os.path.realpath(folder))
        except (OSError, ValueError) as error:  # ValueError: a NUL
            raise OutputError(f"{quote(self.name)}: this path cannot be used: {error}") from None
        self._refuse_name()
        self._names = {self.file} if self.file else set(names)
        self._inputs = inputs
        self._created: list[Path] = []  # folders, outermost first

    def _refuse_name(self) -> None:
        """Names may be too long for the system, say. What is in a folder that is missing yet is refused later."""
        try:
            with suppress(FileNotFoundError, NotADirectoryError):
                os.lstat(self.path / self.file if self.file else self.path)
        except (OSError, ValueError) as error:  # ValueError: a NUL, or no valid Unicode
            why = getattr(error, "strerror", None) or error
            raise OutputError(f"{quote(self.name)}: this path cannot be used: {why}") from None

    @property
    def _journal_path(self) -> Path:
        return journal_path(self.path, self.file)

    def _error(self, message: str) -> OutputError:
        return OutputError(f"{self.name}: {message}")

    def _is_new(self) -> bool:
        """Whether there is nothing in the place of the output."""
        if self.file:
            return not is_there(self.path / self.file)
        return not (is_folder(self.path) and os.listdir(self.path))

    def _present(self, every: Sequence[str]) -> list[str]:
        """Of the names in the folder, those that no run left."""
        left = set(left_by_runs(self.path, self.file, every))
        return [n for n in every if n not in left]

    def _about_contents(self, *, force: bool) -> str:
        """Why what is there is not replaced; empty, if it may be. Raises: OSError."""
        if not is_folder(self.path):
            return ""
        if self.file:
            return refusals.about_file(self.path, self.file, self._inputs, force=force)
        every = entries(self.path, self._names)
        return refusals.about_contents(self.path, every, self._present(every), self._inputs, self._names, force=force)

    def _replaced(self, new: Collection[str]) -> tuple[str, ...]:
        """The files that are moved aside: weights first, and their index after them. While one of its files is missing,
        readers refuse a checkpoint. One file replaces another at once.
        """
        if self.file:
            return ()
        every = entries(self.path, self._names)
        old, _ = old_checkpoint(self.path, self._present(every), self._names)
        return (*old, *(n for n in every if n in new and n not in old))

    def left(self) -> list[str]:
        """The paths that have to be removed to be rid of an output that was left. Raises: OSError."""
        every = entries(self.path, self._names)
        if not self.file and not self._present(every):
            return [self.name]
        return [os.fspath(self.path / name) for name in left_by_runs(self.path, self.file, every)]

    def _make_folders(self) -> None:
        missing = []
        folder = self.path
        while not exists(folder):
            missing.append(folder)
            folder = folder.parent
        try:
            for folder in reversed(missing):
                folder.mkdir(exist_ok=True)
                self._created.append(folder)
        except OSError as error:
            raise self._error(f"the folder cannot be created: {error.strerror}") from error
