"""Differences of models that are decoded from codes, in steps of the quantisation, over samples.

A difference that is small beside the step is mostly noise: codes that were rounded to one side in one model, and to the
other side in the other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from fastinterp.checkpoint.remote import Readable, opened, read_from
from fastinterp.execute.decode_rows import Read, decoded
from fastinterp.execute.quantisation_noise import RoundedDelta
from fastinterp.plan.encoded_rows import aligned, rows_of
from fastinterp.plan.inputs import StoredInput
from fastinterp.plan.planned import PlannedTensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fastinterp.plan.plan import Plan

_ELEMENTS = 1 << 14  # of a sample
# Codes of 1.0, by decoder: they decode to the scale of each element. And the bits of the mantissa, of floats of 8 bits.
_ONES = {"scaled_f8_e4m3": 0x38, "scaled_f8_e5m2": 0x3C, "scaled_i8": 1, "mxfp4": 0x22, "nvfp4": 0x22}
_FLOATS = {"scaled_f8_e4m3": (3, 7), "scaled_f8_e5m2": (2, 15)}  # bits of the mantissa, bias
_E2M1 = (0.5, 0.5, 0.5, 0.5, 1.0, 1.0, 2.0, 2.0)  # from a code to the next


@dataclass
class QuantisedDelta(RoundedDelta):
    """The difference d of one model from another (the base, where there is one), where one or both are decoded.

    sum_d    sum of |d|
    formats  how they are stored
    """

    sum_d: float = 0.0
    formats: set[str] = field(default_factory=set)

    @property
    def ratio(self) -> float:
        """Mean |d| over the mean step."""
        return self.sum_d / self.steps if self.steps > 0 else math.inf

    def as_dict(self) -> dict[str, Any]:
        return {"ratio": self.ratio, "signal": self.signal, "sampled": self.rounded, "formats": sorted(self.formats)}


def quantised_deltas(plan: Plan, tensors: int) -> dict[tuple[int, int], QuantisedDelta]:
    """(model, the one that it is compared with), numbers of the plan's checkpoints -> the difference.

    tensors  that are sampled at most, spread over the model
    Raises: StorageError and CheckpointError, if a file cannot be read.
    """
    having = [t for t in plan.tensors if t.merged and t.numel and any(i.decoded for i in t.inputs)]
    deltas: dict[tuple[int, int], QuantisedDelta] = {}
    with ExitStack() as stack:
        read = _reader(stack)
        for k in range(min(tensors, len(having))):
            _add(deltas, having[k * len(having) // min(tensors, len(having))], read)
    return {key: delta for key, delta in deltas.items() if delta.rounded}


def about(deltas: Mapping[tuple[int, int], QuantisedDelta], names: Sequence[str]) -> list[str]:
    """A remark for each difference. names: of the plan's checkpoints."""
    return [
        f"{names[i]} differs from {names[base]} by {delta.ratio:.2g} quantisation steps on average "
        f"({', '.join(sorted(delta.formats))}; {delta.rounded:,} elements sampled)"
        for (i, base), delta in deltas.items()
    ]


def noise(deltas: Mapping[tuple[int, int], QuantisedDelta], plan: Plan) -> list[str]:
    """Warnings about differences that are mostly noise, if the method adds up differences from a base."""
    recipe = plan.recipes[0]
    if recipe.base is None or not recipe.method.sums_deltas:
        return []
    names = [checkpoint.name for checkpoint in plan.checkpoints]
    return [
        f"the difference of {names[i]} from {names[base]} is mostly quantisation noise: {delta.ratio:.2g} steps on "
        f"average, stored as {' and '.join(sorted(delta.formats))}, about {delta.signal:.2f} of its norm is signal, "
        f"estimated from {delta.rounded:,} sampled elements. Use models from before they were quantised"
        for (i, base), delta in deltas.items()
        if delta.is_noise
    ]


def _reader(stack: ExitStack) -> Read:
    files: dict[Path, Readable] = {}

    def read(path: Path, start: int, nbytes: int) -> bytes:
        if path not in files:
            files[path] = stack.enter_context(opened(str(path)))
        return read_from(files[path], path, start, nbytes)

    return read


