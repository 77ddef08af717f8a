"""The names of a recipe's documents, and what they may refer to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from fastinterp.methods import shown
from fastinterp.recipe.document import Document
from fastinterp.recipe.faults import Faults


def check_names(documents: Sequence[Document], faults: Faults) -> None:
    """See that all but the last have names of their own, and that nothing builds on itself or on what comes later.

    Raises: RecipeError
    """
    named: dict[str, int] = {}
    for i, document in enumerate(documents):
        name = document.value.get("name") if isinstance(document.value, dict) else None
        with faults:
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
                with faults:
                    line = documents[at].lines.get("$.name")
                    where = f" (line {line})" if line else ""
                    what = "this document itself" if at == i else f"a document below{where}. Move that above this one"
                    raise document.error(f"{shown(name)} is the name of {what}", path)


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
