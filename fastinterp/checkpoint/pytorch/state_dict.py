"""Which of the tensors in a file of torch.save are the weights: those of one dict, at the top or one level below."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from fastinterp.checkpoint.names import listing, quote
from fastinterp.checkpoint.pytorch.pickle_machine import Foreign
from fastinterp.checkpoint.pytorch.remedies import save_again
from fastinterp.checkpoint.pytorch.tensors import Tensor, Unread
from fastinterp.checkpoint.remedies import literal
from fastinterp.errors import CheckpointError

# Keys of what trainers save beside a model, in dicts of tensors, too.
_STATE = re.compile(
    r"optim|sched|scaler|rng|random|callback|loops?$|hyper_?param|config|cfg|args|metric|history|stats?$|criterion|loss",
    re.IGNORECASE,
)
_ARRAYS = re.compile(r"numpy\..*_reconstruct")
_SHOWN = 8  # names in a message
_TOP = "the top level"


def choose_state_dict(value: Any, file: str, foreign: Collection[str]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """(the tensors of a model by name; what was chosen and left out, for people) of the value in a file's pickle.

    A dict has weights if it has floating tensors of one dimension or more, by name. It is the value itself, or one of
    the values in it.
    foreign  names of the classes in it whose objects were not made
    Raises: CheckpointError, if none has weights, or several have, or a tensor among them is not read.
    """
    if type(value) in (Tensor, Unread):
        save = save_again(file, not foreign, '{"weight": d}')
        raise CheckpointError(f"it holds one tensor without a name. Save it with one: {save}", file=file)
    if type(value) is not dict:
        raise CheckpointError("it does not hold the tensors of a model by name, in a dict", file=file)
    every = {key: v for key, v in value.items() if v is not value and _has_weights(v)}
    places: dict[Any, dict[Any, Any]] = {key: v for key, v in every.items() if not _STATE.search(_shown(key))}
    if _has_weights(value, but=_STATE):
        places = {_TOP: value, **places}
    places = places or every
    if len(places) > 1:
        raise CheckpointError(_ambiguous(places, file, foreign), file=file)
    [(key, chosen)] = places.items() or [(_TOP, value)]
    tensors, others = _tensors(chosen, file)
    if not tensors:
        held = listing(map(_shown, value), _SHOWN) or "nothing"
        raise CheckpointError(f"it has no tensors by name, at the top or one level below. It holds {held}", file=file)
    remarks = []
    if chosen is not value:
        beside = [_shown(k) for k in value if k != key]
        left = f"; left out: {listing(beside, _SHOWN)}" if beside else ""
        remarks.append(f"its {quote(_shown(key))} is read{left}")
    if others:
        remarks.append(f"left out, because they are no tensors: {listing(others, _SHOWN)}")
    if foreign:
        remarks.append(f"passed over: objects of {listing(foreign, _SHOWN)}. Nothing in the file is executed")
    return tensors, tuple(remarks)


def _has_weights(value: Any, but: re.Pattern[str] | None = None) -> bool:
    """Whether it is a dict with weights. but: keys in which this is found do not count."""
    return type(value) is dict and any(
        type(key) is str and _is_weight(t) and not (but is not None and but.search(key)) for key, t in value.items()
    )


def _is_weight(value: Any) -> bool:
    if type(value) is Tensor:
        return bool(value.shape) and (value.dtype.merges or value.dtype.is_complex)
    return type(value) is Unread


def _tensors(chosen: Mapping[Any, Any], file: str) -> tuple[dict[str, Tensor], list[str]]:
    """(the tensors of a dict, the keys of what else is in it)."""
    tensors: dict[str, Tensor] = {}
    others = []
    for key, value in chosen.items():
        if type(value) is Tensor and type(key) is str:
            tensors[key] = value
            continue
        name = _shown(key)
        if type(value) is Unread:
            raise CheckpointError(f"tensor {quote(name)} is {value.what}: not read", file=file, tensor=name)
        if type(value) is Tensor:
            raise CheckpointError(f"the name of a tensor, {quote(name)}, is no string", file=file)
        if type(value) is Foreign and _ARRAYS.fullmatch(value.name):
            raise CheckpointError(
                f"{quote(name)} is an array of numpy, not a tensor. Where it was made, save "
                "`torch.from_numpy(array)` in its place", file=file, tensor=name,
            )  # fmt: skip
        others.append(name)
    return tensors, others


def _shown(key: Any) -> str:
    return key if type(key) is str else getattr(key, "name", None) or repr(key)


def _ambiguous(places: Mapping[Any, Any], file: str, foreign: Collection[str]) -> str:
    sizes = [
        f"{_TOP if key == _TOP else quote(_shown(key))} ({sum(type(t) is Tensor for t in value.values())} tensors)"
        for key, value in places.items()
    ]
    first = next(key for key in places if key != _TOP)
    save = save_again(file, not foreign, f"d[{literal(first)}]")
    return f"it has weights in several places: {', '.join(sizes[:_SHOWN])}. Save the wanted ones alone: {save}"
