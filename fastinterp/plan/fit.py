"""Whether the tensors of models fit together: those of one output tensor, and the parts of one output."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from fastinterp.checkpoint.sidecar_files import CONFIG, json_or_empty
from fastinterp.errors import ShapeError
from fastinterp.messages import fit, listed
from fastinterp.plan.models import Model
from fastinterp.plan.row_blocks import other_channels
from fastinterp.presence import is_file
from fastinterp.recipe.load import Recipe
from fastinterp.recipe.targets import Cut, Target
from fastinterp.tokenizer.embedding_rows import named_as_embedding

INTEGERS = "Say whose to take: `integers: MODEL`"  # the command line and Python replace keys by what they have

_LISTED = 5  # differences in a message before the rest is only counted
_TOKENIZER_SOURCE = (
    "The vocabularies differ in size: say which one the output has, `tokenizer_source: union` or `tokenizer_source: "
    "base` in the recipe"
)
_VOCABULARIES = (
    f"{_TOKENIZER_SOURCE}, --tokenizer-source union or base of interpolate, average and sweep. Or `missing: base` "
    "copies these tensors from the base"
)
_SAME_IDS = (
    "If a row is of the same token in all models, `truncate_embeddings: true` in the recipe cuts to the fewest rows"
)
_VOCABULARY_FILES = ("tokenizer.json", "vocab.json")  # what a vocabulary is read from: one of them
_SIZES = (
    "hidden_size", "n_embd", "d_model", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
)  # fmt: skip


def chosen_model(recipe: Recipe) -> int | None:
    """The model whose tensors are copied where they do not merge: its index."""
    return None if recipe.integers is None else recipe.models.index(recipe.integers)


# --- inputs of one tensor --------------------------------------------------------------------------------------------


def check_fit(recipe: Recipe, targets: Sequence[Target], models: Sequence[Model], layouts: Mapping[int, str]) -> None:
    """Raises: ShapeError, if inputs of a tensor have several shapes, or only some of them can be merged, and the recipe
    does not say whose to take.

    layouts  by model: which of its tensors have another layout than the base's, and what to do, for messages
    """
    shapes, kinds, only_rows, narrow = [], [], True, False
    chosen = chosen_model(recipe)
    differing: tuple[Model, Model] | None = None
    for target in targets:
        (first, name), *others = target.inputs
        lead, a = models[first], models[first].tensors[name]
        for i, other_name in others:
            b = models[i].tensors[other_name]
            if a.shape != b.shape:
                shapes.append(f"{other_name} is {list(a.shape)} in {lead.name} but {list(b.shape)} in {models[i].name}")
                only_rows &= named_as_embedding(name) and a.shape[1:] == b.shape[1:]
                narrow |= other_channels(a.shape, b.shape)
                differing = differing or (lead, models[i])
            elif a.dtype != b.dtype and not (a.merges and b.merges) and chosen not in dict(target.inputs):
                kinds.append(f"{other_name} is {a.dtype} in {lead.name} but {b.dtype} in {models[i].name}")
    if differing is not None:
        base = models[recipe.base_index].name
        if only_rows and all(map(_has_vocabulary, models)):
            remedy = f"{_VOCABULARIES}. {_SAME_IDS}"
        elif narrow or _in_one_shape(targets, models):
            remedy = _of_other_shapes(base, narrow) + (f". {_SAME_IDS}" if only_rows else "")
        else:
            remedy = f"These are models of different sizes{_sizes(*differing)}, which do not merge"
        remedy = ". ".join(layouts.values()) or remedy
        raise ShapeError(f"{listed(shapes, _LISTED)}. {remedy}")
    if kinds:
        raise ShapeError(f"{listed(kinds, _LISTED)}. Only F64, F32, F16, BF16 and F8 tensors merge. {INTEGERS}")


def _of_other_shapes(base: str, narrow: bool) -> str:
    """What to do about tensors of different shapes. narrow: they are convolutions with other numbers of channels."""
    remedy = (
        "Only tensors of the same shape merge: `missing: base` in the recipe (--missing base) takes those of "
        f"{base}, `missing: skip` leaves them out"
    )
    first = "`channels: first` (--channels first) merges the input channels that all have, "
    return f"{remedy}. {first}and keeps the others" if narrow else remedy


def _in_one_shape(targets: Sequence[Target], models: Sequence[Model]) -> bool:
    """Whether some tensor that is merged has the same shape in all models: a matrix, if any is one, and no embedding.

    Models of different sizes may share vectors of the length of a head.
    """
    merged = [
        [models[i].tensors[name] for i, name in target.inputs]
        for target in targets
        if len(target.inputs) > 1 and not named_as_embedding(target.name)
    ]
    merged = [inputs for inputs in merged if all(tensor.merges for tensor in inputs)]
    matrices = [inputs for inputs in merged if len(inputs[0].shape) > 1]
    return any(len({tensor.shape for tensor in inputs}) == 1 for inputs in matrices or merged)


def _sizes(a: Model, b: Model) -> str:
    """` (hidden_size 32 and 48)`: what the configurations of two models say that differs; empty, if they do not."""
    x, y = (json_or_empty(model.root / CONFIG) for model in (a, b))
    x, y = ({**nested, **config} if isinstance(nested := config.get("text_config"), dict) else config
            for config in (x, y))  # fmt: skip
    said = [
        f"{key} {fit(str(x[key]), 20)} and {fit(str(y[key]), 20)}"
        for key in _SIZES
        if key in x and key in y and x[key] != y[key]
    ]
    return f" ({listed(said, 3)})" if said else ""


def other_sizes(models: Sequence[Model], base: int) -> dict[int, str]:
    """By model, that it is of another size than the base: what both have, and is no embedding, has other shapes."""
    sizes: dict[int, str] = {}
    ours = models[base].tensors
    for i, model in enumerate(models):
        theirs = model.tensors
        if theirs.keys() == ours.keys():
            continue  # their shapes are compared when targets are
        common = [n for n in ours if n in theirs and not named_as_embedding(n) and ours[n].merges and theirs[n].merges]
        common = [n for n in common if len(ours[n].shape) > 1] or common
        if common and all(ours[n].shape != theirs[n].shape for n in common):
            name = common[0]
            sizes[i] = (
                f"What both have is of other shapes: {name} is {list(ours[name].shape)} in {models[base].name} but "
                f"{list(theirs[name].shape)} in {model.name}. These are models of different sizes"
                f"{_sizes(models[base], model)}, which do not merge"
            )
    return sizes


def _has_vocabulary(model: Model) -> bool:
    return any(is_file(model.root / file) for file in _VOCABULARY_FILES)


# --- parts of one output ---------------------------------------------------------------------------------------------


def check_cuts(recipe: Recipe, cuts: Sequence[Cut], targets: Sequence[Target], models: Sequence[Model]) -> None:
    """Raises: ShapeError, if slices of models do not fit into one stack, or the embeddings beside it do not belong to
    one vocabulary.

    cuts  the stacks that slices cut
    """
    for cut in cuts:
        first, *others = dict.fromkeys(cut.models)
        for other in others:
            _check_layers(cut.prefix, models[first], models[other])
    if any(len(set(cut.models)) > 1 for cut in cuts):
        _check_embeddings(recipe, cuts, targets, models)


def _check_layers(prefix: str, a: Model, b: Model) -> None:
    """Raises: ShapeError, if a tensor of the layers has no shape in one model that it also has in the other.

    Layers of one model may differ: the first ones may be dense, or each may have its own size.
    """
    ours, theirs = _layer_shapes(prefix, a), _layer_shapes(prefix, b)
    differing = [
        f"{prefix}.N.{rest} is {_shown(shapes)} in {a.name} but {_shown(theirs[rest])} in {b.name}"
        for rest, shapes in ours.items()
        if rest in theirs and not shapes & theirs[rest]
    ]
    if differing:
        raise ShapeError(
            f"{listed(differing, _LISTED)}: layers of these models do not fit into one stack{_sizes(a, b)}. Take "
            "slices of models that have layers of one size"
        )


def _layer_shapes(prefix: str, model: Model) -> dict[str, set[tuple[int, ...]]]:
    """The shapes of each tensor of a stack in all layers, by its name behind the number of the layer."""
    shapes: dict[str, set[tuple[int, ...]]] = {}
    for name, tensor in model.tensors.items():
        if name.startswith(f"{prefix}."):
            number, _, rest = name[len(prefix) + 1 :].partition(".")
            if number.isdecimal():
                shapes.setdefault(rest, set()).add(tensor.shape)
    return shapes


def _shown(shapes: set[tuple[int, ...]]) -> str:
    return listed([str(list(shape)) for shape in sorted(shapes)], 3).replace("], [", "] or [")


def _check_embeddings(
    recipe: Recipe, cuts: Sequence[Cut], targets: Sequence[Target], models: Sequence[Model]
) -> None:  # fmt: skip
    """Raises: ShapeError, if the input embedding and the output layer come from models with other numbers of rows."""
    outside = [target.name.startswith(tuple(f"{cut.prefix}." for cut in cuts)) for target in targets]
    found = [
        (target.inputs[0][0], name)
        for target, inside in zip(targets, outside, strict=True)
        if not inside and named_as_embedding(name := target.inputs[0][1])
    ]
    for (i, name), (k, other) in _pairs(found):
        a, b = models[i].tensors[name].shape[:1], models[k].tensors[other].shape[:1]
        if i == k or a == b or any(_differ(models[one], name, other) for one in (i, k)):
            continue
        first, last = models[i].name, models[k].name
        if all(map(_has_vocabulary, models)):
            remedy = _TOKENIZER_SOURCE
        else:
            own = [model.name for model in (models[i], models[k]) if model.name == str(recipe.origin)]
            whose = (own or [first])[0]
            where = "begin" if whose == last else "end"
            remedy = (
                f"The vocabularies differ in size: take both from one model, for example {where} with a slice of "
                f"{whose} with `layer_range: [0, 0]`"
            )
        raise ShapeError(
            f"{name} comes from {first} and has {a[0]} rows, but {other} comes from {last} and has {b[0]}. {remedy}",
            tensor=other,
        )


def _pairs(found: Sequence[tuple[int, str]]) -> Iterator[tuple[tuple[int, str], tuple[int, str]]]:
    return ((one, other) for at, one in enumerate(found) for other in found[at + 1 :])


def _differ(model: Model, name: str, other: str) -> bool:
    """Whether two tensors have other numbers of rows within one model, so that they need not agree."""
    a, b = model.tensors.get(name), model.tensors.get(other)
    return a is not None and b is not None and a.shape[:1] != b.shape[:1]
