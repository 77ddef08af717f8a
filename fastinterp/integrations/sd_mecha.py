"""Recipes of sd-mecha carried out by fastinterp: its graph of nodes as a recipe, which is streamed from file to file.

    import sd_mecha
    from fastinterp.integrations.sd_mecha import merge

    recipe = sd_mecha.weighted_sum(sd_mecha.model("a.safetensors"), sd_mecha.model("b.safetensors"), alpha=0.3)
    merge(recipe, output="merged.safetensors")          # in place of sd_mecha.merge(recipe, output=...)

Understood are weighted_sum, add_difference, subtract, scale, n_average, slerp, geometric_median and the model stock of
two models, of models in files, nested in any way, with numbers or numbers by block (`sd1-supermerger_blocks`,
`sdxl-supermerger_blocks`) for alpha. Sums of sums become one sum: every file is read once, and nothing is rounded in
between. A graph with anything else is merged by sd-mecha, and the logger of this module warns of it with the reason.
"""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastinterp.api import merge as merge_files
from fastinterp.arguments import path_of, without_recipe
from fastinterp.errors import OutputError, UsageError
from fastinterp.execute.report import Report
from fastinterp.messages import listed
from fastinterp.presence import exists
from fastinterp.recipe.load import CHOICES
from fastinterp.torch_models.load import load

LOG = logging.getLogger(__name__)

Number = float | Mapping[str, float]  # one for all tensors, or one for each block by its name
Form = dict[str, Number]  # a weighted sum: name of a file, or of a document above -> its weight

_BLOCKS = {"sd1-supermerger_blocks": 12, "sdxl-supermerger_blocks": 9}  # configurations: blocks on each side
_VAE = "VAE"  # a further number of SDXL's; the filter of its tensors is below
_VAE_FILTER = "first_stage_model."
_KNOWN = "weighted_sum, add_difference, subtract, scale, n_average, slerp, geometric_median, model_stock of two models"


class NotUnderstood(UsageError):
    """What sd-mecha can do and this package cannot."""


@without_recipe
def merge(
    recipe: Any,
    *,
    output: str | os.PathLike[str] | None = None,
    output_dtype: Any = "float16",
    threads: int | None = None,
    device: str = "auto",
    force: bool = False,
    missing: str = "error",
    channels: str = "same",
    integers: str | os.PathLike[str] | None = None,
) -> Report | dict[str, Any] | None:
    """Carry out a recipe of sd-mecha.

    recipe        a node, as `sd_mecha.weighted_sum` returns it
    output        a .safetensors file; None: the tensors are returned
    output_dtype  of all floating tensors, a name or a torch.dtype; None: as the models have it. The default
                  is sd-mecha's
    threads, device, force   as of `fastinterp.merge`; force replaces a file
    missing       of tensors that not all models have in one shape, as a VAE that only some files have: "error"; "base",
                  take the first model's; "skip", leave them out
    channels      "first": convolutions with fewer input channels merge into the first ones of the others, as of a model
                  for inpainting; "same": refuse them
    integers      the file whose integer tensors are copied. None: the first model

    All tensors of the first model are in the output, also those that sd-mecha leaves out, as it has no place for them.
    Arithmetic is float32, as sd-mecha's, with one rounding. A graph that is not understood is merged by
    `sd_mecha.merge`, with the reason in the log; where missing, channels or integers ask for what that cannot do, it is
    an error.
    Returns the report of the merge; without `output` a dict of torch tensors; None, if sd-mecha wrote the file.
    Raises: UsageError, which names what is not understood; what `fastinterp.merge` does.
    """
    dtype = None if output_dtype is None else str(output_dtype).removeprefix("torch.")
    target = None if output is None else Path(output)
    if target is not None and target.suffix != ".safetensors":
        raise UsageError(f"`output` must be a .safetensors file, got {os.fspath(target)!r}")
    try:
        documents = recipe_of(recipe, missing=missing, channels=channels, integers=integers)
    except NotUnderstood as error:
        if not _is_node(recipe) or (missing, channels, integers) != ("error", "same", None):
            raise
        LOG.warning("merged by sd-mecha, not by fastinterp: %s", error)
        return _theirs(recipe, target, dtype, threads, force=force)
    if target is None:
        return load(documents, dtype=dtype, threads=threads)
    return merge_files(documents, target, dtype=dtype, threads=threads, device=device, force=force)


