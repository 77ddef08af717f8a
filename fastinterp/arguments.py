"""Validation of the arguments of the public functions."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import wraps
from typing import Annotated, Any, TypeVar, cast

from fastinterp.errors import FastinterpError, UsageError
from fastinterp.messages import with_keys_as
from fastinterp.ops.dtypes import DTYPE_NAMES, DType, parse_stored
from fastinterp.output.layout import parse_size
from fastinterp.recipe.load import CHOICES, NEAREST_CODES, Recipe
from fastinterp.urls import public

# Alphas this close to 0 or 1 count as 0 or 1, where a model is copied exactly. numpy.arange(-1, 2, 0.001)[1000] is
# 9e-14: its step, (first + step) - first, is off by half an ulp of `first`, 2**-53 for up to 2, and a sweep has at most
# 4096 = 2**12 steps. Alphas that are intended to be near an end are much further away.
DUST = 2.0**-40

Checkpoint = Annotated[
    str | os.PathLike[str],
    """Where a checkpoint is: a name, as the command line and recipes take it.

    a folder         with safetensors, files of torch.save or GGUF; a pipeline of diffusers, too
    a file           of these kinds
    ORG/NAME         a model on the Hugging Face Hub, where no such folder exists; ORG/NAME@REVISION
    MODEL+ADAPTER    a model with a LoRA adapter added; each part is one of the above

    docs/CHECKPOINTS.md says what is read, and what is aligned.
    """,
]

F = TypeVar("F", bound=Callable[..., Any])


def without_recipe(function: F) -> F:
    """Decorator of a public function that takes no recipe: where an error names a key of recipes that the function has
    as an argument, it names the argument: `integers=MODEL` for `integers: MODEL`.
    """
    plain: Any = function
    while hasattr(plain, "__wrapped__"):  # by another decorator
        plain = plain.__wrapped__
    code = plain.__code__
    names = frozenset(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount])

    def spell(key: str, value: str) -> str | None:
        return f"{key}={value if value.isupper() else repr(value)}" if key in names else None

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except FastinterpError as error:
            error.args = (with_keys_as(str(error), spell),)
            raise

    return cast("F", call)


def snapped(alpha: float) -> float:
    """`alpha`, or 0 or 1 if it is within DUST of that."""
    nearest = 1.0 if alpha > 0.5 else 0.0
    return nearest if math.fabs(alpha - nearest) <= DUST else alpha


def overridden(
    recipe: Recipe, dtype: object, rounding: object, seed: object, missing: object = None, channels: object = None,
    quantize: object = None,
) -> Recipe:  # fmt: skip
    """`recipe` with those of dtype, rounding, seed, missing, channels and quantize that are not None.

    Raises: UsageError.
    """
    changes: dict[str, Any] = {}
    if dtype is not None:
        changes["out_dtype"] = dtype_named(dtype)
    words = (("rounding", rounding), ("missing", missing), ("channels", channels), ("quantize", quantize))
    for key, word in words:
        if word is not None:
            if word not in CHOICES[key]:
                raise UsageError(f"{key} must be {' or '.join(CHOICES[key])}, got {word!r}")
            changes[key] = word
    if missing == "base" and recipe.base_model is not None and recipe.base_model not in recipe.models:
        changes["models"] = (*recipe.models, recipe.base_model)  # it is read, though it is not merged
    if seed is not None:
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise UsageError(f"the seed must be a whole number, got {seed!r}")
        if not 0 <= seed < 2**64:
            raise UsageError(f"the seed must be in 0..2**64-1, got {seed}")
        changes["seed"] = seed
    changed = replace(recipe, **changes)
    if changed.quantize == "same" and changed.rounding == "stochastic":
        raise UsageError(NEAREST_CODES)
    return changed


def dtype_named(text: object) -> DType:
    """The dtype of that name.

    Raises: UsageError.
    """
    dtype = parse_stored(text) if isinstance(text, str) else None
    if dtype is None:
        raise UsageError(f"unknown dtype {text!r}. Known: {', '.join(DTYPE_NAMES)}")
    return dtype


def size_of(size: str | int) -> int:
    """Bytes of a size: `5GB`, `512MB` or a number.

    Raises: UsageError.
    """
    return parse_size(str(size))


def optional_size(size: str | int | None) -> int | None:
    """`size_of`; None for None."""
    return None if size is None else size_of(size)


def numbers(alphas: object) -> list[float]:
    """One alpha or several as floats, those within DUST of 0 and 1 as these.

    Raises: UsageError.
    """
    items: list[Any] = [alphas]
    if isinstance(alphas, Iterable) and not isinstance(alphas, (str, bytes)) and getattr(alphas, "shape", None) != ():
        items = list(alphas)
    for alpha in items:
        if isinstance(alpha, (bool, str, bytes)) or not hasattr(alpha, "__float__"):
            raise UsageError(f"alpha must be a number, or several in a list, got {alpha!r}")
    try:
        return [snapped(float(alpha)) for alpha in items]
    except (OverflowError, TypeError, ValueError):
        raise UsageError(f"alpha must be a number, or several in a list, got {items!r}"[:200]) from None


def path_of(path: object, name: str) -> str:
    """The path as str. name: of the argument, for the message.

    Raises: UsageError.
    """
    if not isinstance(path, (str, os.PathLike)):
        got = repr(path) if isinstance(path, (int, float, type(None))) else type(path).__name__
        raise UsageError(f"`{name}` must be a path, got {got}")
    return public(os.fspath(path)) if isinstance(path, str) else os.fspath(path)
