"""Parts of a plan that are computed to be compared: whole tensors, or blocks of those whose elements stand alone."""

from __future__ import annotations

import binascii
import math
from collections.abc import Iterable, Sequence

import msgspec
from msgspec import structs

from fastinterp.ops.combine import Combine
from fastinterp.ops.requests import MaskedCombine
from fastinterp.plan.plan import Plan
from fastinterp.plan.planned import PlannedTensor

BLOCK = 1 << 16  # elements: whole chunks of the kernels


class Piece(msgspec.Struct, frozen=True):
    """What is computed of one output tensor.

    of      the tensor in the plan of the whole output
    tensor  the same, or a block of it as a tensor of its own, with a name of its own
    first   the first element of the block
    """

    of: PlannedTensor
    tensor: PlannedTensor
    first: int = 0

    @property
    def names(self) -> set[str]:
        """The tensors of the files that it is compared with."""
        return {name for name, _, _ in self.of.entries}

    @property
    def nbytes(self) -> int:
        """Bytes of the output that it makes."""
        return self.tensor.nbytes


def whole_pieces(tensors: Iterable[PlannedTensor]) -> list[Piece]:
    return [Piece(t, t) for t in tensors]


def sampled(plan: Plan, fraction: float) -> list[Piece]:
    """Blocks of all tensors that make about this fraction of the output, at least one of each; and as much of those
    that have no blocks, at least one. The choice is the same each time.
    """
    stochastic = plan.recipes[0].rounding == "stochastic"
    pieces: list[Piece] = []
    others: list[PlannedTensor] = []
    for t in plan.tensors:
        if not has_blocks(t, stochastic):
            others.append(t)
            continue
        blocks = max(1, math.ceil(t.numel / BLOCK))
        count = min(blocks, max(1, round(fraction * blocks)))
        start = _unit(t.name)
        numbers = sorted({int((k + start) * blocks / count) for k in range(count)})
        pieces += [block(t, number) for number in numbers]
    wanted = fraction * sum(t.nbytes for t in others)
    chosen: list[PlannedTensor] = []
    for t in sorted(others, key=lambda t: _unit(t.name)):
        if chosen and wanted <= 0:
            break
        chosen.append(t)
        wanted -= t.nbytes
    return pieces + whole_pieces(chosen)


def _unit(name: str) -> float:
    """A number in 0..1 that a name always has."""
    return binascii.crc32(name.encode()) / 2**32


def has_blocks(t: PlannedTensor, stochastic: bool) -> bool:
    """Whether each of its elements depends on the same elements of the inputs alone, and not on its place."""
    if t.encoding is not None or t.dtype.block is not None or t.dtype.bits % 8 or t.before:
        return False
    if t.merged and (stochastic or t.dtype.is_complex):
        return False
    plain = [i.plain for i in t.inputs]
    if any(p is None or p.dtype.bits % 8 or p.shape != t.inputs[0].shape for p in plain) or t.numel < 2:
        return False
    if t.program is None:
        return True
    totals = [call() for call in t.program.calls]
    return all(
        isinstance(total, Combine) or (isinstance(total, MaskedCombine) and _stands_alone(total)) for total in totals
    )


def _stands_alone(total: MaskedCombine) -> bool:
    drawn = any(mask.is_random for mask in total.masks or ())
    return not drawn and (total.score is None or total.score.kind == "variance")


def block(t: PlannedTensor, number: int) -> Piece:
    """A block of a tensor that has blocks."""
    first = number * BLOCK
    count = min(BLOCK, t.numel - first)
    inputs = []
    for tensor in t.inputs:
        plain = tensor.plain
        assert plain is not None
        width = plain.dtype.bits // 8
        inputs.append(structs.replace(plain, shape=(count,), nbytes=count * width, start=plain.start + first * width))
    name = f"{t.name}[{first}:{first + count}]"
    return Piece(t, structs.replace(t, name=name, shape=(count,), inputs=tuple(inputs)), first)


def pieces_of(plan: Plan, names: Sequence[str]) -> list[Piece]:
    """The whole tensors of these names."""
    wanted = set(names)
    return whole_pieces(t for t in plan.tensors if t.name in wanted or any(n in wanted for n, _, _ in t.entries))
