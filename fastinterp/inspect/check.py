"""`check`: all that is wrong with a merge at once, and all that looks odd, from headers and a few samples."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from fastinterp.errors import CheckpointError, FastinterpError, RecipeError, ShapeError, StorageError
from fastinterp.messages import WIDTH, counted, plain
from fastinterp.plan.models import Library, Model
from fastinterp.recipe.chain import not_there, references
from fastinterp.recipe.check import against, inspect
from fastinterp.recipe.document import Document, Source, read_all
from fastinterp.recipe.faults import Faults
from fastinterp.recipe.load import Recipe
from fastinterp.recipe.references import ModelRef

if TYPE_CHECKING:
    from fastinterp.plan.plan import Plan

_LISTED = 3  # names in a message, before the rest is only counted
_SHARD = 5 * 10**9  # as merge's default: nothing is written here


@dataclass(frozen=True)
class Finding:
    """One thing that was found.

    kind   name of the error that the merge would end with; "" for what is odd
    path   where it is in the recipe, `$.models[0]`; None: in the models
    line   1-based, in the recipe's file
    """

    message: str
    kind: str = ""
    path: str | None = None
    line: int | None = None
    exit_code: int = 0

    @property
    def where(self) -> str:
        return f"line {self.line}" if self.line else self.path or ""


@dataclass(frozen=True)
class Checked:
    """What `check` found, in the order of the recipe's lines. print() shows it.

    wrong      the merge would end with one of these
    odd        what is allowed, but hardly meant
    name       of the recipe's file
    method     of the document that is written; None, if the recipe could not be read
    models     how many it merges
    tensors    that it makes; 0, if that is not known
    sampled    of how many tensors samples were read, those of documents above included
    exit_code  as `merge` would end: that of the first error that it meets, or 0
    """

    wrong: tuple[Finding, ...]
    odd: tuple[Finding, ...]
    name: str = "recipe"
    method: str | None = None
    models: int = 0
    tensors: int = 0
    sampled: int = 0
    exit_code: int = 0

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.wrong

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as --json prints them."""
        return {
            "recipe": self.name,
            "ok": self.ok,
            "wrong": [vars(f) for f in self.wrong],
            "odd": [{k: v for k, v in vars(f).items() if k not in ("kind", "exit_code")} for f in self.odd],
            **{k: getattr(self, k) for k in ("method", "models", "tensors", "sampled")},
        }

    def __repr__(self) -> str:
        return f"<Checked {plain(self.name)}: {len(self.wrong)} wrong, {len(self.odd)} odd>"

    def __str__(self) -> str:
        counts = [f"{len(some)} {what}" for some, what in ((self.wrong, "wrong"), (self.odd, "suspicious")) if some]
        lines = [f"{plain(self.name)}: {', '.join(counts) or 'nothing is wrong, and nothing looks suspicious'}"]
        for title, some in (("wrong", self.wrong), ("suspicious", self.odd)):
            for finding in some:
                lines += _wrapped(f"{title:11}", finding)
        if self.tensors:
            merged = f"{self.method} of {counted(self.models, 'model')}, {counted(self.tensors, 'tensor')}"
            lines.append(f"  looked at: {merged}; samples of {self.sampled:,}")
        elif self.method is None and any(f.path for f in self.wrong):
            lines.append("  the models were looked for, but not looked at: mend the recipe first")
        return "\n".join(lines)


def check(recipe: Source | Sequence[Mapping[str, Any]]) -> Checked:
    """Look at a recipe and its models as closely as headers and samples of the data allow. Raises nothing that is wrong
    with them: it is in the result.

    recipe   path of a YAML file, YAML text, a mapping, or a list of mappings
    Raises: BackendError, if FASTINTERP_ISA names what is not there.
    """
    found = _Findings()
    try:
        documents = read_all(recipe)
    except RecipeError as error:
        found.add_wrong(error)
        found.exit_code = error.exit_code
        return found.checked(error.file)
    inspected = inspect(recipe)
    for wrong in inspected.wrong:
        found.add_wrong(wrong)
    for finding in inspected.odd:
        found.add_odd(finding)
    library = Library()
    _open_all(documents, inspected.recipes, library, found)
    made: dict[int, _Made] = {}
    for i, one in enumerate(() if found.wrong else inspected.recipes):
        if all(above in made for above in one.earlier.values()):
            known = _looked_at(one, inspected.recipes, library, made, found)
            made |= {} if known is None else {i: known}
    if found.wrong:
        found.exit_code = found.wrong[0].exit_code if inspected.wrong else _exit_code(inspected.recipes, library, found)
    return found.checked(documents[0].file, inspected.recipes, made)


