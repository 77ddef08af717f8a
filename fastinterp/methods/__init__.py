"""The merge methods, one a file. This module finds them by scanning its folder and reads their declarations.

A method is a function of the number of inputs n that answers with the operation it wants; it never sees a tensor.
Its parameters are its keyword-only arguments, and their annotations are the declaration:

    @method(base="required", models=(2, 64))
    def task_arithmetic(n: int, *, weight: Each[float], normalize: bool = False, lambda_: float = 1.0) -> Combine:

`Each[T]` is a tuple of one value per model, the base left out; its default is a tuple of one value, used for every
model. A plain type is one value for the merge. A trailing underscore (`lambda_`) is not part of the name in recipes.
The function has the name of its file; a file whose name starts with an underscore holds no method.
"""

from __future__ import annotations

import importlib
import inspect
import os
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from fastinterp.compute.ops import Combine
from fastinterp.errors import MethodError

T = TypeVar("T")
Each = tuple[T, ...]
Base = Literal["required", "optional", "none"]

# The methods of mergekit, as its recipes name them: those that are not here yet are no misspellings.
_MERGEKIT = """arcee_fusion breadcrumbs breadcrumbs_ties dare_linear dare_ties della della_linear karcher linear
    model_stock multislerp nearswap nuslerp passthrough ram ramplus_tl sce slerp task_arithmetic ties""".split()

LARGEST = (2.0 - 2.0**-23) * 2.0**127  # of float32: coefficients are rounded to it before they reach a kernel


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a method, as its signature declares it.

    name      as recipes write it
    keyword   as the function takes it
    kind      float or bool
    each      one value per model, else one for the merge
    optional  None is a value
    required  there is no default
    default   one value, of `kind` or None
    """

    name: str
    keyword: str
    kind: type[float] | type[bool]
    each: bool
    optional: bool
    required: bool
    default: float | bool | None

    def value(self, given: object) -> float | bool | None:
        """What a recipe gives, as `kind`. Truth values take 0 and 1; numbers take neither true nor false.

        Raises: ValueError with the reason, if `given` is something else or a number that float32 cannot hold.
        """
        if given is None and self.optional:
            return None
        if self.kind is bool:
            if isinstance(given, (bool, int, float)) and given in (0, 1):
                return bool(given)
            raise ValueError(f"`{self.name}` must be true or false, got {shown(given)}")
        if isinstance(given, bool):
            words = "yes and on as true" if given else "no and off as false"
            raise ValueError(f"`{self.name}` must be a number, got {shown(given)} (YAML reads {words})")
        if isinstance(given, (int, float)) and abs(given) <= LARGEST:
            return float(given)
        raise ValueError(f"`{self.name}` must be a finite number (at most 3.4e38), got {shown(given)}")


@dataclass(frozen=True, slots=True)
class Method:
    """A merge method: `fn(n, **parameters)` and what it declares.

    base    "required": input 0 is the base. "optional": it is, if the recipe has one. "none": all inputs are alike
    models  fewest and most inputs, the base included
    """

    name: str
    fn: Callable[..., Combine]
    doc: str
    base: Base
    models: tuple[int, int]
    parameters: tuple[Parameter, ...]

    def __call__(self, n: int, **parameters: Any) -> Combine:
        return self.fn(n, **parameters)


def method(*, base: Base, models: tuple[int, int]) -> Callable[[Callable[..., Combine]], Method]:
    """Declare the function below to be a merge method. Arguments: those of `Method`.

    Raises: TypeError, if a parameter is annotated with a type that recipes cannot give.
    """

    def declare(fn: Callable[..., Combine]) -> Method:
        return Method(fn.__name__, fn, inspect.cleandoc(fn.__doc__ or ""), base, models, _parameters(fn))

    return declare


def names() -> list[str]:
    """The names of all methods, sorted. Imports none of them."""
    with os.scandir(os.path.dirname(__file__)) as entries:
        files = [e.name for e in entries]
    return sorted(f[:-3] for f in files if f.endswith(".py") and not f.startswith("_"))


def find(name: str) -> Method:
    """The method called `name`; imports its file only.

    Raises: MethodError, if there is none.
    """
    known = names()
    if name in _MERGEKIT and name not in known:
        raise MethodError(
            f"`{name}` is a method of mergekit that fastinterp does not have yet. Here: {', '.join(known)}"
        )
    if name not in known:
        raise MethodError(f"unknown merge method `{clipped(name)}`{suggestion(name, known)}")
    found: Method = getattr(importlib.import_module(f"{__name__}.{name}"), name)
    return found


def suggestion(word: str, known: Sequence[str]) -> str:
    """The end of a message about an unknown word: the known word that is close to it, else all that are known."""
    import difflib  # not on the path of a recipe without mistakes

    close = difflib.get_close_matches(word[:100].lower(), known, n=1)
    return f", did you mean `{close[0]}`?" if close else f". Known: {', '.join(known) or 'none'}"


def shown(value: object) -> str:
    """A value for a message: its repr, cut short; true, false and nothing as recipes have them."""
    if value is None or isinstance(value, bool):
        return {None: "nothing", True: "true", False: "false"}[value]
    try:
        return clipped(repr(value))
    except ValueError:  # integers of more than 4300 digits have no repr
        return "a number of thousands of digits"


def clipped(text: str) -> str:
    """Text for a message, cut after 60 characters."""
    return text if len(text) <= 60 else text[:57] + "..."


def _parameters(fn: Callable[..., Combine]) -> tuple[Parameter, ...]:
    code, defaults, hints = fn.__code__, fn.__kwdefaults__ or {}, typing.get_type_hints(fn)
    start = code.co_argcount
    return tuple(
        _parameter(keyword, hints[keyword], keyword not in defaults, defaults.get(keyword))
        for keyword in code.co_varnames[start : start + code.co_kwonlyargcount]
    )


def _parameter(keyword: str, hint: Any, required: bool, default: Any) -> Parameter:
    each = typing.get_origin(hint) is tuple
    if each:
        hint, default = typing.get_args(hint)[0], None if required else default[0]
    kinds = set(typing.get_args(hint) or (hint,))
    optional = type(None) in kinds
    kinds.discard(type(None))
    if kinds not in ({float}, {bool}):
        raise TypeError(f"parameter {keyword}: {hint} is none of float, bool, float | None, bool | None")
    return Parameter(keyword.rstrip("_"), keyword, kinds.pop(), each, optional, required, default)
