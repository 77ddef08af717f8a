"""`diff`: the difference of two checkpoints, measured for each tensor in one read of both."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from fastinterp.arguments import Checkpoint
from fastinterp.backends.cpu import PumpOptions, survey
from fastinterp.backends.registry import cpu_isa, cpu_threads
from fastinterp.errors import ShapeError, UsageError
from fastinterp.execute.damaged import refuse_damaged
from fastinterp.execute.sources import Sources
from fastinterp.ops.steps import Answer, Measure
from fastinterp.plan.gguf import refuse_mixed
from fastinterp.plan.models import Model, is_gguf, open_model
from fastinterp.plan.tensor_sets import with_names_of
from fastinterp.progress import Progress, callback_of
from fastinterp.recipe.tensor_groups import nothing_in_common


@dataclass(frozen=True, slots=True)
class Difference:
    """The difference of b from a in one tensor or several: delta = b - a, in float32 (float64 if either is F64).

    changed      elements where delta is not 0; exact
    norm_a       |a|, float64
    norm_delta   |delta|, float64
    dot_a_delta  <a, delta>, float64
    """

    numel: int
    changed: int
    norm_a: float
    norm_delta: float
    dot_a_delta: float

    @property
    def relative(self) -> float | None:
        """|delta| / |a|, or None if a is 0."""
        return self.norm_delta / self.norm_a if self.norm_a > 0 else None

    @property
    def cosine(self) -> float | None:
        """<a, b> / (|a| |b|), or None if either is 0. From delta: precise where models are close."""
        a2, d2 = self.norm_a * self.norm_a, self.norm_delta * self.norm_delta  # not **, which raises on overflow
        b2 = a2 + 2 * self.dot_a_delta + d2
        return (a2 + self.dot_a_delta) / (self.norm_a * math.sqrt(b2)) if a2 > 0 and b2 > 0 else None

    @property
    def finite(self) -> bool:
        """False if there is NaN or Inf in a or b, or the square of a norm is more than float64 holds."""
        return math.isfinite(self.norm_a) and math.isfinite(self.norm_delta)

    @property
    def changed_fraction(self) -> float | None:
        return self.changed / self.numel if self.numel else None

    @staticmethod
    def total(differences: Iterable[Difference]) -> Difference:
        """The difference of all tensors together, as one vector."""
        every = list(differences)
        return Difference(
            sum(d.numel for d in every),
            sum(d.changed for d in every),
            math.hypot(*(d.norm_a for d in every)),
            math.hypot(*(d.norm_delta for d in every)),
            math.fsum(d.dot_a_delta for d in every),
        )


@dataclass(frozen=True)
class Comparison:
    """The differences of two checkpoints.

    tensors     name -> difference of each tensor that both have, of the same shape and of a dtype that is merged. Its
                attributes: numel; changed, elements that differ; norm_a, |a|; norm_delta, |b - a|; relative, |b - a| /
                |a|; cosine of a and b; changed_fraction
    only_a      names of tensors that b lacks
    only_b      names of tensors that a lacks
    shapes      names of tensors whose shapes differ
    unmeasured  names of tensors that both have, of dtypes that are not merged, or quantised
    vectors     names of those tensors that are no matrices: norms, biases, scalars. Their numbers are near 1 or 0 in
                every model, so that a cosine over them and matrices together says little of either
    kinds       dtype and shape in a and in b where these differ: name -> ("BF16 [4, 2]", "F32 [4, 2]")
    quantised   names of tensors that hold codes or scales of quantised weights in a or in b, and the format
    remarks     how names of b were made to follow those of a, for people
    """

    tensors: dict[str, Difference]
    only_a: list[str]
    only_b: list[str]
    shapes: list[str]
    unmeasured: list[str]
    kinds: dict[str, tuple[str, str]]
    quantised: dict[str, str] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()
    vectors: frozenset[str] = frozenset()

    def __repr__(self) -> str:
        """Short: there is an entry for every tensor."""
        total = self.total
        return f"<Comparison of {len(self.tensors):,} tensors: {total.changed:,} of {total.numel:,} elements differ>"

    @property
    def total(self) -> Difference:
        """Of all tensors as one vector: its counts mean something, its norms and cosine mix matrices and vectors."""
        return Difference.total(self.tensors.values())

    @property
    def total_of_matrices(self) -> Difference:
        """Of all matrices as one vector: what tells independent models from related ones, by its cosine."""
        return Difference.total(d for name, d in self.tensors.items() if name not in self.vectors)


def compare(
    a: Checkpoint,
    b: Checkpoint,
    *,
    threads: int | None = None,
    progress: Progress | bool | None = None,
) -> Comparison:
    """Measure b - a for every tensor of two checkpoints, reading every byte once.

    a, b      the checkpoints, in any form that is read
    threads   None: one per CPU, at most 32. The result does not depend on it
    progress  as of `merge`

    Names of b follow those of a, where a prefix, a wrapper or an older spelling explains all the difference.
    Raises: CheckpointError (ShapeError, if no name is in both), StorageError, BackendError, UsageError.
    """
    for path in (a, b):
        if not isinstance(path, (str, os.PathLike)):
            raise UsageError(f"a checkpoint must be a path, got {path!r}")
    first, second = open_model(os.fspath(a)), open_model(os.fspath(b))
    if is_gguf(first) != is_gguf(second):
        refuse_mixed((first, second))
    remarks: list[str] = []
    second = with_names_of(first, second, remarks)
    if not first.tensors.keys() & second.tensors.keys():
        raise ShapeError(nothing_in_common((first.name, "", first.tensors), (second.name, "", second.tensors)))
    common = [n for n in first.tensors if n in second.tensors]
    shapes = [n for n in common if first.tensors[n].shape != second.tensors[n].shape]
    same_shape = [n for n in common if first.tensors[n].shape == second.tensors[n].shape]
    names = [n for n in same_shape if first.tensors[n].merges and second.tensors[n].merges]
    answers = _measured((first, second), names, threads, callback_of(progress))
    tensors = {}
    for name, (sums, nonzero) in zip(names, answers, strict=True):
        aa, ad, dd = sums[:3]
        tensors[name] = Difference(first.tensors[name].numel, nonzero[1], math.sqrt(aa), math.sqrt(dd), ad)
    return Comparison(
        tensors,
        [n for n in first.tensors if n not in second.tensors],
        [n for n in second.tensors if n not in first.tensors],
        shapes,
        [n for n in same_shape if n not in tensors],
        _kinds(first, second, common),
        {n: t.quantised for c in (second, first) for n, t in c.tensors.items() if t.quantised},
        tuple(remarks),
        frozenset(name for name in names if _is_vector(name, first.tensors[name].shape)),
    )


def _is_vector(name: str, shape: Sequence[int]) -> bool:
    """Whether a tensor has one dimension, but for those of length 1, or is the biases of several modules."""
    return sum(length != 1 for length in shape) < 2 or name.rpartition(".")[2].endswith("bias")


@dataclass(frozen=True, slots=True)
class Deltas:
    """The Gram matrix of several models' deltas from their base in one tensor: with it the norm of any sum is known.

    aa    <a, a> of the base
    gram  gram[i][j] = <d_i, d_j> of the models' deltas from the base, float64
    """

    aa: float
    gram: tuple[tuple[float, ...], ...]


def deltas(
    base: str, models: Sequence[str], *, threads: int | None = None, progress: Progress | None = None
) -> dict[str, Deltas]:
    """The deltas of every tensor that all checkpoints have, of one shape and of dtypes that are merged.

    Raises: CheckpointError, StorageError, BackendError, UsageError.
    """
    first = open_model(base)
    every = [first, *(with_names_of(first, open_model(name)) for name in models)]
    lead = every[0].tensors
    names = [
        n for n, entry in lead.items()
        if all(n in c.tensors and c.tensors[n].shape == entry.shape and c.tensors[n].merges for c in every)
    ]  # fmt: skip
    grams = {}
    for name, (sums, _) in zip(names, _measured(every, names, threads, progress), strict=True):
        # The upper triangle row by row, the base's row first.
        rows, at = [], len(every)
        for i in range(len(models)):
            rows.append([0.0] * i + list(sums[at : at + len(models) - i]))
            at += len(models) - i
        gram = tuple(tuple(rows[min(i, j)][max(i, j)] for j in range(len(models))) for i in range(len(models)))
        grams[name] = Deltas(sums[0], gram)
    return grams


def _measured(
    models: Sequence[Model], names: Sequence[str], threads: int | None, progress: Progress | None
) -> list[Answer]:
    """The pump's answer for each of the tensors called `names`: deltas from the first checkpoint."""
    places = [[c.tensors[name] for c in models] for name in names]
    refuse_damaged(models)
    with ExitStack() as stack:
        sources = Sources(models, (tensor for tensors in places for tensor in tensors), stack)
        steps = [
            Measure(inputs=tuple(sources.operand(x) for x in entries), numel=entries[0].numel, deltas=True)
            for entries in places
        ]
        options = PumpOptions(
            isa=cpu_isa(), threads=cpu_threads(threads), read_bytes=128 << 10, prefetch=not sources.cached()
        )
        total = sum(x.nbytes for entries in places for x in entries)
        answers = survey(sources.handles, steps, options, sources.explained, total, progress)
        sources.refuse_changed()
    return answers


def _kinds(first: Model, second: Model, common: Iterable[str]) -> dict[str, tuple[str, str]]:
    kinds = {}
    for name in common:
        x, y = (c.tensors[name].describe() for c in (first, second))
        if x != y:
            kinds[name] = (x, y)
    return kinds
