"""The tensors of a model as a grid: layers by kinds of tensors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fastinterp.inspect.describe import natural

NO_LAYER = ""


@dataclass(frozen=True)
class Grid:
    """Tensors by layer and kind.

    layers  numbers as in the names, in ascending order; NO_LAYER first, if there are tensors outside of all layers
    kinds   the names without the layer, in the order in which a layer has them; further numbers (experts) are `*`
    cells   names of the tensors by (kind, layer)
    """

    layers: list[str]
    kinds: list[str]
    cells: dict[tuple[str, str], list[str]]


def grid(names: Iterable[str]) -> Grid:
    """The grid of tensor names. The first number in a name, between dots, is its layer."""
    ordered = sorted(names, key=natural)
    stacks = {name: _split(name) for name in ordered}
    several = len({stack for stack, layer, _ in stacks.values() if layer}) > 1  # encoder and decoder, say
    cells: dict[tuple[str, str], list[str]] = {}
    for name, (stack, layer, rest) in stacks.items():
        kind = f"{stack}.*.{rest}" if several and layer else rest
        cells.setdefault((kind, layer), []).append(name)
    layers = sorted({layer for _, layer in cells}, key=natural)
    if NO_LAYER in layers:
        layers = [NO_LAYER, *(x for x in layers if x)]
    # Those of the layers first, those outside of them last.
    kinds = list(dict.fromkeys(kind for kind, layer in sorted(cells, key=lambda cell: not cell[1])))
    return Grid(layers, kinds, cells)


def _split(name: str) -> tuple[str, str, str]:
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    if at is None or at == len(parts) - 1:
        return "", NO_LAYER, name
    rest = ["*" if part.isdecimal() else part for part in parts[at + 1 :]]
    return ".".join(parts[:at]), parts[at].lstrip("0") or "0", ".".join(rest)
