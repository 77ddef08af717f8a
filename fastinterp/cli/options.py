"""What the commands share: options, and how results get to stdout."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from fastinterp.errors import StorageError, UsageError

if TYPE_CHECKING:
    from fastinterp.execute.distributed.peers import Rank

F = TypeVar("F", bound=Callable[..., Any])


def _from_stdin(ctx: click.Context, param: click.Parameter, given: str) -> str:
    """The text on stdin for `-`; a recipe's path otherwise."""
    if given != "-":
        return given
    try:
        return sys.stdin.buffer.read().decode("utf-8-sig") + "\n"  # with a newline it is a recipe, not a path
    except UnicodeDecodeError as error:
        raise click.BadParameter(f"stdin is not UTF-8 text (byte {error.start})", ctx, param) from None


recipe = click.argument("recipe", callback=_from_stdin)
threads = click.option("--threads", type=int, metavar="N", help="Default: one per CPU, at most 32.")
max_shard_size = click.option(
    "--max-shard-size", default="5GB", show_default=True, metavar="SIZE", help="Tensor data in one output file."
)
max_memory = click.option(
    "--max-memory", default="512MB", show_default=True, metavar="SIZE", help="Bound of the scratch memory."
)
as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout, and nothing else there.")
quiet = click.option("--quiet", is_flag=True, help="Print errors and warnings only.")

_OUTPUT = (
    click.option(
        "--device",
        default="auto",
        show_default=True,
        metavar="NAME",
        help="cpu, cuda, cuda:0,1, triton; auto: what should be faster.",
    ),
    threads,
    max_shard_size,
    max_memory,
    click.option(
        "--dtype", metavar="NAME", help="Store float32, bfloat16, ...; default: as the inputs, or as the recipe says."
    ),
    click.option("--rounding", type=click.Choice(["nearest", "stochastic"]), help="Default: nearest, to even."),
    click.option(
        "--seed", type=int, metavar="N", help="Of random keeps and stochastic rounding. Default: the recipe's, else 0."
    ),
    click.option("--force", is_flag=True, help="Replace a checkpoint that is already there."),
    click.option("--durable", is_flag=True, help="fsync all files: slower, but survives a crash of the machine."),
    quiet,
    as_json,
)


def output(command: F) -> F:
    """All options of a command that writes checkpoints. Their names are the keyword arguments of `fastinterp.merge`."""
    for option in reversed(_OUTPUT):
        command = option(command)
    return command


def rank() -> Rank | None:
    """This process among those that torchrun or srun started to merge together; None if it is alone.

    Raises: BackendError, if what they say is incomplete.
    """
    if not {"RANK", "TORCHELASTIC_RUN_ID", "SLURM_STEP_ID"} & os.environ.keys():
        return None
    from fastinterp.execute.distributed.peers import started

    return started()


def refuse_ranks(command: str) -> None:
    """Raises: UsageError, if this process is one of several."""
    me = rank()
    if me is not None:
        raise UsageError(
            f"`{command}` runs in one process, but this is rank {me.rank} of {me.world}. Start it once, without "
            "torchrun or srun; or write a recipe and `merge` it, which all ranks share"
        )


def say(text: str) -> None:
    """Print a result on stdout.

    Raises: StorageError, if it cannot be written; a reader that has gone away (`| head`) ends the program quietly.
    """
    try:
        click.echo(text)
    except BrokenPipeError:
        raise  # click ends the program
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python fails once more when it ends
        raise StorageError(f"stdout cannot be written: {error.strerror}") from None


def say_json(value: Any) -> None:
    """Print `value` on stdout as JSON. NaN and Inf, which JSON does not have, become null."""
    try:
        text = json.dumps(value, indent=2, allow_nan=False)
    except ValueError:
        text = json.dumps(_finite(value), indent=2, allow_nan=False)
    say(text)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, (list, tuple)) else value
