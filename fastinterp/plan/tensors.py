"""The tensors of a plan: of every target its inputs, and its sums as far as headers tell."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from fastinterp.checkpoint.header import Entry
from fastinterp.checkpoint.open import Checkpoint
from fastinterp.errors import MethodError, ShapeError, UsageError
from fastinterp.methods import Method, Sidecar
from fastinterp.ops.combine import Combine, Row, Tensor, check_coefficients, renumbered
from fastinterp.ops.dtypes import DType
from fastinterp.recipe.load import Recipe
from fastinterp.recipe.references import ModelRef
from fastinterp.recipe.targets import Target
from fastinterp.tokenizer.embedding_rows import named_as_embedding

_VOCABULARIES = (
    "The vocabularies differ in size: say which one the output has, `tokenizer_source: base` or "
    "`tokenizer_source: union`"
)
_SHOWN = 5  # differences that a message lists before it only counts them


@dataclass(frozen=True, slots=True)
class Program:
    """What must be asked before a tensor is merged, or a sum that is more than plain.

    calls   one per output: the method with all of its arguments
    reads   what is foreseen to be read: for what, and which of the tensor's inputs. Answers may change it
    whole   something is asked about the whole model
    method  its name
    name    of the tensor, under which random keeps are drawn
    seeds   from which they are drawn, one per output
    """

    calls: tuple[Callable[[], Any], ...]
    reads: tuple[tuple[str, tuple[int, ...]], ...]
    whole: bool
    method: str
    name: str
    seeds: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One output tensor.

    inputs   the checkpoints that are read, as indices into Plan.checkpoints. Those of a program are all that its method
             sees, in its order, side-cars last
    entries  where each of them holds the tensor
    rows     one per output; their numbers count `inputs`. None for a program, and none if the tensor is not merged but
             must be the same in every input (integers, and floats that only a quantiser can read)
    models   how many of `inputs` the method counts: not the side-cars
    sums     what the method asked for, one per output, where `rows` come from it
    seeds    of the store's rounding, one per output
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    inputs: tuple[int, ...]
    entries: tuple[Entry, ...]
    rows: tuple[Row, ...]
    program: Program | None = None
    models: int = 0
    sums: tuple[Combine, ...] = ()
    seeds: tuple[int, ...] = ()

    @property
    def numel(self) -> int:
        return self.entries[0].numel

    @property
    def merged(self) -> bool:
        return bool(self.rows) or self.program is not None

    @property
    def reads(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """What is read, in order: for what, and which of `inputs`."""
        return (("combine", tuple(range(len(self.inputs)))),) if self.program is None else self.program.reads

    @property
    def bytes_read(self) -> int:
        return sum(self.entries[i].nbytes for _, inputs in self.reads for i in inputs)

    @property
    def nbytes(self) -> int:
        """Of one output."""
        return self.dtype.nbytes(self.numel) or 0

    @property
    def first(self) -> list[PlannedTensor]:
        """The tensors of documents above that have to be made before this one, each once, in an order that works."""
        found: dict[int, PlannedTensor] = {}
        for entry in self.entries:
            if isinstance(entry, MadeEntry):
                found |= {id(t): t for t in (*entry.made.first, entry.made)}
        return list(found.values())

    def origins(self, read: Iterable[int]) -> set[int]:
        """The checkpoints that these of its inputs come from in the end; side-cars left out."""
        found: set[int] = set()
        for at in read:
            entry = self.entries[at]
            if isinstance(entry, MadeEntry):
                found |= entry.made.origins(range(entry.made.models))
            elif at < self.models:
                found.add(self.inputs[at])
        return found


@dataclass(frozen=True, slots=True, eq=False)
class MadeEntry(Entry):
    """A tensor of a document above: it is in no file.

    made   how it is made, with the dtype in which it is stored until it is read
    free   that document says nothing of its dtype
    folds  its coefficients may become part of those of others, so that it need not be stored
    """

    made: PlannedTensor
    free: bool
    folds: bool

    def stored(self) -> MadeEntry:
        """As it will be read: `dtype` and `nbytes` of what is stored."""
        return replace(self, dtype=self.made.dtype, nbytes=self.made.nbytes)


def must_agree(tensor: PlannedTensor, first: str, other: str) -> ShapeError:
    """The error of a tensor that is not merged, and is not the same in the two models of these names."""
    return ShapeError(
        f"{tensor.name} ({tensor.dtype}) is not averaged, and differs between {first} and {other}. "
        "Say whose to take: `integers: MODEL` in the recipe, --integers MODEL of interpolate",
        tensor=tensor.name,
    )


def sidecar_refs(points: Sequence[Target], method: Method) -> list[ModelRef]:
    """The further checkpoints that any target's parameters name, each once, in the order of their use."""
    keywords = [p.keyword for p in method.parameters if p.kind is Sidecar]
    found = (model for t in points if not t.copies for keyword in keywords for _, model in _named(t, keyword))
    return list(dict.fromkeys(found))


