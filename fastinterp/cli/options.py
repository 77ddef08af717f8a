"""Options that several commands have, and output to stdout and stderr."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from fastinterp.errors import StorageError, UsageError
from fastinterp.messages import plain, plain_lines

if TYPE_CHECKING:
    from fastinterp.execute.distributed.peers import Rank
    from fastinterp.output.hub_upload import Upload

F = TypeVar("F", bound=Callable[..., Any])


def from_stdin(ctx: click.Context, param: click.Parameter, path: str) -> str:
    """The text on stdin for `-`, else the path."""
    if path != "-":
        return path
    from fastinterp.recipe.document import MAX_BYTES

    try:
        raw = sys.stdin.buffer.read(MAX_BYTES + 1) if sys.stdin else b""  # None: it was closed before the start
        if len(raw) > MAX_BYTES:
            raise click.BadParameter(f"stdin has more than {MAX_BYTES} bytes, so it is hardly a recipe", ctx, param)
        return raw.decode("utf-8-sig") + "\n"  # with a newline it is a recipe, not a path
    except UnicodeDecodeError as error:
        raise click.BadParameter(f"stdin is not UTF-8 text (byte {error.start})", ctx, param) from None


recipe = click.argument("recipe", callback=from_stdin)
threads = click.option(
    "--threads", type=int, metavar="N", help="Number of CPU threads. Default: one per CPU, at most 32."
)
max_shard_size = click.option(
    "--max-shard-size",
    metavar="SIZE",
    help="Largest size of the tensor data in one output file. Default: one file for a model of one file, else 5GB.",
)
max_memory = click.option(
    "--max-memory", default="512MB", show_default=True, metavar="SIZE", help="Largest size of the scratch memory."
)
missing = click.option(
    "--missing",
    type=click.Choice(["error", "base", "skip"]),
    help="Tensors that not all models have in one shape: refuse, take the base's, or leave out. Default: error.",
)
channels = click.option(
    "--channels",
    type=click.Choice(["same", "first"]),
    help="first: convolutions with fewer input channels merge into the first ones of the others. Default: same.",
)
quantize = click.option(
    "--quantize",
    type=click.Choice(["none", "same"]),
    help="same: weights that are quantised in the base are quantised anew, in its format. Default: none, numbers.",
)
tokenizer_source = click.option(
    "--tokenizer-source",
    metavar="NAME",
    help="Vocabulary of the output: union, base or CKPT. Default: the models must have the same.",
)
as_json = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


def _go_offline(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        from fastinterp.checkpoint import hub

        hub.refuse("--offline was given")


def push(command: F) -> F:
    """Decorator: the options for an upload of the output."""
    help_ = "With --push-to: a new model is public. Default: private."
    command = click.option("--public", is_flag=True, help=help_)(command)
    return click.option(
        "--push-to", metavar="ORG/NAME", help="Upload the output folder to the Hugging Face Hub, when it is finished."
    )(command)


def upload(push_to: str | None, public: bool, out: str, force: bool) -> Upload | None:
    """The upload that --push-to asks for, before the merge. Raises: UsageError and OutputError, as Upload does."""
    if push_to is None:
        if public:
            raise UsageError("--public is about an upload: it goes with --push-to ORG/NAME")
        return None
    from fastinterp.output.hub_upload import Upload

    return Upload(push_to, out, public, force)


def uploaded(upload: Upload | None) -> str:
    """Upload after the merge; the address of what is there now, empty if there is nothing to upload.

    Raises: OutputError, as Upload.run does.
    """
    if upload is None:
        return ""
    from fastinterp.cli.faults import OUTCOME

    try:
        return upload.run()
    except KeyboardInterrupt:
        click.get_current_context().meta[OUTCOME] = [f"the output is complete; to upload it: {upload.command}"]
        raise


offline = click.option(
    "--offline", is_flag=True, expose_value=False, callback=_go_offline,
    help="Fetch nothing: models named by Hub ids are those in the Hub's cache, and addresses are not read.",
)  # fmt: skip


def _listens(ctx: click.Context, param: click.Parameter, quiet: bool) -> bool:
    """Print on stderr what a run tells at once, unless the command is quiet."""
    from fastinterp.messages import listen

    listen(None if quiet else tell)
    return quiet


quiet = click.option("--quiet", is_flag=True, callback=_listens, help="Print errors and warnings only.")

device = click.option(
    "--device",
    default="auto",
    show_default=True,
    metavar="NAME",
    help="Where to compute: cpu, cuda, cuda:0,1 or triton; auto: the one estimated to be faster.",
)
force = click.option(
    "--force",
    is_flag=True,
    help="Replace a checkpoint in the output folder, and files of the names that are written (README.md, config.json), "
    "or the output file. Other files stay. The report names what was removed or replaced.",
)
durable = click.option(
    "--durable",
    is_flag=True,
    help="Sync data before names: slower, but the output survives a crash of the machine. --force implies it.",
)
read = click.option(
    "--read",
    type=click.Choice(["auto", "pread", "mapped"]),
    default="auto",
    show_default=True,
    help="How files are read. mapped: the CPU's kernels read them where the page cache has them; tensors that are "
    "copied, and rows that are moved, are read by pread. Not of models elsewhere, or with an accelerator. auto: mapped "
    "for methods that read again what is in the page cache, else pread.",
)

_OUTPUT = (
    device,
    threads,
    max_shard_size,
    max_memory,
    read,
    click.option(
        "--dtype",
        metavar="NAME",
        help="Output dtype: float32, bfloat16, ...; q8_0 of GGUF models. Default: that of the recipe, else that of the "
        "inputs, or the one that holds all of theirs.",
    ),
    click.option(
        "--rounding",
        type=click.Choice(["nearest", "stochastic"]),
        help="Rounding of the output. Default: that of the recipe, else to nearest even.",
    ),
    click.option(
        "--seed",
        type=int,
        metavar="N",
        help="Seed of random masks and stochastic rounding. Default: that of the recipe, else 0.",
    ),
    missing,
    channels,
    quantize,
    force,
    durable,
    click.option(
        "--private",
        is_flag=True,
        help="Name no model in the receipt and the model card. Default: names without the folders of absolute paths.",
    ),
    click.option(
        "--verify-kept",
        is_flag=True,
        help="Where a killed run is resumed: compare all that it had written with its checksums, not a sample.",
    ),
    offline,
    quiet,
    as_json,
)
stream = click.option(
    "--stream",
    is_flag=True,
    help="Read models on the Hub while they are merged, without storing them: nothing but the output is written.",
)


def output(command: F) -> F:
    """Decorator: the options of a command that writes checkpoints, named like the keyword arguments of `merge`."""
    for option in reversed(_OUTPUT):
        command = option(command)
    return command


def rank() -> Rank | None:
    """The rank of this process, if torchrun or srun started it to share a merge with others; else None.

    Raises: BackendError, if their environment variables are incomplete.
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
            f"`{command}` runs in one process, but this is rank {me.rank} of {me.world}. Start it without "
            "torchrun or srun, or use `merge`, which several processes can share"
        )


