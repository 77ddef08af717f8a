"""Sums of methods as plain values, as receipts store them, and back: the same sum, whatever it was computed from."""

from __future__ import annotations

import binascii
import math
import sys
from array import array
from dataclasses import fields
from typing import Any

import msgspec

from fastinterp.ops.combine import LARGEST as LARGEST_NUMBER
from fastinterp.ops.combine import Combine, check_coefficients
from fastinterp.ops.masked import read_inputs
from fastinterp.ops.requests import ALL_BITS, GroupCombine, Mask, MaskedCombine, Sum

LARGEST = 64 << 10  # bytes of the weights or factors of one sum by row, beyond which it has no plain form
_KINDS: dict[str, type] = {"combine": Combine, "masked": MaskedCombine, "groups": GroupCombine}
_BASE64 = "weights_f64"  # of sums by group: float64, little endian, in base64


def plain_sum(total: Sum) -> dict[str, Any] | None:
    """The sum as JSON has it: its kind, and the fields that differ from their defaults. Floats are exact.

    None, if it has weights or factors by row of more than 64 KiB: these are computed again where they are needed.
    """
    if isinstance(total, GroupCombine):
        if len(total.weights) * 8 > LARGEST:
            return None
        values = array("d", total.weights)
        if sys.byteorder == "big":
            values.byteswap()
        encoded = binascii.b2a_base64(values.tobytes(), newline=False).decode()
        group: dict[str, Any] = {"n": total.n, "per": total.per, "base": total.base, "sums_to_one": total.sums_to_one}
        return {"groups": {_BASE64: encoded, **_shortened(GroupCombine, group)}}
    if isinstance(total, MaskedCombine):
        if total.score is not None and len(total.score.factors) > LARGEST:
            return None
        masked: dict[str, Any] = _shortened(MaskedCombine, {f.name: getattr(total, f.name) for f in fields(total)})
        if total.masks is not None:
            masked["masks"] = [_shortened(Mask, {f.name: getattr(m, f.name) for f in fields(m)}) for m in total.masks]
        return {"masked": _builtins(masked)}
    return {"combine": _builtins(_shortened(Combine, {f.name: getattr(total, f.name) for f in fields(total)}))}


def sum_of(value: Any, n: int, groups: dict[str, int]) -> Sum:
    """The sum of a plain form. Nothing in it is trusted.

    n       inputs of the tensor, those of side-cars included
    groups  how many rows and columns the tensor has: {"row": ..., "column": ...}
    Raises: ValueError, if it is none, or none of a tensor of n inputs.
    """
    if not isinstance(value, dict) or len(value) != 1 or (kind := next(iter(value))) not in _KINDS:
        raise ValueError(f"a sum is an object with one of {', '.join(_KINDS)}")
    content = value[kind]
    try:
        total: Sum
        if kind == "groups":
            total = _groups(dict(content))
            if len(total.weights) != total.n * groups[total.per]:
                raise ValueError("the number of weights is not that of the groups")
            check_coefficients(total.weights, "the tensor")
        else:
            total = msgspec.convert(content, _KINDS[kind])
        inputs = _inputs(total, groups["row"])
    except (msgspec.ValidationError, KeyError, TypeError, IndexError, binascii.Error) as error:
        raise ValueError(str(error)) from None
    if any(not 0 <= i < n for i in inputs):
        raise ValueError(f"it reads input {max(inputs)}, but there are {n}")
    return total


def _inputs(total: Sum, rows: int) -> list[int]:
    """The inputs that it names. Raises: ValueError, if its parts do not fit each other."""
    if isinstance(total, MaskedCombine):
        return [*_checked_masked(total, rows), *range(len(total.weights))]
    if isinstance(total, GroupCombine):
        if total.base is not None and total.base >= total.n:
            raise ValueError("the base is none of the inputs")
        total.row()
        return [*range(total.n)]
    for at in (total.base, total.pivot):
        if at is not None and not 0 <= at < len(total.weights):
            raise ValueError("the base or the pivot is none of the inputs")
    if not all(math.isfinite(w) for w in total.weights) or not total.weights:
        raise ValueError("weights must be finite numbers")
    total.row()
    return [*range(len(total.weights))]


def _checked_masked(total: MaskedCombine, rows: int) -> list[int]:
    numbers = [t for t in (total.weights, total.sign_weights, total.shares, total.sole_weights) if t is not None]
    if not all(abs(w) <= LARGEST_NUMBER for some in numbers for w in some) or not total.weights:
        raise ValueError("weights must be finite numbers")
    bits = [b for mask in total.masks or () for b in (mask.min_bits, mask.max_bits)]
    bits += [] if total.score is None else [total.score.min_bits]
    if any(not 0 <= b <= ALL_BITS + 1 for b in bits):
        raise ValueError("bounds of a mask must be bits of float32 magnitudes")
    if any(not (0.0 <= m.probability <= 1.0 and 0.0 <= m.rank_slope <= 1.0) for m in total.masks or ()):
        raise ValueError("probabilities of a mask must be in 0..1")
    if total.score is not None and total.score.kind == "divergence" and len(total.score.factors) != 4 * rows:
        raise ValueError("the number of factors is not that of the rows")
    return read_inputs(total)


def _groups(content: dict[str, Any]) -> GroupCombine:
    weights = array("d")
    weights.frombytes(binascii.a2b_base64(content.pop(_BASE64)))
    if sys.byteorder == "big":
        weights.byteswap()
    per, n, base, one = (
        content.pop("per"),
        content.pop("n"),
        content.pop("base", None),
        content.pop("sums_to_one", False),
    )
    if per not in ("row", "column") or type(n) is not int or n < 1 or content:
        raise ValueError("not the weights of rows or columns")
    if not (base is None or type(base) is int) or not isinstance(one, bool):
        raise ValueError("`base` or `sums_to_one` is wrong")
    return GroupCombine(weights, n, per, base, one)


def _shortened(kind: type, values: dict[str, Any]) -> dict[str, Any]:
    """Without what is at its default."""
    defaults = {f.name: f.default for f in fields(kind)}
    return {name: value for name, value in values.items() if defaults[name] != value}


def _builtins(values: dict[str, Any]) -> dict[str, Any]:
    """Dataclasses in it are mappings then, tuples lists, bytes base64."""
    plain: dict[str, Any] = msgspec.to_builtins(values)
    return plain
