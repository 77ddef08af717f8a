"""The program fastinterp-mergekit: the arguments and options of mergekit-yaml. mergekit is not needed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import click

from fastinterp._version import __version__
from fastinterp.cli import errors_reported, options, stop_on_signals
from fastinterp.integrations.mergekit_options import OPTIONS, Option


class _Size(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions of click only
    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """5000000000, 5B, 500M or 20K, in bytes."""
        if isinstance(value, int):
            return value
        factor = {"K": 10**3, "M": 10**6, "B": 10**9}.get(value[-1:].upper())
        digits = value if factor is None else value[:-1]
        if not digits.isdecimal():
            self.fail(f"expected a number of bytes, as 5000000000, 5B, 500M or 20K, got {value!r}", param, ctx)
        return int(digits) * (factor or 1)


class _Command(click.Command):
    def invoke(self, ctx: click.Context) -> Any:
        with errors_reported(ctx):
            return super().invoke(ctx)


def _with_options(function: Callable[..., None]) -> Callable[..., None]:
    """Decorator: all of them."""
    for option in reversed(OPTIONS):
        function = _option(option)(function)
    return function


def _option(option: Option) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The click option, named as in mergekit-yaml."""
    name = option.name.replace("_", "-")
    how: dict[str, Any] = {"default": option.default, "show_default": option.default is not None}
    text = f"{option.help} Not needed: {option.unneeded}." if option.unneeded else option.help
    if option.name == "gpu_rich":
        return click.option(f"--{name}", option.name, is_flag=True, help=text)
    if option.kind == "flag":
        return click.option(f"--{name}/--no-{name}", option.name, default=option.default, help=text)
    if option.kind == "count":
        return click.option("-v", option.name, count=True, help=text)
    names = [f"--{name}", *(["-j"] if option.name == "num_threads" else [])]
    kind: Any = {"number": int, "size": _Size(), "text": str}[option.kind]
    return click.option(*names, option.name, type=kind, help=text, **how)


@click.command("fastinterp-mergekit", cls=_Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("config_file", callback=options.from_stdin)
@click.argument("out_path")
@_with_options
@click.version_option(__version__, prog_name="fastinterp-mergekit", message="%(prog)s %(version)s")
def command(config_file: str, out_path: str, **values: Any) -> None:
    """Merge as mergekit-yaml does: the same arguments and options, the same files.

    CONFIG_FILE is a YAML file, or - for stdin; OUT_PATH a folder, which may exist: a checkpoint there is replaced.
    Options that change nothing here are accepted, with a line that says why. `fastinterp merge` has more.

    \b
    Example:
      fastinterp-mergekit config.yml merged/ --cuda --lazy-unpickle --out-shard-size 2B
    """
    from fastinterp.cli import progress
    from fastinterp.integrations.mergekit_options import run, settings_of
    from fastinterp.recipe.load import load_recipes

    verbosity, quiet = values["verbosity"], values["quiet"]
    logging.basicConfig(level=[logging.WARNING, logging.INFO, logging.DEBUG][min(verbosity, 2)])
    settings = settings_of(values, default_device="auto")
    for note in settings.notes:
        if not quiet:
            options.tell(f"note: {note}")
    recipes = load_recipes(config_file)
    with progress.shown(quiet) as shown:
        report = run(recipes, recipes[-1].text, out_path, settings, shown)
    if quiet:
        from fastinterp.cli.merge import warn

        warn([report])
    else:
        options.say(report.summary())


def main() -> None:
    """The program `fastinterp-mergekit`. Ends the process."""
    stop_on_signals()
    command(prog_name="fastinterp-mergekit")
