"""Which tensors a recipe makes, of which inputs each, and with which parameters: from names alone.

Whole models: every tensor of the lead model, the base, else the first. A gradient runs over the layers of the stack
that a tensor is in (layers.py): over those of the vision tower in the vision tower.

Slices: the main stack is cut and stacked anew. Tensors before it (embeddings, and everything in other stacks) come from
the sources of the first slice, with its parameters; those after it (final norm, head) from those of the last.

Modules: one after the other, each as if it were a model. What is in none comes from base_model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import msgspec

from fastinterp.errors import RecipeError, ShapeError
from fastinterp.methods import shown
from fastinterp.recipe.faults import Faults
from fastinterp.recipe.layers import Layers, Stack
from fastinterp.recipe.load import Recipe
from fastinterp.recipe.modules import members
from fastinterp.recipe.parameters import Resolver
from fastinterp.recipe.parts import Part, Section, Source

MAX_LAYERS = 100_000  # of a stack that slices make: far above any model, and all of it is held
_SHOWN = 5  # names that a message lists before it only counts them


class Target(msgspec.Struct, frozen=True):
    """One output tensor.

    inputs         (index in Recipe.models, name of the tensor there), in the order in which the method sees them
    parameters     keyword -> what the method is given: one value, or a tuple with one per input other than the base.
                   Tensors with equal parameters have the same object here
    layer, layers  index of its layer and their number, in the output; None and 0 if it is in no layer
    copies         the method is not asked: the one input is copied
    has_base       the first input is the method's base
    """

    name: str
    inputs: tuple[tuple[int, str], ...]
    parameters: Mapping[str, Any]
    layer: int | None = None
    layers: int = 0
    copies: bool = False
    has_base: bool = False


class LayerCount(msgspec.Struct, frozen=True):
    """A stack that the output has with other layers than its inputs.

    prefix  of the names of its tensors
    before  how many layers it has in the model whose layers come first
    layers  for every layer of the output, which one of that slice's first source it is
    """

    prefix: str
    before: int
    layers: tuple[int, ...]


def targets(recipe: Recipe, names: Sequence[Collection[str]]) -> list[Target]:
    """The output's tensors, in the order of the lead model.

    names  of each of Recipe.models, those of its tensors
    Raises: ShapeError, if models that are merged have different tensors; RecipeError, if a slice or module asks for
    what is not there, two modules take one tensor, or a required parameter has no value for a tensor.
    """
    return Assembly(recipe, names).targets


class Assembly:
    """What `targets` returns, and what became known on the way.

    targets    the output's tensors; not all, if faults were gathered
    counts     stacks of which the output has other layers than its inputs
    resolvers  with the values that were used, in the order of the parts
    """

    def __init__(self, recipe: Recipe, names: Sequence[Collection[str]], faults: Faults | None = None):
        self._recipe, self._names, self._faults = recipe, names, faults or Faults()
        self._layers: dict[tuple[int, str | None], Layers] = {}
        self.targets: list[Target] = []
        self.counts: list[LayerCount] = []
        self.resolvers: list[Resolver] = []
        for section in recipe.sections:
            with self._faults:
                before = len(self.targets), len(self._faults.found)
                if section.stacked:
                    self._stack(section)
                else:
                    self._whole(section)
                if (len(self.targets), len(self._faults.found)) == before:
                    raise self._error(self._nothing(section), section.path)
        if recipe.sections[0].name is not None:
            with self._faults:
                self._rest()

    # whole models

    def _whole(self, section: Section) -> None:
        part = section.parts[0]
        lead = part.sources[0]
        layers = self._layers_of(lead, section)
        ours = self._of(lead, section)
        before = len(self._faults.found)
        for source in part.sources[1:]:
            with self._faults:
                self._check_same(lead, ours, source, self._of(source, section))
        if len(self._faults.found) > before:
            return
        resolver = self._resolver(part)
        for name in ours:
            found = layers.place(name)
            place = None if found is None else (found[1], found[0].layers)
            self._add(part, resolver, name, (name,) * len(part.sources), place, place)

    # slices

    def _stack(self, section: Section) -> None:
        parts = section.parts
        stack = self._main(section)
        total = sum(part.sources[0].length for part in parts)
        before = len(self._faults.found)
        resolvers = [self._resolver(part) for part in parts]
        with self._faults:
            self._outside(section, parts[0], resolvers[0], stack, after=False)
        start = 0
        for part, resolver in zip(parts, resolvers, strict=True):
            with self._faults:
                self._slice(section, part, resolver, stack, (start, total))
            start += part.sources[0].length
        with self._faults:
            self._outside(section, parts[-1], resolvers[-1], stack, after=True)
        if len(self._faults.found) > before:  # a range may go beyond all that exists
            return
        picked = [part.sources[0].layers for part in parts]
        numbers = [n for span in picked if span for n in range(*span)]
        if numbers != list(range(stack.layers)):
            self.counts.append(LayerCount(stack.prefix, stack.layers, tuple(numbers)))

    def _slice(self, section: Section, part: Part, resolver: Resolver, stack: Stack, place: tuple[int, int]) -> None:
        """place: index of the slice's first layer in the output, and how many it has"""
        blocks: list[dict[int, list[str]]] = []
        for source in part.sources:
            with self._faults:
                blocks.append(self._blocks(source, section, stack))
        if len(blocks) < len(part.sources):
            return
        lead, (start, total) = part.sources[0], place
        if start + lead.length > MAX_LAYERS:
            raise self._error(f"the slices have more than {MAX_LAYERS:,} layers up to here. Use fewer", part.path)
        for offset in range(lead.length):
            numbers = [source.layers[0] + offset for source in part.sources if source.layers]
            rests = [b[number] for b, number in zip(blocks, numbers, strict=True)]
            for i, source in enumerate(part.sources[1:], 1):
                where = f"layer {numbers[0]}", f"layer {numbers[i]}"
                self._check_same(lead, rests[0], source, rests[i], where)
            out = start + offset
            for rest in rests[0]:
                inputs = tuple(f"{stack.prefix}.{number}.{rest}" for number in numbers)
                name = f"{stack.prefix}.{out}.{rest}"
                self._add(part, resolver, name, inputs, (offset, lead.length), (out, total))

    def _main(self, section: Section) -> Stack:
        """The stack that a section's slices cut, in the lead model of the first."""
        lead = section.parts[0].sources[0]
        layers = self._layers_of(lead, section)
        if layers.main is None:
            found = [f"{s.prefix} ({s.layers})" for s in layers.candidates]
            what = f"several stacks of layers: {', '.join(found)}. Name them under `modules`" if found else "no layers"
            raise self._error(f"slices need one stack of layers, but {lead.ref} has {what}", f"{section.path}.slices")
        return layers.main

    def _blocks(self, source: Source, section: Section, stack: Stack) -> dict[int, list[str]]:
        """Layer -> what stands behind its number in the names of its tensors.

        Raises: RecipeError, if the source does not have the layers that it is asked for.
        """
        layers = self._layers_of(source, section)
        own = next((s for s in layers.stacks if s.prefix == stack.prefix), None)
        if own is None:
            raise self._error(f"{source.ref} has no layers {stack.prefix}.0, {stack.prefix}.1, ...", source.path)
        assert source.layers is not None
        if source.layers[1] > own.layers:
            raise self._error(
                f"`layer_range` {shown(list(source.layers))} goes beyond the {own.layers} layers of {source.ref}",
                f"{source.path}.layer_range",
            )
        found: dict[int, list[str]] = {}
        for name in self._of(source, section):
            place = layers.place(name)
            if place is not None and place[0] is own:
                found.setdefault(place[1], []).append(place[2])
        return found

    def _outside(self, section: Section, part: Part, resolver: Resolver, stack: Stack, *, after: bool) -> None:
        """The tensors before or after the main stack."""
        kept = [
            [name for name in self._of(source, section) if self._is_outside(source, section, name, stack, after)]
            for source in part.sources
        ]
        for source, theirs in zip(part.sources[1:], kept[1:], strict=True):
            self._check_same(part.sources[0], kept[0], source, theirs)
        layers = self._layers_of(part.sources[0], section)
        for name in kept[0]:
            found = layers.place(name)
            place = None if found is None else (found[1], found[0].layers)
            self._add(part, resolver, name, (name,) * len(part.sources), place, place)

    def _is_outside(self, source: Source, section: Section, name: str, stack: Stack, after: bool) -> bool:
        layers = self._layers_of(source, section)
        place = layers.place(name)
        return (place is None or place[0].prefix != stack.prefix) and layers.is_after(name) == after

    # modules

    def _rest(self) -> None:
        """What no module names, from base_model."""
        recipe = self._recipe
        taken: set[str] = set()
        for target in self.targets:
            if target.name in taken:
                raise self._error(f"two modules take the tensor {target.name}", "$.modules")
            taken.add(target.name)
        sources = {source.model for part in recipe.parts for source in part.sources}
        if recipe.base_model is not None:
            at = recipe.models.index(recipe.base_model)
            rest = self._outside_modules(at)
            self.targets += [Target(name, ((at, name),), {}, copies=True) for name in rest]
            return
        for at in sorted(sources):
            if rest := self._outside_modules(at):
                raise self._error(
                    f"no module takes {_listed(rest)} of {recipe.models[at]}. Name a module for them, or write "
                    "`base_model`, from which they are copied then",
                    "$.modules",
                )

    def _outside_modules(self, at: int) -> list[str]:
        inside: set[str] = set()
        for section in self._recipe.sections:
            inside.update(members(section.name or "", self._names[at]))
        return [name for name in self._names[at] if name not in inside]

    # all of them

    def _add(
        self,
        part: Part,
        resolver: Resolver,
        name: str,
        inputs: tuple[str, ...],
        place: tuple[int, int] | None,
        layer: tuple[int, int] | None,
    ) -> None:
        """One tensor: `place` is where gradients are read, `layer` which layer of the output it is in."""
        parameters = {} if part.copies else resolver.parameters(name, inputs, place)
        models = tuple((source.model, given) for source, given in zip(part.sources, inputs, strict=True))
        number, of = layer or (None, 0)
        self.targets.append(Target(name, models, parameters, number, of, part.copies, part.has_base))

    def _resolver(self, part: Part) -> Resolver:
        self.resolvers.append(Resolver(self._recipe.document, self._recipe.method, part))
        return self.resolvers[-1]

    def _of(self, source: Source, section: Section) -> Collection[str]:
        names = self._names[source.model]
        return names if section.name is None else members(section.name, names)

    def _layers_of(self, source: Source, section: Section) -> Layers:
        key = source.model, section.name
        if key not in self._layers:
            self._layers[key] = Layers(self._of(source, section))
        return self._layers[key]

    def _nothing(self, section: Section) -> str:
        if section.name is None:
            return "the models have no tensors"
        starts = {name.split(".")[0]: None for name in self._names[section.parts[0].sources[0].model]}
        return f"no tensor's name starts with the module's, `{section.name}`. They start with {_listed(starts)}"

    def _error(self, message: str, path: str) -> RecipeError:
        return self._recipe.document.error(message, path)

    def _check_same(
        self,
        lead: Source,
        ours: Collection[str],
        other: Source,
        theirs: Collection[str],
        where: tuple[str, str] | None = None,
    ) -> None:
        """Raises: ShapeError, if two models, or layers of theirs, do not have the same tensors."""
        known, found = set(ours), set(theirs)
        if known == found:
            return
        at = [f" in {w}" for w in where] if where else ["", ""]
        only = [n for n in ours if n not in found], [n for n in theirs if n not in known]
        sides = (lead.ref, at[0], only[0]), (other.ref, at[1], only[1])
        told = [f"{model} alone has {_listed(names)}{place}" for model, place, names in sides if names]
        raise ShapeError(f"the models have different tensors: {'; '.join(told)}. Only models of one architecture merge")


def _listed(names: Iterable[str]) -> str:
    found = list(names)
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return ", ".join(found[:_SHOWN]) + more
