"""Reads recipe text into plain values, with the line of every key: YAML, JSON, or a Python mapping. Collects errors.

YAML is read event by event, not as a node tree: libyaml's own composer recurses in C, and a file of a hundred
thousand brackets kills the process.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Annotated, Any, NoReturn

import yaml
from yaml.constructor import SafeConstructor

from fastinterp.errors import RecipeError, ShapeError
from fastinterp.messages import clipped, shown
from fastinterp.urls import is_url, public

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_DUMPER: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)

RecipeSource = str | os.PathLike[str] | Mapping[str, Any]  # of one document, or of a file of several
Source = Annotated[
    str | os.PathLike[str] | Mapping[str, Any] | Sequence[Mapping[str, Any]],
    """A recipe: what to merge, and how.

    a path              of a file of YAML; or of JSON, if it ends in .json
    YAML text           a str with a line break in it
    a mapping           what such a file holds: {"merge_method": "linear", "models": [...]}
    a list of mappings  several documents, which may name each other as models

    The keys are mergekit's: docs/RECIPES.md.
    """,
]

MAX_BYTES, MAX_NODES, MAX_DEPTH = 1 << 20, 100_000, 32  # far above any recipe, far below what hurts

_TAG = "tag:yaml.org,2002:"
_CONSTRUCT: dict[str, Any] = {
    _TAG + "str": SafeConstructor.construct_yaml_str,
    _TAG + "int": SafeConstructor.construct_yaml_int,
    _TAG + "float": SafeConstructor.construct_yaml_float,
    _TAG + "bool": SafeConstructor.construct_yaml_bool,
    _TAG + "null": SafeConstructor.construct_yaml_null,
}


@dataclass(frozen=True)
class Document:
    """A recipe as plain values (dict, list, str, int, float, bool, None), not yet checked for meaning.

    lines   `$.models[0].parameters.weight` -> 1-based line of that key or list item; empty without YAML text
    """

    value: Any
    text: str
    file: str | None
    lines: Mapping[str, int] = field(default_factory=dict)

    def error(
        self, message: str, path: str = "$", *, at: str | None = None, kind: type[RecipeError] = RecipeError
    ) -> RecipeError:
        """An error that names `path`, and the line of `at` (default: of `path`) or of what contains it."""
        spot = at or path
        while spot not in self.lines and ("." in spot or "[" in spot):
            spot = spot[: max(spot.rfind("."), spot.rfind("["))]
        return kind(message, path=path, file=self.file, line=self.lines.get(spot))


class ErrorCollector:
    """A context manager that raises the first error of a recipe, or collects all of them.

    It stands round each thing that can be wrong by itself: `with collector:`.

    Without `collect` every exception passes through. With it, a RecipeError or ShapeError ends the block, is added to
    `errors`, and the code after the block runs: what the block would have set must have a value before.
    """

    def __init__(self, *, collect: bool = False):
        self.collect = collect
        self.errors: list[RecipeError | ShapeError] = []

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: TracebackType | None) -> bool:
        if not self.collect or not isinstance(error, (RecipeError, ShapeError)):
            return False
        self.errors.append(error)
        return True


def read(source: RecipeSource, file: str | None = None) -> Document:
    """The document in a file (.json is JSON, all else YAML), in YAML text (a str with a newline), or in a mapping.

    file    what messages call the source; default: the path that was given
    Raises: RecipeError, if it cannot be read or parsed, holds several documents, or is too large or too deep to be a
    recipe.
    """
    first, *others = read_all(source, file)
    if others:
        message = "several documents (`---`) in one recipe are not supported yet"
        raise others[0].error(message)
    return first


def read_all(source: Source, file: str | None = None) -> tuple[Document, ...]:
    """The documents in a source, `---` between them in YAML; or one for each mapping of a list."""
    if isinstance(source, Mapping):
        source = [source]
    if isinstance(source, (list, tuple)):
        values = [_plain(value, "$", file, 0) for value in source]
        text = as_yaml(values)
        if not values:
            raise RecipeError("the recipe is empty", file=file)
        return tuple(Document(value, text, file) for value in values)
    if isinstance(source, str) and "\n" in source:
        return _from_yaml(public(source), file or "<recipe>")
    if not isinstance(source, (str, os.PathLike)):
        raise RecipeError(f"a recipe is a path, YAML text or a mapping, got {type(source).__name__}", file=file)
    path = os.fspath(source)
    text = public(_text(path, file or path))  # logins in addresses go no further than this
    return (_from_json if path.endswith(".json") else _from_yaml)(text, file or path)


def from_text(text: str) -> tuple[Document, ...]:
    """The documents in the text of a recipe, YAML or JSON, which may be one line. Raises: RecipeError."""
    text = public(text)
    if text.lstrip().startswith("{"):
        try:
            return _from_json(text, "<recipe>")
        except RecipeError:  # YAML has braces, too
            pass
    return _from_yaml(text, "<recipe>")


def as_yaml(values: Sequence[Any]) -> str:
    """Plain values as YAML text, a document each."""
    text: str = yaml.dump_all(
        values, Dumper=_DUMPER, sort_keys=False, allow_unicode=True, explicit_start=len(values) > 1
    )
    return text


def _text(path: str, file: str) -> str:
    if is_url(path):
        raise RecipeError("recipes are read from files here. Download it, and name the file", file=file)
    try:
        with open(os.path.expanduser(path), "rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
        return raw.decode("utf-8-sig")
    except FileNotFoundError:
        raise RecipeError(f"there is no such recipe file{_close(path)}", file=file) from None
    except IsADirectoryError:
        raise RecipeError("this is a folder; a recipe is a .yml, .yaml or .json file", file=file) from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"the file is not UTF-8 text (byte {error.start})", file=file) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise RecipeError(f"cannot read the recipe: {getattr(error, 'strerror', None) or error}", file=file) from None


def _close(path: str) -> str:
    """`. Did you mean ...?` with the file in the same folder whose name is closest."""
    import difflib  # not on the path of a recipe that is there

    folder, name = os.path.split(path)
    try:
        known = {os.path.splitext(n)[0]: n for n in os.listdir(folder or ".") if n.endswith((".yml", ".yaml", ".json"))}
    except (FileNotFoundError, NotADirectoryError):
        return f": there is no folder '{clipped(folder)}'"
    except OSError:  # of a folder whose names may not be read
        return ""
    close = difflib.get_close_matches(os.path.splitext(name)[0], known, n=1)
    return f". Did you mean '{clipped(os.path.join(folder, known[close[0]]))}'?" if close else ""


def _from_yaml(text: str, file: str) -> tuple[Document, ...]:
    if len(text) > MAX_BYTES:
        raise RecipeError(f"larger than {MAX_BYTES} bytes, so hardly a recipe", file=file)
    try:
        loader = _LOADER(text)
        try:
            documents = _Yaml(loader, file).documents()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = text.splitlines()[mark.line] if mark and mark.line < len(text.splitlines()) else ""
        tab = "\t" in line[: len(line) - len(line.lstrip())]
        message = (
            f"not valid YAML: {'a tab indents this line. Write spaces' if tab else error.problem or error.context}"
        )
        raise RecipeError(message, file=file, line=mark.line + 1 if mark else None) from None
    except (yaml.YAMLError, UnicodeError) as error:  # a character that YAML forbids; the C reader gives no mark
        raise RecipeError(f"not valid YAML: {' '.join(str(error).split())}", file=file) from None
    return tuple(Document(value, text, file, lines) for value, lines in documents)


class _Yaml:
    """Builds the values of documents out of their parser events."""

    def __init__(self, loader: Any, file: str):
        self.loader, self.file = loader, file
        self.nodes = 0
        self.lines: dict[str, int] = {}  # of one document, as its anchors are
        self.anchors: dict[str, tuple[Any, int]] = {}  # value, and how many nodes it has

    def documents(self) -> list[tuple[Any, dict[str, int]]]:
        """(value, lines) of each."""
        next_event = self.loader.get_event
        next_event()  # stream start
        documents: list[tuple[Any, dict[str, int]]] = []
        while not isinstance(event := next_event(), yaml.StreamEndEvent):
            self.lines, self.anchors = {"$": event.start_mark.line + 1} if documents else {}, {}
            event = next_event()
            empty = isinstance(event, yaml.ScalarEvent) and event.value == "" and not event.style
            value = self.build(event, "$", 0)
            next_event()  # document end
            if not (empty and documents):  # a `---` with nothing behind it
                documents.append((value, self.lines))
        if not documents:
            raise RecipeError("the recipe is empty", file=self.file)
        return documents

    def fail(self, event: Any, message: str, path: str) -> NoReturn:
        raise RecipeError(message, path=path, file=self.file, line=event.start_mark.line + 1)

    def build(self, event: Any, path: str, depth: int) -> Any:
        self.lines.setdefault(path, event.start_mark.line + 1)
        first = self.nodes
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in self.anchors:
                self.fail(event, f"`*{clipped(str(event.anchor))}` names nothing that is complete above it", path)
            value, size = self.anchors[event.anchor]
            self.count(event, size, path)
            return value
        self.count(event, 1, path)
        if depth > MAX_DEPTH:
            self.fail(event, f"nested deeper than {MAX_DEPTH} levels", "$")
        if isinstance(event, yaml.ScalarEvent):
            value = self.scalar(event, path)
        elif event.tag not in (None, "!", _TAG + ("map" if isinstance(event, yaml.MappingStartEvent) else "seq")):
            self.fail(event, f"the YAML tag `{clipped(event.tag)}` has no meaning in a recipe", path)
        elif isinstance(event, yaml.MappingStartEvent):
            value = self.mapping(path, depth)
        else:
            value = self.sequence(path, depth)
        if event.anchor is not None:
            self.anchors[event.anchor] = value, self.nodes - first
        return value

    def count(self, event: Any, nodes: int, path: str) -> None:
        self.nodes += nodes
        if self.nodes > MAX_NODES:
            self.fail(event, f"more than {MAX_NODES} values (aliases expanded), so hardly a recipe", path)

    def scalar(self, event: Any, path: str) -> Any:
        tag = event.tag
        if tag is None or tag == "!":
            tag = self.loader.resolve(yaml.ScalarNode, event.value, event.implicit)
        if tag not in _CONSTRUCT:
            what = f"`{clipped(event.value)}` is read as `{clipped(tag.removeprefix(_TAG))}` here"
            self.fail(event, f"{what}; put it in quotes if it is text", path)
        try:
            return _CONSTRUCT[tag](self.loader, yaml.ScalarNode(tag, event.value))
        except (ValueError, LookupError):
            self.fail(event, f"`{clipped(event.value)}` is no valid {tag.removeprefix(_TAG)}", path)

    def sequence(self, path: str, depth: int) -> list[Any]:
        items: list[Any] = []
        while not isinstance(event := self.loader.get_event(), yaml.SequenceEndEvent):
            items.append(self.build(event, f"{path}[{len(items)}]", depth + 1))
        return items

    def mapping(self, path: str, depth: int) -> dict[str, Any]:
        values: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        first_line: dict[str, int] = {}
        while not isinstance(event := self.loader.get_event(), yaml.MappingEndEvent):
            key = self.build(event, path, depth + 1) if isinstance(event, yaml.ScalarEvent) else None
            line = event.start_mark.line + 1
            if key == "<<" and event.implicit[0]:
                merged = self.merge_key(event, path, depth) | merged
                continue
            if not isinstance(key, str):
                if not isinstance(event, yaml.ScalarEvent):
                    self.fail(event, "a key must be plain text", path)
                last = next(reversed(values), "")
                if type(key) is type(values.get(last)) is int and first_line[last] == line:  # {weight: 0,5}
                    self.fail(event, f"a key must be text, got `{key}`. A decimal comma? Write a point: 0.5", path)
                self.fail(event, f"a key must be text, got `{clipped(event.value)}`. Put it in quotes", path)
            if key in values:
                self.fail(event, f"the key `{clipped(key)}` is given twice, first in line {first_line[key]}", path)
            first_line[key] = self.lines[f"{path}.{key}"] = line
            values[key] = self.build(self.loader.get_event(), f"{path}.{key}", depth + 1)
        return merged | values

    def merge_key(self, event: Any, path: str, depth: int) -> dict[str, Any]:
        """The mappings under `<<`, the earlier ones winning."""
        value = self.build(self.loader.get_event(), path, depth + 1)
        merged: dict[str, Any] = {}
        for mapping in value if isinstance(value, list) else [value]:
            if not isinstance(mapping, dict):
                self.fail(event, f"`<<` takes mappings, got {shown(mapping)}", path)
            merged = mapping | merged
        return merged


# `<<` stays text: `mapping` above gives it its meaning.
_CONSTRUCT[_TAG + "merge"] = SafeConstructor.construct_yaml_str


def _from_json(text: str, file: str) -> tuple[Document, ...]:
    import json

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise RecipeError(f"the key `{clipped(twice)}` is given twice", file=file)
        return values

    if len(text) > MAX_BYTES:
        raise RecipeError(f"larger than {MAX_BYTES} bytes, so hardly a recipe", file=file)
    try:
        value = json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise RecipeError(f"not valid JSON: {error.msg}", file=file, line=error.lineno) from None
    except RecursionError:
        raise RecipeError(f"nested deeper than {MAX_DEPTH} levels", file=file) from None
    except ValueError as error:  # an integer of more than 4300 digits
        raise RecipeError(f"not valid JSON: {error}", file=file) from None
    return (Document(_plain(value, "$", file, 0), text, file),)


def _plain(value: Any, path: str, file: str | None, depth: int) -> Any:
    """A copy of `value` made of plain types only. Paths (os.PathLike) become text, tuples lists."""
    if depth > MAX_DEPTH:
        raise RecipeError(f"nested deeper than {MAX_DEPTH} levels", path="$", file=file)
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise RecipeError(f"a key must be text, got {shown(key)}", path=path, file=file)
        return {_plain(k, path, file, depth): _plain(v, f"{path}.{k}", file, depth + 1) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v, f"{path}[{i}]", file, depth + 1) for i, v in enumerate(value)]
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise RecipeError(f"{shown(value)} is not valid Unicode text", path=path, file=file) from None
        return public(value)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int) and abs(value) < 2**64:
        return int(value)
    if isinstance(value, float):
        return float(value)
    raise RecipeError(
        f"expected text, a number, a truth value, a list or a mapping, got {shown(value)}", path=path, file=file
    )