def _add(deltas: dict[tuple[int, int], QuantisedDelta], tensor: PlannedTensor, read: Read) -> None:
    """Add the sample of one tensor: some rows in its middle."""
    import numpy as np

    reads = [(i, rows) for i, one in tensor.pairs[: tensor.model_count] if (rows := one.stored_rows) is not None]
    reads = _as_stored(reads)
    if len(reads) < 2 or len({one.shape for _, one in reads}) > 1:
        return
    pivot = tensor.rows[0].pivot if tensor.rows and len(reads) == len(tensor.inputs) else 0
    cut = _middle([one for _, one in reads])
    if not cut:
        return
    numbers = [_numbers(part, read) for part in cut]
    steps = [_steps(part, read) for part in cut]
    for k, (i, one) in enumerate(reads):
        both = [s for s in (steps[pivot], steps[k]) if s is not None]
        if k == pivot or not both:
            continue
        d = np.abs(numbers[k].astype(np.float64) - numbers[pivot])
        q = np.maximum(both[0], both[-1]).astype(np.float64)
        good = np.isfinite(d) & np.isfinite(q)
        delta = deltas.setdefault((i, reads[pivot][0]), QuantisedDelta())
        d, q = d[good], q[good]
        delta.add(d.size, float((d**2).sum()), float(q.sum()), float((q**2).sum()), len(both) == 2)
        delta.sum_d += float(d.sum())
        delta.formats |= {_format(part) for part in (one, reads[pivot][1]) if part.encoding is not None}


def _as_stored(reads: Sequence[tuple[int, StoredInput]]) -> list[tuple[int, StoredInput]]:
    """Matrices that are stored transposed as they are stored, if all are: the order of elements does not matter."""
    known = [(i, e) for i, e in reads if e.encoding is None or e.encoding.decoder in (*_ONES, "mxfp4_transposed")]
    transposed = [e for _, e in known if e.encoding is not None and e.encoding.decoder == "mxfp4_transposed"]
    if not transposed:
        return known
    if len(transposed) < len(known):
        return []
    return [(i, _untransposed(e)) for i, e in known]


def _untransposed(tensor: StoredInput) -> StoredInput:
    assert tensor.encoding is not None
    shape = (tensor.numel // tensor.shape[-2], tensor.shape[-2])
    return replace(tensor, shape=shape, encoding=replace(tensor.encoding, decoder="mxfp4", parameters=()))


def _middle(tensors: Sequence[StoredInput]) -> list[StoredInput]:
    """The same few rows in the middle of each tensor; none, if they cannot be had without many more."""
    columns = tensors[0].shape[-1] if len(tensors[0].shape) > 1 else tensors[0].numel
    rows = tensors[0].numel // columns
    count = min(rows, max(1, _ELEMENTS // columns))
    first = (rows - count) // 2
    for tensor in tensors:
        if tensor.encoding is not None and rows_of(tensor, first, count) is None:
            first = aligned(tensor, first, 1)[0]
    cut = [_rows(tensor, first, count, columns) for tensor in tensors]
    return [part for part in cut if part is not None] if None not in cut else []


def _rows(tensor: StoredInput, first: int, count: int, columns: int) -> StoredInput | None:
    if tensor.encoding is not None:
        return rows_of(tensor, first, count)
    size = (tensor.dtype.nbytes(1) or 0) * columns
    return replace(tensor, shape=(count, columns), start=tensor.start + first * size, nbytes=count * size)


def _numbers(tensor: StoredInput, read: Read) -> NDArray[Any]:
    if tensor.encoding is not None:
        return decoded(tensor, read)
    import numpy as np

    from fastinterp.reference.combine import widen

    return widen(np.frombuffer(read(tensor.path, tensor.start, tensor.nbytes), np.uint8), tensor.dtype)


def _steps(tensor: StoredInput, read: Read) -> NDArray[Any] | None:
    """The step at each element, f32[numel]; None, if the tensor is not decoded."""
    import numpy as np

    encoding = tensor.encoding
    if encoding is None:
        return None
    nbytes = tensor.nbytes - sum(companion.nbytes for companion in encoding.companions)
    codes = np.frombuffer(read(tensor.path, tensor.start, nbytes), np.uint8)
    ones = bytes([_ONES[encoding.decoder]]) * nbytes

    def all_ones(path: Path, start: int, count: int) -> bytes:
        return ones if (path, start, count) == (tensor.path, tensor.start, nbytes) else read(path, start, count)

    scales: NDArray[Any] = np.abs(decoded(tensor, all_ones))
    if encoding.decoder in _FLOATS:
        mantissa, bias = _FLOATS[encoding.decoder]
        exponents = np.maximum((codes & 0x7F) >> mantissa, 1).astype(np.int32)
        scales = scales * np.ldexp(np.float32(1), exponents - bias - mantissa)
    elif encoding.decoder != "scaled_i8":
        high_first = encoding.decoder == "nvfp4" and any(encoding.parameters[2:3])
        halves = (codes & 7, codes >> 4 & 7)
        pairs = np.stack(halves[::-1] if high_first else halves, -1).reshape(-1)
        scales = scales * np.array(_E2M1, np.float32)[pairs]
    return scales


def _format(tensor: StoredInput) -> str:
    assert tensor.encoding is not None
    names = {"mxfp4": "MXFP4", "nvfp4": "NVFP4"}
    return names.get(tensor.encoding.decoder, f"{tensor.encoding.stored} with scales")
