"""The targets of a recipe: each output tensor, its inputs and its parameters, from the names of tensors alone.

Whole models: every tensor of the lead model, the base, else the first. A gradient runs over the layers of the stack
that a tensor is in (layers.py): over those of the vision tower in the vision tower.

Slices: the main stack is cut and stacked anew. Tensors before it (embeddings, and everything in other stacks) come from
the sources of the first slice, with its parameters; those after it (final norm, head) from those of the last. A slice
may have no layer: as the first or the last it still gives these.

Modules: one after the other, each as if it were a model. What is in none comes from base_model.

Tensors that not all models have, or not in one shape, are an error, copied from the base, or left out: the key
`missing` says which.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import msgspec

from fastinterp.errors import RecipeError, ShapeError
from fastinterp.messages import shown
from fastinterp.recipe.document import ErrorCollector
from fastinterp.recipe.layers import LayerPosition, Layers, Stack
from fastinterp.recipe.load import Recipe
from fastinterp.recipe.merge_groups import MergeGroup, MergeSource, Section
from fastinterp.recipe.module_tensors import module_tensors, no_tensor
from fastinterp.recipe.parameters import Resolver
from fastinterp.recipe.tensor_groups import HasShape, different_tensors, grouped

MAX_LAYERS = 100_000  # of a stack that slices make: far above any model, and all of it is held


class Target(msgspec.Struct, frozen=True):
    """One output tensor.

    inputs         (index in Recipe.models, name of the tensor there), in the order in which the method sees them
    parameters     keyword -> argument of the method: one value, or a tuple with one per input other than the base.
                   Tensors with equal parameters have the same object here
    layer, layers  index of its layer and their number, in the output; None and 0 if it is in no layer
    copies         the method is not called: the one input is copied
    verbatim       it is copied as it is stored, whatever dtype the output has
    has_base       the first input is the method's base
    """

    name: str
    inputs: tuple[tuple[int, str], ...]
    parameters: Mapping[str, Any]
    layer: int | None = None
    layers: int = 0
    copies: bool = False
    has_base: bool = False
    verbatim: bool = False


class LayerCount(msgspec.Struct, frozen=True):
    """A stack that the output has with other layers than its inputs.

    prefix  of the names of its tensors
    before  how many layers it has in the model whose layers come first
    layers  for every layer of the output, which one of that slice's first source it is
    models  for every layer of the output, the index of that source in Recipe.models
    sizes   how many layers it has in each of these models
    """

    prefix: str
    before: int
    layers: tuple[int, ...]
    models: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()


class Cut(msgspec.Struct, frozen=True):
    """A stack that slices cut.

    prefix  of the names of its tensors
    models  for every slice, the index of its first source in Recipe.models; also of slices without layers
    """

    prefix: str
    models: tuple[int, ...]


def targets(recipe: Recipe, names: Sequence[Collection[str]]) -> list[Target]:
    """The output's tensors, in the order of the lead model.

    names  of each of Recipe.models, those of its tensors
    Raises: ShapeError, if models that are merged have different tensors; RecipeError, if a slice or module names
    what is not there, two modules take one tensor, or a required parameter has no value for a tensor.
    """
    return Assembly(recipe, names).targets


class Assembly:
    """The targets of a recipe, and what was learned on the way.

    targets    the output's tensors; not all, if errors were collected
    counts     stacks of which the output has other layers than its inputs
    cuts       stacks that slices cut
    resolvers  with the values that were used, in the order of the groups
    left       tensors that not all models have in one shape -> the models that lack them
    """

    def __init__(
        self,
        recipe: Recipe,
        names: Sequence[Collection[str]],
        collector: ErrorCollector | None = None,
        *,
        tensors: Sequence[Mapping[str, HasShape]] = (),
        copied: Mapping[str, int] | None = None,
        notes: Mapping[int, str] | None = None,
        layouts: Mapping[int, str] | None = None,
        sizes: Mapping[int, str] | None = None,
    ):
        """tensors  of each of Recipe.models, by name; empty: their shapes are not known, and taken as equal
        copied   names of tensors of which those of one model are copied, as they are, and its index
        notes    by model: why it lacks what it lacks, for messages
        layouts  by model: which tensors have another layout than the base's, and what to do
        sizes    by model: that its tensors have other shapes than the base's, so that nothing would merge
        """
        self._recipe, self._names, self._collector = recipe, names, collector or ErrorCollector()
        self._tensors_of, self._copied, self._notes = tensors, copied or {}, notes or {}
        self._layouts, self._sizes_of = layouts or {}, sizes or {}
        self._layers: dict[tuple[int, str | None], Layers] = {}
        self.targets: list[Target] = []
        self.counts: list[LayerCount] = []
        self.cuts: list[Cut] = []
        self.resolvers: list[Resolver] = []
        self.left: dict[str, tuple[str, ...]] = {}
        self._merging = False  # some are in all
        for section in recipe.sections:
            with self._collector:
                before = len(self.targets), len(self._collector.errors)
                if section.stacked:
                    self._stack(section)
                else:
                    self._whole_models(section)
                if (len(self.targets), len(self._collector.errors)) == before and not self.left:
                    lead = section.groups[0].sources[0].model
                    raise self._error(no_tensor(section.name, self._names[lead]), section.path)
        if recipe.sections[0].name is not None:
            with self._collector:
                self._outside_modules()
        if self.left and recipe.missing != "error" and not self._merging:
            with self._collector:
                raise ShapeError("no tensor is in all models in one shape, so nothing would be merged")

    # whole models

    def _whole_models(self, section: Section) -> None:
        group = section.groups[0]
        lead, base = group.sources[0], self._recipe.base_index
        layers = self._layers_of(lead, section)
        names = [[n for n in self._tensors(s, section) if n not in self._copied] for s in group.sources]
        before = len(self._collector.errors)
        if self._recipe.missing == "error":
            for source, others in zip(group.sources[1:], names[1:], strict=True):
                with self._collector:
                    self._check_same(lead, names[0], source, others)
            if len(self._collector.errors) > before:
                return
        shared = self._shared(group.sources, names)
        resolver = self._resolver(group)
        of_base = _in(section, self._names[base])
        for name in dict.fromkeys((*self._tensors(lead, section), *of_base, *_in(section, self._copied))):
            if name in shared:
                position = layers.position(name)
                self._add(group, resolver, name, (name,) * len(group.sources), position, position)
            elif name in self._copied or (name in self._names[base] and self._recipe.missing == "base"):
                self._copy(self._copied.get(name, base), name, name)

    def _shared(self, sources: Sequence[MergeSource], names: Sequence[Sequence[str]]) -> set[str]:
        """The names that all sources have, in one shape unless `missing` is `error`; the others are noted."""
        shared = set(names[0]).intersection(*names[1:])
        shared = {name for name in shared if self._fit([(source.model, name) for source in sources])}
        sets = [set(each) for each in names]
        for name in dict.fromkeys(name for each in names for name in each if name not in shared):
            self.left[name] = self._lacking(sources, [name in each for each in sets])
        self._merging |= bool(shared)
        return shared

    def _fit(self, inputs: Sequence[tuple[int, str]]) -> bool:
        """Whether tensors have one shape, as far as that is known; where `missing` is `error`, planning finds out."""
        return (
            self._recipe.missing == "error"
            or not self._tensors_of
            or len({self._tensors_of[model][name].shape for model, name in inputs}) == 1
        )

    def _lacking(self, sources: Sequence[MergeSource], there: Sequence[bool]) -> tuple[str, ...]:
        """The models that lack a tensor. there: whether each source has it"""
        return tuple(str(source.ref) for source, has in zip(sources, there, strict=True) if not has)

    def _copy(self, model: int, tensor: str, name: str) -> None:
        self.targets.append(Target(name, ((model, tensor),), {}, copies=True, verbatim=name in self._copied))

    # slices

    def _stack(self, section: Section) -> None:
        groups = section.groups
        stack = self._main_stack(section)
        total = sum(group.sources[0].length for group in groups)
        if not total:
            raise self._error("the slices have no layer: `layer_range` is [first, end)", f"{section.path}.slices")
        before = len(self._collector.errors)
        resolvers = [self._resolver(group) for group in groups]
        with self._collector:
            self._outside(section, groups[0], resolvers[0], stack, after=False)
        start = 0
        for group, resolver in zip(groups, resolvers, strict=True):
            with self._collector:
                self._slice(section, group, resolver, stack, LayerPosition(start, total))
            start += group.sources[0].length
        with self._collector:
            self._outside(section, groups[-1], resolvers[-1], stack, after=True)
        if len(self._collector.errors) > before:  # a range may go beyond all that exists
            return
        leads = [group.sources[0] for group in groups]
        self.cuts.append(Cut(stack.prefix, tuple(lead.model for lead in leads)))
        numbers = tuple(n for lead in leads if lead.layers for n in range(*lead.layers))
        models = tuple(lead.model for lead in leads for _ in range(lead.length))
        if numbers != tuple(range(stack.layers)) or len(set(models)) > 1:
            sizes = self._sizes(stack, {lead.model: lead for lead in leads if lead.length}, section)
            self.counts.append(LayerCount(stack.prefix, stack.layers, numbers, models, sizes))

    def _sizes(self, stack: Stack, sources: Mapping[int, MergeSource], section: Section) -> tuple[int, ...]:
        """How many layers a stack has in each model of the recipe; 0 for those that are none of the sources."""
        sizes = [0] * len(self._recipe.models)
        for at, source in sources.items():
            stacks = self._layers_of(source, section).stacks
            sizes[at] = next((one.layers for one in stacks if one.prefix == stack.prefix), 0)
        return tuple(sizes)

    def _slice(
        self, section: Section, group: MergeGroup, resolver: Resolver, stack: Stack, position: LayerPosition
    ) -> None:
        """position: of the slice's first layer in the output"""
        blocks: list[dict[int, list[str]]] = []
        for source in group.sources:
            with self._collector:
                blocks.append(self._blocks(source, section, stack))
        if len(blocks) < len(group.sources):
            return
        lead, (start, total) = group.sources[0], position
        if start + lead.length > MAX_LAYERS:
            raise self._error(f"the slices have more than {MAX_LAYERS:,} layers up to here. Use fewer", group.path)
        for offset in range(lead.length):
            numbers = [source.layers[0] + offset for source in group.sources if source.layers]
            rests = [b[number] for b, number in zip(blocks, numbers, strict=True)]
            self._layer(group, resolver, stack, numbers, rests, LayerPosition(offset, lead.length),
                        LayerPosition(start + offset, total))  # fmt: skip

    def _layer(
        self, group: MergeGroup, resolver: Resolver, stack: Stack, numbers: Sequence[int],
        rests: Sequence[Sequence[str]], position: LayerPosition, out: LayerPosition,
    ) -> None:  # fmt: skip
        """One layer of a slice. What not all sources have is copied from the layer of the first, or left out.

        numbers  of the layer in each source
        rests    of each source, the names of the layer's tensors behind its number
        """
        lead, sources = group.sources[0], [source.model for source in group.sources]
        if self._recipe.missing == "error":
            for i, source in enumerate(group.sources[1:], 1):
                layers = f"layer {numbers[0]}", f"layer {numbers[i]}"
                self._check_same(lead, rests[0], source, rests[i], layers)
        home = self._home(group)
        for rest in dict.fromkeys((*rests[0], *rests[home])):
            inputs = tuple(f"{stack.prefix}.{number}.{rest}" for number in numbers)
            name = f"{stack.prefix}.{out.layer}.{rest}"
            if all(rest in names for names in rests) and self._fit(list(zip(sources, inputs, strict=True))):
                self._merging = True
                self._add(group, resolver, name, inputs, position, out)
                continue
            self.left[name] = self._lacking(group.sources, [rest in names for names in rests])
            if self._recipe.missing == "base" and rest in rests[home]:
                self._copy(sources[home], inputs[home], name)
        for rest in dict.fromkeys(rest for names in rests for rest in names if rest not in rests[0]):
            lacking = self._lacking(group.sources, [rest in names for names in rests])
            self.left[f"{stack.prefix}.{out.layer}.{rest}"] = lacking

    def _home(self, group: MergeGroup) -> int:
        """Which source of a group has the tensors that `missing: base` copies: the base, else the first."""
        base = self._recipe.base_index
        return next((k for k, source in enumerate(group.sources) if source.model == base), 0)

    def _main_stack(self, section: Section) -> Stack:
        """The stack that a section's slices cut, in the lead model of the first."""
        lead = section.groups[0].sources[0]
        layers = self._layers_of(lead, section)
        if layers.main is None:
            stacks = [f"{s.prefix} ({s.layers})" for s in layers.candidates]
            has = f"several stacks of layers: {', '.join(stacks)}. Name them under `modules`" if stacks else "no layers"
            raise self._error(f"slices need one stack of layers, but {lead.ref} has {has}", f"{section.path}.slices")
        return layers.main

    def _blocks(self, source: MergeSource, section: Section, stack: Stack) -> dict[int, list[str]]:
        """Layer -> the names of its tensors, behind the number of the layer.

        Raises: RecipeError, if the source does not have the layers that the recipe names.
        """
        layers = self._layers_of(source, section)
        of_source = next((s for s in layers.stacks if s.prefix == stack.prefix), None)
        if of_source is None:
            raise self._error(f"{source.ref} has no layers {stack.prefix}.0, {stack.prefix}.1, ...", source.path)
        assert source.layers is not None
        if source.length and source.layers[1] > of_source.layers:
            raise self._error(
                f"`layer_range` {shown(list(source.layers))} goes beyond the {of_source.layers} layers of {source.ref}",
                f"{source.path}.layer_range",
            )
        blocks: dict[int, list[str]] = {}
        for name in self._tensors(source, section):
            member = layers.member(name)
            if member is not None and member.stack is of_source:
                blocks.setdefault(member.layer, []).append(member.rest)
        return blocks

    def _outside(self, section: Section, group: MergeGroup, resolver: Resolver, stack: Stack, *, after: bool) -> None:
        """The tensors before or after the main stack."""
        outside = [
            [name for name in self._tensors(source, section) if self._is_outside(source, section, name, stack, after)]
            for source in group.sources
        ]
        if self._recipe.missing == "error":
            for source, names in zip(group.sources[1:], outside[1:], strict=True):
                self._check_same(group.sources[0], outside[0], source, names)
        layers, shared = self._layers_of(group.sources[0], section), self._shared(group.sources, outside)
        home = self._home(group)
        for name in dict.fromkeys((*outside[0], *outside[home])):
            if name in shared:
                position = layers.position(name)
                self._add(group, resolver, name, (name,) * len(group.sources), position, position)
            elif self._recipe.missing == "base" and name in outside[home]:
                self._copy(group.sources[home].model, name, name)

    def _is_outside(self, source: MergeSource, section: Section, name: str, stack: Stack, after: bool) -> bool:
        layers = self._layers_of(source, section)
        member = layers.member(name)
        return (member is None or member.stack.prefix != stack.prefix) and layers.is_after(name) == after

    # modules

    def _outside_modules(self) -> None:
        """Tensors that no module names, copied from base_model."""
        recipe = self._recipe
        taken: set[str] = set()
        for target in self.targets:
            if target.name in taken:
                raise self._error(f"two modules take the tensor {target.name}", "$.modules")
            taken.add(target.name)
        sources = {source.model for group in recipe.groups for source in group.sources}
        if recipe.base_model is not None:
            at = recipe.models.index(recipe.base_model)
            rest = self._in_no_module(at)
            for name in rest:
                self._copy(at, name, name)
            return
        for at in sorted(sources):
            if rest := self._in_no_module(at):
                raise self._error(
                    f"no module takes {grouped(rest)} of {recipe.models[at]}. Name a module for them, or write "
                    "`base_model`, from which they are copied then",
                    "$.modules",
                )

    def _in_no_module(self, at: int) -> list[str]:
        inside: set[str] = set()
        for section in self._recipe.sections:
            inside.update(module_tensors(section.name or "", self._names[at]))
        return [name for name in self._names[at] if name not in inside]

    # all of them

    def _add(
        self,
        group: MergeGroup,
        resolver: Resolver,
        name: str,
        inputs: tuple[str, ...],
        position: LayerPosition | None,
        layer: LayerPosition | None,
    ) -> None:
        """Add one tensor.

        position  where gradients are read
        layer     of the output
        """
        parameters = {} if group.copies else resolver.parameters(name, inputs, position)
        models = tuple((source.model, tensor) for source, tensor in zip(group.sources, inputs, strict=True))
        index, layers = layer or (None, 0)
        self.targets.append(Target(name, models, parameters, index, layers, group.copies, group.has_base))

    def _resolver(self, group: MergeGroup) -> Resolver:
        self.resolvers.append(Resolver(self._recipe.document, self._recipe.method, group))
        return self.resolvers[-1]

    def _tensors(self, source: MergeSource, section: Section) -> Collection[str]:
        return _in(section, self._names[source.model])

    def _layers_of(self, source: MergeSource, section: Section) -> Layers:
        key = source.model, section.name
        if key not in self._layers:
            self._layers[key] = Layers(self._tensors(source, section))
        return self._layers[key]

    def _error(self, message: str, path: str) -> RecipeError:
        return self._recipe.document.error(message, path)

    def _check_same(
        self, lead: MergeSource, tensors: Collection[str], other: MergeSource, others_tensors: Collection[str],
        layers: tuple[str, str] = ("", ""),
    ) -> None:  # fmt: skip
        """Raises: ShapeError, if two models, or layers of theirs, do not have the same tensors.

        layers  those of the lead and of the other, for the message
        """
        ours, theirs = dict.fromkeys(tensors), dict.fromkeys(others_tensors)
        if ours.keys() == theirs.keys():
            return
        both = lead.model, other.model
        notes, layouts = ([of[i] for i in both if i in of] for of in (self._notes, self._layouts))
        sizes = [] if layers[0] else [self._sizes_of[i] for i in both if i in self._sizes_of]
        raise ShapeError(
            different_tensors(
                (str(lead.ref), layers[0], ours),
                (str(other.ref), layers[1], theirs),
                str(self._recipe.models[self._recipe.base_index]),
                notes,
                layouts,
                next(iter(sizes), ""),
            )
        )


def _in(section: Section, names: Collection[str]) -> Collection[str]:
    return names if section.name is None else module_tensors(section.name, names)