def _named(target: Target, keyword: str) -> Iterator[tuple[int, ModelRef]]:
    """(place of the model among the inputs, side-car) of a parameter; one value for all belongs to the first."""
    given = target.parameters[keyword]
    values = given if isinstance(given, tuple) else (given,)
    first = len(target.inputs) - len(values) if isinstance(given, tuple) else 0
    return ((first + i, ModelRef.of(name)) for i, name in enumerate(values) if name is not None)


def plan_tensors(
    recipes: Sequence[Recipe],
    points: Sequence[Sequence[Target]],
    models: Sequence[Checkpoint],
    sidecars: Mapping[ModelRef, Checkpoint],
    origin: Checkpoint,
) -> tuple[PlannedTensor, ...]:
    """The targets of all recipes, which differ in parameters only, as planned tensors.

    points    the targets of each recipe
    sidecars  further checkpoints by model; in the plan they follow the models
    origin    whose dtypes are kept
    Raises: ShapeError, if tensors do not fit together; MethodError, with the tensor's name; UsageError.
    """
    for other in points[1:]:
        if [(t.name, t.inputs) for t in other] != [(t.name, t.inputs) for t in points[0]]:
            raise UsageError("recipes that share one read must make the same tensors of the same models")
    _check_fit(points[0], models)
    planner = _Planner(recipes, models, sidecars, origin, points[0])
    tensors = tuple(planner.planned(targets) for targets in zip(*points, strict=True))
    whole = next((t.program for t in tensors if t.program is not None and t.program.whole), None)
    if whole is None:
        return tensors
    # What is asked about the whole model is asked about those, too, that ask nothing themselves.
    planner.asked = tuple(read for read in whole.reads if read[0] == "select")
    return tuple(planner.planned(targets) for targets in zip(*points, strict=True))


