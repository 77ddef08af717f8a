"""Scales of activations beside encoded tensors, which mean nothing where weights are numbers; and what is told of both.

Software that loads numbers knows no such tensors: transformers would report unexpected keys. So they are left out.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from fastinterp.checkpoint.formats.encoded import EncodedTensor
from fastinterp.checkpoint.names import listing
from fastinterp.checkpoint.open import Checkpoint
from fastinterp.messages import counted
from fastinterp.ops.dtypes import F8_E4M3, F8_E5M2

# Of attention: what keys, values and queries are divided by before they are stored in 8 bits.
_CACHE = re.compile(
    r"(^|\.)(attn|\w*attention\w*|self_attn|attn\.\w+|self_attn\.\w+)\.(k|v|q|kv|prob|qkv)_(scale|zero_point)$"
)
_FP8 = (F8_E4M3, F8_E5M2)
_LISTED = 3  # names in a remark before the rest is only counted


def scales_of_activations(checkpoint: Checkpoint, encoded: Sequence[EncodedTensor]) -> tuple[str, ...]:
    """The names of scales of keys and values, in components that have encoded tensors."""
    if not encoded:
        return ()
    names = {one.codes.name for one in encoded}
    return tuple(
        part.prefix + name
        for part in checkpoint.parts
        if any(part.prefix + name in names for name in part.checkpoint.tensors)
        for name, e in part.checkpoint.tensors.items()
        if name.endswith(("_scale", "_zero_point")) and e.numel <= 1 and _CACHE.search(name)
    )


def about_what_is_not_said(checkpoint: Checkpoint, encoded: Sequence[EncodedTensor]) -> tuple[str, ...]:
    """Remarks on what is said nowhere: the size of blocks, and that tensors without a scale are numbers."""
    name, remarks = checkpoint.name, []
    if assumed := [one for one in encoded if one.assumed]:
        remarks.append(
            f"{name}: no configuration says how large the blocks of {listing((one.name for one in assumed), 1)} are: "
            f"taken as {assumed[0].format.partition('blocks of ')[2]}, by the number of scales"
        )
    if any(one.decoder.startswith("scaled_f8") for one in encoded):
        taken = {e.name for one in encoded for e in one.stored}
        plain = [n for n, e in checkpoint.tensors.items() if e.dtype in _FP8 and len(e.shape) > 1 and n not in taken]
        if plain:
            remarks.append(f"{name}: without a scale, and taken for numbers as they are: {listing(plain, _LISTED)}")
    return tuple(remarks)


def about_numbers(
    checkpoint: Checkpoint, encoded: Sequence[EncodedTensor], activations: Sequence[str]
) -> tuple[str, ...]:
    """Remarks on weights that are written as numbers: which were codes, and what is left out with these."""
    name = checkpoint.name
    remarks = [
        f"{name}: {counted(count, 'tensor')} de-quantised ({form})"
        for form, count in Counter(one.format for one in encoded if one.format).items()
    ]
    left = [*(e.name for one in encoded for e in one.activations), *activations]
    if left:
        what = "scales of activations, which mean nothing where weights are numbers"
        remarks.append(f"left out of {name}: {what}: {listing(left, _LISTED)}")
    return tuple(remarks)
