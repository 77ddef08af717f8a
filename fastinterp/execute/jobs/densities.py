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


def densities(total: Sum, answers: Answers, numel: int) -> dict[int, Density]:
    """Of every input of a sum whose keep has a threshold that is not 0. answers: what the method was told before."""
    found: dict[int, Density] = {}
    if not isinstance(asked, MaskedCombine):
        return found
    for request, selected in answers:
        if request.score is not None or request.nonzero:
            continue
        for i, keep in enumerate(asked.keeps or ()):
            own = [(int(k), s) for (at, k), s in zip(request.ranks, selected, strict=True) if at == i]
            low = max(((k, s.kept) for k, s in own if s.least == keep.least > 0), default=None)
            above = min((k - 1 for k, s in own if s.least == keep.most), default=0)
            if low is not None:
                found[i] = Density(low[0] - above, low[1] - above, 0 if request.whole else numel)
    return found


def together(found: Iterable[Density]) -> Density:
    """Those of one model in several tensors."""
    every = list(found)
    if not every[0].numel:  # each has the whole model's
        return every[0]
    return Density(*(sum(getattr(d, name) for d in every) for name in Density.__slots__))


def as_dict(models: Mapping[str, Mapping[str, Density]], whole: int) -> dict[str, Any]:
    """Plain values for each model, and for each of its tensors."""
    return {
        name: {
            **together(tensors.values()).as_dict(whole),
            "tensors": {tensor: found.as_dict(whole) for tensor, found in tensors.items()},
        }
        for name, tensors in models.items()
    }


def note(models: Mapping[str, Mapping[str, Density]], whole: int) -> str | None:
    """One line on the model whose density is most off, if it is noticeably."""
    shares = {name: together(tensors.values()).as_dict(whole) for name, tensors in models.items()}
    off = {name: abs(s["kept"] - s["asked"]) for name, s in shares.items()}
    noticed = [name for name, by in off.items() if by > _NOTICED]
    if not noticed:
        return None
    name = max(noticed, key=off.__getitem__)
    others = "" if len(noticed) == 1 else f" and {len(noticed) - 1} more"
    asked, kept = shares[name]["asked"], shares[name]["kept"]
    return f"density {kept:.2f} instead of {asked:.2f} for {name}{others}: equal magnitudes are all kept"