class _Planner:
    """asked  reads of every tensor, whatever it asks itself; those of a request about the whole model"""

    def __init__(
        self,
        recipes: Sequence[Recipe],
        models: Sequence[Checkpoint],
        sidecars: Mapping[ModelRef, Checkpoint],
        origin: Checkpoint,
        targets: Sequence[Target],
    ):
        self._recipes, self._models, self._origin = recipes, models, origin
        self._method = recipes[0].method
        self._sidecars = {model: (len(models) + i, c) for i, (model, c) in enumerate(sidecars.items())}
        self._keywords = [p.keyword for p in self._method.parameters if p.kind is Sidecar]
        leads = (models[t.inputs[0][0]].tensors[t.inputs[0][1]] for t in targets if not t.copies)
        self._numel = sum(e.numel for e in leads if e.dtype.merges)
        self._known: dict[tuple[Any, ...], Any] = {}  # what a method of the count alone asks for
        self._foreseen: dict[tuple[Any, ...], Any] = {}
        self.asked: tuple[tuple[str, tuple[int, ...]], ...] = ()

    def planned(self, targets: Sequence[Target]) -> PlannedTensor:
        """targets  one per output, of equal name and inputs"""
        return replace(self._planned(targets), seeds=tuple(r.seed for r in self._recipes))

    def _planned(self, targets: Sequence[Target]) -> PlannedTensor:
        one, recipe = targets[0], self._recipes[0]
        found = [(i, self._models[i].tensors[name]) for i, name in one.inputs]
        kept = found[0][1]
        if not kept.dtype.merges:
            if recipe.integers is not None:
                whose = recipe.models.index(recipe.integers)
                found = [(i, entry) for i, entry in found if i == whose] or found
            return _planned(one.name, kept.dtype, kept.shape, found)
        # What is kept is the dtype of the model whose config.json is copied, which need not be merged itself.
        named = (_kept_of(one, self._origin) or kept).dtype
        dtype = recipe.out_dtype or recipe.dtype or (named if named.merges else kept.dtype)
        if one.copies:
            return _summed(one.name, dtype, kept.shape, found, [Combine((1.0,))] * len(targets))
        self._check_count(one)
        calls = tuple(self._call(k, target, kept) for k, target in enumerate(targets))
        asked = [call() for call in calls] if not self._method.generator else []
        if asked and all(isinstance(a, Combine) for a in asked):
            return _summed(one.name, dtype, kept.shape, found, asked)
        return self._asking(targets, dtype, kept, found, calls)

    def _asking(
        self,
        targets: Sequence[Target],
        dtype: DType,
        kept: Entry,
        found: list[tuple[int, Entry]],
        calls: tuple[Callable[[], Any], ...],
    ) -> PlannedTensor:
        from fastinterp.plan.method_run import Conversation, foresee

        one = targets[0]
        if kept.numel == 0:  # nothing to merge, and nothing to ask
            return _summed(one.name, dtype, kept.shape, found, [Combine((1.0,))] * len(calls))
        talk = Conversation(one.name, calls, [r.seed for r in self._recipes])
        plain = [asked for asked in talk.sums if isinstance(asked, Combine)]
        if talk.ended and len(plain) == len(calls) and not self.asked:
            return _summed(one.name, dtype, kept.shape, found, plain)
        # What is asked hardly depends on more than this, and it is an estimate.
        key = (kept.shape, len(one.inputs), one.layer, *(id(t.parameters) for t in targets))
        if key not in self._foreseen:
            self._foreseen[key] = foresee(talk, len(one.inputs), kept.shape)
        reads, whole = self._foreseen[key]
        reads = reads if whole else (*self.asked, *reads)
        seeds = tuple(r.seed for r in self._recipes)
        program = Program(calls, reads, whole, self._method.name, one.name, seeds)
        return _planned(one.name, dtype, kept.shape, [*found, *self._beside(one)], program, len(found))

    def _call(self, k: int, target: Target, kept: Entry) -> Callable[[], Any]:
        n, method = len(target.inputs), self._method
        tensor = Tensor(target.name, kept.shape, target.layer, target.layers, self._numel)
        call = partial(method, n, tensor, **target.parameters)
        if method.generator:
            return call
        if method.fn.__code__.co_argcount > 1:
            return partial(self._said, call, target.name, self._recipes[k])
        key = (k, n, id(target.parameters))
        if key not in self._known:
            self._known[key] = self._said(call, target.name, self._recipes[k])
        asked = self._known[key]
        return lambda: asked

    def _said(self, call: Callable[[], Any], name: str, recipe: Recipe) -> Any:
        try:
            asked = call()
        except MethodError as error:
            raise MethodError(error.message, path="$.models", file=recipe.file) from None
        if isinstance(asked, Combine):
            check_coefficients([asked.row().total, *asked.weights], name)
        return asked

    def _check_count(self, target: Target) -> None:
        low, high = self._method.models
        n = len(target.inputs)
        if not low <= n <= high:
            count = f"exactly {low}" if low == high else f"{low} to {high}"
            raise MethodError(f"`{self._method.name}` takes {count} models, got {n} for {target.name}")

    def _beside(self, target: Target) -> list[tuple[int, Entry]]:
        """The side-cars' tensors, in the order of the models that they belong to."""
        found = []
        lead = self._models[target.inputs[0][0]].tensors[target.inputs[0][1]]
        pairs = [pair for keyword in self._keywords for pair in _named(target, keyword)]
        for place, sidecar in sorted(pairs, key=lambda pair: pair[0]):
            number, checkpoint = self._sidecars[sidecar]
            entry = checkpoint.tensors.get(target.inputs[place][1])
            if entry is None or entry.shape != lead.shape or not entry.dtype.merges:
                has = "lacks it" if entry is None else f"has {entry.dtype} {list(entry.shape)}"
                raise ShapeError(
                    f"{target.inputs[place][1]} is {lead.dtype} {list(lead.shape)}, but the side-car "
                    f"{checkpoint.name} {has}. It must have every tensor of its model, in the same shape",
                    tensor=target.name,
                )
            found.append((number, entry))
        return found


