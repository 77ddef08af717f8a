"""The models of a merge in memory: state dicts whose names, shapes and dtypes fit each other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastinterp.backends.cpu import Handle
from fastinterp.backends.torch_device import common_device
from fastinterp.errors import ShapeError, UsageError
from fastinterp.in_memory.arrays import ArrayView, DLPackArrays, Library, TorchTensors, library_of
from fastinterp.ops.dtypes import DType
from fastinterp.ops.steps import Stored

Arrays = Mapping[str, Any]  # a state dict: arrays of one library, or `StoredTensor`s, by name
_SHOWN = 5  # names that a message lists


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A floating tensor that is read from an open file as it is merged.

    source  number of the file in the Sources that it is open in
    start   byte offset in the file
    """

    source: int
    start: int
    shape: tuple[int, ...]
    dtype: DType


View = ArrayView | StoredTensor


class Inputs:
    """The models of one merge, the base first, and its side-cars: tensors that models bring beside their weights.

    labels  what messages call the models: `state dict 0`, say
    """

    def __init__(self, models: Sequence[Arrays], sidecars: Sequence[Arrays], labels: Sequence[str]):
        self.models, self.sidecars = [*models], [*sidecars]
        self._by_name = labels[-1].startswith("state dict")
        self._labels = [*labels, *(f"side-car {i}" for i in range(len(sidecars)))]
        first = next(iter(self.first.values()), None)
        self.library: Library = TorchTensors if isinstance(first, StoredTensor) else library_of(first)

    @property
    def first(self) -> Arrays:
        return self.models[0]

    @property
    def _all(self) -> list[tuple[str, Arrays]]:
        return list(zip(self._labels, [*self.models, *self.sidecars], strict=True))

    def prepared(self) -> Inputs:
        """The inputs as torch tensors, if they are arrays of another library with DLPack."""
        if self.library is not DLPackArrays:
            return self
        models, sidecars = (
            [{name: DLPackArrays.prepare(x) for name, x in arrays.items()} for arrays in part]
            for part in (self.models, self.sidecars)
        )
        return Inputs(models, sidecars, self._labels[: len(models)])

    def check_names(self) -> None:
        """Raises: UsageError, if a name is no text; ShapeError, if models differ in their names."""
        names = self.first
        for name in names:
            text(name, "the name of a tensor")
        for label, other in self._all[1:]:
            missing = [n for n in names if n not in other]
            more = [n for n in other if n not in names]
            if missing or more:
                shown = ", ".join((missing or more)[:_SHOWN])
                raise ShapeError(f"{label} {'lacks' if missing else 'alone has'} {shown}. All must have the same names")

    def device(self) -> Any:
        """The torch.device of all tensors, None for the CPU. Raises: UsageError, if they are on several."""
        tensors = [(self._label(name, label), x) for label, arrays in self._all for name, x in arrays.items()]
        return common_device([
            (label, None if isinstance(x, StoredTensor) else self.library.device(x))
            for label, x in tensors if self._is_like_first(x)
        ])  # fmt: skip

    def merges(self, name: str) -> bool:
        """Whether a tensor is merged. Raises: UsageError; ShapeError, if one that is not differs between models."""
        models = self._all[: len(self.models)]
        for label, arrays in models:
            if not hasattr(arrays[name], "dtype") or not self._is_like_first(arrays[name]):
                kind = type(arrays[name]).__name__
                raise UsageError(f"{self._label(name, label)} must be a tensor like the first, got {kind}")
        tensors = [arrays[name] for arrays in self.models]
        floats = [isinstance(x, StoredTensor) or self.library.dtype(x) is not None for x in tensors]
        if all(floats):
            return True
        if any(floats):
            kinds = ", ".join(str(x.dtype) for x in tensors[:_SHOWN])
            raise ShapeError(f"{name} is of dtypes {kinds}. Only floating ones merge; others must agree", tensor=name)
        first = tensors[0]
        for label, arrays in models[1:]:
            if not self.library.equal(first, arrays[name]):
                raise ShapeError(f"{name} ({first.dtype}) is not averaged, and differs in {label}", tensor=name)
        return False

    def views(self, name: str) -> list[View]:
        """A tensor of each model, then of each side-car. Raises: UsageError; ShapeError, if shapes differ."""
        views: list[View] = []
        for label, arrays in self._all:
            x = arrays[name]
            views.append(x if isinstance(x, StoredTensor) else self.library.view(x, self._label(name, label)))
            if views[-1].shape != views[0].shape:
                shapes = f"{list(views[0].shape)} in {self._labels[0]} but {list(views[-1].shape)} in {label}"
                raise ShapeError(f"{name} is {shapes}. Only tensors of the same shape merge", tensor=name)
        return views

    def _is_like_first(self, x: Any) -> bool:
        return (TorchTensors if isinstance(x, StoredTensor) else library_of(x)) is self.library

    def _label(self, name: str, label: str) -> str:
        """The name of a tensor in messages: of single tensors the label says all."""
        return f"{name} of {label}" if self._by_name else label


def operand_of(view: View, kind: str, sources: list[Handle]) -> Stored:
    """A view as an operand of a step. An array becomes one more of `sources`, memory of this kind."""
    code = view.dtype.code or 0
    if isinstance(view, StoredTensor):
        return Stored(view.source, view.start, code)
    sources.append((kind, view.address, math.prod(view.shape) * view.dtype.bits // 8))
    return Stored(len(sources) - 1, 0, code)


def text(value: object, what: str) -> str:
    """`value`, if it is text that UTF-8 can write. Raises: UsageError, else. what: what messages call it."""
    if not isinstance(value, str):
        raise UsageError(f"{what} must be text, got {value!r}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UsageError(f"{what} must be text that UTF-8 can write, got {value!r}") from None
    return value
