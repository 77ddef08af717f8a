"""`load_recipe`: a recipe, checked against its method, ready to be planned."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastinterp.compute.dtypes import DType, parse_dtype
from fastinterp.compute.ops import Combine
from fastinterp.errors import MethodError
from fastinterp.methods import LARGEST, Method, clipped, shown, suggestion
from fastinterp.recipe.document import Document, read
from fastinterp.recipe.parameters import resolve
from fastinterp.recipe.schema import Place, Reference, Wish, check, method_of

_CHOICES = {"rounding": ("nearest", "stochastic"), "fp8_overflow": ("saturate", "nonfinite")}
_DTYPES = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")


@dataclass(frozen=True)
class Recipe:
    """What to merge, and how. Models are named as the user did: a path, or a Hub id with or without `@revision`.

    models        the inputs in the order in which the method sees them; its base, if it uses one, is the first
    base          index of the base in `models`, or None
    origin        the model that config and tokenizer come from: base_model, else the first model listed
    parameters    what the method is given: one value, or a tuple with one per model other than the base
    dtype         as mergekit's: dtype of the output, unless `out_dtype` says otherwise; None keeps each tensor's own
    rounding      "nearest" or "stochastic"
    seed          0 .. 2**64 - 1
    fp8_overflow  "saturate" or "nonfinite": what becomes of values beyond the range of an fp8 output
    integers      the one of `models` whose integer tensors are taken where the models differ, or None: they must agree
    text          the recipe for receipts: the user's own text, or YAML of the mapping that was given
    file          what messages call the source, or None
    coefficients  what the method asks for, if that is the same for every tensor and known without reading any;
                  else None; read it through `combine`
    """

    method: Method
    models: tuple[str, ...]
    base: int | None
    origin: str
    parameters: Mapping[str, Any]
    dtype: DType | None
    out_dtype: DType | None
    rounding: str
    seed: int
    fp8_overflow: str
    integers: str | None
    text: str
    file: str | None
    coefficients: Combine | None

    def combine(self, tensor: str) -> Combine:
        """What the method asks for the tensor of this name, where that is the same for every tensor.

        Raises: ValueError, if it is not.
        """
        if self.coefficients is None:
            raise ValueError("what the method asks for is not the same for every tensor")
        return self.coefficients

    def formula(self) -> str:
        """The merge in one line, then which model each symbol stands for; for people.

        out = x0 + 0.6*(x1 - x0) - 0.3*(x2 - x0)
        x0 = models/base
        ...

        Where the coefficients are not known beforehand, it is the method's own formula.
        """
        if self.coefficients is None:
            out = self.method.doc.partition("\n")[0].partition("out = ")[2] or f"{self.method.name}(x0, x1, ...)"
            return "\n".join([f"out = {out}", *(f"x{i} = {name}" for i, name in enumerate(self.models))])
        weights, base = self.coefficients.weights, self.coefficients.base
        terms = [(w, f"x{i}" if base is None else f"(x{i} - x{base})") for i, w in enumerate(weights) if w != 0.0]
        if base is not None:
            terms.insert(0, (1.0, f"x{base}"))
        signed = "".join(
            f" {'-' if w < 0 else '+'} {'' if abs(w) == 1.0 else f'{abs(w):.9g}*'}{symbol}" for w, symbol in terms
        )
        unread = [i for i, w in enumerate(weights) if w == 0.0 and i != base]
        legend = [
            f"x{i} = {name}{' (weight 0: not read)' if i in unread else ''}" for i, name in enumerate(self.models)
        ]
        out = signed.removeprefix(" + ") if not signed.startswith(" - ") else "-" + signed.removeprefix(" - ")
        return "\n".join([f"out = {out}", *legend])


def load_recipe(source: str | os.PathLike[str] | Mapping[str, Any], *, file: str | None = None) -> Recipe:
    """Read and check a recipe. Touches no checkpoint.

    source  path of a .yml, .yaml or .json file, YAML text (a str with a newline in it), or a mapping
    file    what messages call the source, if it is not a path
    Raises: RecipeError with path, file and line; MethodError (one of them), if models or parameters do not suit the
    method.
    """
    document = read(source, file)
    wish = check(document)
    method = method_of(document, wish.merge_method)
    _check_tokenizer(document, wish)
    listed = _listed(document, wish)
    base_model = None if wish.base_model is None else _name(document, wish.base_model, "$.base_model")
    base = base_model if method.base != "none" else None
    if method.base == "required" and base is None:
        raise document.error(f"`{method.name}` needs the key `base_model`", at="$.merge_method", kind=MethodError)
    places = [i for i, name in enumerate(listed) if base is None or not same_model(name, base)]
    models = (() if base is None else (base,)) + tuple(listed[i] for i in places)
    _count(document, method, len(models))
    for i, name in enumerate(listed):
        _not_beside(document, name, f"$.models[{i}].model")
    if base_model is not None:
        _not_beside(document, base_model, "$.base_model")
    parameters = resolve(document, wish, method, listed, places)
    return Recipe(
        method=method,
        models=models,
        base=None if base is None else 0,
        origin=base_model or listed[0],
        parameters=parameters,
        dtype=_dtype(document, wish.dtype, "$.dtype"),
        out_dtype=_dtype(document, wish.out_dtype, "$.out_dtype"),
        rounding=_choice(document, wish.rounding, "rounding"),
        seed=_seed(document, wish.seed),
        fp8_overflow=_choice(document, wish.fp8_overflow, "fp8_overflow"),
        integers=_integers(document, wish, models),
        text=document.text,
        file=document.file,
        coefficients=_coefficients(document, method, models, parameters),
    )


def _check_tokenizer(document: Document, wish: Wish) -> None:
    """`base` asks for what is done where a base_model is named; nothing else is done yet."""
    path = "$.tokenizer_source"
    if wish.tokenizer_source not in (None, "base"):
        given, instead = shown(wish.tokenizer_source), "base_model, else of the first model"
        raise document.error(
            f"`tokenizer_source` {given} is not supported yet. Remove the line to copy the tokenizer of {instead}", path
        )
    if wish.tokenizer_source == "base" and wish.base_model is None:
        raise document.error(
            "`tokenizer_source` 'base' needs the key `base_model`. Remove the line to copy the tokenizer of the first "
            "model",
            path,
        )


def _name(document: Document, given: str | Reference, path: str) -> str:
    """A model reference as one string: a path or Hub id, with `@revision` if there is one."""
    if isinstance(given, Reference):
        return _placed(document, given.model, f"{path}.model")
    if not given.strip():
        raise document.error("the name of a model must not be empty", path)
    instead = "If it belongs to the path, write `{model: {path: ...}}` for the name"
    if "+" in given:
        raise document.error(f"a LoRA behind `+` is not supported yet: merge it into its model first. {instead}", path)
    if given.count("@") > 1:
        raise document.error(f"{shown(given)} has more than one `@`. {instead}", path)
    return given


def _placed(document: Document, given: str | Place, path: str) -> str:
    if isinstance(given, str):
        return _name(document, given, path)
    if not given.path.strip() or given.revision == "":
        raise document.error("`path` and `revision` must not be empty", path)
    return given.path if given.revision is None else f"{given.path}@{given.revision}"


def same_model(a: str, b: str) -> bool:
    """Whether two names in a recipe are the same model: `models/a` and `./models/a/` are."""
    return os.path.normpath(a) == os.path.normpath(b)


def _listed(document: Document, wish: Wish) -> tuple[str, ...]:
    """The names under `models`, each of them once."""
    if not wish.models:
        raise document.error("`models` lists no model", "$.models")
    first: dict[str, int] = {}
    names: list[str] = []
    for i, entry in enumerate(wish.models):
        name = _name(document, entry.model, f"$.models[{i}].model")
        at = first.setdefault(os.path.normpath(name), i)
        if at != i:
            raise document.error(
                f"{shown(name)} is already listed as $.models[{at}]. List a model once, with the weights added up",
                f"$.models[{i}]",
            )
        names.append(name)
    return tuple(names)


def _count(document: Document, method: Method, n: int) -> None:
    low, high = method.models
    if not low <= n <= high:
        count = f"exactly {low}" if low == high else f"{low} to {high}"
        what = "model" if high == 1 else "models"
        of = "" if method.base == "none" else ", the base included"
        raise document.error(f"`{method.name}` takes {count} {what}{of}, got {n}", "$.models", kind=MethodError)


def _not_beside(document: Document, name: str, path: str) -> None:
    """Relative paths start at the current folder, as mergekit's do: say so where the recipe's folder was meant."""
    folder = os.path.dirname(document.file or "")
    beside = os.path.join(folder, name)
    if folder and not os.path.isabs(name) and os.path.exists(beside) and not os.path.exists(name):
        raise document.error(
            f"there is no {shown(name)} in the current folder, where relative paths start, but there is one beside the "
            f"recipe. Write '{beside}', or run in '{folder}'",
            path,
        )


def _dtype(document: Document, given: str | None, path: str) -> DType | None:
    found = None if given is None else parse_dtype(given)
    if given is not None and found is None:
        raise document.error(f"unknown dtype `{clipped(given)}`{suggestion(given, _DTYPES)}", path)
    return found


def _choice(document: Document, given: str, key: str) -> str:
    if given not in _CHOICES[key]:
        raise document.error(f"`{key}` must be {' or '.join(_CHOICES[key])}, got {shown(given)}", f"$.{key}")
    return given


def _seed(document: Document, seed: int) -> int:
    if not 0 <= seed < 2**64:
        raise document.error(f"`seed` must be in 0..2**64-1, got {shown(seed)}", "$.seed")
    return seed


def _integers(document: Document, wish: Wish, models: tuple[str, ...]) -> str | None:
    if wish.integers is None:
        return None
    name = _name(document, wish.integers, "$.integers")
    for model in models:
        if same_model(model, name):
            return model
    raise document.error(f"`integers` must name a model that is merged, got {shown(name)}", "$.integers")


def _coefficients(
    document: Document, method: Method, models: tuple[str, ...], parameters: Mapping[str, Any]
) -> Combine | None:
    """Run the method, and see that float32 can hold what it asks for. None, if that depends on the tensor."""
    if method.generator or method.fn.__code__.co_argcount > 1:
        return None
    try:
        asked = method(len(models), **{p.keyword: parameters[p.name] for p in method.parameters})
    except MethodError as error:
        raise document.error(error.message, "$.models", kind=MethodError) from None
    if not isinstance(asked, Combine):
        return None
    row = asked.row()
    largest = max([abs(row.total), *(abs(w) for w in asked.weights)])
    if not largest <= LARGEST:
        raise document.error(
            f"the parameters make a coefficient of {largest:g}, beyond float32's 3.4e38", "$.models", kind=MethodError
        )
    return asked
