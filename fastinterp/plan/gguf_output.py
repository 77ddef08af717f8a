"""The output of a merge of GGUF models: the types of its tensors, and the keys of its header."""

from __future__ import annotations

import re
import struct
from collections import Counter
from collections.abc import Iterable, Sequence

from msgspec.structs import replace

from fastinterp.checkpoint.gguf_keys import ARRAY, STRING, U32, U64, GgufHeader, KeyValue
from fastinterp.checkpoint.gguf_types import BY_NAME
from fastinterp.checkpoint.names import GGUF, quote
from fastinterp.errors import CheckpointError, UsageError
from fastinterp.messages import counted, listed
from fastinterp.ops.dtypes import F16, F32, Q8_0, DType
from fastinterp.ops.steps import Encoder
from fastinterp.output.gguf_layout import gguf_layout
from fastinterp.output.layout import Layout
from fastinterp.plan.gguf import header_of
from fastinterp.plan.inputs import PlannedTensor, TensorInput
from fastinterp.plan.models import Model, is_gguf
from fastinterp.plan.output_encoding import OutputEncoding
from fastinterp.recipe.load import Recipe

_LAYER = re.compile(r"blk\.(\d{1,9})\.")
# Tensors of two or more dimensions that llama.cpp reads in F32 only, as its converter writes them.
_ALWAYS_F32 = re.compile(
    r".*_norm\.weight|.*(?:ffn_gate_inp(?:_shexp)?|ssm_conv1d\w*|shortconv\.conv|time_mix_(?:first|w[12]|decay_w[12]|lerp"
    r"\w*)|position_embd|token_types|altup_\w+_coef)\.weight|.*(?<!\.weight)"
)


class StoredTypes:
    """The types in which the tensors of a GGUF output are stored.

    asked  by the recipe; None: those of the origin, as far as they are written
    Raises: UsageError, if GGUF has no such type.
    """

    def __init__(self, origin: Model, asked: DType | None):
        self._asked = asked
        floats = [t for t in origin.tensors.values() if t.merges and len(t.shape) > 1]
        self._mixed = any(_kept(t) != F32 for t in floats)
        if asked is not None and asked.name not in BY_NAME:
            raise UsageError(
                f"{asked} is none of the types of GGUF. `dtype` is float32, float16, bfloat16 or q8_0 there"
            )

    def of(self, name: str, shape: tuple[int, ...], own: TensorInput) -> DType:
        """That of one tensor. own: the one of the origin, or what stands for it."""
        dtype = _kept(own)
        if self._asked is not None and not (
            dtype == F32 and (self._mixed or len(shape) < 2 or _ALWAYS_F32.fullmatch(name))
        ):
            dtype = self._asked
        return F16 if dtype.block and (not shape or shape[-1] % dtype.block[0]) else dtype

    def of_sum(self, name: str, shape: tuple[int, ...], own: TensorInput) -> DType:
        """The dtype of its sum, before it is encoded."""
        dtype = self.of(name, shape, own)
        return F32 if dtype.block else dtype


def _kept(tensor: TensorInput) -> DType:
    """The type of an output tensor that keeps this one's: F16 in the place of those that are not written."""
    return tensor.blocks.dtype if tensor.blocks is not None and tensor.blocks.dtype == Q8_0 else tensor.kept_dtype


def in_stored_types(
    origin: Model, tensors: Sequence[PlannedTensor], recipe: Recipe
) -> tuple[tuple[PlannedTensor, ...], list[str]]:
    """The tensors of a GGUF output as they are stored, in blocks or not; and remarks.

    Copies of blocks are copies of their bytes, where the output has their type, whatever it is.
    Raises: CheckpointError, if `quantize: same` asks for types that are not written.
    """
    asked = recipe.out_dtype or recipe.dtype
    types = StoredTypes(origin, asked)
    every = tuple(_stored(t, types, asked) for t in tensors)
    pairs = [(own.blocks.dtype, _type(t)) for t in every if (own := _own(t)) is not None and own.blocks is not None]
    changed = Counter(before.name for before, after in pairs if before != after)
    if recipe.quantize == "same" and changed:
        raise CheckpointError(
            f"`quantize: same` (--quantize same) asks for the types of {origin.name}, of which these are read and not "
            f"written: {', '.join(changed)}. Leave it out to have F16 there; llama.cpp's llama-quantize makes such "
            "types of the output",
            file=origin.name,
        )
    remarks = []
    if changed and asked is None:
        kinds = listed([f"{count} {kind}" for kind, count in changed.most_common()], 8)
        remarks.append(
            f"{counted(changed.total(), 'tensor')} that {origin.name} has in types that are not written ({kinds}): "
            "stored in F16. llama.cpp's llama-quantize makes such types of the output"
        )
    if asked is not None and (others := sum(t.merged and _type(t) != asked for t in every)):
        remarks.append(f"{counted(others, 'tensor')} not stored in {asked}: llama.cpp reads them in another type only")
    return every, remarks


