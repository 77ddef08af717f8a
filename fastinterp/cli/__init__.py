"""The command line. A command's module is imported when the command runs: `fastinterp --version` imports none."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from types import FrameType, TracebackType
from typing import Any

import click

from fastinterp._version import __version__
from fastinterp.cli.faults import OUTCOME
from fastinterp.errors import NO_MEMORY, CheckpointError, FastinterpError, StorageError, UsageError
from fastinterp.urls import public

# The commands in the order of --help, with their modules.
_MODULES = {
    "merge": "fastinterp.cli.merge",
    "interpolate": "fastinterp.cli.merge",
    "average": "fastinterp.cli.average",
    "sweep": "fastinterp.cli.sweep",
    "extract-lora": "fastinterp.cli.lora",
    "upload": "fastinterp.cli.upload",
    "verify": "fastinterp.cli.verify",
    "replay": "fastinterp.cli.verify",
    "check": "fastinterp.cli.inspect",
    "explain": "fastinterp.cli.inspect",
    "inspect": "fastinterp.cli.inspect",
    "diff": "fastinterp.cli.inspect",
    "plot": "fastinterp.cli.explore",
    "explore": "fastinterp.cli.explore",
    "methods": "fastinterp.cli.info",
    "doctor": "fastinterp.cli.info",
    "bench": "fastinterp.bench.command",
}
_JSON = "fastinterp.json"  # key in click's Context.meta: bool, whether the command has --json


# Of a terminal that is closed; of Ctrl-\, and of a limit on processor time, which would write the memory to a file.
_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGXCPU)
_stopped: list[BaseException] = []  # what such a signal raised


class _Stopped(KeyboardInterrupt):
    """A signal that ends the program, as an exception in the main thread, so that context managers clean up."""

    def __init__(self, number: int):
        super().__init__(number)
        self.exit_code = 128 + number


@contextmanager
def errors_reported(ctx: click.Context, worded: Callable[[str], str] = str, *, as_json: bool = False) -> Iterator[None]:
    """Context manager: an exception of the package ends the program with its exit code and a line on stderr for each
    error; or with JSON on stdout.

    worded  its message, as the command words it
    """
    try:
        yield
    except BrokenPipeError:
        raise  # of stdout: click ends the program
    except (FastinterpError, OSError, MemoryError, RecursionError, ImportError) as error:
        if isinstance(error, ImportError) and "failed to map segment" not in str(error):  # of a shared library
            if not _stopped:
                raise
            _say_interrupted(ctx, _stopped[-1], as_json)
        from fastinterp.cli import faults, options
        from fastinterp.messages import plain

        known = error if isinstance(error, FastinterpError) else of_the_system(error)
        message = "; ".join([worded(str(known)), *ctx.meta.get(OUTCOME, [])])
        found = ctx.meta.get(faults.FOUND)
        if as_json:
            options.say_json(faults.values(known, message, found))
        else:
            for kind, text in faults.lines(known, message, found):
                options.tell(plain(text), head=kind)
        ctx.exit(known.exit_code)
    except KeyboardInterrupt as stopped:
        _say_interrupted(ctx, stopped, as_json)
    except Exception:
        if not _stopped:
            raise
        _say_interrupted(ctx, _stopped[-1], as_json)  # a module that is imported makes another exception of it


def _say_interrupted(ctx: click.Context, stopped: BaseException, as_json: bool) -> None:
    from fastinterp.cli import faults, options

    message, code = "; ".join(["interrupted", *ctx.meta.get(OUTCOME, [])]), getattr(stopped, "exit_code", 130)
    if as_json:
        options.say_json(faults.failed({"message": message, "kind": "Interrupted", "exit_code": code}))
    else:
        options.tell(message)
    ctx.exit(code)


def _wants_json(args: Sequence[str]) -> bool:
    """Whether a command line asks for JSON. Of the processes of one merge, the first prints it."""
    options = args[: args.index("--")] if "--" in args else args
    return "--json" in options and os.environ.get("RANK", "0") == "0"


def of_the_system(error: OSError | MemoryError | RecursionError | ImportError) -> FastinterpError:
    """What is said of an error of Python's own that nothing expected: a system call failed, memory is used up."""
    if isinstance(error, OSError):
        what = error.strerror or str(error) or type(error).__name__
        file = error.filename
        return StorageError(f"{os.fsdecode(file)}: {what}" if isinstance(file, (str, bytes, os.PathLike)) else what)
    if isinstance(error, (MemoryError, ImportError)):
        return StorageError(NO_MEMORY)
    return CheckpointError("a file nests too deeply to be read: damaged, or made to do harm")


@contextmanager
def _usage_errors_plain() -> Iterator[None]:
    """click prints its own errors, which repeat arguments."""
    from fastinterp.messages import plain

    try:
        yield
    except click.ClickException as error:
        vars(error)["message"] = plain(error.message)
        if isinstance(error, click.NoSuchOption) and error.possibilities:
            from difflib import get_close_matches

            names = {name.lstrip("-"): name for name in error.possibilities}  # all are alike in their dashes
            close = get_close_matches(error.option_name.lstrip("-"), names)
            vars(error)["possibilities"] = [names[name] for name in close]
        raise


