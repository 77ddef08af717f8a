"""`plot` and `explore`: figures of a path, and a local page to explore it on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from fastinterp.cli import grammar, options, ranges

if TYPE_CHECKING:
    from fastinterp.paths.explore.sliders import Sliders
    from fastinterp.paths.report import PathReport


@click.command()
@click.argument("report")
@click.argument("outs", nargs=-1, metavar="[FILE]")
@grammar.out_option("The figure, in place of FILE.", metavar="FILE")
@click.option("--metric", "metrics", multiple=True, metavar="NAME", help="Draw only this metric. Repeatable.")
def plot(report: str, outs: tuple[str, ...], named_out: str | None, metrics: tuple[str, ...]) -> None:
    """Draw metrics along a path.

    REPORT is a JSON file, as PathReport.to_json writes it; FILE the figure: .png, .svg or .pdf. Along one direction
    each metric is a curve with error bars, the chord between the ends and the range between them shaded; over two
    directions it is a heat map.

    \b
    Example:
      fastinterp plot report.json figure.png
    """
    from fastinterp.paths.report import PathReport

    out = grammar.only_output(outs, named_out, "plot REPORT")
    PathReport.from_json(report).plot(out, metrics or None)


def _range(ctx: click.Context, param: click.Parameter, value: str) -> tuple[float, float]:
    low, colon, high = value.partition(":")
    try:
        span = float(low), float(high)
    except ValueError:
        span = 0.0, 0.0
    if not (colon and -1e6 <= span[0] < span[1] <= 1e6):
        raise click.BadParameter(f"{value!r} is no range LOW:HIGH, as -0.5:1.5", ctx, param)
    return span


@click.command()
@click.argument("models", nargs=-1, metavar="RECIPE | A B")
@click.option("--base", metavar="CKPT", help="Start of the directions of --add.")
@click.option(
    "--add",
    "added",
    multiple=True,
    callback=ranges.named,
    metavar="NAME=CKPT",
    help="A direction, with a slider.",
)
@click.option("--prompt", default="", metavar="TEXT", help="The prompt at first.")
@click.option("--report", metavar="FILE", help="Metrics to show, as PathReport.to_json writes them.")
@click.option(
    "--range",
    "span",
    default="-0.5:1.5",
    show_default=True,
    callback=_range,
    metavar="LOW:HIGH",
    help="Range of the sliders.",
)
@click.option("--tokenizer", metavar="DIR", help="Folder with the tokenizer. Default: the base's own.")
@click.option("--chat", is_flag=True, help="Format the prompt with the base's chat template.")
@click.option("--port", default=8765, show_default=True, type=click.IntRange(0, 65535), help="Port; 0: any free one.")
@options.offline
@options.threads
def explore(
    models: tuple[str, ...], base: str | None, added: dict[str, str], prompt: str, report: str | None,
    span: tuple[float, float], tokenizer: str | None, chat: bool, port: int, threads: int | None,
) -> None:  # fmt: skip
    """Explore a path of language models on a local page.

    The page has a slider for each direction, the text that the model generates there and at the ends, and how much each
    layer changes; it gives the recipe and the command of a setting, and writes its checkpoint. RECIPE is a linear or
    task_arithmetic recipe; A B the line from one checkpoint to another. Ctrl-C ends it. The page is served to this
    machine alone, to whoever has the token in the printed address, and connects to no other.

    \b
    Example:
      fastinterp explore model-a/ model-b/ --prompt "The food was"
      fastinterp explore --base base/ --add joy=j/ --add calm=c/ --report r.json
    """
    from fastinterp.paths.explore.sliders import Sliders, read_report

    sliders = Sliders.of(models, base, added)
    metrics = None if report is None else read_report(report, sliders)
    _serve(sliders, metrics, prompt, span, chat=chat, port=port, threads=threads, tokenizer=tokenizer)


def _serve(
    sliders: Sliders, report: PathReport | None, prompt: str, span: tuple[float, float], *, chat: bool, port: int,
    threads: int | None, tokenizer: str | None,
) -> None:  # fmt: skip
    """Load the model and serve the page until it is interrupted."""
    import gc
    import secrets

    from fastinterp.inspect.compare import deltas
    from fastinterp.paths.explore import server
    from fastinterp.paths.explore.checkpoint import CheckpointWriter
    from fastinterp.paths.explore.facts import facts
    from fastinterp.paths.explore.session import check_model, check_packages, open_session
    from fastinterp.plan.models import open_model

    check_packages()
    gc.enable()  # it runs for long; and triton, in torch, warns at exit of objects that are left
    with server.bound(port) as sock:  # first: errors come before what takes long
        for name in (sliders.base, *sliders.models.values()):
            open_model(name)
        check_model(sliders.base, tokenizer)
        options.tell("measuring what the directions change")
        changes = deltas(sliders.base, list(sliders.models.values()), threads=threads)
        options.tell("loading the model")
        with (
            CheckpointWriter(sliders, threads=threads) as writer,
            open_session(sliders, threads=threads, chat=chat, tokenizer=tokenizer) as session,
        ):
            data = facts(
                sliders, changes, report, prompt=prompt, low=span[0], high=span[1], most_tokens=session.most_tokens,
                chat=chat,
            )  # fmt: skip
            token = secrets.token_urlsafe(16)
            app = server.make_app(server.Page(sliders, session, writer, data, token))

            def end() -> None:
                session.end()
                writer.end()

            server.serve(app, sock, token, end, lambda url: options.say(f"{url}  (Ctrl-C ends it)"))
    options.tell("ended")
