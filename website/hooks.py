"""Hooks of MkDocs, which mkdocs.yml names: pages from above docs/, pages made of the code, and links between them all.

The sources are pages of GitHub, so their links are those of the folder of the project. Here they become links of the
site: `docs/X.md` of README.md leads to X.md, `../SECURITY.md` to that page, an image elsewhere to a copy of it. A link
to another file of the project becomes text.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # MkDocs loads this file by its path

from website import command_pages, method_pages, python_pages  # noqa: E402

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ABOVE = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")  # pages of the folder above docs/
IMAGES = (".svg", ".png")
MADE: dict[str, Callable[[], str]] = {
    "api.md": python_pages.public_names,
    "integrations-api.md": python_pages.integrations,
    "methods-api.md": python_pages.own_methods,
    "method-reference.md": method_pages.reference,
    "commands.md": command_pages.commands,
    "style.css": lambda: (ROOT / "website" / "style.css").read_text("utf-8"),
}
_CODE = re.compile(r"^```.*?^```$|`[^`\n]*`", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"(!?)\[((?:[^][]|\[[^]]*\])*)\]\(([^)\s]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """All files of the site: those of docs/, those above it, and those that are made."""
    from mkdocs.structure.files import File

    for name in ABOVE:
        files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
    for name, make in MADE.items():
        files.append(File.generated(config, name, content=make()))
    for page in [*ABOVE, *(f"docs/{file.src_uri}" for file in files.documentation_pages() if file.src_dir)]:
        for target in images_elsewhere(page):
            if files.get_file_from_path(target) is None:
                files.append(File.generated(config, target, abs_src_path=str(ROOT / target)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, **_: Any) -> str:
    """The text of a page, as MkDocs takes it."""
    name = page.file.src_uri
    if name in MADE:
        return site_text(markdown, f"docs/{name}", titles(config.nav))
    if name == "methods.md":  # the methods of the table lead to their sections
        markdown = re.sub(r"^\| `(\w+)` \|", r"| [`\1`](method-reference.md#\1) |", markdown, flags=re.MULTILINE)
    return site_text(markdown, name if name in ABOVE else f"docs/{name}", titles(config.nav))


def titles(nav: Any) -> dict[str, str]:
    """The title of each page in the navigation."""
    found: dict[str, str] = {}
    for entry in nav:
        for title, target in entry.items():
            found |= titles(target) if isinstance(target, list) else {target: title}
    return found


def images_elsewhere(page: str) -> list[str]:
    """The images outside of docs/ that a page shows: paths in the project."""
    path = ROOT / page
    if not path.exists():
        return []
    prose = _CODE.sub("", path.read_text("utf-8"))
    found = [project_path(page, link[3]) for link in _LINK.finditer(prose) if link[3].endswith(IMAGES)]
    return [target for target in found if not target.startswith("docs/")]


def project_path(page: str, target: str) -> str:
    """The path in the project to which a link of a page leads."""
    return os.path.normpath(os.path.join(os.path.dirname(page), target))


def site_text(markdown: str, page: str, titles: Mapping[str, str]) -> str:
    """The Markdown of the page at `page` in the project, with links of the site, and as Python-Markdown reads it.

    titles  of pages: what a link says that is called as its file
    """

    def link(found: re.Match[str]) -> str:
        image, text, target = found.groups()
        if re.match(r"[a-z][a-z0-9+.-]*:|#", target):
            return found[0]
        file, hash_, anchor = target.partition("#")
        path = project_path(page, file)
        if path in ABOVE or path.startswith("docs/") or path.endswith(IMAGES):
            target = path.removeprefix("docs/")
            text = titles.get(target, text) if text == file else text
            return f"{image}[{text}]({target}{hash_}{anchor})"
        return text

    parts, end = [], 0
    for code in _CODE.finditer(markdown):
        # The text of a link may have code in it, so links are looked for in the whole, without blocks.
        if code[0].startswith("```"):
            parts += [_adapted(_LINK.sub(link, markdown[end : code.start()])), code[0]]
            end = code.end()
    return "".join([*parts, _adapted(_LINK.sub(link, markdown[end:]))])


def _adapted(text: str) -> str:
    """Lists and tables of GitHub for Python-Markdown, of a text without blocks of code at its margin.

    What belongs to an item of a list is indented by four, where GitHub takes less; and after paragraphs in an item, a
    blank line is before the next. A bar in the code of a table has a backslash on GitHub, and none here.
    """
    lines: list[str] = []
    width, blank, before = 0, False, ""  # of an item's marker; whether the item has a blank line
    for line in text.split("\n"):
        if item := re.match(r"(?:\d+\.|[*+-]) +", line):
            lines += [""] if width and blank and before.strip() else []
            width, blank = len(item[0]), False
        elif width and line.startswith(" " * width):
            line = "    " + line[width:]
        elif line.strip() and not before.strip():
            width = 0
        blank = blank or not line.strip()
        lines.append(re.sub(r"`[^`]*`", lambda code: code[0].replace("\\|", "|"), line) if line[:1] == "|" else line)
        before = line
    return "\n".join(lines)
