"""The page of all commands: what `--help` prints, read from click."""

from __future__ import annotations

import re
import textwrap

import click

from fastinterp.cli import commands as group
from fastinterp.cli.mergekit import command as mergekit_yaml
from website.docstrings import prose


def commands() -> str:
    """A section for each command: usage, description, examples, options."""
    assert isinstance(group, click.Group)
    context = click.Context(group, info_name="fastinterp")
    made = ["# Commands", "", "What `fastinterp COMMAND --help` prints.", ""]
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        made += _section(command, name, f"fastinterp {name}")
    return "\n".join([*made, *_section(mergekit_yaml, "fastinterp-mergekit", "fastinterp-mergekit")])


def _section(command: click.Command, name: str, program: str) -> list[str]:
    context = click.Context(command, info_name=program)
    usage = " ".join([program, *command.collect_usage_pieces(context)])
    made = [f"## {name}", "", "```text", usage, "```", "", *_text(command.help or ""), ""]
    records = [p.get_help_record(context) for p in command.params if isinstance(p, click.Option)]
    rows = [f"| `{option}` | {prose(does, {})} |" for option, does in filter(None, records)]
    return [*made, "| option | does |", "|---|---|", *rows, ""]


def _text(help_: str) -> list[str]:
    """The description: paragraphs, and blocks that click leaves as they are, which begin with \\b."""
    made: list[str] = []
    for paragraph in re.split(r"\n\s*\n", help_.strip()):
        lines = paragraph.split("\n")
        if lines[0].strip() != "\b":
            made += [prose(" ".join(line.strip() for line in lines), {}), ""]
            continue
        lines = textwrap.dedent("\n".join(lines[1:])).split("\n")
        if lines[0].endswith(":"):
            made += [prose(lines.pop(0), {}), ""]
        made += ["```text", textwrap.dedent("\n".join(lines)), "```", ""]
    return made
