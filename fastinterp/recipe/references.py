"""Models as recipes name them (path or Hub id, revision, adapters), and names of documents. Opened elsewhere."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from fastinterp.messages import shown
from fastinterp.recipe.document import Document, ErrorCollector
from fastinterp.recipe.schema import ModelPath, Reference

_CLOSE = 0.8  # names as alike as this are one that was mistyped


class ModelRef(msgspec.Struct, frozen=True, eq=False):
    """A model as a recipe names it: a value. str() is its text form, which messages, receipts and model cards show.

    path      a folder, a .safetensors file or a Hub id, as it was written
    revision  of a Hub id; None: its default branch
    adapters  of the model, in the order in which they are added; always empty, as `+` is refused

    Two are equal, if their text forms are the same normalised path: `models/a` and `./models/a/` are.
    """

    path: str
    revision: str | None = None
    adapters: tuple[str, ...] = ()

    @classmethod
    def of(cls, text: str) -> ModelRef:
        """The model of a text form: `path` or `path@revision`."""
        path, at, revision = text.rpartition("@")
        return cls(path, revision) if at else cls(text)

    def __str__(self) -> str:
        revision = "" if self.revision is None else f"@{self.revision}"
        return "+".join((f"{self.path}{revision}", *self.adapters))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ModelRef) and os.path.normpath(str(self)) == os.path.normpath(str(other))

    def __hash__(self) -> int:
        return hash(os.path.normpath(str(self)))


# The base of adapters that are merged with each other, which is not read: their changes of it are zero there.
UNCHANGED = ModelRef("the base, unchanged")


def model_ref(document: Document, written: str | Reference, path: str) -> ModelRef:
    """The model that a recipe names at `path`, by its text form or by the long form `{model: {path, revision}}`.

    Raises: RecipeError, if the name is empty, has an adapter or more than one revision.
    """
    if isinstance(written, Reference):
        if written.lora is not None:
            raise document.error("`lora` is not supported yet. Merge the LoRA into its model first", f"{path}.lora")
        if isinstance(written.model, str):
            return model_ref(document, written.model, f"{path}.model")
        return _of_long_form(document, written.model, f"{path}.model")
    if not written.strip():
        raise document.error("the name of a model must not be empty", path)
    instead = "If it belongs to the path, write `{model: {path: ...}}` for the name"
    if "+" in written:
        raise document.error(
            f"a LoRA behind `+` is not supported yet: merge it into its model first. {_with_peft(written)}. {instead}",
            path,
        )
    if written.count("@") > 1:
        raise document.error(f"{shown(written)} has more than one `@`. {instead}", path)
    return ModelRef.of(written)


def _with_peft(written: str) -> str:
    """How peft merges the LoRA in `model+lora` into the model."""
    base, _, adapter = written.partition("+")
    model = ModelRef.of(base)
    revision = "" if model.revision is None else f", revision={json.dumps(model.revision)}"
    load = f"transformers.AutoModelForCausalLM.from_pretrained({json.dumps(model.path)}{revision})"
    code = (
        f"import peft, transformers; peft.PeftModel.from_pretrained({load}, {json.dumps(adapter)})"
        '.merge_and_unload().save_pretrained("NEW")'
    )
    import shlex  # a recipe without errors does not need it

    return f"Of a language model: `python -c {shlex.quote(code)}`; then copy the tokenizer's files to NEW, and name NEW"


def _of_long_form(document: Document, written: ModelPath, path: str) -> ModelRef:
    if not written.path.strip() or written.revision == "":
        raise document.error("`path` and `revision` must not be empty", path)
    return ModelRef(written.path, written.revision)


def refuse_beside(document: Document, model: ModelRef, path: str) -> None:
    """Relative paths start at the current folder, as mergekit's do: say so where the recipe's folder was meant.

    Raises: RecipeError, if there is such a folder beside the recipe, and none where the name says.
    """
    name, folder = str(model), os.path.dirname(document.file or "")
    beside = os.path.join(folder, name)
    if folder and not os.path.isabs(name) and os.path.exists(beside) and not os.path.exists(name):
        raise document.error(
            f"there is no {shown(name)} in the current folder, where relative paths start, but there is one beside the "
            f"recipe. Write '{beside}', or run in '{folder}'",
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
