"""Code in README.md and docs/: commands have the options that are shown, Python calls fit, recipes load.

What can run by itself is run elsewhere: README.md (test_readme_runs), docs/CHECKPOINTS.md (test_checkpoint_examples),
pages for users of other tools (test_integrations, test_coming_from), docs/methods.md (test_own_methods), docs/python.md
(test_python_page).
"""

from __future__ import annotations

import ast
import inspect
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

import fastinterp
from fastinterp.cli import commands as group
from fastinterp.cli.mergekit import command as mergekit_yaml
from fastinterp.recipe.load import load_recipes

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
IDS = [page.relative_to(ROOT).as_posix() for page in PAGES]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NAMED = {"COMMAND", "NAME", "..."}  # stand for any command, method or rest


def blocks(text: str, *languages: str) -> list[str]:
    return [body for language, body in BLOCK.findall(text) if language in languages]


def shown_commands(text: str) -> Iterator[list[str]]:
    """The words of each `fastinterp ...` in blocks of a shell and in backquotes, up to what ends a command."""
    lines = [line for body in blocks(text, "console", "sh", "bash") for line in joined(body)]
    lines += [code for code in re.findall(r"`([^`]+)`", BLOCK.sub("", text)) if code.startswith("fastinterp")]
    for line in lines:
        for part in re.split(r"(?:^|&& |\|\| |; |\| )(?=\S*(?:fastinterp|torchrun|srun) )", line):
            found = re.search(r"\b(fastinterp(?:-mergekit)?) (.*)", part)
            if not found or re.match(r"\s*(#|pip)", part):
                continue
            lexer = shlex.shlex(found[2], posix=True, punctuation_chars=True)
            lexer.wordchars += "$={}*?[]:,+@%"
            words = []
            for word in lexer:
                if word in {"|", "&", "&&", ";", ">", ">>", "<", "||"}:
                    break
                words.append(word)
            yield [found[1], *words]


def joined(body: str) -> list[str]:
    """The commands of a block: behind `$ `, or all lines if there is no such; `\\` at the end goes on."""
    lines = body.replace("\\\n", " ").splitlines()
    marked = [line[2:] for line in lines if line.startswith("$ ")]
    return marked or lines


def fault(words: list[str]) -> str | None:
    """What click says of a command line; None, if it accepts it. Values are not looked at."""
    program, *rest = words
    command: click.Command | None
    context = click.Context(group, info_name=program)
    if program == "fastinterp-mergekit":
        command, args = mergekit_yaml, rest
    elif not rest or rest[0].startswith("-") or rest[0] in NAMED:
        command, args = group, []
    else:
        assert isinstance(group, click.Group)
        command, args = group.get_command(context, rest[0]), rest[1:]
        if command is None:
            return f"no command {rest[0]}"
    try:
        parser = command.make_parser(click.Context(command, parent=context, info_name=rest[0]))
        _, left, _ = parser.parse_args([arg for arg in args if arg != "..."])
    except click.UsageError as error:
        return error.format_message()
    return f"too many arguments: {left}" if left and command is not group else None


def test_the_reader_finds_commands_and_faults():
    text = "```console\n$ fastinterp merge x.yml out  # z\n$ cd x && fastinterp diff a b | head\n```\n"
    text += "`fastinterp sweep --no`\n"
    found = list(shown_commands(text))
    assert found == [
        ["fastinterp", "merge", "x.yml", "out"],
        ["fastinterp", "diff", "a", "b"],
        ["fastinterp", "sweep", "--no"],
    ]
    assert [fault(words) for words in found[:2]] == [None, None]
    assert "--no" in (fault(found[2]) or "")
    assert fault(["fastinterp", "marge"]) == "no command marge"
    assert "too many" in (fault(["fastinterp", "diff", "a", "b", "c"]) or "")


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_commands_have_the_options_that_are_shown(page):
    assert [(words, said) for words in shown_commands(page.read_text("utf-8")) if (said := fault(words))] == []


USERS = [page for page in PAGES if page.stem not in ("CONTRIBUTING", "ARCHITECTURE", "performance", "paper", "INSTALL")]
OTHERS = {"--nproc-per-node", "--ntasks"}  # of torchrun and srun


@pytest.mark.parametrize("page", USERS, ids=lambda page: page.name)
def test_options_in_the_text_exist(page):
    """Some command has each: pages about one command name its options alone."""
    assert isinstance(group, click.Group)
    names = group.list_commands(click.Context(group))
    every = [group, mergekit_yaml, *(group.get_command(click.Context(group), name) for name in names)]
    parameters = [p for command in every if command is not None for p in command.params]
    known = {option for p in parameters for option in (*p.opts, *p.secondary_opts)} | OTHERS
    text = BLOCK.sub("", page.read_text("utf-8"))
    codes = [code for code in re.findall(r"`([^`]+)`", text) if not code.startswith("mergekit-")]
    shown = {option for code in codes for option in re.findall(r"(?<!\S)--[a-z-]+", code)}
    assert sorted(shown - known - {"--help", "---"}) == []


def unknown(source: str) -> list[str]:
    """Names of `fastinterp` that are not there, and keywords that its functions do not have."""
    wrong = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "fastinterp":
            known = hasattr(fastinterp, node.attr) or node.attr == "integrations"
            wrong += [] if known else [f"fastinterp.{node.attr}"]
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("fastinterp."):
            name = ast.unparse(node.func).removeprefix("fastinterp.")
            if "." in name or not hasattr(fastinterp, name):
                continue
            taken = inspect.signature(getattr(fastinterp, name)).parameters
            wrong += [f"{name}({k.arg}=)" for k in node.keywords if k.arg is not None and k.arg not in taken]
    return wrong


def test_the_reader_finds_names_and_keywords():
    source = "import fastinterp\nfastinterp.merge('x', 'y', force=True, colour=1)\nfastinterp.marge()\n"
    assert unknown(source) == ["merge(colour=)", "fastinterp.marge"]


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_python_fits_the_functions(page):
    text = page.read_text("utf-8")
    sources = blocks(text, "python")
    calls = re.findall(r"`(fastinterp\.\w+\([^`]*\))`", BLOCK.sub("", text))
    sources += [code.replace("=...", "=None").replace("...", "None") for code in calls]
    assert [found for source in sources if (found := unknown(source))] == []


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_recipes_load(page):
    for body in blocks(page.read_text("utf-8"), "yaml"):
        whole = (
            body
            if "merge_method" in body
            else f"merge_method: linear\nmodels: [{{model: some/model, parameters: {{weight: 1}}}}]\n{body}"
        )
        assert load_recipes(whole)
