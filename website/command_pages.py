"""The page of all commands: what `--help` prints, read from click."""

from __future__ import annotations

import re

import click

from fastinterp.cli import commands as group
from website.docstrings import prose


def commands() -> str:
    """A section for each command: usage, description, examples, options."""
    assert isinstance(group, click.Group)
    parent = click.Context(group, info_name="fastinterp")
    made = ["# Commands", "", "What `fastinterp COMMAND --help` prints.", ""]
    for name in group.list_commands(parent):
        command = group.get_command(parent, name)
        assert command is not None
        context = click.Context(command, parent=parent, info_name=name)
        usage = " ".join(command.collect_usage_pieces(context))
        made += [f"## {name}", "", "```text", f"fastinterp {name} {usage}", "```", "", *_text(command.help or ""), ""]
        rows = [
            record for p in command.params if isinstance(p, click.Option) and (record := p.get_help_record(context))
        ]
        made += [
            "| option | does |",
            "|---|---|",
            *(f"| `{option.replace('|', '/')}` | {prose(does, {})} |" for option, does in rows),
            "",
        ]
    return "\n".join(made)


def _text(help_: str) -> list[str]:
    """The description: paragraphs, and blocks that click leaves as they are, which begin with \\b."""
    made: list[str] = []
    for paragraph in re.split(r"\n\s*\n", help_.strip()):
        lines = paragraph.split("\n")
        if lines[0].strip() != "\b":
            made += [prose(" ".join(line.strip() for line in lines), {}), ""]
            continue
        lines = lines[1:]
        if not lines[0].startswith(" ") and lines[0].rstrip().endswith(":"):
            made += [prose(lines.pop(0), {}), ""]
        made += ["```text", *(line.removeprefix("  ") for line in lines), "```", ""]
    return made