def _is_node(recipe: Any) -> bool:
    """Whether it is sd-mecha's own, which it can merge."""
    nodes = sys.modules.get("sd_mecha.recipe_nodes")
    return nodes is not None and isinstance(recipe, nodes.RecipeNode)


def _theirs(
    recipe: Any, target: Path | None, dtype: str | None, threads: int | None, *, force: bool
) -> dict[str, Any] | None:
    """The merge by sd-mecha. Raises: OutputError, if the file is there."""
    import sd_mecha
    import torch

    if target is not None and exists(target) and not force:
        raise OutputError(f"{target} exists already. Write force=True to replace it, or name another file")
    settings: dict[str, Any] = {} if threads is None else {"threads": threads}
    stored = None if dtype is None else getattr(torch, dtype)
    if target is not None:
        sd_mecha.merge(recipe, output=target, output_dtype=stored, **settings)
        return None
    found = dict(sd_mecha.merge(recipe, output_dtype=stored, **settings))
    found.pop("__metadata__", None)
    return found


def recipe_of(
    recipe: Any,
    *,
    missing: str = "error",
    channels: str = "same",
    integers: str | os.PathLike[str] | None = None,
) -> list[dict[str, Any]]:
    """The documents of the recipe that does what a node of sd-mecha does, for `fastinterp.merge`, explain and load.

    missing, channels, integers   as of `merge`
    Raises: UsageError, which names what is not understood.
    """
    reader = _Reader()
    last = reader.document(reader.form(recipe))
    documents = [*reader.documents, last]
    for key, word in (("missing", missing), ("channels", channels)):
        if word not in CHOICES[key]:
            raise UsageError(f"`{key}` must be {' or '.join(CHOICES[key])}, got {word!r}")
        if word != CHOICES[key][0]:
            for document in documents:
                document[key] = word
    if integers is not None:
        _take_integers(documents, path_of(integers, "integers"))
    return documents


def _take_integers(documents: Sequence[dict[str, Any]], file: str) -> None:
    """Set the key `integers` of the documents that read the file, and of those that read what these make.

    Raises: UsageError, if none reads it.
    """
    have, read = set(), set()  # documents that have its integers; files
    for document in documents:
        models = [document.get("base_model"), *(entry["model"] for entry in document["models"])]
        read |= {model for model in models if model is not None}
        for model in models:
            if model is not None and (model in have or os.path.abspath(model) == os.path.abspath(_found(Path(file)))):
                document["integers"] = model
                have.add(document.get("name"))
                break
    if not have:
        files = sorted(read - {document.get("name") for document in documents})
        raise UsageError(
            f"`integers` must be one of the models that are read, got {file!r}. They are: {listed(files, 8)}"
        )


