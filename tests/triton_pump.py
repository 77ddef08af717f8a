"""A pump whose steps are done by Triton's interpreter, so that what tests of the native one check is checked of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastinterp.compute.dtypes import DTYPES
from fastinterp.compute.pieces import cut, join, join_stats
from fastinterp.compute.triton import TritonDevice

SIZES = {dtype.code: dtype.bits // 8 for dtype in DTYPES.values() if dtype.code is not None}


class TritonPump:
    """Made and used as `_C.Pump`, of sources and sinks in memory.

    most  bytes of a piece: a class attribute, because no pump has such an argument
    """

    most = 1 << 40

    def __init__(
        self, isa: str, sources: Sequence[Any], sinks: Sequence[Any], steps: Sequence[Mapping[str, Any]],
        *, stochastic: bool = False, fp8_saturate: bool = True, stats_every: int = 0, **_: Any,
    ):  # fmt: skip
        device = TritonDevice()
        queue = device.queue()
        cuts = [cut(step, self.most) for step in steps]
        pieces = []
        for step, places in zip(steps, cuts, strict=True):
            assert device.refuses(step) is None, device.refuses(step)
            self._settings = {"fp8_saturate": fp8_saturate, "stats_every": stats_every}
            for first, count in places:
                piece = _piece(step, sources, sinks, first, count) | self._settings
                if not stochastic:
                    piece.pop("keys", None)
                pieces.append(piece)
        pending = queue.run(pieces)
        event = queue.record()
        event.wait()
        assert event.done()
        self._answers, self._stats = [], []
        for step, places in zip(steps, cuts, strict=True):
            own, pending = pending[: len(places)], pending[len(places) :]
            self._answers.append(join(step, [p.answer() for p in own]))
            self._stats.append(join_stats([p.stats() for p in own]))
        read = [sum(SIZES[code] for _, _, code in step["inputs"]) * step["numel"] for step in steps]
        self.bytes_read = sum(read)

    def start(self) -> None:
        pass

    def wait(self, seconds: float) -> bool:
        return True

    def join(self) -> None:
        pass

    def error(self) -> None:
        pass

    def answers(self) -> list[Any]:
        return self._answers

    def stats(self) -> list[list[dict[str, float]]]:
        return self._stats


def _piece(step: Mapping[str, Any], sources: Sequence[Any], sinks: Sequence[Any], first: int, count: int) -> Any:
    piece = {key: value for key, value in step.items() if key not in ("sinks", "offsets")}
    piece["inputs"] = [
        (sources[source][1] + offset + first * SIZES[code], code) for source, offset, code in step["inputs"]
    ]
    if "sinks" in step:
        size = SIZES[step["out_dtype"]]
        places = zip(step["sinks"], step["offsets"], strict=True)
        piece["outputs"] = [sinks[sink][1] + offset + first * size for sink, offset in places]
    return piece | {"numel": count, "first": first}
