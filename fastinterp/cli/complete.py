"""What a shell offers for a word that is not complete: methods, dtypes, files. Imported only when a shell asks.

click offers commands, options and the words of a choice by itself; here is what it cannot know of the other values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import click
from click.shell_completion import CompletionItem

_Offer = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]
_FOLDERS = ("DIR",)  # metavars


def offered(command: click.Command) -> click.Command:
    """The command, whose text values are completed from now on."""
    for param in command.params:
        if isinstance(param.type, click.types.StringParamType):
            offer = _by_name(param)
            if offer is not None:
                param._custom_shell_complete = offer
    return command


def _by_name(param: click.Parameter) -> _Offer | None:
    """Of the values of an option or argument; None: nothing is offered."""
    names = {option.lstrip("-") for option in param.opts}
    if "dtype" in names:
        return _dtypes
    if "device" in names:
        return _devices
    if names & {"method", "name"}:
        return _methods
    if "parameter" in names:
        return _parameters
    if "tokenizer-source" in names:
        return _vocabularies
    if isinstance(param, click.Argument) or (param.metavar or "").rpartition("=")[2] in (
        "CKPT",
        "FILE",
        "OUT",
        "NEW",
        "PLACE",
        "EXE",
    ):
        return _files
    return _folders if param.metavar in _FOLDERS else None


def _files(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The shell's own completion of files and folders."""
    return [CompletionItem(incomplete, type="file")]


def _folders(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(incomplete, type="dir")]


def _methods(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    from fastinterp.methods import names, names_of_others

    return _starting(incomplete, sorted({*names(), *names_of_others()}))


def _dtypes(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    from fastinterp.ops.dtypes import DTYPE_NAMES

    return _starting(incomplete, DTYPE_NAMES)


def _devices(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return _starting(incomplete, ("auto", "cpu", "cuda", "triton"))


def _vocabularies(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return [*_starting(incomplete, ("union", "base")), *_files(ctx, param, incomplete)]


def _parameters(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """NAME= of each parameter of the method that the command line names, else of all methods."""
    from fastinterp.methods import find, names
    from fastinterp.recipe.schema import known_parameters

    method = ctx.params.get("method")
    known = [p.name for p in find(method).parameters] if method in names() else known_parameters()
    return _starting(incomplete, [f"{name}=" for name in known])


def _starting(incomplete: str, words: Iterable[str]) -> list[CompletionItem]:
    return [CompletionItem(word) for word in words if word.startswith(incomplete)]
