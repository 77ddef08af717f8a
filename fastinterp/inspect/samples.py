"""What a few samples of the tensor data tell: NaN and Inf, models that are the same, deltas that are mostly noise.

A merge would read all of it; here a chunk from the middle of some tensors has to do.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from fastinterp.backends.cpu import PumpOptions, survey
from fastinterp.backends.registry import cpu_isa, cpu_threads
from fastinterp.errors import ShapeError
from fastinterp.execute.chunks import middle_chunk, read_bytes, spread_over
from fastinterp.execute.sources import Sources
from fastinterp.ops.steps import Measure
from fastinterp.plan.inputs import PlannedTensor, StoredInput
from fastinterp.plan.plan import Plan
from fastinterp.plan.tensors import must_agree

_AGREE_BYTES = 1 << 20  # of a tensor that must be the same in all models
_NOISY = 0.7  # a share of signal below this is worth a word

_WIDTH = 0.8  # mean |d| of normally distributed d, in standard deviations


@dataclass
class Against:
    """What one model is beside the first of its tensors: the base, where there is one.

    changed  sampled elements that differ
    numel    sampled elements
    sum_dd   of the squares of the differences, over samples where both or one are stored in 8 bits
    steps    sum of the distances between neighbouring numbers there, and of their squares
    """

    changed: int = 0
    numel: int = 0
    sum_dd: float = 0.0
    steps: float = 0.0
    steps2: float = 0.0
    quantised: int = 0
    both: bool = True
    dtypes: set[str] = field(default_factory=set)

    @property
    def signal(self) -> float | None:
        """About how much of the delta is what training did, the rest being the rounding to 8 bits: its cosine with the
        true delta. None, if nothing is stored in 8 bits.

        A small change c moves an element by a whole step q with the chance |c|/q, so E d^2 = |c|*q where both models
        are rounded; where one is, its rounding adds q^2/12.
        """
        if not self.quantised or self.sum_dd <= 0 or not math.isfinite(self.sum_dd):
            return None
        mean = self.sum_dd / self.quantised
        if self.both:
            return min(1.0, math.sqrt(mean) / (_WIDTH * self.steps / self.quantised))
        return math.sqrt(max(0.0, mean - self.steps2 / self.quantised / 12) / mean)


@dataclass
class Samples:
    """What was found.

    tensors    how many were sampled
    not_finite (model, tensor) that have NaN or Inf
    models     index of a checkpoint, and of the one it is compared with -> what it is beside that
    """

    tensors: int = 0
    not_finite: list[tuple[int, str]] = field(default_factory=list)
    models: dict[tuple[int, int], Against] = field(default_factory=dict)

    def noisy(self) -> Iterator[tuple[int, int, Against, float]]:
        """(model, base, what it is beside it, share of signal) where the deltas are mostly rounding."""
        for (i, base), found in self.models.items():
            signal = found.signal
            if signal is not None and signal < _NOISY:
                yield i, base, found, signal

    def same(self) -> Iterator[tuple[int, int]]:
        """(model, other) that do not differ in any sample."""
        return ((i, base) for (i, base), found in self.models.items() if found.numel and not found.changed)


def take(plan: Plan) -> Samples:
    """Sample the tensors of a plan that are merged.

    Raises: StorageError and CheckpointError, if a file cannot be read, or was cut meanwhile.
    """
    found = Samples()
    merged = [t for t in plan.tensors if t.merged and t.numel]
    pairs = [pair for t in spread_over(merged) for pair in _pairs(t)]
    found.tensors = len({t.name for t, _ in pairs})
    with ExitStack() as stack:
        sources = Sources(plan.opened, (e for _, reads in pairs for _, e in reads), stack)
        steps = [
            Measure(inputs=tuple(sources.operand(e) for _, e in reads), numel=reads[0][1].numel, deltas=True)
            for _, reads in pairs
        ]
        options = PumpOptions(isa=cpu_isa(), threads=cpu_threads(None), read_bytes=128 << 10)
        answers = survey(sources.fds, steps, options, sources.explained)
    for (tensor, reads), (sums, nonzero) in zip(pairs, answers, strict=True):
        _note(found, tensor, reads, sums, nonzero)
    found.not_finite = list(dict.fromkeys(found.not_finite))
    return found


def disagreeing(plan: Plan) -> tuple[list[ShapeError], list[str]]:
    """Tensors that are not merged and differ between models, as far as their first bytes tell; and the names of those
    that have more bytes than were compared.
    """
    wrong, longer = [], []
    for tensor in (t for t in plan.tensors if not t.merged and len(t.inputs) > 1):
        reads = _plain(tensor)
        if len(reads) < 2:
            continue
        first = read_bytes(reads[0][1], limit=_AGREE_BYTES)
        differing = [i for i, e in reads[1:] if read_bytes(e, limit=_AGREE_BYTES) != first]
        if differing:
            names = (plan.checkpoints[i].name for i in (reads[0][0], differing[0]))
            wrong.append(must_agree(tensor, *names))
        elif tensor.inputs[0].nbytes > _AGREE_BYTES:
            longer.append(tensor.name)
    return wrong, longer


def _plain(tensor: PlannedTensor) -> list[tuple[int, StoredInput]]:
    """The inputs that lie in the files as they are, with their models: rows that are moved and tensors of a document
    above are left out.
    """
    pairs = ((i, e.plain) for i, e in tensor.pairs)
    return [(i, e) for i, e in pairs if e is not None]


Pair = tuple[PlannedTensor, list[tuple[int, StoredInput]]]  # a sample of the first model, or of two


def _pairs(tensor: PlannedTensor) -> Iterator[Pair]:
    """The same chunk of the first model and of each other one."""
    reads = _plain(tensor)
    cut = [(i, middle_chunk(e)) for i, e in reads[: tensor.model_count]]
    if not cut:
        return
    first = tensor.rows[0].pivot if tensor.rows and len(cut) == len(tensor.inputs) else 0
    others = [one for k, one in enumerate(cut) if k != first]
    for other in others or [cut[first]]:
        yield tensor, [cut[first], other]


def _note(found: Samples, tensor: PlannedTensor, reads: list[tuple[int, StoredInput]], sums: Any, nonzero: Any) -> None:
    (a, x), (b, y) = reads
    aa, _, dd = sums[:3]
    for i, total in ((a, aa), (b, dd)):
        if not math.isfinite(total) and (i == a or math.isfinite(aa)):
            found.not_finite.append((i, tensor.name))
    if x is y:
        return
    beside = found.models.setdefault((b, a), Against())
    beside.changed += nonzero[1]
    beside.numel += x.numel
    rounded = [(i, e) for i, e in reads if e.dtype.merges and e.dtype.bits == 8]
    if rounded and math.isfinite(dd):
        # The steps of one are those of the other, where both are rounded: their deltas are small.
        steps, steps2 = _steps(rounded[0][1])
        beside.sum_dd += dd
        beside.steps += steps
        beside.steps2 += steps2
        beside.quantised += x.numel
        beside.both &= len(rounded) == 2
        beside.dtypes.update(e.dtype.name for _, e in rounded)


def _steps(tensor: StoredInput) -> tuple[float, float]:
    """Sum of the distances from each element to its neighbours in its dtype of 8 bits, and of their squares."""
    layout = tensor.dtype.layout
    assert layout is not None
    bias, bits = layout.bias, layout.mantissa
    steps = steps2 = 0.0
    for code, count in Counter(read_bytes(tensor, limit=tensor.nbytes)).items():
        step = 2.0 ** (max((code & 0x7F) >> bits, 1) - bias - bits)
        steps += count * step
        steps2 += count * step * step
    return steps, steps2
