"""The model card of an output: README.md, with the front matter that the Hub reads."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fastinterp.checkpoint import hub
from fastinterp.checkpoint.regular_file import read_regular
from fastinterp.errors import CheckpointError
from fastinterp.presence import exists, is_file

CARD = "README.md"
_TAG = re.compile(r"[a-z0-9_-]{1,50}")
_MAX_CARD = 1 << 20  # bytes of a README.md that is read for its licence
# What is beside the weights of a library's models, and the library's name on the Hub.
_LIBRARIES = (
    ("model_index.json", "diffusers"),
    ("modules.json", "sentence-transformers"),
    ("config.json", "transformers"),
)


@dataclass(frozen=True, slots=True)
class Told:
    """How a model was made, for people.

    summary  of the method, a sentence without a full stop
    formula  of the output, in the symbols of the table
    rows     a table of the models and their parameters, its head first
    facts    further sentences, about rounding, say
    command  that makes the model of the recipe, as recipe.yml
    """

    summary: str = ""
    formula: str = ""
    rows: Sequence[Sequence[str]] = ()
    facts: Sequence[str] = ()
    command: str = ""


def model_card(
    recipe_text: str,
    models: Sequence[str],
    method: str,
    version: str,
    roots: Sequence[Path] = (),
    local: Collection[str] = (),
    told: Told = Told(),
    commits: Mapping[str, str] = {},
) -> str:
    """README.md for the output: YAML front matter for the Hub, then how the model was made.

    models  names; `base_model` lists those that can be Hub ids: the Hub refuses other names there
    local   those of the names that stand for folders elsewhere on this machine, and are no Hub ids
    commits of models from the Hub, by their names
    roots   the folders of the models, that of the configuration first: the licence is stated if all state the same one
    """
    named = [m for m in models if m not in local]
    ids = list(dict.fromkeys(parsed[0] for m in named if not exists(m) and (parsed := hub.parse(m))))
    front: dict[str, Any] = {"base_model": ids, "base_model_relation": "merge"} if ids else {}
    library = next((name for file, name in _LIBRARIES if roots and is_file(roots[0] / file)), None)
    if library is not None:
        front["library_name"] = library
    licences = [_licence(root) for root in dict.fromkeys(roots)]
    if licences and licences[0] is not None and all(licence == licences[0] for licence in licences):
        front |= licences[0]
    front["tags"] = ["merge", "mergekit", "fastinterp", *([method] if _TAG.fullmatch(method) else [])]
    rows = told.rows or [["model"], *([name] for name in models)]
    parts = [
        front_matter(front),
        "# Merged model",
        f"Made with fastinterp {version} by the method {_code(method)}{f': {told.summary}' if told.summary else ''}.",
        _fenced(told.formula) if told.formula else "",
        table(rows, code=[column for column, head in enumerate(rows[0]) if head in ("", "model")]),
        "\n".join(f"* {_line(fact)}" for fact in (*told.facts, *_from_the_hub(models, commits))),
        f"The recipe{', as recipe.yml:' if told.command else ':'}",
        _fenced(recipe_text, "yaml"),
    ]
    if told.command:
        parts += ["The command, which makes the same weights again:", _fenced(told.command, "sh")]
    return "\n\n".join(part for part in parts if part) + "\n"


def front_matter(keys: Mapping[str, Any]) -> str:
    """The block of YAML with which a card begins. keys: text, or lists of text"""
    lines = [
        f"{key}: {_quoted(value)}"
        if isinstance(value, str)
        else "\n".join([f"{key}:", *(f"- {_quoted(v)}" for v in value)])
        for key, value in keys.items()
    ]
    return "\n".join(["---", *lines, "---"])


def table(rows: Sequence[Sequence[str]], code: Collection[int] = ()) -> str:
    """A table of Markdown, its head first. code: columns whose cells are inline code"""

    def cell(column: int, text: str) -> str:
        return (_code(text) if column in code and text else _line(text)).replace("|", "\\|")

    head, *others = rows
    lines = ["| " + " | ".join(_line(name) for name in head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(cell(i, text) for i, text in enumerate(row)) + " |" for row in others]
    return "\n".join(lines)


def _fenced(text: str, language: str = "") -> str:
    fence = "`" * max(3, 1 + _longest_run(text))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _from_the_hub(models: Sequence[str], commits: Mapping[str, str]) -> list[str]:
    """Which commit was read of each model, and adapter, from the Hub."""
    named = dict.fromkeys(name.partition(":")[0] for model in models for name in model.split("+"))
    return [f"{name} was read at commit {commits[name]}" for name in named if name in commits]


def _licence(root: Path) -> dict[str, str] | None:
    """The keys about the licence in the front matter of a model's card; None, if there are none that can be read."""
    try:
        text = read_regular(str(root / CARD), _MAX_CARD).decode("utf-8-sig")
        front = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
        keys = yaml.safe_load(front[1]) if front else None
    except (OSError, CheckpointError, UnicodeDecodeError, yaml.YAMLError, RecursionError):
        return None
    if not isinstance(keys, dict) or not isinstance(keys.get("license"), str):
        return None
    wanted = ("license", "license_name", "license_link")  # the two others name a licence that the Hub has no word for
    return {key: keys[key] for key in wanted if isinstance(keys.get(key), str)}


def _quoted(text: str) -> str:
    """Quoted in any version of YAML: `1e3` is a number in one, and text in another."""
    return json.dumps(text, ensure_ascii=True)


def _line(text: str) -> str:
    """`text` on one line, control characters escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _code(text: str) -> str:
    """`text` as inline code on one line, whatever backquotes it holds."""
    line = _line(text)
    ticks = "`" * (1 + _longest_run(line))
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{ticks}{pad}{line}{pad}{ticks}"


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)