def _exit_code(recipes: Sequence[Recipe], library: Library, found: _Findings) -> int:
    """That of the error that ends the planning of the merge; where it can be planned, of the first that was found."""
    from fastinterp.plan.plan import make_plan

    try:
        make_plan(recipes[-1:], max_shard_size=_SHARD, above=recipes[:-1], library=library)
    except FastinterpError as error:
        return error.exit_code
    return found.wrong[0].exit_code


class _Made(NamedTuple):
    """A document that was looked at: the names of the tensors that it makes, and how many were sampled."""

    names: list[str]
    sampled: int


@dataclass
class _Findings:
    wrong: list[Finding] = field(default_factory=list)
    odd: list[Finding] = field(default_factory=list)
    exit_code: int = 0

    def add_wrong(self, error: FastinterpError, place: tuple[str, int | None] | None = None, hint: str = "") -> None:
        """place  path and line, for an error that does not say it itself"""
        path, line = place or (getattr(error, "path", None), getattr(error, "line", None))
        message = (error.message if isinstance(error, RecipeError) else str(error)) + hint
        self.wrong.append(Finding(message, type(error).__name__, path, line, error.exit_code))

    def add_odd(self, finding: RecipeError | str) -> None:
        if isinstance(finding, str):
            self.odd.append(Finding(finding))
        else:
            self.odd.append(Finding(finding.message, "", finding.path, finding.line))

    def checked(
        self, name: str | None, recipes: Sequence[Recipe] = (), made: Mapping[int, _Made] | None = None
    ) -> Checked:
        last = recipes[-1] if recipes else None
        made = made or {}
        return Checked(
            _ordered(self.wrong),
            _ordered(self.odd),
            name or "recipe",
            last.method.name if last else None,
            len(last.models) if last else 0,
            len(made[len(recipes) - 1].names) if made and len(made) == len(recipes) else 0,
            sum(one.sampled for one in made.values()),
            self.exit_code,
        )


def _ordered(found: Sequence[Finding]) -> tuple[Finding, ...]:
    """Each once, by line; those without a line last."""
    unique = dict.fromkeys(found)
    return tuple(sorted(unique, key=lambda f: f.line or math.inf))