def _own(planned: PlannedTensor) -> TensorInput | None:
    """The tensor of the origin whose type an output tensor keeps."""
    return None if planned.form is None else planned.form.form


def _type(planned: PlannedTensor) -> DType:
    return planned.entries[0][1]


def _stored(planned: PlannedTensor, types: StoredTypes, asked: DType | None) -> PlannedTensor:
    own = _own(planned)
    if own is None or not planned.merged:
        return planned
    copies = planned.program is None and len(planned.inputs) == 1 and all(row.is_copy for row in planned.rows)
    blocks = planned.inputs[0].blocks if copies else None
    wanted = types.of(planned.name, planned.shape, own)
    if blocks is not None and blocks.dtype in (wanted, own.blocks.dtype if own.blocks and asked is None else None):
        return replace(planned, dtype=blocks.dtype, inputs=(blocks,), rows=(), sums=())
    if wanted.block is None or planned.numel == 0:
        return planned
    alike = tuple(one.blocks is not None and one.blocks.dtype == wanted for one in planned.inputs)
    encoder = Encoder(wanted.name.lower(), planned.shape[-1])
    form = OutputEncoding(wanted.name, (planned.name, wanted, planned.shape), (), encoder, alike)
    return replace(planned, dtype=F32, encoding=form)


def refuse_ending(ending: str, origin: Model) -> None:
    """Raises: UsageError, if the name of a one-file output says another format than that of the models.

    ending  of the name; empty: the output is a folder
    """
    if (ending == GGUF) != is_gguf(origin) and ending:
        wanted = "NAME.gguf" if is_gguf(origin) else "NAME.safetensors"
        why = "is in GGUF, and so is the output" if is_gguf(origin) else "is not in GGUF, and neither is the output"
        more = "" if is_gguf(origin) else ". llama.cpp's convert_hf_to_gguf.py makes GGUF of an output folder"
        raise UsageError(f"the output is named *{ending}, but {origin.name} {why}. Name it {wanted}, or a folder{more}")


def layout(origin: Model, tensors: Sequence[PlannedTensor], receipt: str, limit: int | None, stacked: bool) -> Layout:
    """The layout of an output, which is one file.

    limit    bytes of tensors in one file, if the user set one
    stacked  the output may have the origin's layers in another order, or other layers
    Raises: OutputError; UsageError, if the limit is less than the output takes; CheckpointError, if the keys cannot say
    what its layers are.
    """
    source, header = origin.source, header_of(origin)
    assert source is not None
    own = {name: (e.conversion.stored_as if e.conversion else e.dtype.name) for name, e in source.tensors.items()}
    order = {name: i for i, name in enumerate(own)}
    if all(t.name in order for t in tensors):
        tensors = sorted(tensors, key=lambda t: order[t.name])
    same = all(own.get(t.name) == _type(t).name for t in tensors)
    made = gguf_layout(
        [entry for t in tensors for entry in t.entries],
        _layered(header, own, [t.name for t in tensors], origin.name) if stacked else header.keys,
        header.alignment, receipt, source.files[0].name, same,
    )  # fmt: skip
    if limit is not None and made.total_size > limit:
        raise UsageError(
            f"a GGUF output is one file, here of {made.total_size} bytes, more than --max-shard-size {limit}. Leave "
            "that out; llama.cpp's `llama-gguf-split --split-max-size 5G X.gguf X` splits the file"
        )
    return made


def _layered(header: GgufHeader, own: Iterable[str], names: Iterable[str], origin: str) -> dict[str, KeyValue]:
    """The keys of an output with other layers: their number, and arrays that have an element for each of them."""
    before, after = _layers(own), _layers(names)
    keys = dict(header.keys)
    name = f"{header.architecture}.block_count"
    count = header.value(name)
    if not isinstance(count, int) or not 0 < before <= count < 1 << 32:
        raise CheckpointError(f"{origin}: `{name}` does not say how many layers there are: got {count!r}")
    count_now = count + after - before
    kind = U64 if keys[name].kind == U64 else U32
    keys[name] = KeyValue(name, kind, kind, 1, struct.pack("<IQ" if kind == U64 else "<II", kind, count_now))
    for key, found in header.keys.items():
        if found.kind != ARRAY or found.count != count or not key.startswith(f"{header.architecture}."):
            continue
        values = found.numbers()
        if found.element == STRING or values is None or len(set(values)) > 1:
            raise CheckpointError(
                f"{origin}: {quote(key)} differs from layer to layer, so the layers cannot be put in another order. "
                "Merge the models in safetensors, and convert the output with llama.cpp's convert_hf_to_gguf.py"
            )
        width = (len(found.raw) - 16) // found.count
        new = found.raw[:8] + struct.pack("<Q", count_now) + found.raw[16 : 16 + width] * count_now
        keys[key] = KeyValue(key, found.kind, found.element, count_now, new)
    return keys


def _layers(names: Iterable[str]) -> int:
    return max((int(m[1]) + 1 for name in names if (m := _LAYER.match(name))), default=0)
