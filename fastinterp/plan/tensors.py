"""The tensors of a plan: the inputs of every target, and its weighted sums as far as headers tell."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from operator import is_
from typing import Any

from msgspec.structs import replace

from fastinterp.errors import CheckpointError, MethodError, ShapeError, UsageError
from fastinterp.messages import counted, listed
from fastinterp.methods import Method, Sidecar
from fastinterp.ops.combine import Combine, Row, Tensor, check_coefficients, renumbered
from fastinterp.ops.dtypes import F16, DType, promoted
from fastinterp.plan.fit import INTEGERS, check_fit, chosen_model
from fastinterp.plan.inputs import ModelInput, TensorInput
from fastinterp.plan.models import Model, is_gguf
from fastinterp.plan.planned import PlannedTensor
from fastinterp.plan.program import Program
from fastinterp.plan.quantised import agree, quantised_error
from fastinterp.recipe.load import Recipe
from fastinterp.recipe.references import ModelRef
from fastinterp.recipe.targets import Target

_LISTED = 5  # differences in a message before the rest is only counted


def must_agree(differing: Sequence[tuple[PlannedTensor, int, int]], models: Sequence[Model]) -> CheckpointError:
    """The error of tensors that are copied, not merged, but differ between models.

    differing  a tensor and two of its checkpoints, of which the second has other bytes than the first
    models     the checkpoints of the plan
    """
    codes = [one for one in differing if one[0].inputs[0].quantised]
    if codes:
        return quantised_error(models[i] for i in codes[0][0].checkpoints)
    tensor, first, other = differing[0]
    names = [f"{t.name} ({t.dtype})" for t, _, _ in differing]
    between = f"between {models[first].name} and {models[other].name}"
    if any(stored.factor for stored in tensor.inputs):
        are = "belongs to an adapter that is built into the models, and differs"
        are = are if len(names) == 1 else "belong to adapters that are built into the models, and differ"
        return ShapeError(
            f"{listed(names, _LISTED)} {are} {between}: the mean of two products is not the product of the means of "
            "their factors. To take the factors of one model as they are: `integers: MODEL`",
            tensor=tensor.name,
        )
    are = "is not averaged, and differs" if len(names) == 1 else "are not averaged, and differ"
    return ShapeError(f"{listed(names, _LISTED)} {are} {between}. {INTEGERS}", tensor=tensor.name)


def sidecar_refs(targets: Sequence[Target], method: Method) -> list[ModelRef]:
    """The further checkpoints that any target's parameters name, each once, in the order of their use."""
    keywords = [p.keyword for p in method.parameters if p.kind is Sidecar]
    models = (model for t in targets if not t.copies for keyword in keywords for _, model in _sidecars_of(t, keyword))
    return list(dict.fromkeys(models))


def _sidecars_of(target: Target, keyword: str) -> Iterator[tuple[int, ModelRef]]:
    """(index of the input that it belongs to, side-car) of a parameter; a value for all belongs to the first input."""
    parameter = target.parameters[keyword]
    values = parameter if isinstance(parameter, tuple) else (parameter,)
    first = len(target.inputs) - len(values) if isinstance(parameter, tuple) else 0
    return ((first + i, ModelRef.of(name)) for i, name in enumerate(values) if name is not None)


def plan_tensors(
    recipes: Sequence[Recipe],
    targets: Sequence[Sequence[Target]],
    models: Sequence[Model],
    sidecars: Mapping[ModelRef, Model],
    origin: Model,
    layouts: Mapping[int, str] | None = None,
) -> tuple[PlannedTensor, ...]:
    """The targets of all recipes, which differ in parameters only, as planned tensors.

    targets   those of each recipe
    sidecars  further checkpoints by model; in the plan they follow the models
    origin    the model whose dtypes the output has
    layouts   by model: which of its tensors have another layout than the base's, and what to do, for messages
    Raises: ShapeError, if tensors do not fit together; MethodError, with the tensor's name; UsageError.
    """
    for other in targets[1:]:
        if [(t.name, t.inputs) for t in other] != [(t.name, t.inputs) for t in targets[0]]:
            raise UsageError("recipes that share one read must make the same tensors of the same models")
    check_fit(recipes[0], targets[0], models, layouts or {})
    planner = _Planner(recipes, models, sidecars, origin, targets[0])
    tensors = tuple(planner.planned(outputs) for outputs in zip(*targets, strict=True))
    whole = next((t.program for t in tensors if t.program is not None and t.program.whole), None)
    if whole is None:
        return tensors
    # A request about the whole model reads the tensors, too, whose method requests nothing.
    planner.whole_reads = tuple(read for read in whole.reads if read[0] == "select")
    return tuple(planner.planned(outputs) for outputs in zip(*targets, strict=True))