def _wrapped(title: str, finding: Finding) -> list[str]:
    import textwrap

    where = f"{finding.where}: " if finding.where else ""
    return textwrap.wrap(
        plain(where + finding.message), WIDTH, initial_indent=f"  {title}", subsequent_indent=" " * 13,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


# --- models ----------------------------------------------------------------------------------------------------------


def _open_all(
    documents: Sequence[Document], recipes: Sequence[Recipe], library: Library, found: _Findings
) -> None:  # fmt: skip
    """Open all checkpoints that are named, whatever else is wrong; those that cannot be opened are findings."""
    named = [d.value.get("name") for d in documents if isinstance(d.value, dict)]
    made = {name for name in (*named, *(r.name for r in recipes)) if isinstance(name, str)}
    seen: set[ModelRef] = set()
    told = {error.path for error in found.wrong}
    for model, document, path in _named(documents, recipes):
        name = str(model)
        if path in told or name in made or model in seen:
            continue
        seen.add(model)
        try:
            library.find(model)
        except (CheckpointError, StorageError) as error:
            hint = "" if os.path.exists(os.path.expanduser(name)) else not_there(document, name, sorted(made))
            found.add_wrong(error, (path, document.error("", path).line), hint)


def _named(documents: Sequence[Document], recipes: Sequence[Recipe]) -> Iterator[tuple[ModelRef, Document, str]]:
    """Every model that is named, with its place: as the recipes have them, or as the text has where that has faults."""
    for number, document in enumerate(documents):
        if not recipes:
            yield from ((ModelRef.of(text), document, path) for text, path in references(document.value, "$"))
            continue
        recipe = recipes[number]
        for model in (*recipe.models, recipe.origin, *recipe.sidecars):
            yield model, document, recipe.place_of(model)


def _looked_at(
    recipe: Recipe,
    recipes: Sequence[Recipe],
    library: Library,
    made: Mapping[int, _Made],
    found: _Findings,
) -> _Made | None:
    """One document with its models; None, if something is wrong with them.

    recipes  all documents
    made     those above it
    """
    from fastinterp.plan.plan import make_plan

    faults, sampled = Faults(gather=True), 0
    try:
        models, fit = _models(recipe, library, made, found)
        odd, own = against(recipe, models, faults)
        for error in faults.found:
            if fit or not isinstance(error, ShapeError):  # they were to be made to fit
                found.add_wrong(error)
        for finding in odd:
            found.add_odd(finding)
        if own is None or not fit:
            return None
        if not recipe.earlier:
            sampled = _sampled(
                make_plan([recipe], max_shard_size=_SHARD, library=library), {str(f) for f in odd}, found
            )
        elif recipe is recipes[-1] and len(made) == len(recipes) - 1:
            plan = make_plan([recipe], max_shard_size=_SHARD, above=recipes[:-1], library=library)
            sampled = _sampled(plan, {str(f) for f in odd}, found)
    except (RecipeError, CheckpointError, StorageError) as error:
        found.add_wrong(error)
        return None
    return _Made(own, sampled)


def _models(
    recipe: Recipe, library: Library, made: Mapping[int, _Made], found: _Findings
) -> tuple[list[Collection[str]], bool]:
    """The tensors of a recipe's models, and whether these could be made to fit each other."""
    from fastinterp.plan.vocabularies import align_models

    if recipe.earlier:
        return [_names(recipe, model, library, made) for model in recipe.models], True
    models = [library.find(model) for model in recipe.models]
    try:
        aligned = align_models(recipe, models, library.find(recipe.origin)).models
    except (CheckpointError, StorageError) as error:
        found.add_wrong(error, _tokenizer(recipe))
        return [m.tensors for m in models], False
    differing = _differing(recipe, aligned)
    for wrong in differing:
        found.add_wrong(wrong)
    return [m.tensors for m in aligned], not differing


def _tokenizer(recipe: Recipe) -> tuple[str, int | None] | None:
    """Path and line of what the recipe says of tokenizers."""
    keys = [k for k in ("tokenizer", "tokenizer_source", "chat_template") if recipe.document.value.get(k) is not None]
    return (f"$.{keys[0]}", recipe.document.error("", f"$.{keys[0]}").line) if keys else None


def _names(recipe: Recipe, model: ModelRef, library: Library, made: Mapping[int, _Made]) -> Collection[str]:
    above = recipe.made_by(model)
    return library.find(model).tensors if above is None else made[above].names


def _differing(recipe: Recipe, models: Sequence[Model]) -> list[ShapeError]:
    """Tensors that one model has and another lacks, of every model where they are merged whole. Where that is so, the
    shapes of the others are told, too; where it is not, the plan tells them.
    """
    if recipe.sections[0].stacked or recipe.sections[0].name is not None:
        return []
    lead, *others = models
    alone, shapes = [], []
    for other in others:
        only = [(a.name, [n for n in a.tensors if n not in b.tensors]) for a, b in ((lead, other), (other, lead))]
        told = [f"{name} alone has {_listed(names)}" for name, names in only if names]
        alone += ["; ".join(told)] if told else []
        shapes += [
            f"{n} is {list(e.shape)} in {lead.name} but {list(other.tensors[n].shape)} in {other.name}"
            for n, e in lead.tensors.items()
            if n in other.tensors and e.shape != other.tensors[n].shape
        ]
    remedy = ". Only models of one architecture merge"
    found = [ShapeError(f"the models have different tensors: {told}{remedy}") for told in alone]
    return [*found, ShapeError(_listed(shapes))] if found and shapes else found


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


# --- samples ---------------------------------------------------------------------------------------------------------


def _sampled(plan: Plan, told: Collection[str], found: _Findings) -> int:
    """Tell what is odd about a plan and the data that it reads. Returns how many tensors were sampled.

    told  warnings of the plan that are findings already
    """
    from fastinterp.execute import importances
    from fastinterp.inspect import samples

    for warning in plan.warnings:
        if warning not in told:
            found.add_odd(warning)
    wrong, longer = samples.disagreeing(plan)
    for error in wrong:
        found.add_wrong(error)
    if longer:
        found.add_odd(
            f"{counted(len(longer), 'tensor')} that no method merges must be the same in all models, and only the "
            f"first MB of each was compared: {_listed(longer)}. Say whose to take: `integers: MODEL`"
        )
    for doubt in importances.negative_importances(plan):
        found.add_odd(doubt)
    taken = samples.take(plan)
    names = [plain(c.name) for c in plan.checkpoints]
    for i in dict.fromkeys(i for i, _ in taken.not_finite):
        where = [tensor for model, tensor in taken.not_finite if model == i]
        found.add_odd(f"{names[i]} holds NaN or Inf, in {_listed(where)}")
    for i, other in taken.same():
        found.add_odd(
            f"{names[i]} and {names[other]} hold the same numbers in all samples: is one of them the wrong model?"
        )
    recipe = plan.recipes[0]
    if recipe.base is not None and recipe.method.sums_deltas:
        for i, base, beside, signal in taken.noisy():
            found.add_odd(
                f"what {names[i]} adds to {names[base]} is mostly rounding noise: stored as "
                f"{' and '.join(sorted(beside.dtypes))}, about {signal:.2f} of its length is signal, by "
                f"{beside.quantised:,} sampled elements. Take deltas from models that were never quantised"
            )
    return taken.tensors
