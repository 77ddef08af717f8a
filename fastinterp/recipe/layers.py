"""Finds layers in the names of tensors: of any architecture, without a list of architectures.

The components of a name are what stands between its dots. A **stack** is a prefix whose next component is a number, so
that the numbers are 0 .. layers-1 without a gap and the blocks are alike: at least half of them have a tensor in common
with another block (the same name behind the number), and some tensor lies two or more components behind the number,
which sets `layers.0.mlp.weight` apart from `mlp.0.weight`. A single block counts if the prefix ends in a word with
`layer` or `block`, in `h` or `blk`. The first number of a name that makes a stack counts, so experts are in layers, and
embedders.0 and embedders.1, which have nothing in common, are no stack, but the layers inside them are.

The **main** stack is the one that slices cut. Left out are those of other modalities and of helpers (a component with
vision, audio, conditioner, ...), then those of encoders, as long as others remain; of the rest it is the one with the
most layers. If two have as many, there is none.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import NamedTuple

import msgspec

_NUMBER = re.compile(r"\.(0|[1-9][0-9]{0,5})\.")
# Text, not compiled: most merges look for none of these.
_BLOCK = "layer|block|^h$|^blk$"
_ASIDE = (
    "vision|visual|image|audio|speech|video|^vit|^vae|patch|resampler|projector|connector|perceiver|merger|^mtp"
    "|conditioner|cond_stage|first_stage|text_encoder"
)
_ENCODER = "encoder"
_EMBEDDING = "emb|^wte$|^wpe$|^shared$"
_AFTER = "norm|^ln_|_ln$|head|final|pool|classif|score|^out|_out$|^fc$"


class Stack(msgspec.Struct, frozen=True):
    """`prefix.0.` to `prefix.{layers - 1}.`"""

    prefix: str
    layers: int


class LayerPosition(NamedTuple):
    """A layer of a stack, or of a slice: its index, and how many layers there are. Gradients are read there."""

    layer: int
    layers: int


class StackMember(NamedTuple):
    """A tensor in a stack.

    layer  index of its layer
    rest   of its name, behind that index
    """

    stack: Stack
    layer: int
    rest: str

    @property
    def position(self) -> LayerPosition:
        return LayerPosition(self.layer, self.stack.layers)


class Layers:
    """The stacks among the names of a model's tensors, and the layer that each tensor is in.

    stacks  in the order in which the names have them
    """

    def __init__(self, names: Iterable[str]):
        self._members: dict[str, StackMember] = {}
        self.stacks: tuple[Stack, ...] = ()
        waiting = [(name, 0) for name in names]
        order = {name: i for i, (name, _) in enumerate(waiting)}
        while waiting:
            groups: dict[str, list[tuple[str, int, str]]] = {}
            ends = {}
            for name, start in waiting:
                if number := _NUMBER.search(name, start):
                    groups.setdefault(name[: number.start()], []).append((name, int(number[1]), name[number.end() :]))
                    ends[name] = number.end() - 1
            waiting = []
            for prefix, members in groups.items():
                if prefix and _is_stack(prefix, members):
                    stack = Stack(prefix, 1 + max(index for _, index, _ in members))
                    for name, index, rest in members:
                        self._members[name] = StackMember(stack, index, rest)
                else:
                    waiting += [(name, ends[name]) for name, _, _ in members]
        first: dict[Stack, int] = {}
        for name, (stack, _, _) in self._members.items():
            first[stack] = min(first.get(stack, order[name]), order[name])
        self.stacks = tuple(sorted(first, key=first.__getitem__))

    def member(self, name: str) -> StackMember | None:
        """The stack and layer that a tensor is in; None, if it is in none."""
        return self._members.get(name)

    def position(self, name: str) -> LayerPosition | None:
        """The layer that a tensor is in; None, if it is in none."""
        member = self._members.get(name)
        return None if member is None else member.position

    @property
    def candidates(self) -> tuple[Stack, ...]:
        """The main stack; or those that could be it, if there are several."""
        left: Collection[Stack] = self.stacks
        for kind in (_ASIDE, _ENCODER):
            left = [s for s in left if not _any(kind, s.prefix)] or left
        most = max((s.layers for s in left), default=0)
        return tuple(s for s in left if s.layers == most)

    @property
    def main(self) -> Stack | None:
        return self.candidates[0] if len(self.candidates) == 1 else None

    def is_after(self, name: str) -> bool:
        """Whether a tensor outside the main stack comes after it: final norm, head; not embeddings, towers."""
        main = self.main
        if name in self._members or _any(_ASIDE, name) or _any(_EMBEDDING, name):
            return False
        if _any(_ENCODER, name) and not (main and _any(_ENCODER, main.prefix)):
            return False
        return _any(_AFTER, name)


def _is_stack(prefix: str, members: list[tuple[str, int, str]]) -> bool:
    blocks: dict[int, set[str]] = {}
    for _, number, rest in members:
        blocks.setdefault(number, set()).add(rest)
    if max(blocks) != len(blocks) - 1 or not any("." in rest for _, _, rest in members):
        return False
    if len(blocks) == 1:
        return bool(re.search(_BLOCK, prefix.rpartition(".")[2]))
    seen: dict[str, int] = {}
    for block in blocks.values():
        for rest in block:
            seen[rest] = seen.get(rest, 0) + 1
    alike = sum(any(seen[rest] > 1 for rest in block) for block in blocks.values())
    return 2 * alike >= len(blocks)


def _any(kind: str, name: str) -> bool:
    return any(re.search(kind, part) for part in name.lower().split("."))