def _kept_of(target: Target, origin: Checkpoint) -> Entry | None:
    """The tensor of the origin whose dtype a target keeps, or None: where layers are stacked, that of its own layer in
    the lead source, or in layer 0, which all layers of a kind have.
    """
    if target.layer is None or (target.name in origin.tensors and target.name == target.inputs[0][1]):
        return origin.tensors.get(target.name)
    first = target.name.replace(f".{target.layer}.", ".0.", 1)
    return origin.tensors.get(target.inputs[0][1]) or origin.tensors.get(first)


def foreign_dtypes(recipe: Recipe, targets: Sequence[Target], origin: Checkpoint) -> list[str]:
    """A warning, if the origin does not tell the dtype of tensors in stacked layers, so that their source does."""
    if recipe.dtype is not None or recipe.out_dtype is not None:
        return []
    found = [t.name for t in targets if t.layer is not None and _kept_of(t, origin) is None]
    if not found:
        return []
    return [
        f"{origin.name}, which the output follows, has no tensor like {_listed(found)}: stored in the dtype of "
        "their sources. Say which one: `out_dtype`, or --dtype"
    ]


def _planned(
    name: str,
    dtype: DType,
    shape: tuple[int, ...],
    found: Sequence[tuple[int, Entry]],
    program: Program | None = None,
    models: int = 0,
) -> PlannedTensor:
    inputs, entries = tuple(i for i, _ in found), tuple(entry for _, entry in found)
    return PlannedTensor(name, dtype, shape, inputs, entries, (), program, models or len(found))


def _summed(
    name: str, dtype: DType, shape: tuple[int, ...], found: Sequence[tuple[int, Entry]], sums: Sequence[Combine]
) -> PlannedTensor:
    """A tensor whose sums are known. An input of weight 0 is not read."""
    read, rows = renumbered(a.row() for a in sums)
    inputs, entries = tuple(found[i][0] for i in read), tuple(found[i][1] for i in read)
    return PlannedTensor(name, dtype, shape, inputs, entries, rows, None, len(read), tuple(sums))


def _check_fit(targets: Sequence[Target], models: Sequence[Checkpoint]) -> None:
    """All inputs of a tensor must have its shape, and merge or not as the first does."""
    shapes, kinds, only_rows = [], [], True
    for target in targets:
        (first, name), *others = target.inputs
        lead, a = models[first], models[first].tensors[name]
        for i, its in others:
            b = models[i].tensors[its]
            if a.shape != b.shape:
                shapes.append(f"{its} is {list(a.shape)} in {lead.name} but {list(b.shape)} in {models[i].name}")
                only_rows &= named_as_embedding(name) and a.shape[1:] == b.shape[1:]
            elif a.dtype != b.dtype and not (a.dtype.merges and b.dtype.merges):
                kinds.append(f"{its} is {a.dtype} in {lead.name} but {b.dtype} in {models[i].name}")
    if shapes:
        raise ShapeError(f"{_listed(shapes)}. {_VOCABULARIES if only_rows else 'Only tensors of the same shape merge'}")
    if kinds:
        raise ShapeError(f"{_listed(kinds)}. Only F64, F32, F16, BF16 and F8 tensors merge; others must agree")


def _listed(items: Sequence[str]) -> str:
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return ", ".join(items[:_SHOWN]) + more