class _Reader:
    """Reads a graph. documents: what must be made before the rest, in order."""

    def __init__(self) -> None:
        self.documents: list[dict[str, Any]] = []

    def form(self, node: Any) -> Form:
        """A node as a weighted sum. Raises: UsageError."""
        path = getattr(node, "path", None)
        if path is not None:
            return {_found(path): 1.0}
        method = getattr(getattr(node, "merge_method", None), "identifier", None)
        if method is None:
            raise UsageError(f"models must be files: sd_mecha.model('a.safetensors'), got {node!r}"[:200])
        arguments = dict(node.bound_args.arguments)
        if method == "weighted_sum":
            alpha = _alpha(arguments.get("alpha"), 0.5)
            a, b = self.form(arguments["a"]), self.form(arguments["b"])
            return _add(_scaled(a, _each(lambda x: 1.0 - x, alpha)), _scaled(b, alpha))
        if method == "add_difference":
            return _add(
                self.form(arguments["a"]), _scaled(self.form(arguments["b"]), _alpha(arguments.get("alpha"), 1.0))
            )
        if method == "subtract":
            return _add(self.form(arguments["a"]), _scaled(self.form(arguments["b"]), -1.0))
        if method == "scale":
            return _scaled(self.form(arguments["a"]), _alpha(arguments.get("alpha"), 1.0))
        if method == "n_average":
            total: Form = {}
            for model in arguments["models"]:
                total = _add(total, _scaled(self.form(model), 1.0 / len(arguments["models"])))
            return total
        others = {
            "slerp": self._slerp, "geometric_median": self._median, "model_stock": self._stock,
            "fallback": self._fallback,
        }  # fmt: skip
        if method in others:
            return others[method](arguments)
        raise NotUnderstood(
            f"`{method}` of sd-mecha is not understood here. Known: {_KNOWN}. sd_mecha.merge carries it out"
        )

    def _median(self, arguments: Mapping[str, Any]) -> Form:
        models = [self._model(self.form(model)) for model in arguments["models"]]
        steps = _alpha(arguments.get("maxiter"), 100.0)
        if len(models) < 2 or len(set(models)) < len(models) or not isinstance(steps, float):
            raise NotUnderstood("the `geometric_median` of sd-mecha is understood only of several models, each once")
        name = f"median {len(self.documents) + 1}"
        self.documents.append({
            "name": name, "merge_method": "geometric_median", "models": [{"model": model} for model in models],
            "integers": models[0], "parameters": {"tol": 0.0, "max_iter": int(steps)},
        })  # fmt: skip
        return {name: 1.0}

    def _stock(self, arguments: Mapping[str, Any]) -> Form:
        """`model_stock` of the differences of two models from a third: what is added to that one.

        sd-mecha takes the cosines of neighbours in the list: of more than two models those are not all pairs.
        """
        differences = [self.form(delta) for delta in arguments["deltas"]]
        pairs = [{weight: model for model, weight in form.items()} for form in differences if len(form) == 2]
        bases = {pair[-1.0] for pair in pairs if pair.keys() == {1.0, -1.0}}
        if len(pairs) != 2 or len(differences) != 2 or len(bases) != 1 or any(-1.0 not in pair for pair in pairs):
            raise NotUnderstood("`model_stock` of sd-mecha is understood only of two models less the same third one")
        (base,), name = bases, f"stock {len(self.documents) + 1}"
        self.documents.append({
            "name": name, "merge_method": "model_stock", "base_model": base, "integers": base,
            "models": [{"model": pair[1.0]} for pair in pairs], "parameters": {"filter_wise": True},
        })  # fmt: skip
        return {name: 1.0, base: -1.0}

    def _slerp(self, arguments: Mapping[str, Any]) -> Form:
        ends = [self._model(self.form(arguments[name])) for name in ("a", "b")]
        name = f"slerp {len(self.documents) + 1}"
        self.documents.append({
            "name": name, "merge_method": "slerp_lengths", "base_model": ends[0], "models": [{"model": ends[1]}],
            "integers": ends[0],
            "parameters": {"t": _value(_alpha(arguments.get("alpha"), 0.5))},
        })  # fmt: skip
        return {name: 1.0}

    def _fallback(self, arguments: Mapping[str, Any]) -> Form:
        """`a | default`: nothing is missing of a, whose models have the same tensors, if default is one of them."""
        form = self.form(arguments["a"])
        default = getattr(arguments["default"], "path", None)
        if default is None or _found(default) not in form:
            raise NotUnderstood("`fallback` of sd-mecha is understood only to a model that the merge reads anyway")
        return form

    def _model(self, form: Form) -> str:
        """The name of a form as a model: its only file, or a document above that makes it."""
        if len(form) == 1 and [*form.values()] == [1.0]:
            return next(iter(form))
        name = f"sum {len(self.documents) + 1}"
        self.documents.append({"name": name, **self.document(form)})
        return name

    def document(self, form: Form) -> dict[str, Any]:
        """The merge that makes a form, which must be a model. Raises: UsageError."""
        form = {model: weight for model, weight in form.items() if any(_numbers(weight))}
        totals = {round(math.fsum(column), 9) for column in _columns(form)}
        if totals <= {0.0}:
            raise UsageError("the recipe is a difference of models, and no model: add it to one (add_difference)")
        first, *others = form
        if self.documents and len(form) == 1 and form[first] == 1.0 and self.documents[-1]["name"] == first:
            made = self.documents.pop()
            return {key: value for key, value in made.items() if key != "name"}
        models = [{"model": model, "parameters": {"weight": _value(form[model])}} for model in others]
        if totals == {1.0} and others:
            return {"merge_method": "task_arithmetic", "base_model": first, "models": models, "integers": first}
        models.insert(0, {"model": first, "parameters": {"weight": _value(form[first])}})
        return {
            "merge_method": "linear", "models": models, "parameters": {"normalize": False}, "integers": first,
        }  # fmt: skip


