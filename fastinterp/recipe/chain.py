"""The names of a recipe's documents: unique, and referred to by documents below only."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fastinterp.messages import shown
from fastinterp.recipe.document import Document
from fastinterp.recipe.error_collector import ErrorCollector

_CLOSE = 0.8  # names as alike as this are one that was mistyped


def check_names(documents: Sequence[Document], collector: ErrorCollector) -> None:
    """Check that all but the last have names of their own, and that none refers to itself or to one below it.

    Raises: RecipeError, with path and line.
    """
    named: dict[str, int] = {}
    for i, document in enumerate(documents):
        name = document.value.get("name") if isinstance(document.value, dict) else None
        with collector:
            if name is None and i < len(documents) - 1:
                message = "the key `name` is missing: every document but the last needs one that those after it use"
                raise document.error(message)
            if isinstance(name, str) and named.setdefault(name, i) != i:
                first = documents[named[name]].lines.get("$.name")
                where = f" in line {first}" if first else ""
                raise document.error(f"the name {shown(name)} is already taken{where}", "$.name")
            if isinstance(name, str) and not name.strip():
                raise document.error("the name of a document must not be empty", "$.name")
    for i, document in enumerate(documents):
        for name, path in references(document.value, "$"):
            if (at := named.get(name, -1)) >= i:
                with collector:
                    line = documents[at].lines.get("$.name")
                    where = f" (line {line})" if line else ""
                    what = "this document itself" if at == i else f"a document below{where}. Move that above this one"
                    raise document.error(f"{shown(name)} is the name of {what}", path)


def close_reference(name: str, documents: Sequence[Document]) -> str:
    """The end of a message about a name that nothing refers to: a reference that is close to it, or nothing."""
    import difflib  # as below

    for document in documents:
        for known, path in references(document.value, "$"):
            if difflib.get_close_matches(known, [name], n=1, cutoff=_CLOSE):
                line = document.lines.get(path)
                where = f"line {line} names" if line else "one names"
                return f", but {where} {shown(known)}: did you mean {shown(name)}?"
    return ""


def not_there(document: Document, name: str, documents: Sequence[str]) -> str:
    """The end of a message about a model that cannot be opened: the document that was meant, or the folder it is in.

    documents  the names of the recipe's documents
    """
    import difflib  # not on the path of a recipe whose models are there

    if close := difflib.get_close_matches(name, documents, n=1, cutoff=_CLOSE):
        return f" Did you mean the document {shown(close[0])}?"
    if os.path.isabs(os.path.expanduser(name)):
        return ""
    here, path, file = os.getcwd(), name.partition("@")[0], document.file or ""
    beside = os.path.dirname(os.path.abspath(file)) if os.path.isfile(file) else here
    for folder in (beside, *map(str, Path(beside).parents)):
        if folder != here and os.path.exists(os.path.join(folder, path)):
            return f" It is in '{folder}': relative paths start at the current folder. Run it there"
    return "" if beside == here else f" Relative paths start at the current folder, '{here}'"


def references(value: Any, path: str) -> Iterator[tuple[str, str]]:
    """(name, path) of all that may name a model."""
    if isinstance(value, list):
        for i, item in enumerate(value):
            yield from references(item, f"{path}[{i}]")
    elif isinstance(value, dict):
        for key, item in value.items():
            if key in ("model", "base_model", "path") and isinstance(item, str):
                yield item, f"{path}.{key}"
            else:
                yield from references(item, f"{path}.{key}")
