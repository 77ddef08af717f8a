"""The merge methods, one a file. This module finds them by scanning its folder and reads their declarations.

A method is a function of the number of inputs n that returns a sum of them; it never sees an element. One that needs
statistics is a generator: it yields requests (ops/requests.py) and returns the sum. Its parameters are its
keyword-only arguments, and their annotations are the declaration:

    @method(base="required", models=(2, 64))
    def task_arithmetic(n: int, *, weight: Each[float], normalize: bool = False, lambda_: float = 1.0) -> Combine:

    @method(base="required", models=(2, 64))
    def ties(n: int, tensor: Tensor, *, weight: Each[float], density: Each[Unit] = (1.0,), ...) -> Steps:

`Each[T]` is a tuple of one value per model, the base left out; its default is a tuple of one value, used for every
model. A plain type is one value for the merge. Types: float, bool, int, those of them with a range (`Unit`), a Literal
of words, `Sidecar`, and any of these or None. A trailing underscore (`lambda_`) is not part of the name in recipes.
The function has the name of its file; a file whose name starts with an underscore holds no method.

Methods of others are declared the same way. They come from the entry points of installed packages in the group
`fastinterp.methods`, or as arguments: `merge(..., methods=[mine])`. None may have the name of a method here.
"""

from __future__ import annotations

import importlib
import inspect
import os
import typing
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from fastinterp.errors import MethodError
from fastinterp.messages import clipped, shown, suggestion
from fastinterp.ops.combine import LARGEST, Tensor

T = TypeVar("T")
Each = tuple[T, ...]  # one value for each model, the base left out
Base = Literal["required", "optional", "none"]


class Range(NamedTuple):
    """The numbers low .. high, both included. `absolute`: in units of the weights, so that it scales with them."""

    low: float
    high: float
    absolute: bool = False

    def __str__(self) -> str:
        return f"{self.low:g}..{self.high:g}" if self.high < LARGEST else f"at least {self.low:g}"


class Keyed(NamedTuple):
    """A word that recipes write as a mapping of one key: `weights: {decay: linear}`."""

    key: str


class Sidecar(str):
    """The name of a further checkpoint, with the tensors of the model that it belongs to: its diagonal Fisher, say."""


