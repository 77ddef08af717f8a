"""README and docs/ show what the program prints: generated parts are compared, commands, links and paths exist."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

import benchmarks.table as speed
from fastinterp.cli import commands
from fastinterp.cli.info import table

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text("utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def between(page: str, name: str) -> str:
    found = re.search(rf"<!-- {name}:begin -->\n(.*?)<!-- {name}:end -->", (ROOT / page).read_text("utf-8"), re.DOTALL)
    assert found, f"{page} has no markers for {name}"
    return found[1].strip()


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150


def test_methods_table_is_what_the_program_prints():
    """To renew it: `fastinterp methods --markdown`, between the markers."""
    assert between("docs/methods.md", "methods") == table()


def test_every_command_that_the_readme_shows_exists():
    assert isinstance(commands, click.Group)
    known = set(commands.list_commands(click.Context(commands)))
    shown = set(re.findall(r"^\$ fastinterp ([a-z-]+)", README, re.MULTILINE))
    assert shown, "the README shows no command"
    assert shown <= known


def relative_links(text: str) -> list[str]:
    """The targets of Markdown links and images, code aside, that lead to files: no scheme, no lone `#heading`."""
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
    found = re.findall(r"\]\(\s*<?([^)>\s]+)", prose) + re.findall(r"^\[[^\]]+\]:\s*<?([^>\s]+)", prose, re.MULTILINE)
    return [t.partition("#")[0] for t in found if not re.match(r"[a-z][a-z0-9+.-]*:|#", t, re.IGNORECASE)]


def test_links_are_found():
    text = "[a](x.md#y) ![b](<z.png> 't') [c](https://x.org/y.md) [d](#e)\n`[f](g)`\n[h]: docs/i.md\n"
    assert relative_links(text) == ["x.md", "z.png", "docs/i.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_relative_links_lead_somewhere(page):
    assert [t for t in relative_links(page.read_text("utf-8")) if not (page.parent / t).exists()] == []


def test_speed_tables_are_those_of_the_committed_results():
    """To renew it: `python -m benchmarks.table --write`."""
    races, kernels = speed.load(ROOT / "benchmarks" / "results")
    assert kernels
    assert between("docs/performance.md", "bench") == "\n".join(speed.table(races, kernels))
    assert between("docs/performance.md", "kernels") == "\n".join(speed.kernels_table(kernels))


def files_of_the_architecture() -> set[str]:
    """The files in the tables under the headings of folders in docs/ARCHITECTURE.md, from the root of the project."""
    sections = re.split(r"^### ", (ROOT / "docs" / "ARCHITECTURE.md").read_text("utf-8"), flags=re.MULTILINE)[1:]
    files = set()
    for section in sections:
        heading, _, rows = section.partition("\n## ")[0].partition("\n")
        names = re.findall(r"^([a-z_]+/)(?::|$)", heading)  # one folder; of several, the rows have the folder
        base = "" if names in (["fastinterp/"], ["csrc/"]) else names[0] if names else ""
        top = "csrc" if heading.startswith("csrc/") else "fastinterp"
        for row in re.findall(r"^\| (`[^|]*) \|", rows, re.MULTILINE):
            files |= {f"{top}/{base}{name}" for name in re.findall(r"`([^`]+)`", row)}
    return files


def test_the_architecture_names_every_file():
    """One line a file, but for methods, decoders, kernels of CUDA, and the files that cpu/loops.inc includes."""
    named = {name for name in files_of_the_architecture() if "NAME" not in name}
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
    python = {p.relative_to(ROOT).as_posix() for p in (ROOT / "fastinterp").rglob("*.py")}
    native = {p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").rglob("*.cpp")}
    kinds = re.compile(
        r"fastinterp/methods/[a-z]|fastinterp/(.*/)__init__\.py|fastinterp/_triton/|csrc/(cuda/binding|decoders)/"
    )
    assert [name for name in sorted(python | native) if name not in named and not kinds.match(name)] == []


def test_the_architecture_names_every_file_of_the_site():
    text = (ROOT / "docs" / "ARCHITECTURE.md").read_text("utf-8")
    assert [path.name for path in (ROOT / "website").glob("*.py") if f"`website/{path.name}`" not in text] == []


@pytest.mark.parametrize("page", ["docs/ARCHITECTURE.md", "CONTRIBUTING.md"])
def test_paths_in_backquotes_exist(page):
    """Of files and folders of the project, as `csrc/cpu/` or `ops/steps.py`, but for names in capitals."""
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    paths = re.findall(r"`([a-z_]+(?:/[\w.]+)*/(?:[\w.]+\.(?:py|h|cpp|cu|inc|md|svg))?)`", text)
    roots = [ROOT, ROOT / "fastinterp", ROOT / "csrc", *(p for p in (ROOT / "fastinterp").iterdir() if p.is_dir())]
    assert [p for p in paths if not any((root / p).exists() for root in roots) and "NAME" not in p] == []
