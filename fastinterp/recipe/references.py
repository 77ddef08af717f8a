"""Models as recipes name them (path or Hub id, revision, adapters), and names of documents. Opened elsewhere."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from fastinterp.messages import clipped, shown, suggestion
from fastinterp.presence import exists
from fastinterp.recipe.document import Document, ErrorCollector
from fastinterp.recipe.schema import ModelPath, Reference
from fastinterp.urls import is_url, public, scheme_of

_SCALE = re.compile(r"(.+):([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)", re.DOTALL)
_CLOSE = 0.8  # names as alike as this are one that was mistyped


class AdapterRef(msgspec.Struct, frozen=True):
    """An adapter that is added to a model.

    path      a folder, a file or a Hub id, as it was written
    revision  of a Hub id; None: its default branch
    scale     by which what it adds is multiplied, beside its own scaling
    """

    path: str
    revision: str | None = None
    scale: float = 1.0

    @classmethod
    def of(cls, text: str) -> AdapterRef:
        """The adapter of a text form: `path`, `path@revision`, `path:0.5`."""
        rest, scale = text, 1.0
        if found := _SCALE.fullmatch(text):
            rest, scale = found[1], float(found[2])
        path, at, revision = _parted(public(rest))
        return cls(path, revision, scale) if at else cls(path, None, scale)

    @property
    def name(self) -> str:
        """Of its checkpoint: path and revision."""
        return self.path if self.revision is None else f"{self.path}@{self.revision}"

    def __str__(self) -> str:
        return self.name if self.scale == 1 else f"{self.name}:{self.scale:.17g}"


class ModelRef(msgspec.Struct, frozen=True, eq=False):
    """A model as a recipe names it: a value. str() is its text form, which messages, receipts and model cards show.

    path      a folder, a .safetensors file, a Hub id or an address, as it was written, without logins
    revision  of a Hub id; None: its default branch
    adapters  that are added to the model, in this order

    Two are equal, if their text forms are the same normalised path: `models/a` and `./models/a/` are.
    """

    path: str
    revision: str | None = None
    adapters: tuple[AdapterRef, ...] = ()

    @classmethod
    def of(cls, text: str) -> ModelRef:
        """The model of a text form: `path`, `path@revision`, and adapters behind it: `path+adapter+other:0.5`. What is
        there under the whole text is a path, even if it has a `+`.
        """
        adapters: tuple[AdapterRef, ...] = ()
        text = public(text)
        if "+" in text and not exists(os.path.expanduser(text)):
            text, *others = text.split("+")
            adapters = tuple(map(AdapterRef.of, others))
        path, at, revision = _parted(text)
        return cls(path, revision, adapters) if at else cls(path, None, adapters)

    @property
    def name(self) -> str:
        """Of the checkpoint without adapters: path and revision."""
        return self.path if self.revision is None else f"{self.path}@{self.revision}"

    @property
    def names(self) -> tuple[str, ...]:
        """Of all checkpoints: its own, then those of its adapters."""
        return (self.name, *(adapter.name for adapter in self.adapters))

    def __str__(self) -> str:
        return "+".join((self.name, *map(str, self.adapters)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ModelRef) and self._normal == other._normal

    def __hash__(self) -> int:
        return hash(self._normal)

    @property
    def _normal(self) -> str:
        if not self.adapters:
            return os.path.normpath(self.name)
        scales = (f":{adapter.scale!r}" for adapter in self.adapters)
        return "+".join((*map(os.path.normpath, self.names), *scales))


def _parted(name: str) -> tuple[str, str, str]:
    """Path, `@` and revision; of an address, all of it: what an `@` in it means depends on its protocol."""
    path, at, revision = name.rpartition("@")
    return (path, at, revision) if at and not is_url(name) else (name, "", "")


# The base of adapters that are merged with each other, which is not read: their changes of it are zero there.
UNCHANGED = ModelRef("the base, unchanged")


def model_ref(document: Document, written: str | Reference, path: str) -> ModelRef:
    """The model that a recipe names at `path`, by its text form or by the long form `{model: ..., lora: ...}`.

    Raises: RecipeError, if a name is empty, or has more than one revision.
    """
    if isinstance(written, Reference):
        if isinstance(written.model, str):
            model = model_ref(document, written.model, f"{path}.model")
        else:
            model = _of_long_form(document, written.model, f"{path}.model")
        own = _adapters(document, written, path)
        return msgspec.structs.replace(model, adapters=(*model.adapters, *own)) if own else model
    if not written.strip():
        raise document.error("the name of a model must not be empty", path)
    model = ModelRef.of(written)
    instead = "If it belongs to the path, write `{model: {path: ...}}` for the name"
    parts: tuple[ModelRef | AdapterRef, ...] = (model, *model.adapters)
    for part in parts:
        if not part.path.strip() or part.revision == "":
            what = "of a model" if isinstance(part, ModelRef) else "of an adapter, behind `+`,"
            raise document.error(f"the name {what} must not be empty: {shown(written)}. {instead}", path)
        if "@" in part.path and not is_url(part.path):
            raise document.error(f"{shown(written)} has more than one `@`. {instead}", path)
    return model


def _adapters(document: Document, written: Reference, path: str) -> tuple[AdapterRef, ...]:
    """The adapters of `lora`: a name, a mapping, or a list of both."""
    if written.lora is None:
        if written.scale is not None:
            raise document.error("`scale` is that of a `lora`, and there is none", f"{path}.scale")
        return ()
    every = written.lora if isinstance(written.lora, list) else [written.lora]
    if not every:
        raise document.error("`lora` is an empty list. Leave it out", f"{path}.lora")
    found = []
    for i, item in enumerate(every):
        at = f"{path}.lora[{i}]" if isinstance(written.lora, list) else f"{path}.lora"
        if isinstance(item, str):
            adapter = AdapterRef.of(item)
            if "+" in item and not exists(os.path.expanduser(item)):
                raise document.error(f"{shown(item)} is one adapter. Write several as a list, without `+`", at)
        else:
            adapter = _adapter(document, item, at)
        if not adapter.path.strip() or adapter.revision == "":
            raise document.error("the name of an adapter must not be empty", at)
        given = "scale" in item if isinstance(item, dict) else _SCALE.fullmatch(item)
        if written.scale is not None and not given:
            adapter = msgspec.structs.replace(adapter, scale=written.scale)
        if not math.isfinite(adapter.scale):
            raise document.error(f"`scale` must be a finite number, got {adapter.scale}", at)
        found.append(adapter)
    return tuple(found)


def _adapter(document: Document, item: Any, path: str) -> AdapterRef:
    """`{path: ..., revision: ..., scale: ...}`."""
    known = ("path", "revision", "scale")
    if not isinstance(item, dict) or not isinstance(item.get("path"), str):
        raise document.error("an adapter is a name, or `{path: NAME, revision: ..., scale: ...}`", path)
    for key in item:
        if key not in known:
            unknown = f"unknown key `{clipped(str(key))}`{suggestion(str(key), known)}"
            raise document.error(unknown, path, at=f"{path}.{key}")
    revision, scale = item.get("revision"), item.get("scale", 1.0)
    if revision is not None and not isinstance(revision, str):
        raise document.error(f"`revision` must be text, got {shown(revision)}", f"{path}.revision")
    if type(scale) not in (int, float):
        raise document.error(f"`scale` must be a number, got {shown(scale)}", f"{path}.scale")
    return AdapterRef(public(item["path"]), revision, float(scale))


def _of_long_form(document: Document, written: ModelPath, path: str) -> ModelRef:
    if not written.path.strip() or written.revision == "":
        raise document.error("`path` and `revision` must not be empty", path)
    if written.revision is not None and is_url(written.path) and scheme_of(written.path) != "hf":
        raise document.error("`revision` is that of a model on the Hub, and the path is an address", f"{path}.revision")
    return ModelRef(public(written.path), written.revision)


def refuse_beside(document: Document, model: ModelRef, path: str) -> None:
    """Relative paths start at the current folder, as mergekit's do: say so where the recipe's folder was meant.

    Raises: RecipeError, if there is such a folder beside the recipe, and none where the name says.
    """
    folder = os.path.dirname(document.file or "")
    for name in model.names if folder else ():
        beside = os.path.join(folder, name)
        if not is_url(name) and not os.path.isabs(name) and exists(beside) and not exists(name):
            raise document.error(
                f"there is no {shown(name)} in the current folder, where relative paths start, but there is one beside "
                f"the recipe. Write '{beside}', or run in '{folder}'",
                path,
            )


def in_order(documents: Sequence[Document]) -> tuple[Document, ...]:
    """The documents in an order in which each refers to those above it only, and the one that is written is the last:
    the one without a name, else the last one that no other refers to. Those that refer to each other in a circle stay
    as they are.
    """
    names = [d.value.get("name") if isinstance(d.value, dict) else None for d in documents]
    uses = [
        [names.index(name) for name, _ in references(d.value, "$") if name in names and names.index(name) != i]
        for i, d in enumerate(documents)
    ]
    used = {j for of_one in uses for j in of_one}
    unnamed = [i for i, name in enumerate(names) if name is None]
    ends = unnamed or [i for i in range(len(documents)) if i not in used]
    order: list[int] = []
    open_ones: set[int] = set()

    def add(i: int) -> None:
        if i not in open_ones:
            open_ones.add(i)
            for j in uses[i]:
                add(j)
            order.append(i)

    for i in (*(i for i in range(len(documents)) if i not in ends[-1:]), *ends[-1:]):
        add(i)
    return tuple(documents[i] for i in order)


def check_names(documents: Sequence[Document], collector: ErrorCollector) -> None:
    """Check that all but the last have names of their own, and that none refers to itself, or in a circle.

    documents  `in_order`

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
                    what = "this document itself" if at == i else f"a document{where} that builds on this one"
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
    if os.path.isabs(os.path.expanduser(name)) or is_url(name):
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
            if key == "lora":
                continue  # adapters are none
            if key in ("model", "base_model", "path") and isinstance(item, str):
                yield item, f"{path}.{key}"
            else:
                yield from references(item, f"{path}.{key}")
