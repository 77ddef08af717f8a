"""Errors as the command line prints them: those of a recipe all at once, as lines of text or as JSON."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from fastinterp.errors import CheckpointError, FastinterpError, RecipeError

if TYPE_CHECKING:
    from fastinterp.inspect.check_result import CheckResult, Finding
    from fastinterp.recipe.document import Source

RECIPE_KEYS = ("dtype", "rounding", "seed", "missing", "channels", "quantize")  # options that replace a recipe's keys
OUTCOME = (
    "fastinterp.outcome"  # key in click's Context.meta: list[str], notes about the output for the message of a failure
)
_SHOWN = 3  # models in the name of a merge that has no recipe
FOUND = (
    "fastinterp.found"  # key in click's Context.meta: CheckResult, with all errors of the recipe of a failed command
)


@contextmanager
def told_together(recipe: Source | None, keys: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Context manager: if the recipe or its models end the command with an error, all their errors are told.

    recipe  as of `merge`; None: there is none. Of a mapping, which no user wrote, places are not told, and its name is
            that of the command, with the models
    keys    options of the command, of which those of RECIPE_KEYS, where given, change the recipe
    """
    try:
        yield
    except (RecipeError, CheckpointError):
        if recipe is not None and _readable_again(recipe):
            from fastinterp.inspect.check import check_with
            from fastinterp.messages import listed

            given = {key: value for key, value in (keys or {}).items() if key in RECIPE_KEYS}
            with suppress(FastinterpError):  # the error that ended the command is told
                found = check_with(recipe, given)
                context = click.get_current_context()
                if isinstance(recipe, Mapping):
                    name = f"{context.command_path} of {listed([m['model'] for m in recipe['models']], _SHOWN)}"
                    errors = tuple(replace(f, path=None, line=None) for f in found.errors)
                    found = replace(found, errors=errors, name=name)
                context.meta[FOUND] = found
        raise


def _readable_again(recipe: Source) -> bool:
    """Not the path of a pipe, as of `<(...)` in a shell: what it held is gone."""
    if not isinstance(recipe, str) or "\n" in recipe:
        return True
    try:
        return not stat.S_ISFIFO(os.stat(os.path.expanduser(recipe)).st_mode)
    except (OSError, ValueError):  # ValueError: a NUL in the path
        return True


def of_models(models: Sequence[str]) -> dict[str, Any]:
    """A recipe that merges these models: for its errors."""
    weighed = [{"model": name, "parameters": {"weight": 1.0}} for name in dict.fromkeys(models)]
    return {"merge_method": "linear", "models": weighed}


def lines(error: FastinterpError, message: str, found: CheckResult | None) -> list[tuple[str, str]]:
    """(kind, text) of each error: that which ended the command, and others of its recipe, in the order of its lines.

    message  of the error, as the command words it
    """
    others = _others(error, found)
    if found is None or not others:
        return [(type(error).__name__, message)]
    every = [(f.kind, _text(f, found.name)) for f in found.errors]
    if len(others) == len(found.errors):  # the error is none of those
        every.insert(0, (type(error).__name__, message))
    return every


def values(error: FastinterpError, message: str, found: CheckResult | None) -> dict[str, Any]:
    """The same as plain values, as `check --json` has them."""
    own = {
        "message": error.message if isinstance(error, RecipeError) else message,
        "kind": type(error).__name__,
        "path": getattr(error, "path", None),
        "line": getattr(error, "line", None),
        "exit_code": error.exit_code,
    }
    if found is None or not found.errors:
        return failed(own)
    every = found.as_dict()
    if len(_others(error, found)) == len(found.errors):
        every["wrong"].insert(0, own)
    return every


def failed(*wrong: dict[str, Any]) -> dict[str, Any]:
    """What a command with --json prints if it fails."""
    return {"ok": False, "wrong": list(wrong)}


def _others(error: FastinterpError, found: CheckResult | None) -> Sequence[Finding]:
    """The errors that were found beside this one."""
    if found is None:
        return ()
    message = error.message if isinstance(error, RecipeError) else str(error)
    message = message.partition(" - at $.")[0]  # planning adds the place in the recipe
    kind = type(error).__name__
    of_kind = [f for f in found.errors if f.kind == kind]
    same = next((f for f in of_kind if f.message.startswith(message)), None)
    if same is None:  # `check` may tell more tensors, and then the same remedy, which names a key, no option
        same = next((f for f in of_kind if _remedy(f.message) == _remedy(message)), None)
    return [f for f in found.errors if f is not same]


def _remedy(message: str) -> str:
    """The last sentence of a message, without what it quotes."""
    import re

    return re.sub("`[^`]*`", "``", message.rpartition(". ")[2])


def _text(finding: Finding, file: str) -> str:
    """The finding in a line, as the error itself has it."""
    if finding.path is None:
        return finding.message
    source = f"{file}:{finding.line}" if finding.line else file
    return f"{finding.message} - at {finding.path} ({source})"
