"""`check`: all errors of a recipe and its models at once, and warnings, from headers and samples of the data."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from fastinterp.checkpoint import hub, remote
from fastinterp.errors import CheckpointError, FastinterpError, RecipeError, ShapeError, StorageError
from fastinterp.execute import chunks, quantised_deltas
from fastinterp.execute.damaged import refuse_damaged
from fastinterp.execute.sources import Sources
from fastinterp.inspect import samples
from fastinterp.inspect.check_result import CheckResult, Finding
from fastinterp.messages import counted, listed, plain
from fastinterp.methods import Method, given
from fastinterp.plan.fit import other_sizes
from fastinterp.plan.models import Library, Model
from fastinterp.plan.plan import Plan, make_plan
from fastinterp.plan.quantised import refuse_quantised
from fastinterp.plan.single import plan_document
from fastinterp.plan.vocabularies import align_models
from fastinterp.recipe.check import check_documents, check_tensors
from fastinterp.recipe.document import Document, ErrorCollector, Source, read_all
from fastinterp.recipe.load import Recipe
from fastinterp.recipe.mergekit_options import other_file
from fastinterp.recipe.references import ModelRef, in_order, not_there, references

_LISTED = 3  # names in a message, before the rest is only counted


def check(recipe: Source, *, methods: Sequence[Method] = ()) -> CheckResult:
    """Find the errors of a recipe and its models, and what is probably not intended, from headers and samples of the
    data. Errors are returned in the result, not raised.

    recipe   path of a YAML file, YAML text, a mapping, or a list of mappings
    methods  as of `merge`
    Raises: MethodError, if one of `methods` is none; BackendError, if FASTINTERP_ISA names an instruction set that
    cannot be used.
    """
    with given(methods):
        return check_with(recipe, {})


def check_with(recipe: Source, keys: Mapping[str, Any]) -> CheckResult:
    """`check` of a recipe as options of `merge` change it.

    keys  dtype, rounding, seed, missing, channels, quantize, as of `merge`; None: as the recipe has it
    """
    with hub.one_run(), remote.headers_only():
        return _check(recipe, keys)


def _check(recipe: Source, keys: Mapping[str, Any]) -> CheckResult:
    findings = _Findings()
    try:
        *above, last = in_order(read_all(recipe))
    except RecipeError as error:
        findings.add_error(error)
        return findings.result(error.file, exit_code=error.exit_code)
    shared = {key: keys.get(key) for key in ("missing", "channels")}
    documents = (*(_changed(document, shared) for document in above), _changed(last, keys))
    about_recipe = check_documents(documents)
    recipes = about_recipe.recipes
    for fault in about_recipe.errors:
        findings.add_error(fault)
    for warning in about_recipe.warnings:
        findings.add_warning(warning)
    if any(other_file(document.value) for document in documents):
        return findings.result(documents[0].file, exit_code=about_recipe.errors[0].exit_code)
    value = documents[0].value
    if len(documents) == 1 and isinstance(value, dict) and value.get("out") == "lora":
        return _check_adapters(documents[0].file, recipes, findings)
    library = Library()
    if findings.errors:
        hub.refuse("the recipe has errors")
    _open_all(documents, recipes, library, findings)
    checked: dict[int, _Checked] = {}
    for i, one in enumerate(() if findings.errors else recipes):
        if all(above in checked for above in one.earlier.values()):
            document = _check_document(one, recipes, library, checked, findings)
            checked |= {} if document is None else {i: document}
    exit_code = 0
    if findings.errors:
        exit_code = findings.errors[0].exit_code
        if not about_recipe.errors:
            exit_code = _exit_code(recipes, library, exit_code)
    return findings.result(documents[0].file, recipes, checked, exit_code)


def _changed(document: Document, keys: Mapping[str, Any]) -> Document:
    """The document with these keys, those of None left as they are."""
    given = {"out_dtype" if key == "dtype" else key: value for key, value in keys.items() if value is not None}
    if not given or not isinstance(document.value, dict):
        return document
    return replace(document, value={**document.value, **given})


def _check_adapters(file: str | None, recipes: Sequence[Recipe], findings: _Findings) -> CheckResult:
    """The result for adapters that are merged with each other (`out: lora`)."""
    from fastinterp.lora.plan import plan_adapters

    if findings.errors:
        return findings.result(file, recipes, exit_code=findings.errors[0].exit_code)
    try:
        plan = plan_adapters(recipes[0])
        refuse_damaged(source.model for source in plan.sources if source.model is not None)
    except FastinterpError as error:
        findings.add_error(error)
        return findings.result(file, recipes, exit_code=error.exit_code)
    for warning in plan.warnings[len(recipes[0].warnings) :]:
        findings.add_warning(warning)
    findings.remarks += plan.remarks
    outputs = [product.name for product in plan.products] + [whole.name for whole in plan.whole]
    return findings.result(file, recipes, {0: _Checked(outputs, 0)})


def _exit_code(recipes: Sequence[Recipe], library: Library, first: int) -> int:
    """That of the error that ends the planning of the merge; `first`, that of the first finding, if none does."""
    try:
        make_plan(recipes[-1:], above=recipes[:-1], library=library)
    except FastinterpError as error:
        return error.exit_code
    return first


class _Checked(NamedTuple):
    """A document without errors: the names of the tensors that it makes, how many of its tensors were sampled, and for
    those below it what it makes as a model, with the folder of its small files.
    """

    outputs: list[str]
    sampled: int
    made: tuple[Model, object] | None = None


@dataclass
class _Findings:
    """Collects errors and warnings."""

    errors: list[Finding] = field(default_factory=list)
    warnings: list[Finding] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def add_error(self, error: FastinterpError, location: tuple[str, int | None] | None = None, hint: str = "") -> None:
        """location  path and line of an error that does not have them itself"""
        path, line = location or (getattr(error, "path", None), getattr(error, "line", None))
        message = (error.message if isinstance(error, RecipeError) else str(error)) + hint
        self.errors.append(Finding(message, type(error).__name__, path, line, error.exit_code))

    def add_warning(self, warning: RecipeError | str) -> None:
        if isinstance(warning, str):
            self.warnings.append(Finding(warning))
        else:
            self.warnings.append(Finding(warning.message, "", warning.path, warning.line))

    def result(
        self,
        name: str | None,
        recipes: Sequence[Recipe] = (),
        checked: Mapping[int, _Checked] | None = None,
        exit_code: int = 0,
    ) -> CheckResult:
        last = recipes[-1] if recipes else None
        checked = checked or {}
        return CheckResult(
            _ordered(self.errors),
            _ordered(self.warnings),
            name or "recipe",
            last.method.name if last else None,
            len(last.models) if last else 0,
            len(checked[len(recipes) - 1].outputs) if checked and len(checked) == len(recipes) else 0,
            sum(document.sampled for document in checked.values()),
            exit_code,
            tuple(dict.fromkeys(self.remarks)),
        )


def _ordered(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    """Each once, by line; those without a line last."""
    unique = dict.fromkeys(findings)
    return tuple(sorted(unique, key=lambda f: f.line or math.inf))


# --- models ----------------------------------------------------------------------------------------------------------


def _open_all(
    documents: Sequence[Document], recipes: Sequence[Recipe], library: Library, findings: _Findings
) -> None:  # fmt: skip
    """Open all checkpoints that the documents name; those that cannot be opened are errors."""
    named = [d.value.get("name") for d in documents if isinstance(d.value, dict)]
    names = {name for name in (*named, *(r.name for r in recipes)) if isinstance(name, str)}
    seen: set[ModelRef] = set()
    reported = {error.path for error in findings.errors}
    about_recipe = bool(findings.errors)
    for model, document, path in _named(documents, recipes):
        name = str(model)
        if path in reported or name in names or model in seen:
            continue
        seen.add(model)
        try:
            refuse_damaged([library.find(model)])
        except (CheckpointError, StorageError) as error:
            unasked = any(isinstance(one, hub.OfflineError) for one in (error, error.__cause__))
            if unasked and about_recipe and "Did you mean" not in str(error):
                continue  # it may be there
            name = error.file if isinstance(error, CheckpointError) and error.file in model.names else name
            hint = "" if os.path.exists(os.path.expanduser(name)) else not_there(document, name, sorted(names))
            findings.add_error(error, (path, document.error("", path).line), hint)


def _named(documents: Sequence[Document], recipes: Sequence[Recipe]) -> Iterator[tuple[ModelRef, Document, str]]:
    """Every model that is named, with its path: as the recipes have them, or as the text has where that has errors."""
    for number, document in enumerate(documents):
        if not recipes:
            yield from ((ModelRef.of(text), document, path) for text, path in references(document.value, "$"))
            continue
        recipe = recipes[number]
        for model in (*recipe.models, recipe.origin, *recipe.sidecars):
            yield model, document, recipe.path_of(model)


def _check_document(
    recipe: Recipe,
    recipes: Sequence[Recipe],
    library: Library,
    checked: Mapping[int, _Checked],
    findings: _Findings,
) -> _Checked | None:
    """Check one document with its models. None, if it has errors.

    recipes  all documents
    checked  the earlier ones that have no errors, by number
    """
    collector, sampled = ErrorCollector(collect=True), 0
    try:
        names, known, fit = _models(recipe, library, checked, findings)
        warnings, outputs = check_tensors(recipe, names, collector, **known)
        for error in collector.errors:
            if fit or not isinstance(error, ShapeError):  # align_models has reported it
                findings.add_error(error)
        if shapes := _shapes(recipe, known) if collector.errors else []:
            findings.add_error(ShapeError(listed(shapes, _LISTED)))
        for warning in warnings:
            findings.add_warning(warning)
        if outputs is None or not fit:
            return None
        said = {str(warning) for warning in (*warnings, *(w for one in recipes for w in one.warnings))}
        if not recipe.earlier:
            plan = make_plan([recipe], library=library)
            sampled = _check_samples(plan, said, findings)
        elif recipe is recipes[-1] and len(checked) == len(recipes) - 1:
            plan = make_plan([recipe], above=recipes[:-1], library=library)
            sampled = _check_samples(plan, said, findings)
        made = None if recipe is recipes[-1] else _made(recipe, library, checked)
    except (RecipeError, CheckpointError, StorageError) as error:
        findings.add_error(error)
        return None
    return _Checked(outputs, sampled, made)


def _made(recipe: Recipe, library: Library, checked: Mapping[int, _Checked]) -> tuple[Model, object]:
    """What a document makes, as a model of those below it, and the folder of its small files."""
    from fastinterp.plan.chained import made_by

    origin = _origin(recipe)
    document = plan_document([replace(recipe, origin=origin)], lambda model: _found(recipe, model, library, checked))
    return made_by(recipe, document)


def _found(recipe: Recipe, model: ModelRef, library: Library, checked: Mapping[int, _Checked]) -> Model:
    """One of a recipe's models: what a document above makes, or a checkpoint."""
    above = recipe.made_by(model)
    made = None if above is None else checked[above].made
    return library.find(model) if made is None else made[0]


