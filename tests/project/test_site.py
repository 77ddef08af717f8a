"""The documentation as a site, built with every warning as an error, and what it must hold. See `make docs`."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import fastinterp
from fastinterp import methods
from fastinterp.cli import _MODULES as COMMANDS

pytest.importorskip("material", reason="the tools for the site need Python 3.11.5 or newer: the extra `docs`")
pytestmark = pytest.mark.slow(8)

ROOT = Path(__file__).resolve().parents[2]


def built(source: Path, site: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=source, env=env, capture_output=True, text=True, check=False)


class Reader(HTMLParser):
    """What a page refers to, its anchors, and the text below each heading."""

    def __init__(self, page: Path):
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = set()
        self.sections: dict[str, str] = {}
        self.items = 0  # of numbered lists
        self._section, self._heading = "", False
        self._lists: list[str] = []
        self.feed(page.read_text("utf-8"))

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        name = found.get("id")
        if name:
            self.anchors.add(name)
        if re.fullmatch("h[1-6]", tag) and name:
            self._section, self._heading = name, True
            self.sections[name] = ""
        if tag in ("ol", "ul"):
            self._lists.append(tag)
        self.items += tag == "li" and self._lists[-1:] == ["ol"]
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        elif tag in ("script", "img", "iframe", "source"):
            self.loaded += [found["src"]] if found.get("src") else []
        elif tag == "link" and found.get("rel") in ("stylesheet", "icon", "preload", "preconnect"):
            self.loaded.append(found["href"])

    def handle_endtag(self, tag):
        if tag in ("ol", "ul"):
            self._lists.pop()
        self._heading = self._heading and not re.fullmatch("h[1-6]", tag)

    def handle_data(self, data):
        if self._section and not self._heading:
            self.sections[self._section] += data.strip()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    done = built(ROOT, folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site):
    return {path.name: Reader(path) for path in site.glob("*.html")}


def test_every_public_name_is_explained(pages):
    sections = pages["api.html"].sections
    by_name = {name.strip("_").lower(): text for name, text in sections.items()}
    assert [name for name in fastinterp.__all__ if len(by_name.get(name.strip("_").lower(), "")) < 15] == []


def test_every_method_and_command_has_a_section(pages):
    assert [n for n in methods.names() if len(pages["method-reference.html"].sections.get(n, "")) < 100] == []
    names = [*COMMANDS, "fastinterp-mergekit"]
    assert [n for n in names if len(pages["commands.html"].sections.get(n, "")) < 100] == []


def test_marks_of_docstrings_are_shown_as_they_are(pages):
    """No backslash is left of those that keep Markdown from reading them."""
    made = ("api", "integrations-api", "methods-api", "method-reference", "commands")
    text = "\n".join(text for name in made for text in pages[f"{name}.html"].sections.values())
    assert re.findall(r".{0,30}\\[*_<>|#\[\]].{0,30}", text) == []
    joined = re.sub(r"\s", "", text)
    assert "<v_i,v_j>" in joined and "a,b={" in joined and "{'w':array(" in joined


def test_every_page_is_in_the_navigation(pages):
    sources = {f"{path.stem}.html" for path in (ROOT / "docs").glob("*.md")}
    sources |= {"CONTRIBUTING.html", "SECURITY.html", "CHANGELOG.html", "index.html"}
    assert sources <= pages.keys()
    linked = {urlsplit(link).path.removeprefix("./") for link in pages["INSTALL.html"].links}
    assert sorted(pages.keys() - linked - {"404.html", "INSTALL.html"}) == []


def test_links_and_anchors_lead_somewhere(site, pages):
    """Also those that are made in code, which MkDocs does not see."""
    dead = []
    for name, page in pages.items():
        for link in page.links if name != "404.html" else []:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = unquote(parts.path.removeprefix("./")) or name
            target = "index.html" if target in (".", "") else target
            there = (site / target).exists() and (target not in pages or not parts.fragment)
            if not there and parts.fragment not in (pages[target].anchors if target in pages else set()):
                dead.append((name, link))
    assert dead == []


def test_nothing_is_loaded_from_another_host(site, pages):
    assert [(name, url) for name, page in pages.items() for url in page.loaded if urlsplit(url).netloc] == []
    styles = [*site.rglob("*.css")]
    assert styles and not [path for path in styles if re.search(r"url\(\s*[\"']?(https?:)?//", path.read_text("utf-8"))]


def test_the_search_finds_what_is_written(site):
    index = json.loads((site / "search" / "search_index.json").read_text("utf-8"))
    assert any("Shoemake" in entry["text"] for entry in index["docs"] if entry["location"].startswith("method-ref"))


def test_links_of_github_become_links_of_the_site(pages):
    """And bars in the code of tables are bars in both."""
    assert "INSTALL.html" in pages["index.html"].links and "SECURITY.html" in pages["INSTALL.html"].links
    assert "benchmarks/results/results.svg" in pages["performance.html"].loaded
    rules = re.findall(r"^(\d+)\. ", (ROOT / "docs" / "NUMERICS.md").read_text("utf-8"), re.MULTILINE)
    assert pages["NUMERICS.html"].items == len(rules) > 15  # with blocks of code between them
    assert "sum_i |x_i|/n" in " ".join(pages["methods.html"].sections.values())


def test_dead_links_and_pages_outside_of_the_navigation_end_the_build(tmp_path):
    copy = tmp_path / "project"
    (copy / "docs").mkdir(parents=True)
    for name in ("fastinterp", "website", "mkdocs.yml", "README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"):
        (copy / name).symlink_to(ROOT / name)
    for path in (ROOT / "docs").iterdir():
        (copy / "docs" / path.name).symlink_to(path)
    text = (ROOT / "docs" / "INSTALL.md").read_text("utf-8")
    (copy / "docs" / "INSTALL.md").unlink()
    (copy / "docs" / "INSTALL.md").write_text(f"{text}\n[a](gone.md), [b](RECIPES.md#no-such-heading)\n")
    (copy / "docs" / "unlisted.md").write_text("# Unlisted\n")
    done = built(copy, tmp_path / "site")
    assert done.returncode != 0
    assert [said for said in ("gone.md", "no-such-heading", "unlisted.md") if said not in done.stderr] == []
