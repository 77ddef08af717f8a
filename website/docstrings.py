"""Docstrings of this project as Markdown. Their form: sentences, lists of names with a text beside each, code.

    name, other   two spaces or more, then the text, which goes on in lines
                  that are indented

Indented lines are code. Names of the public interface become links, as do the pages of docs/.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping

_ITEM = re.compile(r"(?P<term>(?:[\w`*(][^:;]*?|[\"{\[].*?)) {2,}(?P<text>\S.*)")
_ERROR = re.compile(r"\b[A-Z]\w+Error\b")


def markdown(doc: str, links: Mapping[str, str]) -> str:
    """The docstring `doc` as Markdown.

    links  name in backquotes, or an error's name -> the address of its explanation
    """
    lines = inspect.cleandoc(doc).split("\n")
    made: list[str] = []
    while lines:
        if not lines[0].strip():
            lines.pop(0)
            made.append("")
        elif lines[0].startswith("    "):
            made += ["", "```python", *_code(lines), "```", ""]
        elif lines[0].startswith(">>> "):
            made += ["", "```pycon", *_until_blank(lines), "```", ""]
        elif found := _item(lines):
            term, text = found
            made += ["", term if "`" in term else f"`{term}`", f":   {prose(text, links)}", ""]
        else:
            made.append(prose(lines.pop(0), links))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(made)).strip()


def prose(text: str, links: Mapping[str, str]) -> str:
    """A text with what Markdown would read as marks escaped, outside of backquotes; and with links."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(_linked(part, links) if i % 2 else _escaped(part, links) for i, part in enumerate(parts))


def _linked(code: str, links: Mapping[str, str]) -> str:
    name = code.strip("`").removeprefix("fastinterp.")
    return f"[{code}]({links[name]})" if name in links else code


def _escaped(text: str, links: Mapping[str, str]) -> str:
    text = re.sub(r"([\\*_\[\]|#])", r"\\\1", text.replace("&", "&amp;").replace("<", "&lt;"))
    text = text.replace("{", "&#123;")  # which would begin attributes
    text = _ERROR.sub(lambda found: f"[{found[0]}]({links[found[0]]})" if found[0] in links else found[0], text)
    return re.sub(r"docs/([\w-]+\.md)", r"[\1](\1)", text)


def _code(lines: list[str]) -> list[str]:
    """Takes the indented lines at the front, and blank ones between them."""
    taken: list[str] = []
    while lines and (lines[0].startswith("    ") or (not lines[0] and lines[1:] and lines[1].startswith("    "))):
        taken.append(lines.pop(0)[4:])
    return taken


def _until_blank(lines: list[str]) -> list[str]:
    """Takes the lines at the front, up to a blank one."""
    taken: list[str] = []
    while lines and lines[0]:
        taken.append(lines.pop(0))
    return taken


def _item(lines: list[str]) -> tuple[str, str] | None:
    """Takes a name and the text beside it from the front: None, if there is none."""
    found = _ITEM.fullmatch(lines[0])
    hangs = len(lines) > 1 and lines[1].startswith(" " * 6)
    if not found and not hangs:
        return None
    first = lines.pop(0)
    term, texts = (found["term"], [found["text"]]) if found else (first, [])
    while lines and lines[0].startswith(" "):
        texts.append(lines.pop(0).strip())
    return term, " ".join(texts)