class _Planner:
    """Plans one target at a time. Methods of equal parameters are called once.

    whole_reads  reads of every tensor, whatever its method requests: those of a request about the whole model
    """

    def __init__(
        self,
        recipes: Sequence[Recipe],
        models: Sequence[Model],
        sidecars: Mapping[ModelRef, Model],
        origin: Model,
        targets: Sequence[Target],
    ):
        self._recipes, self._models, self._origin = recipes, models, origin
        self._seeds = tuple(r.seed for r in recipes)
        self._method = recipes[0].method
        self._sidecars = {ref: (len(models) + i, model) for i, (ref, model) in enumerate(sidecars.items())}
        self._keywords = [p.keyword for p in self._method.parameters if p.kind is Sidecar]
        leads = (models[t.inputs[0][0]].tensors[t.inputs[0][1]] for t in targets if not t.copies)
        self._gguf = None
        if is_gguf(origin):
            from fastinterp.plan.gguf_output import StoredTypes

            self._gguf = StoredTypes(origin, recipes[0].out_dtype or recipes[0].dtype)
        self._numel = sum(lead.numel for lead in leads if lead.merges)
        # The calls of methods that look at the number of models alone.
        self._requests: dict[tuple[Any, ...], Callable[[], Any]] = {}
        self._reads: dict[tuple[Any, ...], Any] = {}
        self.whole_reads: tuple[tuple[str, tuple[int, ...]], ...] = ()

    def planned(self, targets: Sequence[Target]) -> PlannedTensor:
        """targets  one per output, of equal name and inputs"""
        planned = self._planned(targets)
        form = (_dtype_source(targets[0], self._origin) or planned.inputs[0]) if planned.merged else None
        return replace(planned, seeds=self._seeds, form=form)

    def _planned(self, targets: Sequence[Target]) -> PlannedTensor:
        target, recipe = targets[0], self._recipes[0]
        inputs = [(i, self._models[i].tensors[name]) for i, name in target.inputs]
        lead = inputs[0][1]
        if target.verbatim:
            return _unsummed(target.name, lead.dtype, lead, inputs)
        if not all(tensor.merges for _, tensor in inputs):
            return self._unmerged(targets, inputs)
        # An output keeps the dtype of the model whose config.json is copied, which need not be merged itself.
        first = _dtype_source(target, self._origin) or lead
        if self._gguf is not None:
            dtype = self._gguf.of_sum(target.name, lead.shape, first)
        else:
            kept = _kept([tensor for _, tensor in inputs], first)
            own = first.kept_dtype if first.kept_dtype.merges else lead.kept_dtype
            dtype = recipe.out_dtype or recipe.dtype or (promoted(kept) if len(kept) > 1 else own)
        if target.copies:
            return _summed(target.name, dtype, lead, inputs, [Combine((1.0,))] * len(targets))
        calls = self._calls(targets, lead)
        sums = [call() for call in calls] if not self._method.generator else []
        if sums and all(isinstance(s, Combine) for s in sums):
            return _summed(target.name, dtype, lead, inputs, sums)
        return self._adaptive(targets, dtype, lead, inputs, calls)

    def _unmerged(self, targets: Sequence[Target], inputs: list[ModelInput]) -> PlannedTensor:
        """A tensor of which not all inputs are numbers that methods average: it is copied, or a sum of pairs."""
        target, chosen = targets[0], chosen_model(self._recipes[0])
        tensors = [tensor for _, tensor in inputs]
        if len(inputs) > 1 and all(tensor.dtype.is_complex for tensor in tensors) and not agree(tensors):
            return self._complex(targets, inputs, chosen)
        quantised = inputs[0][1].quantised
        if not quantised:
            inputs = [(i, tensor) for i, tensor in inputs if i == chosen] or inputs
        lead = inputs[0][1]
        alone = len(inputs) == 1 and quantised and not target.copies
        if alone and any(not _is_copy(call) for call in self._calls(targets, lead)):
            model = self._models[inputs[0][0]]
            raise quantised_error([model], f"{self._method.name} would change {target.name}, which holds codes")
        return _unsummed(target.name, lead.dtype, lead, inputs)

    def _complex(self, targets: Sequence[Target], inputs: list[ModelInput], chosen: int | None) -> PlannedTensor:
        """A sum of complex numbers that differ; where the method does more than sum, a copy of those of `chosen`.

        Raises: ShapeError, if that is none of the inputs'.
        """
        target, lead = targets[0], inputs[0][1]
        sums = [call() for call in self._calls(targets, lead)] if not self._method.generator else []
        if sums and all(isinstance(s, Combine) for s in sums):
            return _summed(target.name, lead.dtype, lead, inputs, sums)
        for i, tensor in inputs:
            if i == chosen:
                return _unsummed(target.name, tensor.dtype, tensor, [(i, tensor)])
        first, other = (self._models[inputs[k][0]].name for k in (0, 1))
        raise ShapeError(
            f"{target.name} ({lead.dtype}) differs between {first} and {other}, and {self._method.name} does more than "
            f"weigh: it is not defined for complex numbers. {INTEGERS}, or use `linear` or `task_arithmetic`",
            tensor=target.name,
        )

    def _calls(self, targets: Sequence[Target], lead: TensorInput) -> tuple[Callable[[], Any], ...]:
        self._check_count(targets[0])
        return tuple(self._call(k, target, lead) for k, target in enumerate(targets))

    def _adaptive(
        self,
        targets: Sequence[Target],
        dtype: DType,
        lead: TensorInput,
        inputs: list[ModelInput],
        calls: tuple[Callable[[], Any], ...],
    ) -> PlannedTensor:
        """A tensor whose method requests something of the data, or a sum that is more than plain."""
        from fastinterp.plan.method_run import MethodRun, foreseen_reads

        target = targets[0]
        if lead.numel == 0:  # there is no data
            return _summed(target.name, dtype, lead, inputs, [Combine((1.0,))] * len(calls))
        run = MethodRun(target.name, calls, self._seeds)
        plain = [s for s in run.sums if isinstance(s, Combine)]
        if run.ended and len(plain) == len(calls) and not self.whole_reads:
            return _summed(target.name, dtype, lead, inputs, plain)
        # What is requested hardly depends on more than this, and it is an estimate.
        key = (lead.shape, len(target.inputs), target.layer, *(id(t.parameters) for t in targets))
        if key not in self._reads:
            self._reads[key] = foreseen_reads(run, len(target.inputs), lead.shape)
        reads, whole = self._reads[key]
        reads = reads if whole else (*self.whole_reads, *reads)
        program = Program(calls, reads, whole, self._method.name, target.name, self._seeds)
        return _unsummed(target.name, dtype, lead, [*inputs, *self._sidecar_inputs(target)], program, len(inputs))

    def _call(self, k: int, target: Target, lead: TensorInput) -> Callable[[], Any]:
        """The method with all of its arguments, for output k."""
        n, method = len(target.inputs), self._method
        key = (k, n, id(target.parameters))
        if key in self._requests:
            return self._requests[key]
        tensor = Tensor(target.name, lead.shape, target.layer, target.layers, self._numel)
        call = partial(method, n, tensor, **target.parameters)
        if method.generator:
            return call
        if method.fn.__code__.co_argcount > 1:
            return partial(self._checked, call, target.name, self._recipes[k])
        request = self._checked(call, target.name, self._recipes[k])
        self._requests[key] = lambda: request
        return self._requests[key]

    def _checked(self, call: Callable[[], Any], name: str, recipe: Recipe) -> Any:
        """The return value of the method's call. Raises: MethodError, with its path and file in the recipe."""
        try:
            request = call()
        except MethodError as error:
            raise MethodError(error.message, path="$.models", file=recipe.file) from None
        if isinstance(request, Combine):
            check_coefficients([request.row().total, *request.weights], name)
        return request

    def _check_count(self, target: Target) -> None:
        low, high = self._method.models
        n = len(target.inputs)
        if not low <= n <= high:
            count = f"exactly {low}" if low == high else f"{low} to {high}"
            raise MethodError(f"`{self._method.name}` takes {count} models, got {n} for {target.name}")

    def _sidecar_inputs(self, target: Target) -> list[ModelInput]:
        """The side-cars' tensors, in the order of the models that they belong to."""
        inputs = []
        lead = self._models[target.inputs[0][0]].tensors[target.inputs[0][1]]
        for at, ref in sorted(pair for keyword in self._keywords for pair in _sidecars_of(target, keyword)):
            number, sidecar = self._sidecars[ref]
            tensor = sidecar.tensors.get(target.inputs[at][1])
            if tensor is None or tensor.shape != lead.shape or not tensor.merges:
                difference = "lacks it" if tensor is None else f"has {tensor.describe()}"
                raise ShapeError(
                    f"{target.inputs[at][1]} is {lead.describe()}, but the side-car {sidecar.name} {difference}. "
                    "It must have every tensor of its model, in the same shape",
                    tensor=target.name,
                )
            inputs.append((number, tensor))
        return inputs


