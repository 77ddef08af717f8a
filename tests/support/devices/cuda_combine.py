"""Combines of whole buffers by fastinterp._cuda, on a device or on the host's emulation of one."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

from fastinterp.backends.device import Piece
from fastinterp.ops.combine import Row
from fastinterp.ops.dtypes import DType
from fastinterp.ops.steps import Combine
from tests.support.cases import Guarded
from tests.support.pumps import code, stored


class Loan:
    """Guarded buffers in a device's memory, where they lie as far from boundaries as on the host."""

    def __init__(self, device: Any, queue: Any, buffers: Sequence[Guarded]):
        self._queue, self._buffers = queue, buffers
        self._memory = [device.memory(b.whole.size + 64) for b in buffers]
        self._at = [m.address + b.whole.ctypes.data % 64 for m, b in zip(self._memory, buffers, strict=True)]
        for b, at in zip(buffers, self._at, strict=True):
            queue.upload(at, b.whole.ctypes.data, b.whole.size)

    @property
    def addresses(self) -> list[int]:
        return [at + b.address - b.whole.ctypes.data for b, at in zip(self._buffers, self._at, strict=True)]

    def back(self) -> None:
        """Bring everything back, the guards too, and free the memory."""
        for b, at in zip(self._buffers, self._at, strict=True):
            self._queue.download(b.whole.ctypes.data, at, b.whole.size)
        self._queue.record().wait()
        for memory in self._memory:
            memory.free()


def piece_of(
    inputs: Sequence[int],
    dtypes: Sequence[DType],
    rows: Sequence[Row],
    outputs: Sequence[int],
    out_dtype: int,
    numel: int,
    keys: Sequence[int] = (),
    **more: Any,
) -> Piece:
    """A piece of a Combine; `more` has what is optional."""
    step = Combine(
        inputs=stored(dtypes), numel=numel, sinks=tuple(range(len(outputs))), offsets=(0,) * len(outputs),
        out_dtype=out_dtype, keys=tuple(keys), rows=tuple(rows),
    )  # fmt: skip
    return Piece(step=step, inputs=tuple(inputs), outputs=tuple(outputs), numel=numel, **more)


def run(
    native: ModuleType,
    inputs: Sequence[Guarded],
    dtypes: Sequence[DType],
    rows: Sequence[Row],
    outputs: Sequence[Guarded],
    out_dtype: DType,
    **options: Any,
) -> list[dict[str, float]]:
    """As `_C.combine`, with the same options but for `isa`; `threads` and `streamed` change nothing."""
    device = native.Device(0)
    queue = device.queue()
    stochastic, keys = options.pop("stochastic", False), options.pop("keys", [])
    options = {name: value for name, value in options.items() if name not in ("threads", "streamed")}
    loans = Loan(device, queue, inputs), Loan(device, queue, outputs)
    piece = piece_of(
        loans[0].addresses,
        dtypes,
        rows,
        loans[1].addresses,
        out_dtype=code(out_dtype),
        numel=inputs[0].view.size * 8 // dtypes[0].bits,
        keys=keys if stochastic else [],
        **({"stats_every": 32} | options),
    )
    [pending] = queue.run([piece])
    for loan in loans:
        loan.back()
    assert pending.answer() is None
    found: list[dict[str, float]] = pending.stats()
    return found
