"""`diff`: the differences of two checkpoints as text and as plain values."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from fastinterp.inspect.compare import Comparison, Difference
from fastinterp.inspect.describe import natural
from fastinterp.messages import WIDTH, counted, fit, listed, table

_MOST = 10  # tensors in the table that has those that differ most
_LISTED = 3  # names in a note
_APART, _ENOUGH = 0.1, 1000  # the cosine below which matrices have nothing in common, of how many elements at least


def as_dict(comparison: Comparison) -> dict[str, Any]:
    """Plain values, as `diff --json` prints them."""
    return {
        "total": _values_of(comparison, comparison.tensors),
        "layers": {layer: _values_of(comparison, names) for layer, names in _layers(comparison.tensors).items()},
        "tensors": {name: _values(d) for name, d in comparison.tensors.items()},
        "only_a": comparison.only_a,
        "only_b": comparison.only_b,
        "shapes": comparison.shapes,
        "unmeasured": comparison.unmeasured,
        "kinds": comparison.kinds,
        "quantised": comparison.quantised,
        "remarks": list(comparison.remarks),
    }


def _values(d: Difference) -> dict[str, Any]:
    named = ("numel", "changed", "norm_a", "norm_delta", "dot_a_delta", "relative", "cosine", "changed_fraction")
    return {name: getattr(d, name) for name in named}


def _values_of(comparison: Comparison, names: Iterable[str]) -> dict[str, Any]:
    """Some tensors together: how many elements differ; and the rest, of matrices and vectors apart."""
    every = {name: comparison.tensors[name] for name in names}
    matrices = [d for name, d in every.items() if name not in comparison.vectors]
    vectors = [d for name, d in every.items() if name in comparison.vectors]
    total = Difference.total(every.values())
    return {
        "numel": total.numel,
        "changed": total.changed,
        "changed_fraction": total.changed_fraction,
        "matrices": _values(Difference.total(matrices)) if matrices else None,
        "vectors": _values(Difference.total(vectors)) if vectors else None,
    }


def _layers(names: Iterable[str]) -> dict[str, list[str]]:
    """The tensors of each layer (a name up to its first number), and each that is in no layer, in natural order."""
    groups: dict[str, list[str]] = {}
    for name in sorted(names, key=natural):
        parts = name.split(".")
        at = next((i for i, part in enumerate(parts) if part.isdecimal()), len(parts))
        groups.setdefault(".".join(parts[: at + 1]), []).append(name)
    return groups


def _kinds(names: Iterable[str]) -> dict[str, list[str]]:
    """Tensors whose names differ in numbers alone, as `model.layers.*.input_layernorm.weight`, in natural order."""
    groups: dict[str, list[str]] = {}
    for name in sorted(names, key=natural):
        groups.setdefault(".".join("*" if part.isdecimal() else part for part in name.split(".")), []).append(name)
    return {names[0] if len(names) == 1 else kind: names for kind, names in groups.items()}


def as_text(comparison: Comparison, *, every: bool = False, whole: bool = False) -> str:
    """Tables of layers and tensors.

    every  all tensors, not only those that differ most
    whole  names are not cut to fit into a line
    """
    head = ["|d|/|a|", "cosine", "changed", "elements"]
    notes = _notes(comparison)
    lines = [*notes]
    matrices = [name for name in comparison.tensors if name not in comparison.vectors]
    parts = (("layer", "matrix", matrices, _layers), ("kind", "vector", comparison.vectors, _kinds))
    for group, noun, some, grouped in parts:
        if not some:
            continue
        title = f"{group}, {'matrices' if noun == 'matrix' else 'vectors'}"
        rows = [_row(title_of, _total(comparison, names)) for title_of, names in grouped(some).items()]
        count = f"{len(some):,} {noun}" if len(some) == 1 else f"{len(some):,} {title.partition(', ')[2]}"
        rows.append(_row(f"all {count}", _total(comparison, some)))
        lines += [*([""] if lines else []), *_table([[title, *head], *rows], whole)]
    names = sorted(comparison.tensors, key=natural)
    if not every:
        differing = [n for n in names if comparison.tensors[n].changed]
        names = sorted(differing, key=lambda n: _rank(comparison.tensors[n]))[:_MOST]
    title = "tensor" if len(names) == len(comparison.tensors) else f"tensor, the {len(names)} that differ most"
    if names:
        lines += ["", *_table([[title, *head], *(_row(n, comparison.tensors[n]) for n in names)], whole)]
    return "\n".join(lines)


def _total(comparison: Comparison, names: Iterable[str]) -> Difference:
    return Difference.total(comparison.tensors[name] for name in names)


def _rank(d: Difference) -> float:
    """Sort key: NaN first, then the largest relative difference, that from zeros being infinite."""
    return -math.inf if not d.finite else -(math.inf if d.relative is None else d.relative)


def _notes(comparison: Comparison) -> list[str]:
    """Lines about what the tables do not show."""
    notes = list(comparison.remarks)
    for what, some in (("only in A", comparison.only_a), ("only in B", comparison.only_b)):
        if some:
            notes.append(f"{counted(len(some), 'tensor')} {what}: {_names(some)}")
    kinds = {n: f"{fit(n, WIDTH - 10)} ({a} in A, {b} in B)" for n, (a, b) in comparison.kinds.items()}
    dtypes = [kinds[n] for n in kinds if n not in comparison.shapes]
    if comparison.shapes:
        shapes = [kinds[n] for n in comparison.shapes]
        notes.append(f"{counted(len(shapes), 'tensor')} of different shapes: {listed(shapes, _LISTED)}")
    if dtypes:
        notes.append(f"{counted(len(dtypes), 'tensor')} of different dtypes: {listed(dtypes, _LISTED)}")
    if comparison.quantised:
        many, formats = (
            counted(len(comparison.quantised), "tensor"),
            ", ".join(sorted({*comparison.quantised.values()})),
        )
        notes.append(f"{many} with codes or scales of quantised weights ({formats}), which are no numbers to measure")
    if others := [n for n in comparison.unmeasured if n not in comparison.quantised]:
        notes.append(
            f"{counted(len(others), 'tensor')} of a dtype that is not merged, and not measured: {_names(others)}"
        )
    in_a = [n for n, d in comparison.tensors.items() if not math.isfinite(d.norm_a)]
    in_b = [n for n, d in comparison.tensors.items() if math.isfinite(d.norm_a) and not d.finite]
    for which, some in (("A", in_a), ("B", in_b)):
        if some:
            notes.append(
                f"{which} contains NaN, Inf or numbers whose squares exceed float64, first in {_names(some[:1])}"
            )
    if comparison.tensors and not comparison.total.changed:
        partly = len(notes) > len(comparison.remarks)
        notes.append("all elements of A and B are equal" + (" in the tensors that were measured" if partly else ""))
    matrices = comparison.total_of_matrices
    if matrices.numel >= _ENOUGH and matrices.finite and matrices.cosine is not None and abs(matrices.cosine) < _APART:
        notes.append(
            f"the matrices of A and B are nearly orthogonal (cosine {matrices.cosine:.3f}), as those of models that "
            "were trained independently: such models do not interpolate"
        )
    return notes


def _table(rows: list[list[str]], whole: bool) -> list[str]:
    return table(rows, "<>>>>", indent=0, whole=whole)


def _names(names: Iterable[str]) -> str:
    return listed((fit(name, WIDTH - 10) for name in names), _LISTED)


def _row(name: str, d: Difference) -> list[str]:
    return [
        name,
        "-" if d.relative is None else f"{d.relative:.3e}",
        "-" if d.cosine is None else f"{d.cosine:.6f}",
        "-" if d.changed_fraction is None else f"{d.changed_fraction:.2%}",
        f"{d.numel:,}",
    ]