def _dtype_source(target: Target, origin: Model) -> TensorInput | None:
    """The tensor of the origin whose dtype a target keeps, or None: where layers are stacked, that of its own layer in
    the lead source, or in layer 0, which all layers of a kind have.
    """
    if target.layer is None or (target.name in origin.tensors and target.name == target.inputs[0][1]):
        return origin.tensors.get(target.name)
    first = target.name.replace(f".{target.layer}.", ".0.", 1)
    return origin.tensors.get(target.inputs[0][1]) or origin.tensors.get(first)


def _kept(tensors: Sequence[TensorInput], first: TensorInput) -> frozenset[DType]:
    """The dtypes of tensors that are merged, of which one that holds all is stored.

    What is decoded has none of its own: BF16, and beside F16 alone that of `first`, the one whose dtype is kept.
    """
    kept = frozenset([tensor.kept_dtype for tensor in tensors])
    if F16 not in kept:
        return kept
    own = {tensor.kept_dtype for tensor in tensors if not tensor.decoded}
    if own == {F16} and any(tensor.decoded for tensor in tensors):
        return frozenset({first.kept_dtype})
    return kept


def dtype_warnings(recipe: Recipe, targets: Sequence[Target], origin: Model) -> list[str]:
    """A warning, if the origin does not tell the dtype of tensors in stacked layers, so that their source does."""
    if recipe.dtype is not None or recipe.out_dtype is not None:
        return []
    names = [t.name for t in targets if t.layer is not None and _dtype_source(t, origin) is None]
    if not names:
        return []
    return [
        f"{origin.name}, whose dtypes the output keeps, has no tensor like {listed(names, _LISTED)}: stored in the "
        "dtype of their sources. Say which one: `out_dtype`, or --dtype"
    ]


