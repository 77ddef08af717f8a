"""The README shows what the program says: its generated parts are compared, its commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import click

from fastinterp.cli import commands
from fastinterp.cli.about import table

README = (Path(__file__).parent.parent / "README.md").read_text("utf-8")


def between(name: str) -> str:
    found = re.search(rf"<!-- {name}:begin -->\n(.*?)<!-- {name}:end -->", README, re.DOTALL)
    assert found, f"README.md has no markers for {name}"
    return found[1].strip()


def test_methods_table_is_what_the_program_prints():
    """To renew it: `fastinterp methods --markdown`, between the markers."""
    assert between("methods") == table()


def test_every_command_that_the_readme_shows_exists():
    assert isinstance(commands, click.Group)
    known = set(commands.list_commands(click.Context(commands)))
    shown = set(re.findall(r"^\$ fastinterp ([a-z]+)", README, re.MULTILINE))
    assert shown, "the README shows no command"
    assert shown <= known
