"""What the commands have in common: where the output is named, several points after one option, and checkpoints where
a recipe belongs.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from fastinterp.errors import UsageError
from fastinterp.presence import exists, is_folder

F = TypeVar("F", bound=Callable[..., Any])

_POINTS = ("--alpha", "--alphas", "--grid")  # options whose value may be several numbers, separated by commas
_NUMBERS = re.compile(r"[-+]?[0-9.][-+0-9.,:eE]*")


class Command(click.Command):
    """A command that says how several numbers are given to one option: 0,0.5,1 and not 0 0.5 1."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        for i, argument in enumerate(args):
            option, equals, value = argument.partition("=")
            if option not in _POINTS:
                continue
            first = i + 1 if equals else i + 2
            value = value if equals else next(iter(args[i + 1 : i + 2]), "")
            last = first
            while last < len(args) and _NUMBERS.fullmatch(args[last]) and not os.path.exists(args[last]):
                last += 1
            if last > first and _NUMBERS.fullmatch(value.rpartition("=")[2]):
                every = ",".join(text.strip(",") for text in (value, *args[first:last]))
                raise click.UsageError(f"{option} takes one value, numbers separated by commas. Write {option} {every}")
        return super().parse_args(ctx, args)


def only_output(arguments: Sequence[str], option: str | None, usage: str) -> str:
    """The output of a command that takes it as its last argument or as -o.

    usage  the command with its arguments before the output, for messages
    Raises: UsageError, if there is none, or there are two.
    """
    named = [*map(repr, arguments), *([f"-o {option!r}"] if option is not None else [])]
    if len(named) > 1:
        raise UsageError(f"one output is needed, got {' and '.join(named)}")
    if not named:
        raise UsageError(f"the output is not named. Write it last, `fastinterp {usage} OUT`, or as -o OUT")
    return output_of(arguments[0] if option is None else option)


def output_of(name: str) -> str:
    """The output of a command by its name: of `file:///path` the path.

    Raises: UsageError, if it would be gone with the process.
    """
    from fastinterp.urls import path_of_file, scheme_of

    if scheme_of(name) == "memory":
        raise UsageError(
            f"{name}: this is the memory of one process, and gone when the command ends. Name a folder, or a place in "
            "a store, as s3://bucket/merged. From Python it can be used"
        )
    return path_of_file(name) or name


def refuse_checkpoints(command: str, recipe: str, others: Sequence[str] = ()) -> None:
    """Raises: UsageError, if checkpoints are named where a recipe belongs, with the command that merges them.

    others  further arguments, an output among them perhaps
    """
    if not _is_checkpoint(recipe):
        return
    models = [recipe, *(name for name in others if _is_checkpoint(name))]
    out = next((name for name in others if name not in models), "OUT")
    names = shlex.join(models)
    if len(models) == 1 and command != "merge":
        instead = f"To see what is in it: `fastinterp inspect {names}`"
    elif len(models) <= 2:
        pair = names if len(models) == 2 else f"{names} OTHER"
        instead = (
            f"For a point between two checkpoints: `fastinterp interpolate {pair} --alpha 0.5 -o {shlex.quote(out)}`"
        )
    else:
        instead = f"For their average: `fastinterp average {names} --in-order -o {shlex.quote(out)}`"
    raise UsageError(f"{command} takes a recipe, a YAML file, and {recipe!r} is a checkpoint. {instead}")


def _is_checkpoint(name: str) -> bool:
    """Whether this names a folder, a file of weights, or one of them with adapters."""
    from fastinterp.checkpoint.names import GGUF, PICKLES, WEIGHTS
    from fastinterp.urls import is_url

    if is_url(name):
        return not name.partition("?")[0].endswith((".yml", ".yaml", ".json")) or name.endswith("index.json")
    path = os.path.expanduser(name.partition("+")[0] if not exists(name) else name)
    return "\n" not in name and (is_folder(path) or path.endswith((WEIGHTS, GGUF, *PICKLES)))


def out_option(text: str, metavar: str = "OUT") -> Callable[[F], F]:
    """-o, the other way to name the output."""
    return click.option("-o", "--out", "named_out", metavar=metavar, help=text)