def _origin(recipe: Recipe) -> ModelRef:
    """The model that configuration and tokenizer come from: also a document above."""
    lead = recipe.base_model or recipe.models[0]
    return recipe.origin if recipe.made_by(lead) is None else lead


def _models(
    recipe: Recipe, library: Library, checked: Mapping[int, _Checked], findings: _Findings
) -> tuple[list[Collection[str]], dict[str, Any], bool]:
    """The tensor names of each of a recipe's models, what else is known of them for Assembly, and whether their
    vocabularies could be aligned.

    Raises: CheckpointError, if models that are merged have different quantised tensors.
    """
    models = [_found(recipe, model, library, checked) for model in recipe.models]
    refuse_quantised(recipe, models)
    origin = _origin(recipe)
    try:
        aligned = align_models(replace(recipe, origin=origin), models, _found(recipe, origin, library, checked))
    except (CheckpointError, StorageError) as error:
        findings.add_error(error, _tokenizer(recipe))
        return [m.tensors for m in models], {}, False
    tensors = [m.tensors for m in aligned.models]
    sizes = other_sizes(aligned.models, recipe.base_index)
    return [*tensors], {"tensors": tensors, "copied": aligned.copied, "notes": aligned.notes, "sizes": sizes}, True


def _shapes(recipe: Recipe, known: Mapping[str, Any]) -> list[str]:
    """Tensors of different shapes, where whole models are merged. Planning reports them, unless something else ends it
    before.

    known  as _models returns it
    """
    if not known or recipe.missing != "error" or recipe.sections[0].stacked or recipe.sections[0].name is not None:
        return []
    lead, *others = known["tensors"]
    names = [str(model) for model in recipe.models]
    return [
        f"{n} is {list(e.shape)} in {names[0]} but {list(other[n].shape)} in {name}"
        for name, other in zip(names[1:], others, strict=True)
        for n, e in lead.items()
        if n in other and e.shape != other[n].shape
    ]