Unit = Annotated[float, Range(0.0, 1.0)]  # a number from 0 to 1
NotNegative = Annotated[float, Range(0.0, LARGEST)]  # a number that is at least 0
# a number that is at least 0, in units of the weights: where these are scaled, it is, too
Length = Annotated[float, Range(0.0, LARGEST, absolute=True)]


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a method, as its signature declares it.

    name      as recipes write it
    keyword   as the function takes it
    kind      float, bool, int, str (one of `choices`) or Sidecar
    each      one value per model, else one for the merge
    optional  None is a value
    required  there is no default
    default   one value, of `kind` or None
    range     of a number
    choices   of a word
    key       of a word that is written as a mapping of this one key, or None
    """

    name: str
    keyword: str
    kind: Any
    each: bool
    optional: bool
    required: bool
    default: float | bool | str | None
    range: Range | None = None
    choices: tuple[str, ...] = ()
    key: str | None = None

    @property
    def varies(self) -> bool:
        """Whether gradients make sense: values that lie between two others."""
        return self.kind is float

    def value(self, raw: object) -> float | bool | str | None:
        """A value from a recipe, as `kind`. Booleans take 0 and 1; numbers take neither true nor false.

        Raises: ValueError with the reason, if `raw` is something else, out of range, or a number that float32 cannot
        hold.
        """
        if raw is None and self.optional:
            return None
        if self.kind is bool:
            if isinstance(raw, (bool, int, float)) and raw in (0, 1):
                return bool(raw)
            raise ValueError(f"`{self.name}` must be true or false, got {shown(raw)}")
        if issubclass(self.kind, str):
            return self._word(raw)
        if isinstance(raw, bool):
            words = "yes and on as true" if raw else "no and off as false"
            raise ValueError(f"`{self.name}` must be a number, got {shown(raw)} (YAML reads {words})")
        if not isinstance(raw, (int, float)) or not abs(raw) <= LARGEST:
            raise ValueError(f"`{self.name}` must be a finite number (at most 3.4e38), got {shown(raw)}")
        if self.kind is int and raw != int(raw):
            raise ValueError(f"`{self.name}` must be a whole number, got {shown(raw)}")
        if self.range and not self.range.low <= raw <= self.range.high:
            raise ValueError(f"`{self.name}` must be {'in ' * ('..' in str(self.range))}{self.range}, got {shown(raw)}")
        return self.kind(raw)  # type: ignore[no-any-return]

    def _word(self, raw: object) -> str:
        if self.key is not None:
            if not isinstance(raw, dict) or list(raw) != [self.key]:
                raise ValueError(f"`{self.name}` is written {{{self.key}: ...}}, got {shown(raw)}")
            raw = raw[self.key]
        if not isinstance(raw, str) or not raw.strip():
            raise ValueError(f"`{self.name}` must be text, got {shown(raw)}")
        if self.choices and raw not in self.choices:
            raise ValueError(f"`{self.name}` must be one of {', '.join(self.choices)}, got {shown(raw)}")
        return self.kind(raw)  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class Method:
    """A merge method: `fn(n, **parameters)` or `fn(n, tensor, **parameters)`, and what it declares.

    name         as recipes write it
    fn           the function
    doc          its docstring: summary, formula, parameters
    parameters   what recipes may give, one `Parameter` each
    base         "required": input 0 is the base. "optional": it is, if the recipe has one. "none": all inputs are alike
    models       fewest and most inputs, the base included; side-cars are not counted
    generator    whether it is a generator of requests
    sums_deltas  the output is the base plus a sum of deltas x_i - x0, or of parts of them
    drops        it leaves elements of the deltas out: all but a `density`, if it has that parameter
    draws        which elements are left out is drawn at random: the output depends on the seed
    elects       for each element it elects a sign, and leaves out deltas of the other sign
    walks        its parameter `t` walks from the first input, 0, to the second, 1
    relative     only the ratios of its weights count, whatever its other parameters are
    for_more     what to use for more inputs than it takes, as a message has it
    """

    name: str
    fn: Callable[..., Any]
    doc: str
    base: Base
    models: tuple[int, int]
    parameters: tuple[Parameter, ...]
    generator: bool = False
    sums_deltas: bool = False
    drops: bool = False
    draws: bool = False
    elects: bool = False
    walks: bool = False
    relative: bool = False
    for_more: str = ""

    def __call__(self, n: int, tensor: Tensor | None = None, **parameters: Any) -> Any:
        """A call for a tensor of n inputs: the sum, or the generator that yields requests first and returns the sum."""
        return self.fn(*(n, tensor)[: self.fn.__code__.co_argcount], **parameters)


def method(
    *, base: Base, models: tuple[int, int], sums_deltas: bool = False, drops: bool = False, draws: bool = False,
    elects: bool = False, walks: bool = False, relative: bool = False, for_more: str = "",
) -> Callable[[Callable[..., Any]], Method]:  # fmt: skip
    """Declare the function below to be a merge method. Arguments: those of `Method`.

    Nothing else is known about a method: no other module looks at its name.
    Raises: TypeError, if a parameter is annotated with a type that recipes cannot give.
    """

    def declare(fn: Callable[..., Any]) -> Method:
        doc, generator = inspect.cleandoc(fn.__doc__ or ""), inspect.isgeneratorfunction(fn)
        return Method(
            fn.__name__, fn, doc, base, models, _parameters(fn), generator, sums_deltas=sums_deltas, drops=drops,
            draws=draws, elects=elects, walks=walks, relative=relative, for_more=for_more,
        )  # fmt: skip

    return declare


ENTRY_POINTS = "fastinterp.methods"  # the group in which other packages name their methods
_given: ContextVar[dict[str, Method]] = ContextVar("_given", default={})  # noqa: B039 - it is never changed
_loaded: dict[str, Method] = {}  # by other packages


def names() -> list[str]:
    """The names of all methods here and of those that are `given`, sorted. Imports none of them."""
    return sorted({*_own_names(), *_given.get(), *_loaded})


def names_of_others() -> list[str]:
    """The names of the methods of other packages, sorted. Imports none of them."""
    return sorted({entry.name for entry in _entry_points()} - set(_own_names()))


def find(name: str) -> Method:
    """The method called `name`; imports its file only.

    Raises: MethodError, if there is none, or another package names what is no method.
    """
    if name in _own_names():
        return _own(name)
    if name in _given.get():
        return _given.get()[name]
    for entry in () if name in _loaded else _entry_points():
        if entry.name == name:
            _loaded[name] = _checked(entry.load(), name, f"the entry point {entry.value}")
    if name not in _loaded:
        known = sorted({*names(), *names_of_others()})
        raise MethodError(f"unknown merge method `{clipped(name)}`{suggestion(name, known)}")
    return _loaded[name]


@cache
def _own(name: str) -> Method:
    method: Method = getattr(importlib.import_module(f"{__name__}.{name}"), name)
    return method


def is_own(method: Method) -> bool:
    """Whether it is a method of this package: its code is known by the version."""
    return method.fn.__module__.startswith(f"{__name__}.")


@contextmanager
def given(methods: Iterable[Method]) -> Iterator[None]:
    """Context manager: these methods are found by their names, too.

    Raises: MethodError, if one is no method, or has the name of another.
    """
    added: dict[str, Method] = {}
    for method in methods:
        name = getattr(method, "name", "") or getattr(method, "__name__", "")
        if name in added or name in _own_names():
            raise MethodError(f"there is a merge method `{clipped(name)}` already. Give the function another name")
        added[name] = _checked(method, name, "`methods`")
    token = _given.set(_given.get() | added)
    try:
        yield
    finally:
        _given.reset(token)


@cache
def _own_names() -> tuple[str, ...]:
    with os.scandir(os.path.dirname(__file__)) as entries:
        files = [e.name for e in entries]
    return tuple(f[:-3] for f in files if f.endswith(".py") and not f.startswith("_"))


def _entry_points() -> Iterable[Any]:
    from importlib.metadata import entry_points  # not on the path of a method that is here

    return entry_points(group=ENTRY_POINTS)


def _checked(method: object, name: str, where: str) -> Method:
    """Raises: MethodError, if it is no method of that name. where: it comes from"""
    if not isinstance(method, Method):
        what = f"{clipped(repr(method))} is no merge method"
        raise MethodError(f"{where}: {what}. Put `@fastinterp.methods.method(base=..., models=...)` above the function")
    if method.name != name:
        raise MethodError(
            f"{where}: the method is called `{method.name}`, so its name there must be that, not `{name}`"
        )
    return method


def _parameters(fn: Callable[..., Any]) -> tuple[Parameter, ...]:
    code, defaults = fn.__code__, fn.__kwdefaults__ or {}
    start = code.co_argcount
    keywords = code.co_varnames[start : start + code.co_kwonlyargcount]
    hints = typing.get_type_hints(fn, include_extras=True)
    return tuple(_parameter(k, hints[k], k not in defaults, defaults.get(k)) for k in keywords)


def _parameter(keyword: str, hint: Any, required: bool, default: Any) -> Parameter:
    each = typing.get_origin(hint) is tuple
    if each:
        hint, default = typing.get_args(hint)[0], None if required else default[0]
    optional = type(None) in typing.get_args(hint)
    if optional:
        (hint,) = (kind for kind in typing.get_args(hint) if kind is not type(None))
    limits, key, choices = None, None, ()
    if typing.get_origin(hint) is Annotated:
        hint, note = typing.get_args(hint)
        limits, key = (note, None) if isinstance(note, Range) else (None, note.key)
    if typing.get_origin(hint) is Literal:
        hint, choices = str, typing.get_args(hint)
    if hint not in (float, bool, int, Sidecar) and not choices:
        raise TypeError(
            f"parameter {keyword}: {hint} is none of float, bool, int, Literal, Sidecar, or one of them or None"
        )
    return Parameter(keyword.rstrip("_"), keyword, hint, each, optional, required, default, limits, choices, key)
