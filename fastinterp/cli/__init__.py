"""The command line. A command's module is imported when the command runs: `fastinterp --version` imports none."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from types import FrameType
from typing import Any

import click

from fastinterp._version import __version__
from fastinterp.errors import FastinterpError

# The commands in the order of --help, with their modules.
_MODULES = {
    "merge": "fastinterp.cli.merge",
    "interpolate": "fastinterp.cli.merge",
    "average": "fastinterp.cli.average",
    "sweep": "fastinterp.cli.sweep",
    "extract-lora": "fastinterp.cli.lora",
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
OUTCOME = (
    "fastinterp.outcome"  # key in click's Context.meta: list[str], notes about the output for the message of a failure
)


class _Stopped(KeyboardInterrupt):
    """SIGINT or SIGTERM, as an exception in the main thread, so that context managers clean up."""

    def __init__(self, number: int):
        super().__init__(number)
        self.exit_code = 128 + number


@contextmanager
def errors_reported(ctx: click.Context, worded: Callable[[str], str] = str) -> Iterator[None]:
    """Context manager: an exception of the package ends the program with a line on stderr and its exit code.

    worded  its message, as the command words it
    """
    try:
        yield
    except FastinterpError as error:
        message = "; ".join([worded(str(error)), *ctx.meta.get(OUTCOME, [])])
        click.echo(f"{click.style(type(error).__name__, fg='red')}: {message}", err=True)
        ctx.exit(error.exit_code)
    except KeyboardInterrupt as stopped:
        click.echo("; ".join(["interrupted", *ctx.meta.get(OUTCOME, [])]), err=True)
        ctx.exit(getattr(stopped, "exit_code", 130))


class _Commands(click.Group):
    """Imports the command that is called; prints an exception as one line on stderr and exits with its exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_MODULES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _MODULES:
            return None
        command: click.Command = getattr(import_module(_MODULES[cmd_name]), cmd_name.replace("-", "_"))
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in _MODULES and not args[0].startswith("-"):
            from fastinterp.messages import closest

            close = closest(args[0], _MODULES)
            ctx.fail(f"no such command '{args[0]}'. " + (f"Did you mean {close}?" if close else _KNOWN))
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        from fastinterp.checkpoint import hub, remote
        from fastinterp.messages import listen

        listen(_told)  # --quiet ends that
        remote.show_progress(_downloading)
        try:
            with hub.one_run(), errors_reported(ctx, partial(self._with_options, ctx)):
                return super().invoke(ctx)
        except click.NoSuchOption as error:
            from fastinterp.recipe.mergekit_options import instead_of_option

            instead = instead_of_option(error.option_name)
            if not instead:
                raise
            message = f"No such option: {error.option_name}. {instead}"
            raise click.NoSuchOption(error.option_name, message, ctx=error.ctx) from None

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
    from fastinterp.messages import plain

    click.echo(plain(line), err=True)


def _downloading() -> Any:
    from fastinterp.cli import progress

    ctx = click.get_current_context(silent=True)
    return progress.shown(ctx is not None and bool(ctx.params.get("quiet")))


_KNOWN = "Known: " + ", ".join(_MODULES)


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 success, 2 bad usage or recipe, 3 bad checkpoint, 4 input or output failed, 130 interrupted.",
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
    commands(prog_name="fastinterp")


def stop_on_signals() -> None:
    """Let SIGINT and SIGTERM end the program as exceptions, so that partial files are removed."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, _stop)


def _stop(number: int, frame: FrameType | None) -> None:
    # A second Ctrl-C must not interrupt the removal of partial files.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise _Stopped(number)