def dtype_remarks(recipe: Recipe, targets: Sequence[Target], models: Sequence[Model], origin: Model) -> list[str]:
    """What is stored where models have a tensor in different dtypes, and the recipe names none."""
    if recipe.dtype is not None or recipe.out_dtype is not None:
        return []
    counts: dict[frozenset[DType], int] = {}
    for target in targets:
        tensors = [models[i].tensors[name] for i, name in target.inputs]
        kinds = _kept(tensors, _dtype_source(target, origin) or tensors[0])
        if len(kinds) > 1 and not target.verbatim and all(tensor.merges for tensor in tensors):
            counts[kinds] = counts.get(kinds, 0) + 1
    return [
        f"{counted(count, 'tensor')} of dtypes {', '.join(sorted(map(str, kinds)))}, which differ between the models: "
        f"stored as {promoted(kinds)}, which holds all. "
        "Another one: `dtype` in the recipe, or --dtype"
        for kinds, count in counts.items()
    ]


def complex_remarks(recipe: Recipe, tensors: Sequence[PlannedTensor]) -> list[str]:
    """A remark on sums of complex numbers, which keep their dtype."""
    names = [t.name for t in tensors if t.merged and t.dtype.is_complex]
    dtype = recipe.out_dtype or recipe.dtype
    if not names or dtype is None:
        return []
    return [f"{counted(len(names), 'tensor')} of complex numbers, {listed(names, _LISTED)}: C64, not {dtype}"]


def _unsummed(
    name: str,
    dtype: DType,
    lead: TensorInput,
    inputs: Sequence[ModelInput],
    program: Program | None = None,
    model_count: int = 0,
) -> PlannedTensor:
    """A tensor that is copied, or whose sums the data decide."""
    numbers, tensors = tuple(i for i, _ in inputs), tuple(tensor for _, tensor in inputs)
    return PlannedTensor(name, dtype, lead.shape, numbers, tensors, (), program, model_count or len(inputs))


def _summed(
    name: str, dtype: DType, lead: TensorInput, inputs: Sequence[ModelInput], sums: Sequence[Combine]
) -> PlannedTensor:
    """A tensor whose sums are known. An input of weight 0 is not read."""
    sums = tuple(sums)
    same, read, rows = _rows(sums)
    sums = same if all(map(is_, same, sums)) else sums  # one object for many tensors
    numbers = shared(tuple([inputs[i][0] for i in read]))
    tensors = tuple([inputs[i][1] for i in read])
    return PlannedTensor(name, dtype, lead.shape, numbers, tensors, rows, None, len(read), sums)


@lru_cache(maxsize=64)  # most tensors of a model have the sums of the one before
def _rows(sums: tuple[Combine, ...]) -> tuple[tuple[Combine, ...], tuple[int, ...], tuple[Row, ...]]:
    return sums, *renumbered(s.row() for s in sums)


@lru_cache(maxsize=256)
def shared(numbers: tuple[int, ...]) -> tuple[int, ...]:
    """The same numbers, as one object for many tensors."""
    return numbers


def _is_copy(call: Callable[[], Any]) -> bool:
    """Whether a method leaves its one input as it is."""
    request = call()
    return isinstance(request, Combine) and request.row().is_copy
