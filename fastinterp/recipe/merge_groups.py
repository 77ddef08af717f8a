"""The parts of a recipe, as plain values: sections (modules) of merge groups (slices) of sources (models).

Structs, not dataclasses: those take longer to make than a small recipe takes to read.
"""

from __future__ import annotations

import msgspec

from fastinterp.methods import Method, Sidecar
from fastinterp.recipe.references import ModelRef
from fastinterp.recipe.values import Value

Level = dict[str, Value]  # parameter -> its value, of the `parameters` at one place of a recipe


class MergeSource(msgspec.Struct, frozen=True):
    """One model of a merge group.

    model       index into Recipe.models
    ref         the same model, as it is named here
    layers      first and end of its layers in a slice; None: the whole model
    parameters  its own
    path        where it stands in the recipe
    """

    model: int
    ref: ModelRef
    layers: tuple[int, int] | None = None
    parameters: Level = msgspec.field(default_factory=dict)
    path: str = "$"

    @property
    def length(self) -> int:
        return self.layers[1] - self.layers[0] if self.layers else 0


class MergeGroup(msgspec.Struct, frozen=True):
    """Models that are merged with each other: whole, or as many layers of each.

    sources   in the order of the method: its base first, if it has one
    has_base  whether it has
    levels    parameters of the slice, the module and the recipe: the nearest first
    copies    there is one source, and the method takes more: it is copied
    path      where it stands in the recipe
    """

    sources: tuple[MergeSource, ...]
    has_base: bool
    levels: tuple[Level, ...]
    copies: bool
    path: str

    def levels_of(self, i: int | None) -> tuple[Level, ...]:
        """The levels that may set a parameter of source i, the nearest first; None: one for the whole merge."""
        return self.levels if i is None else (self.sources[i].parameters, *self.levels)

    @property
    def all_levels(self) -> tuple[Level, ...]:
        """Those of the sources, then those that all have in common."""
        return (*(source.parameters for source in self.sources), *self.levels)

    @property
    def is_constant(self) -> bool:
        """Whether all its parameters are the same for all tensors."""
        return all(value.is_constant for level in self.all_levels for value in level.values())


class Section(msgspec.Struct, frozen=True):
    """A model as a whole, or a module of it: the tensors whose names start with `name`.

    name     None: the whole model
    groups   slices, one upon the other; or one group of whole models
    stacked  they are slices
    path     where it stands in the recipe
    """

    name: str | None
    groups: tuple[MergeGroup, ...]
    stacked: bool
    path: str


def sidecar_paths(method: Method, sections: tuple[Section, ...]) -> dict[ModelRef, str]:
    """The further checkpoints that parameters name, and where in the recipe each is first named."""
    paths: dict[ModelRef, str] = {}
    names = [p.name for p in method.parameters if p.kind is Sidecar]
    for group in (group for section in sections for group in section.groups) if names else ():
        for level in group.all_levels:
            for value in (level[name] for name in names if name in level):
                for (_, sidecar), path in zip(value.cases, value.paths, strict=True):
                    if sidecar is not None:
                        paths.setdefault(ModelRef.of(sidecar), path)
    return paths
