"""`help()` of every public name: what it is, every argument, every field, errors; and examples that run."""

from __future__ import annotations

import dataclasses
import doctest
import inspect
import pydoc
import re
from types import FunctionType
from typing import Any

import pytest

import fastinterp
from fastinterp.errors import FastinterpError

NAMES = [name for name in fastinterp.__all__ if name != "__version__"]
PUBLIC = {name: getattr(fastinterp, name) for name in NAMES}
FUNCTIONS = [name for name in NAMES if isinstance(PUBLIC[name], FunctionType)]
CLASSES = [name for name in NAMES if inspect.isclass(PUBLIC[name])]
ALIASES = [name for name in NAMES if hasattr(PUBLIC[name], "__metadata__")]
RESULTS = [name for name in CLASSES if dataclasses.is_dataclass(PUBLIC[name])]
ERRORS = [name for name in CLASSES if issubclass(PUBLIC[name], Exception)]


def text(thing: object) -> str:
    return inspect.getdoc(thing) or ""


def named(argument: str, doc: str) -> bool:
    """Whether a docstring explains an argument: at the start of a line, alone or in a list; or in backquotes."""
    lists = re.findall(r"^((?:\w+, )*\w+)(?: +|$)", doc, re.MULTILINE)
    return any(argument in names.split(", ") for names in lists) or f"`{argument}`" in doc


def explained(function: str, argument: str) -> bool:
    """In its own docstring, or in that of a function to which it leads: "The other arguments are those of `merge`"."""
    doc = text(PUBLIC[function])
    if named(argument, doc):
        return True
    others = re.findall(r"(?:arguments|errors)[^.]*?(?:those of|as of) `(\w+)`", " ".join(doc.split()))
    taken = [o for o in others if o in FUNCTIONS and argument in inspect.signature(PUBLIC[o]).parameters]
    return any(explained(other, argument) for other in taken)


def members(cls: type) -> dict[str, Any]:
    """The methods and properties of a class of this package that a user sees."""
    found: dict[str, Any] = {}
    for base in cls.__mro__:
        if base.__module__.startswith("fastinterp"):
            found |= {n: v for n, v in vars(base).items() if not n.startswith("_") and n not in found}
    kinds = (FunctionType, property, staticmethod, classmethod)
    return {n: v for n, v in found.items() if isinstance(v, kinds) or hasattr(v, "attrname")}


def test_every_name_is_of_a_kind():
    assert sorted({*FUNCTIONS, *CLASSES, *ALIASES}) == sorted(NAMES)
    assert len(FUNCTIONS) > 15 and len(ALIASES) > 6 and len(ERRORS) == 9


def test_the_module_names_all():
    shown = set(re.findall(r"\w+", fastinterp.__doc__ or ""))
    assert [name for name in fastinterp.__all__ if name not in shown] == []


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_explain_their_arguments_and_errors(name):
    doc = text(PUBLIC[name])
    assert [a for a in inspect.signature(PUBLIC[name]).parameters if not explained(name, a)] == []
    assert "Raises:" in doc or re.search(r"errors[^.]*(are|is) (those|that) of `\w+`", " ".join(doc.split()))


@pytest.mark.parametrize("name", CLASSES)
def test_classes_explain_their_members(name):
    assert len(text(PUBLIC[name])) > 20
    assert [n for n, member in members(PUBLIC[name]).items() if len(text(member)) < 10] == []


@pytest.mark.parametrize("name", RESULTS)
def test_results_explain_their_fields(name):
    doc = text(PUBLIC[name])
    assert [
        f.name for f in dataclasses.fields(PUBLIC[name]) if not f.name.startswith("_") and not named(f.name, doc)
    ] == []


@pytest.mark.parametrize("name", ["Live", "Path"])
def test_methods_explain_their_arguments(name):
    missing = []
    for member, function in members(PUBLIC[name]).items():
        if isinstance(function, FunctionType):
            arguments = [a for a in inspect.signature(function).parameters if a != "self"]
            missing += [f"{member}({a})" for a in arguments if not named(a, text(function))]
    assert missing == []


@pytest.mark.parametrize("name", ERRORS)
def test_errors_state_their_exit_code(name):
    kind = PUBLIC[name]
    assert issubclass(kind, FastinterpError)
    assert name == "FastinterpError" or f"exit code {kind.exit_code}" in text(kind)


@pytest.mark.parametrize("name", ALIASES)
def test_help_shows_the_text_of_an_alias(name):
    """Not that of `Annotated`."""
    shown = pydoc.render_doc(PUBLIC[name], renderer=pydoc.plaintext)  # type: ignore[attr-defined]  # typeshed lacks it
    assert f"{name} = " in shown
    first = PUBLIC[name].__metadata__[0].strip().splitlines()[0]
    assert first in shown and len(first) > 20


def test_signatures_name_public_types():
    """Every name of this package in a public signature has a public explanation."""
    unknown = set()
    for name in FUNCTIONS:
        for annotation in inspect.get_annotations(PUBLIC[name]).values():
            words = set(re.findall(r"\b[A-Z]\w+", str(annotation)))
            unknown |= words - set(NAMES) - {"Any", "Callable", "Framework", "Generator", "Iterable", "Mapping", "None"}
    assert unknown - {"Sequence", "PathLike", "Array"} == set()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_examples(name):
    finder = doctest.DocTestFinder(recurse=False)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    for example in finder.find(PUBLIC[name], name, globs={}):
        runner.run(example)
    assert runner.summarize(verbose=False).failed == 0


def test_there_are_examples():
    with_examples = [name for name in NAMES if ">>> " in text(PUBLIC[name])]
    assert {"weighted_sum", "merge_tensors", "merge_state_dicts"} <= set(with_examples)