def say(text: str, *, whole: bool = False) -> None:
    """Print a result on stdout, in lines; on a terminal none is cut inside a word. What does not print is escaped: this
    and `tell` are the only ways out.

    whole  no line is broken, whatever the width
    Raises: StorageError, if it cannot be written; a closed pipe (`| head`) ends the program without a message.
    """
    try:
        text = plain_lines(text)
        _print(text if whole else fitting(text, sys.stdout))
    except BrokenPipeError:
        raise  # click ends the program
    except OSError as error:
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # or Python fails again when it flushes stdout at exit
        raise StorageError(f"stdout cannot be written: {error.strerror}") from None


def tell(text: str, *, head: str = "") -> None:
    """Print lines on stderr: an error, a warning, what is going on. What does not print is escaped.

    head  a word in red before it, and a colon
    """
    start = f"{plain(head)}: " if head else ""
    text = fitting(start + plain_lines(text), sys.stderr)
    _print(click.style(plain(head), fg="red") + text.removeprefix(plain(head)) if head else text, err=True)


def fitting(text: str, stream: Any, less: int = 0) -> str:
    """The text for a stream: lines that a terminal would cut are broken between words.

    less  columns that are taken already
    """
    width = columns(stream)
    if width is None:
        return text
    from fastinterp.messages import broken

    return broken(text, width - less)


def columns(stream: Any) -> int | None:
    """The width of a terminal; None of what is none: lines have any length, for programs that read them."""
    from shutil import get_terminal_size

    return None if stream is None or not stream.isatty() else get_terminal_size().columns


def _print(text: str, *, err: bool = False) -> None:
    try:
        click.echo(text, err=err)
    except UnicodeEncodeError as error:  # a stream that is neither UTF-8 nor ASCII, which click makes UTF-8
        click.echo(text.encode(error.encoding, "backslashreplace").decode(error.encoding), err=err)


def say_json(value: Any) -> None:
    """Print `value` on stdout as JSON, with null for NaN and Inf. An object gets `"ok": true`, if it has no `ok`."""
    if isinstance(value, dict) and "ok" not in value:
        value = {"ok": True, **value}
    try:
        text = json.dumps(value, indent=2, allow_nan=False)
    except ValueError:
        text = json.dumps(_finite(value), indent=2, allow_nan=False)
    say(text, whole=True)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, (list, tuple)) else value
