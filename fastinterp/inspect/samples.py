"""Samples of tensor data for `check`: NaN and Inf, equal models, and deltas that are mostly rounding noise.

A sample is a chunk from the middle of a tensor.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from fastinterp.backends.cpu import PumpOptions, survey
from fastinterp.backends.registry import cpu_isa, cpu_threads
from fastinterp.errors import CheckpointError
from fastinterp.execute.chunks import differing_unmerged, evenly_sampled, middle_chunk, read_bytes, stored_inputs
from fastinterp.execute.quantisation_noise import RoundedDelta
from fastinterp.execute.sources import Sources
from fastinterp.ops.steps import Measure
from fastinterp.plan.inputs import StoredInput
from fastinterp.plan.plan import Plan
from fastinterp.plan.planned import PlannedTensor
from fastinterp.plan.tensors import must_agree


@dataclass
class SampledDelta(RoundedDelta):
    """The delta d of one model from another (the base, where there is one), over samples.

    adapted    whether adapters change tensors of one model, which are not sampled
    changed    number of sampled elements that differ
    numel      number of sampled elements

    dtypes     names of the 8-bit dtypes in which one or both models are stored, the rounded ones
    """

    adapted: bool = False
    changed: int = 0
    numel: int = 0
    dtypes: set[str] = field(default_factory=set)


@dataclass
class Samples:
    """Statistics of the samples of a plan.

    tensors     number of tensors sampled
    not_finite  (index of a checkpoint, name of a tensor) of samples with NaN or Inf
    deltas      (index of a checkpoint, index of the one it is compared with) -> its delta
    """

    tensors: int = 0
    not_finite: list[tuple[int, str]] = field(default_factory=list)
    deltas: dict[tuple[int, int], SampledDelta] = field(default_factory=dict)

    def noisy(self) -> Iterator[tuple[int, int, SampledDelta, float]]:
        """(model, base, delta, its signal) of deltas that are mostly rounding noise."""
        for (i, base), delta in self.deltas.items():
            if delta.is_noise:
                yield i, base, delta, delta.signal or 0.0

    def equal(self) -> Iterator[tuple[int, int]]:
        """(model, other) that are equal in all samples."""
        known = ((pair, delta) for pair, delta in self.deltas.items() if delta.numel and not delta.adapted)
        return (pair for pair, delta in known if not delta.changed)


def sample(plan: Plan) -> Samples:
    """Sample the tensors of a plan that are merged.

    Raises: StorageError and CheckpointError, if a file cannot be read, or was truncated meanwhile.
    """
    samples = Samples()
    merged = [t for t in plan.tensors if t.merged and t.numel]
    pairs = [pair for t in evenly_sampled(merged) for pair in _pairs(t)]
    samples.tensors = len({t.name for t, _ in pairs})
    with ExitStack() as stack:
        sources = Sources(plan.checkpoints, (e for _, reads in pairs for _, e in reads), stack)
        steps = [
            Measure(inputs=tuple(sources.operand(e) for _, e in reads), numel=reads[0][1].numel, deltas=True)
            for _, reads in pairs
        ]
        options = PumpOptions(isa=cpu_isa(), threads=cpu_threads(None), read_bytes=128 << 10)
        answers = survey(sources.handles, steps, options, sources.explained)
    for (tensor, reads), (sums, nonzero) in zip(pairs, answers, strict=True):
        _add(samples, tensor, reads, sums, nonzero)
    samples.not_finite = list(dict.fromkeys(samples.not_finite))
    _mark_adapted(samples, merged)
    return samples


def _mark_adapted(samples: Samples, tensors: Iterable[PlannedTensor]) -> None:
    """Say of deltas that they are more than what is sampled: adapters change tensors of one model and not the other."""
    adapted: dict[int, set[Hashable]] = {}
    for tensor in tensors:
        for i, one in tensor.pairs[: tensor.model_count]:
            if one.adapted:
                adapted.setdefault(i, set()).add(one.key)
    for (i, other), delta in samples.deltas.items():
        delta.adapted = adapted.get(i) != adapted.get(other)


def compare_unmerged(plan: Plan) -> tuple[CheckpointError | None, list[PlannedTensor]]:
    """Compare the first MB of each tensor that is not merged, and must be equal in all models.

    Returns an error about all that differ, if any do, and the others that are longer than that.
    """
    differing, longer = differing_unmerged(plan)
    return must_agree(differing, plan.checkpoints) if differing else None, longer


Pair = tuple[
    PlannedTensor, list[tuple[int, StoredInput]]
]  # samples of one tensor in the first model and another (or twice the first)


def _pairs(tensor: PlannedTensor) -> Iterator[Pair]:
    """The same chunk of the first model (the pivot) and of each other one."""
    reads = stored_inputs(tensor)
    chunks = [(i, middle_chunk(e)) for i, e in reads[: tensor.model_count]]
    if not chunks:
        return
    first = tensor.rows[0].pivot if tensor.rows and len(chunks) == len(tensor.inputs) else 0
    others = [one for k, one in enumerate(chunks) if k != first]
    for other in others or [chunks[first]]:
        yield tensor, [chunks[first], other]


def _add(
    samples: Samples, tensor: PlannedTensor, reads: list[tuple[int, StoredInput]], sums: Any, nonzero: Any
) -> None:
    """Add the measures of one pair. sums: <a, a>, <a, d>, <d, d>, ...; nonzero: number of elements of a and d not 0."""
    (a, x), (b, y) = reads
    aa, _, dd = sums[:3]
    for i, total in ((a, aa), (b, dd)):
        if not math.isfinite(total) and (i == a or math.isfinite(aa)):
            samples.not_finite.append((i, tensor.name))
    if x is y:
        return
    delta = samples.deltas.setdefault((b, a), SampledDelta())
    delta.changed += nonzero[1]
    delta.numel += x.numel
    rounded = [(i, e) for i, e in reads if e.dtype.merges and e.dtype.bits == 8]
    if rounded and math.isfinite(dd):
        # Where both are rounded, the steps of one are about those of the other: their deltas are small.
        steps, steps2 = _steps(rounded[0][1])
        delta.add(x.numel, dd, steps, steps2, len(rounded) == 2)
        delta.dtypes.update(e.dtype.name for _, e in rounded)


def _steps(tensor: StoredInput) -> tuple[float, float]:
    """Sums over the elements of q and q^2, the distance to the next value of the 8-bit dtype."""
    layout = tensor.dtype.layout
    assert layout is not None
    bias, bits = layout.bias, layout.mantissa
    steps = steps2 = 0.0
    for code, count in Counter(read_bytes(tensor, limit=tensor.nbytes)).items():
        step = 2.0 ** (max((code & 0x7F) >> bits, 1) - bias - bits)
        steps += count * step
        steps2 += count * step * step
    return steps, steps2
