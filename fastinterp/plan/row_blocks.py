"""Tensors as blocks of rows of others: fused experts and single ones, fused projections, convolutions of more channels.

A row is what lies along the last dimension. Nothing is copied: a block is read where it is stored.
"""

from __future__ import annotations

import math
import re
from array import array
from collections.abc import Iterable, Mapping, Sequence
from functools import cache

from msgspec.structs import replace

from fastinterp.messages import counted
from fastinterp.ops.dtypes import F32, F64, DType, promoted
from fastinterp.plan.encoded_rows import rows_of
from fastinterp.plan.inputs import GatheredInput, StoredInput, TensorInput
from fastinterp.recipe.tensor_groups import HasShape
from fastinterp.tokenizer.embedding_rows import RowMap, pack

Tensors = Mapping[str, TensorInput]
Shape = tuple[int, ...]

# The end of a fused tensor's name, and the ends of those whose rows it has one after the other; {} is the number of an
# expert: the fused tensor has a first dimension more, of as many.
_FUSED: tuple[tuple[str, tuple[tuple[str, ...], ...]], ...] = (
    ("experts.gate_up_proj", (
        ("experts.{}.gate_proj.weight", "experts.{}.up_proj.weight"), ("experts.{}.w1.weight", "experts.{}.w3.weight"),
    )),
    ("experts.down_proj", (("experts.{}.down_proj.weight",), ("experts.{}.w2.weight",))),
    # Not `attn.qkv_proj`, which is that of CodeGen: its rows are in another order.
    ("self_attn.qkv_proj.weight", (
        ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    )),
    ("self_attn.qkv_proj.bias", (("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),)),
    ("gate_up_proj.weight", (("gate_proj.weight", "up_proj.weight"),)),
)  # fmt: skip
_FUSED_EXPERTS = ("experts.gate_up_proj", "experts.down_proj")
_SINGLE = re.compile(r"\.experts\.(?:0\.[a-z_0-9]+|[a-z_]+\.0)\.weight$")


def fused_as(own: Tensors, reference: Tensors) -> tuple[Tensors, tuple[str, ...]]:
    """(tensors of a model, fused or split as the reference's are; what was done, for people).

    Only whole rows move: a fused tensor that is transposed, or whose parts alternate, stays as it is.
    """
    if own.keys() == reference.keys():
        return own, ()
    made: dict[str, TensorInput] = {}
    used: set[str] = set()
    counts = {"fused": 0, "split": 0}
    for name in reference:
        for end, ways in _FUSED if name not in own else ():
            parts = _parts(name, end, ways, own) if name.endswith(end) else []
            fused = _fuse(name, parts, reference, own)
            if fused is not None:
                made[name] = fused
                used.update(parts)
                counts["fused"] += 1
                break
    for name in own:
        for end, ways in _FUSED if name not in reference else ():
            parts = _parts(name, end, ways, reference) if name.endswith(end) else []
            split = _split(name, parts, own, reference)
            if split:
                made |= split
                used.add(name)
                counts["split"] += 1
                break
    if not made:
        return own, ()
    kept = {name: tensor for name, tensor in own.items() if name not in used}
    return kept | made, tuple(f"{counted(n, 'tensor')} {how}" for how, n in counts.items() if n)


def has_other_experts(own: Mapping[str, HasShape], reference: Mapping[str, HasShape]) -> bool:
    """Whether two models have the matrices of experts in different layouts: one of them has all in one tensor, the
    other one by one; or both have them in one tensor, transposed in one of them.
    """
    fused = [n for n in own if n.endswith(_FUSED_EXPERTS)]
    if own.keys() != reference.keys():
        others = any(n.endswith(_FUSED_EXPERTS) for n in reference)
        singles = [any(map(_SINGLE.search, names)) for names in (own, reference)]
        if [bool(fused), others, *singles] in ([True, False, False, True], [False, True, True, False]):
            return True
    return any(n in reference and _is_transposed(own[n].shape, reference[n].shape) for n in fused)


def _is_transposed(a: Shape, b: Shape) -> bool:
    return a != b and len(a) == len(b) == 3 and a == (b[0], b[2], b[1])


def _parts(name: str, end: str, ways: Sequence[Sequence[str]], tensors: Tensors) -> list[str]:
    """The names of the tensors that a fused one is made of, in the order of its rows; [], if they are not all there."""
    stems = [name.removesuffix(end)]
    stems += [stem.replace(".mlp.", ".block_sparse_moe.") for stem in stems if ".mlp." in stem]
    for stem in stems:
        for way in ways:
            parts: list[str] = []
            while (further := [stem + p.format(len(parts) // len(way)) for p in way])[0] in tensors:
                if not all(part in tensors for part in further):
                    return []
                parts += further
                if "{}" not in way[0]:
                    break
            if parts:
                return parts
    return []


def _fits(fused: Shape, parts: Sequence[Shape], by_rows: bool) -> bool:
    """Whether the rows of the parts, one part after the other, are as many as those of the fused tensor.

    by_rows  matrices of experts that could as well be transposed are known not to be
    """
    if not parts or any(part[1:] != parts[0][1:] for part in parts):
        return False
    rows, one = sum(part[0] for part in parts), parts[0]
    if len(fused) == len(one):
        return fused == (rows, *one[1:])
    return (
        len(fused) == 3 and len(one) == 2 and fused[2] == one[1] and fused[0] * fused[1] == rows
        and len(parts) in (fused[0], 2 * fused[0]) and (by_rows or fused[1] != fused[2])
    )  # fmt: skip


def _by_rows(name: str, fused: Tensors, single: Tensors) -> bool:
    """Whether the other tensor of the same experts shows that matrices are not transposed."""
    for end, ways in _FUSED[:2]:
        other = name.rpartition("experts.")[0] + end
        if name.endswith(".experts." + end.rpartition(".")[2]) or other not in fused:
            continue
        return _fits(fused[other].shape, [single[part].shape for part in _parts(other, end, ways, single)], False)
    return False


def _fuse(name: str, parts: Sequence[str], reference: Tensors, tensors: Tensors) -> GatheredInput | None:
    """A tensor of the reference's shape whose rows are those of the parts; None, if they do not fit, or are not stored
    as rows.
    """
    shape = reference[name].shape
    if len(shape) == 1 or not _fits(shape, [tensors[p].shape for p in parts], _by_rows(name, reference, tensors)):
        return None
    sources = [source for part in parts if (source := tensors[part].stored_rows) is not None and source.merges]
    if len(sources) < len(parts):
        return None
    rows = _stacked(tuple(source.shape[0] for source in sources))
    dtype = _dtype_of_all(sources)
    nbytes = (dtype.nbytes(1) or 0) * len(rows.codes) * shape[-1]
    return GatheredInput(name, dtype, shape, nbytes, 0, rows, (), tuple(sources), _kept(sources))


def _kept(sources: Sequence[StoredInput]) -> DType | None:
    """The dtype that an output of these tensors keeps, if some are decoded."""
    return promoted(source.kept_dtype for source in sources) if any(source.decoded for source in sources) else None


def _dtype_of_all(sources: Iterable[StoredInput]) -> DType:
    """The dtype of tensors, if they have one; else float32, which holds the numbers of all but F64, or F64."""
    every = {source.dtype for source in sources}
    return every.pop() if len(every) == 1 else F64 if F64 in every else F32


@cache  # layers have the same
def _stacked(counts: tuple[int, ...]) -> RowMap:
    """Rows of parts, so many of each, one part after the other."""
    codes = array("q")
    for number, count in enumerate(counts):
        codes.extend(range(pack(number, 0), pack(number, 0) + count))
    return RowMap(codes, frozenset(range(len(counts))))


def _split(name: str, parts: Sequence[str], tensors: Tensors, reference: Tensors) -> dict[str, TensorInput]:
    """The parts of a fused tensor, in the shapes that the reference has; {}, if they do not fit."""
    stored = tensors[name].stored_rows
    shapes = [reference[part].shape for part in parts]
    if stored is None or not _fits(stored.shape, shapes, _by_rows(name, tensors, reference)):
        return {}
    made: dict[str, TensorInput] = {}
    if stored.encoding is not None:
        first = 0
        for part, shape in zip(parts, shapes, strict=True):
            cut = rows_of(stored, first, math.prod(shape[:-1]), part)
            if cut is None:
                return {}
            made[part] = replace(cut, shape=shape)
            first += math.prod(shape[:-1])
        return made
    start = stored.start
    for part in parts:
        made[part] = _block(stored, part, start, reference[part].shape)
        start += made[part].nbytes
    return made


def _block(stored: StoredInput, name: str, start: int, shape: Shape) -> StoredInput:
    """A part of a stored tensor, from byte `start` of its file on."""
    numel = 1
    for length in shape:
        numel *= length
    return replace(stored, name=name, shape=shape, nbytes=stored.dtype.nbytes(numel) or 0, start=start)


# --- channels --------------------------------------------------------------------------------------------------------


def other_channels(a: Shape, b: Shape) -> bool:
    """Whether shapes are those of convolutions that differ in the number of input channels alone."""
    return len(a) == len(b) > 2 and a[0] == b[0] and a[2:] == b[2:] and a[1] != b[1]


def widened(tensor: TensorInput, widest: TensorInput) -> GatheredInput | None:
    """A convolution with the input channels of the widest: behind its own those of that one. None, if one of the two is
    not stored as rows.

    tensor  [out, c, ...]
    widest  [out, more than c, ...]
    """
    narrow, wide = tensor.stored_rows, widest.stored_rows
    if narrow is None or wide is None:
        return None
    own, every, below = tensor.shape[1], widest.shape[1], 1
    for length in tensor.shape[2:-1]:
        below *= length  # rows of one channel of one output
    codes = array("q")
    for out in range(tensor.shape[0]):
        start = pack(0, out * own * below)
        codes.extend(range(start, start + own * below))
        start = pack(1, (out * every + own) * below)
        codes.extend(range(start, start + (every - own) * below))
    dtype = _dtype_of_all((narrow, wide))
    nbytes = dtype.nbytes(widest.numel) or 0
    return GatheredInput(
        tensor.name, dtype, widest.shape, nbytes, 0, RowMap(codes, frozenset((0, 1))), (), (narrow, wide),
        _kept((narrow, wide)),
    )  # fmt: skip