def _tokenizer(recipe: Recipe) -> tuple[str, int | None] | None:
    """Path and line of the recipe's first key about tokenizers."""
    keys = [k for k in ("tokenizer", "tokenizer_source", "chat_template") if recipe.document.value.get(k) is not None]
    return (f"$.{keys[0]}", recipe.document.error("", f"$.{keys[0]}").line) if keys else None


# --- samples ---------------------------------------------------------------------------------------------------------


def _check_samples(plan: Plan, known: Collection[str], findings: _Findings) -> int:
    """Add the warnings of a plan and of samples of the data that it reads. Returns the number of tensors sampled.

    known  warnings of the plan that are findings already
    """
    for warning in plan.warnings:
        if warning not in known:
            findings.add_warning(warning)
    findings.remarks += [*plan.remarks, *plan.file_remarks]
    if elsewhere := plan.elsewhere:
        findings.remarks.append(
            f"no samples were read, since only the headers of {listed([plain(n) for n in elsewhere], _LISTED)} are here"
        )
        return 0
    error, longer = samples.compare_unmerged(plan)
    if error is not None:
        findings.add_error(error)
    if names := [t.name for t in longer if not t.inputs[0].quantised]:
        findings.add_warning(
            f"{counted(len(names), 'tensor')} that no method merges must be the same in all models, and only the "
            f"first MB of each was compared: {listed(names, _LISTED)}. Say whose to take: `integers: MODEL`"
        )
    if names := [t.name for t in longer if t.inputs[0].quantised]:
        findings.add_warning(
            f"{counted(len(names), 'tensor')} with codes or scales of quantised weights must be the same in all "
            f"models, and only the first MB of each was compared: {listed(names, _LISTED)}"
        )
    stored = (i.stored for t in plan.tensors for stage in t.stages for i in stage.inputs)
    try:
        with ExitStack() as stack:  # a run looks at the scales of encoded tensors when it opens them
            Sources(plan.checkpoints, (one for one in stored if one is not None and one.encoding is not None), stack)
    except CheckpointError as refused:
        findings.add_error(refused)
    for warning in chunks.negative_importances(plan):
        findings.add_warning(warning)
    sampled = samples.sample(plan)
    names = [plain(c.name) for c in plan.checkpoints]
    for i in dict.fromkeys(i for i, _ in sampled.not_finite):
        where = [tensor for model, tensor in sampled.not_finite if model == i]
        findings.add_warning(f"{names[i]} contains NaN or Inf, in {listed(where, _LISTED)}")
    for i, other in sampled.equal():
        findings.add_warning(f"{names[i]} and {names[other]} are equal in all samples: is one of them the wrong model?")
    if any(i.decoded for t in plan.tensors for i in t.inputs):
        deltas = quantised_deltas.quantised_deltas(plan, chunks.TENSORS)
        findings.remarks += [plain(line) for line in quantised_deltas.about(deltas, [c.name for c in plan.checkpoints])]
        for warning in quantised_deltas.noise(deltas, plan):
            findings.add_warning(plain(warning))
    recipe = plan.recipes[0]
    if recipe.base is not None and recipe.method.sums_deltas:
        for i, base, delta, signal in sampled.noisy():
            findings.add_warning(
                f"the difference of {names[i]} from {names[base]} is mostly rounding noise: stored as "
                f"{' and '.join(sorted(delta.dtypes))}, about {signal:.2f} of its norm is signal, estimated from "
                f"{delta.rounded:,} sampled elements. Use models that were never quantised"
            )
    return sampled.tensors
