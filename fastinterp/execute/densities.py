"""Densities: the number of elements that a method's thresholds keep, beside the number intended. Ties are all kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastinterp.ops.requests import MaskedCombine, Select, Selected, Sum

_NOTICED = 0.01  # a density that differs by more than this from the intended one is noted


@dataclass(frozen=True, slots=True)
class Density:
    """The density of one model in one tensor, or in several together.

    asked  number of elements that the method intended to keep
    kept   number of elements that it keeps. Where the largest are dropped, ties with their threshold are not counted
    numel  number of all elements; 0: those of all merged tensors, where the density is that of the whole model
    """

    asked: int
    kept: int
    numel: int

    def as_dict(self, whole: int) -> dict[str, float]:
        """Fractions. whole: number of elements of all merged tensors."""
        of = self.numel or whole
        return {"asked": self.asked / of, "kept": self.kept / of}


Answers = Sequence[tuple[Select, Sequence[Selected]]]


def densities(requested: Sum, answers: Answers, numel: int) -> dict[int, Density]:
    """The density of every input whose mask has a threshold above 0. answers: those to the method's requests."""
    by_input: dict[int, Density] = {}
    if not isinstance(requested, MaskedCombine):
        return by_input
    for request, selected in answers:
        if request.score is not None or request.nonzero:
            continue
        for i, mask in enumerate(requested.masks or ()):
            ranks = [(int(k), s) for (at, k), s in zip(request.ranks, selected, strict=True) if at == i]
            low = max(((k, s.kept) for k, s in ranks if s.min_bits == mask.min_bits > 0), default=None)
            above = min((k - 1 for k, s in ranks if s.min_bits == mask.max_bits), default=0)
            if low is not None:
                by_input[i] = Density(low[0] - above, low[1] - above, 0 if request.whole else numel)
    return by_input


def together(densities: Iterable[Density]) -> Density:
    """The density of one model in several tensors together."""
    every = list(densities)
    if not every[0].numel:  # each is that of the whole model
        return every[0]
    return Density(*(sum(getattr(d, name) for d in every) for name in Density.__slots__))


def as_dict(models: Mapping[str, Mapping[str, Density]], whole: int) -> dict[str, Any]:
    """Plain values for each model, and for each of its tensors."""
    return {
        name: {
            **together(tensors.values()).as_dict(whole),
            "tensors": {tensor: density.as_dict(whole) for tensor, density in tensors.items()},
        }
        for name, tensors in models.items()
    }


def note(models: Mapping[str, Mapping[str, Density]], whole: int) -> str | None:
    """A line about the model whose density differs most from the intended one, if any differs by more than _NOTICED."""
    shares = {name: together(tensors.values()).as_dict(whole) for name, tensors in models.items()}
    differences = {name: abs(s["kept"] - s["asked"]) for name, s in shares.items()}
    noticed = [name for name, by in differences.items() if by > _NOTICED]
    if not noticed:
        return None
    name = max(noticed, key=differences.__getitem__)
    others = "" if len(noticed) == 1 else f" and {len(noticed) - 1} more"
    asked, kept = shares[name]["asked"], shares[name]["kept"]
    return f"density {kept:.2f} instead of {asked:.2f} for {name}{others}: equal magnitudes are all kept"
