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

    intended  number of elements that the method intended to keep
    kept      number of elements that it keeps. Where the largest are dropped, ties with their threshold are not counted
    numel     number of all elements; 0: those of all merged tensors, where the density is that of the whole model
    """

    intended: int
    kept: int
    numel: int

    def as_dict(self, whole: int) -> dict[str, float]:
        """The fractions of elements, "asked" and "kept". whole: number of elements of all merged tensors."""
        of = self.numel or whole
        return {"asked": self.intended / of, "kept": self.kept / of}


Answers = Sequence[tuple[Select, Sequence[Selected]]]


def densities(total: Sum, answers: Answers, numel: int) -> dict[int, Density]:
    """The density of every input of a sum whose mask has a threshold that is not 0.

    answers  the Select requests of the method that returned the sum, each with its answer
    """
    by_input: dict[int, Density] = {}
    if not isinstance(total, MaskedCombine):
        return by_input
    for request, selected in answers:
        if request.score is not None or request.nonzero:
            continue
        for i, mask in enumerate(total.masks or ()):
            ranked = [(int(k), s) for (at, k), s in zip(request.ranks, selected, strict=True) if at == i]
            low = max(((k, s.count) for k, s in ranked if s.min_bits == mask.min_bits > 0), default=None)
            above = min((k - 1 for k, s in ranked if s.min_bits == mask.max_bits), default=0)
            if low is not None:
                by_input[i] = Density(low[0] - above, low[1] - above, 0 if request.whole else numel)
    return by_input


def together(densities: Iterable[Density]) -> Density:
    """The density of one model in several tensors, added up."""
    every = list(densities)
    if not every[0].numel:  # each is that of the whole model
        return every[0]
    return Density(*(sum(getattr(d, name) for d in every) for name in Density.__slots__))


def as_dict(models: Mapping[str, Mapping[str, Density]], whole: int) -> dict[str, Any]:
    """The densities of each model and of each of its tensors, as plain values."""
    return {
        name: {
            **together(tensors.values()).as_dict(whole),
            "tensors": {tensor: density.as_dict(whole) for tensor, density in tensors.items()},
        }
        for name, tensors in models.items()
    }


def note(models: Mapping[str, Mapping[str, Density]], whole: int) -> str | None:
    """One line about the model whose density differs most from the intended one; None if none differs noticeably."""
    shares = {name: together(tensors.values()).as_dict(whole) for name, tensors in models.items()}
    errors = {name: abs(s["kept"] - s["asked"]) for name, s in shares.items()}
    noticed = [name for name, error in errors.items() if error > _NOTICED]
    if not noticed:
        return None
    name = max(noticed, key=errors.__getitem__)
    others = "" if len(noticed) == 1 else f" and {len(noticed) - 1} more"
    intended, kept = shares[name]["asked"], shares[name]["kept"]
    return f"density {kept:.2f} instead of {intended:.2f} for {name}{others}: equal magnitudes are all kept"
