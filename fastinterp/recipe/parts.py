"""What a recipe puts together, as plain values: sections (modules) of parts (slices) of sources (models).

Structs, not dataclasses: those take longer to make than a small recipe takes to read.
"""

from __future__ import annotations

import msgspec

from fastinterp.methods import Method, Sidecar
from fastinterp.recipe.references import ModelRef
from fastinterp.recipe.values import Value

Level = dict[str, Value]  # the parameters that stand at one place of a recipe


class Source(msgspec.Struct, frozen=True):
    """One model in a part.

    model    index into Recipe.models
    ref      the same model, as it is named there
    layers   first and end of its layers in a slice; None: the whole model
    own      its own parameters
    path     where it stands
    """

    model: int
    ref: ModelRef
    layers: tuple[int, int] | None = None
    own: Level = msgspec.field(default_factory=dict)
    path: str = "$"

    @property
    def length(self) -> int:
        return self.layers[1] - self.layers[0] if self.layers else 0


class Part(msgspec.Struct, frozen=True):
    """What is merged with each other: whole models, or as many layers of each.

    sources   in the order of the method: its base first, if it has one
    has_base  whether it has
    levels    parameters of the slice, the module and the recipe: the nearest first
    copies    there is one source, and the method takes more: it is copied
    """

    sources: tuple[Source, ...]
    has_base: bool
    levels: tuple[Level, ...]
    copies: bool
    path: str

    def levels_of(self, i: int | None) -> tuple[Level, ...]:
        """Where a parameter of source i is looked for, the nearest first; None: one for the whole merge."""
        return self.levels if i is None else (self.sources[i].own, *self.levels)

    @property
    def is_constant(self) -> bool:
        """Whether all its parameters are the same for all tensors."""
        every = (*self.levels, *(source.own for source in self.sources))
        return all(value.is_constant for level in every for value in level.values())


class Section(msgspec.Struct, frozen=True):
    """A model as a whole, or a module of it: the tensors whose names start with `name`.

    name     None: the whole model
    parts    slices, one upon the other; or one part of whole models
    stacked  they are slices
    """

    name: str | None
    parts: tuple[Part, ...]
    stacked: bool
    path: str


def sidecar_places(method: Method, sections: tuple[Section, ...]) -> dict[ModelRef, str]:
    """The further checkpoints that parameters name, and where each is first named."""
    found: dict[ModelRef, str] = {}
    names = [p.name for p in method.parameters if p.kind is Sidecar]
    for part in (part for section in sections for part in section.parts) if names else ():
        for level in (*(source.own for source in part.sources), *part.levels):
            for value in (level[name] for name in names if name in level):
                for (_, case), path in zip(value.cases, value.paths, strict=True):
                    if case is not None:
                        found.setdefault(ModelRef.of(case), path)
    return found