def _found(path: Path) -> str:
    """A file where sd-mecha looks for it: as named, else in its folders of models."""
    dirs = sys.modules.get("sd_mecha.extensions.model_dirs")
    if dirs is not None and not exists(path) and not path.is_absolute():
        path = next((folder / path for folder in dirs.get_all() if exists(folder / path)), path)
    return os.fspath(path)


# --- numbers ----------------------------------------------------------------------------------------------------------


def _alpha(node: Any, default: float) -> Number:
    """The value of a parameter: a number, or one for each block. Raises: UsageError."""
    if node is None:
        return default
    if isinstance(node, (int, float)):
        return float(node)
    while getattr(node, "merge_method", None) is not None:  # what converts it to the names of a model
        converter = node.merge_method.identifier
        if not converter.startswith("convert_"):
            raise NotUnderstood(f"alpha must be a number or numbers by block, and not what `{converter}` computes")
        node = next(iter(node.bound_args.arguments.values()))
    values = getattr(node, "value_dict", None)
    config = getattr(getattr(node, "model_config", None), "identifier", None)
    if values is None:
        raise UsageError(f"alpha must be a number or numbers by block, got {node!r}"[:200])
    if config not in _BLOCKS and len(values) == 1:
        return _number(next(iter(values.values())))
    if config not in _BLOCKS:
        raise NotUnderstood(f"numbers for the tensors of {config} are not understood here. Known: {', '.join(_BLOCKS)}")
    names = _block_names(_BLOCKS[config])
    missing = [name for name in names if name not in values]
    if missing:
        raise UsageError(
            f"{config}: no number for {listed(missing, 4)}. sd-mecha leaves such tensors out of the output"
        )
    return {name: _number(values[name]) for name in (*names, *([_VAE] if _VAE in values else []))}


def _number(value: Any) -> float:
    """Raises: UsageError."""
    if hasattr(value, "item") and getattr(value, "numel", lambda: 0)() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UsageError(f"alpha must be a number, got {value!r}"[:200])
    return float(value)


def _block_names(side: int) -> list[str]:
    numbered = [[f"{kind}{i:02}" for i in range(side)] for kind in ("IN", "OUT")]
    return ["BASE", *numbered[0], "M00", *numbered[1]]


def _value(number: Number) -> Any:
    """A number as the value of a parameter in a recipe."""
    if isinstance(number, float):
        return number
    blocks = {"blocks": [value for name, value in number.items() if name != _VAE]}
    return [{"filter": _VAE_FILTER, "value": number[_VAE]}, blocks] if _VAE in number else blocks


def _numbers(number: Number) -> list[float]:
    return [number] if isinstance(number, float) else [*number.values()]


def _columns(form: Form) -> Iterator[list[float]]:
    """The weights of all models: of each block, if any differ by block."""
    blocks = next(([*w] for w in form.values() if not isinstance(w, float)), [""])
    for block in blocks:
        yield [w if isinstance(w, float) else w[block] for w in form.values()]


def _each(function: Callable[..., float], *numbers: Number) -> Number:
    """A function of numbers, block by block where any of them differs by block. Raises: UsageError."""
    kinds = [number for number in numbers if not isinstance(number, float)]
    if not kinds:
        return function(*numbers)
    if any(kind.keys() != kinds[0].keys() for kind in kinds):
        raise UsageError("numbers by block of two kinds of models, or with and without one for the VAE, do not mix")
    return {name: function(*(n if isinstance(n, float) else n[name] for n in numbers)) for name in kinds[0]}


def _scaled(form: Form, by: Number) -> Form:
    return {model: _each(lambda w, x: w * x, weight, by) for model, weight in form.items()}


def _add(a: Form, b: Form) -> Form:
    total = dict(a)
    for model, weight in b.items():
        total[model] = _each(lambda x, y: x + y, total[model], weight) if model in total else weight
    return total