class _Commands(click.Group):
    """Imports the command that is called; prints an exception as one line on stderr and exits with its exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_MODULES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _MODULES:
            return None
        command: click.Command = getattr(import_module(_MODULES[cmd_name]), cmd_name.replace("-", "_"))
        if "_FASTINTERP_COMPLETE" in os.environ:  # a shell asks what a word may become
            from fastinterp.cli.complete import offered

            return offered(command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in _MODULES and not args[0].startswith("-"):
            from fastinterp.messages import closest

            close = closest(args[0], _MODULES)
            ctx.fail(f"no such command '{args[0]}'. " + (f"Did you mean {close}?" if close else _KNOWN))
        return super().resolve_command(ctx, args)

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        with _usage_errors_plain():
            return super().make_context(*args, **extra)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[_JSON] = _wants_json(args)
        try:
            args = [public(arg) for arg in args]  # logins in addresses are in no message
        except UsageError as error:
            raise click.UsageError(str(error), ctx=ctx) from None
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        from fastinterp.checkpoint import hub, remote
        from fastinterp.messages import listen

        listen(_told)  # --quiet ends that
        remote.show_progress(_downloading)
        as_json = ctx.meta.get(_JSON, False)
        try:
            with (
                hub.one_run(),
                _usage_errors_plain(),
                errors_reported(ctx, partial(self._with_options, ctx), as_json=as_json),
            ):
                return super().invoke(ctx)
        except click.UsageError as error:
            error = _with_remedy(error)
            from fastinterp.cli import faults, options

            if not as_json:
                message = options.fitting(error.format_message(), sys.stderr, less=len("Error: "))
                raise click.UsageError(message, ctx=error.ctx) from None
            wrong = {
                "message": error.format_message(),
                "kind": "UsageError",
                "path": None,
                "line": None,
                "exit_code": 2,
            }
            options.say_json(faults.failed(wrong))
            ctx.exit(2)

    def _with_options(self, ctx: click.Context, message: str) -> str:
        """The message of a command without a recipe: what it has as an option is not called a key or an argument."""
        command = self.get_command(ctx, ctx.invoked_subcommand or "")
        names = {p.name: p.opts[0] for p in command.params if p.opts} if command is not None else {}
        if "recipe" in names:
            return message
        from fastinterp.messages import with_keys_as

        known = {name: option for name, option in names.items() if option.startswith("--")}
        return with_keys_as(message, lambda key, value: f"{known[key]} {value}" if key in known else None)


def _told(line: str) -> None:
    """Print what a run tells at once."""
    from fastinterp.cli.options import tell
    from fastinterp.messages import plain

    tell(plain(line))


def _downloading() -> Any:
    from fastinterp.cli import progress

    ctx = click.get_current_context(silent=True)
    return progress.shown(ctx is not None and bool(ctx.params.get("quiet")))


def _with_remedy(error: click.UsageError) -> click.UsageError:
    """The error of an option that is not known, with what to do instead, if it is one of mergekit's."""
    if not isinstance(error, click.NoSuchOption):
        return error
    from fastinterp.recipe.mergekit_options import instead_of_option

    instead = instead_of_option(error.option_name)
    message = f"No such option: {error.option_name}. {instead}"
    return click.NoSuchOption(error.option_name, message, ctx=error.ctx) if instead else error


_KNOWN = "Known: " + ", ".join(_MODULES)


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 success, 1 verify and replay: a difference, 2 bad usage or recipe, 3 bad checkpoint, 4 input "
    "or output failed, 130 interrupted (by another signal: 128 and its number).",
)
@click.version_option(__version__, prog_name="fastinterp", message="%(prog)s %(version)s")
def commands() -> None:
    """Merge model checkpoints as fast as the files can be copied, exactly.

    \b
    Example:
      fastinterp explain recipe.yml
      fastinterp merge recipe.yml merged/
    """


def main() -> None:
    """The program `fastinterp`. Ends the process."""
    stop_on_signals()
    warnings.showwarning = _warn
    sys.excepthook = _failed
    commands(prog_name="fastinterp")


def _warn(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
    """A warning of a library: it may repeat names, too."""
    from fastinterp.cli.options import tell

    tell(f"{category.__name__}: {message}")


def _failed(kind: type[BaseException], error: BaseException, at: TracebackType | None) -> None:
    """The traceback of an error of the program itself."""
    import traceback

    from fastinterp.cli.options import tell

    tell("".join(traceback.format_exception(kind, error, at)).rstrip())


def stop_on_signals() -> None:
    """Let the signals that end a program do so as exceptions, so that partial files are removed."""
    for number in _STOPPING:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, _stop)


def _stop(number: int, frame: FrameType | None) -> None:
    # A second Ctrl-C must not interrupt the removal of partial files.
    for every in _STOPPING:
        signal.signal(every, signal.SIG_IGN)
    _stopped.append(_Stopped(number))
    raise _stopped[-1]
