"""The page with each method: what `fastinterp methods NAME` prints."""

from __future__ import annotations

import re

from fastinterp.cli.info import example
from fastinterp.methods import Method, find, names
from website.docstrings import markdown, prose


def reference() -> str:
    """A section for each method: summary, formula, parameters, source, an example recipe."""
    made = [
        "# Each method",
        "",
        "What `fastinterp methods NAME` prints. x0 is the base where there is one, else the first model;",
    ]
    made += ["`lambda` and all other parameters are keys of `parameters` in a [recipe](RECIPES.md).", ""]
    return "\n".join([*made, *(line for name in names() for line in _section(find(name)))])


def _section(method: Method) -> list[str]:
    summary, formula, rest = _parts(method.doc)
    name = method.name.replace("_", "\\_")
    made = [f"## {name} {{ #{method.name} }}", "", prose(summary, {}), "", "```text", *formula, "```", ""]
    return [*made, markdown(rest, {}), "", "```yaml", example(method), "```", ""]


def _parts(doc: str) -> tuple[str, list[str], str]:
    """Summary; the lines of the formula, with those of its symbols; the rest."""
    first, *lines = doc.split("\n")
    summary, _, formula = first.partition("     ")
    shown = [formula] if formula else []
    while lines and (not lines[0].strip() or lines[0].startswith("    ")):
        shown += [cell for cell in re.split(r" {2,}", lines.pop(0).strip()) if cell]
    # `Reads:`, `Models:` and so on begin paragraphs; what stands behind a list without indentation does, too.
    rest = re.sub(r"^(?=Reads:|Models:|Source:|Differs\b)", "\n", "\n".join(lines), flags=re.MULTILINE)
    rest = re.sub(r"^(Reads:) +", r"\1 ", rest, flags=re.MULTILINE)
    return summary, shown, re.sub(r" {2}(Models:)", r" \1", rest)
