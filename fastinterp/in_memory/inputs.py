"""The models of a merge in memory: state dicts whose names, shapes and dtypes fit each other."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from fastinterp.backends.cpu import SourceHandle
from fastinterp.backends.torch_device import common_device
from fastinterp.checkpoint.quantised import quantised_tensors
from fastinterp.errors import CheckpointError, ShapeError, UsageError
from fastinterp.in_memory.arrays import ArrayView, DLPackArrays, Library, TorchTensors, library_of, stored_dtype
from fastinterp.messages import listed
from fastinterp.ops.dtypes import DType
from fastinterp.ops.operands import Stored
from fastinterp.plan.quantised import quantised_arrays

Arrays = Mapping[str, Any]  # a state dict: arrays of one library, or `StoredTensor`s, by name
_SHOWN = 5  # names that a message lists
_INTEGERS = "Say whose to take: `integers=`, the number of a state dict or 'base'"


class ArrayHeader(NamedTuple):
    """Dtype and shape of an array."""

    dtype: DType
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A floating tensor that is read from an open file as it is merged.

    source   number of the file in the Sources that it is open in
    start    byte offset in the file
    dtype    of its numbers
    operand  how it is read, if its bytes there are not all that it is: codes, or with products of adapters; else None
    """

    source: int
    start: int
    shape: tuple[int, ...]
    dtype: DType
    operand: Stored | None = None


View = ArrayView | StoredTensor


class Inputs:
    """The models of one merge, the base first, and its side-cars: tensors that models bring beside their weights.

    labels  what messages call the models: `state dict 0`, say
    """

    def __init__(self, models: Sequence[Arrays], sidecars: Sequence[Arrays], labels: Sequence[str]):
        self.models, self.sidecars = [*models], [*sidecars]
        self._held: list[Any] = []  # what views point into
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
                self._refuse_other_names(label, other)
                shown = ", ".join((missing or more)[:_SHOWN])
                raise ShapeError(f"{label} {'lacks' if missing else 'alone has'} {shown}. All must have the same names")

    def _refuse_other_names(self, label: str, other: Arrays) -> None:
        """Raises: ShapeError, if the names differ from the first's in a prefix, a wrapper or the like."""
        from fastinterp.plan.tensor_names import match_names

        match = match_names(self._headers(other), self._headers(self.first))
        if match is None or not set(match.names.values()) <= self.first.keys():
            return
        changed = next((name, new) for name, new in match.names.items() if name != new)
        raise ShapeError(
            f"{label} has other names than {self._labels[0]}; they are the same with {listed(match.how, _SHOWN)}. "
            f"Rename them, {changed[0]} to {changed[1]} and so on"
        )

    def refuse_adapters(self) -> None:
        """Raises: CheckpointError, if a state dict is an adapter, or of a model of peft with one."""
        from fastinterp.checkpoint.adapters import find_adapter, refusal_in_memory

        for label, arrays in self._all[: len(self.models)] if self._by_name else ():
            adapter = find_adapter(self._headers(arrays), {}, None)
            if adapter is not None and (message := refusal_in_memory(label, adapter)):
                raise CheckpointError(message)

    def device(self) -> Any:
        """The torch.device of all tensors, None for the CPU. Raises: UsageError, if they are on several."""
        tensors = [(self._label(name, label), x) for label, arrays in self._all for name, x in arrays.items()]
        return common_device([
            (label, None if isinstance(x, StoredTensor) else self.library.device(x))
            for label, x in tensors if self._is_like_first(x)
        ])  # fmt: skip

    def refuse_quantised(self) -> frozenset[str]:
        """The names of tensors with codes or scales of quantised weights, which are equal in all models, and copied.

        Raises: CheckpointError, if they are not equal.
        """
        found = [quantised_tensors(self._headers(arrays)) for arrays in self.models]
        names = [{name for q in every for name in (q.codes, *q.companions)} for every in found]
        same = all(n == names[0] for n in names[1:]) and all(
            self._equal(arrays[name], self.first[name]) for name in names[0] for arrays in self.models[1:]
        )
        if not same:
            known = [(label, every) for label, every in zip(self._labels, found, strict=False) if every]
            raise quantised_arrays(known)
        return frozenset(names[0])

    @staticmethod
    def _headers(arrays: Arrays) -> dict[str, ArrayHeader]:
        headers = {}
        for name, x in arrays.items():
            dtype = x.dtype if isinstance(x, StoredTensor) else stored_dtype(x) if hasattr(x, "dtype") else None
            if dtype is not None and isinstance(name, str):
                headers[name] = ArrayHeader(dtype, tuple(x.shape))
        return headers

    def _equal(self, x: Any, y: Any) -> bool:
        return not isinstance(x, StoredTensor) and not isinstance(y, StoredTensor) and self.library.equal(x, y)

    def unmerged(self, quantised: Collection[str], chosen: int | None, sums: Callable[[str], bool]) -> dict[str, Any]:
        """The tensors that are copied, by name: those that are not floating in all models.

        quantised  names of tensors that are copied, whatever their dtype
        chosen     the model whose tensors are taken; None: they must be equal, but for complex numbers
        sums       whether the method only sums a tensor, so that complex numbers that differ are not copied
        Raises: UsageError; ShapeError, about all that differ.
        """
        copied: dict[str, Any] = {}
        kinds: list[str] = []
        differing: list[tuple[str, str]] = []
        for name in self.first:
            for label, arrays in self._all[: len(self.models)]:
                if not hasattr(arrays[name], "dtype") or not self._is_like_first(arrays[name]):
                    kind = type(arrays[name]).__name__
                    raise UsageError(f"{self._label(name, label)} must be a tensor like the first, got {kind}")
            tensors = [arrays[name] for arrays in self.models]
            floats = [isinstance(x, StoredTensor) or self.library.dtype(x) is not None for x in tensors]
            if all(floats) and name not in quantised:
                continue
            copied[name] = tensors[chosen or 0]
            is_complex = not any(floats) and all(self._is_complex(x) for x in tensors)
            if (chosen is not None and not (is_complex and sums(name))) or name in quantised:
                continue
            if any(floats):
                dtypes = (str(x.dtype).removeprefix("torch.") for x in tensors[:_SHOWN])
                kinds.append(f"{name} is of dtypes {', '.join(dtypes)}")
            elif other := next((i for i, x in enumerate(tensors) if not self.library.equal(tensors[0], x)), 0):
                if is_complex:
                    del copied[name]
                else:
                    dtype = str(tensors[0].dtype).removeprefix("torch.")
                    differing.append((f"{name} ({dtype})", self._labels[other]))
        if kinds:
            raise ShapeError(f"{listed(kinds, _SHOWN)}. Only floating ones merge. {_INTEGERS}")
        if differing:
            are = "is not averaged, and differs" if len(differing) == 1 else "are not averaged, and differ"
            names = listed((name for name, _ in differing), _SHOWN)
            raise ShapeError(f"{names} {are} in {differing[0][1]}. {_INTEGERS}")
        return copied

    def is_complex(self, name: str) -> bool:
        """Whether a tensor of the first model is of pairs of float32 numbers."""
        return self._is_complex(self.first[name])

    def view(self, x: Any, label: str) -> ArrayView:
        """An array as kernels see it: of complex numbers, their parts. Raises: UsageError."""
        if self._is_complex(x):
            x = self.library.pairs(x)
            self._held.append(x)
        return self.library.view(x, label)

    def _is_complex(self, x: Any) -> bool:
        dtype = None if isinstance(x, StoredTensor) else stored_dtype(x)
        return dtype is not None and dtype.is_complex

    def views(self, name: str) -> list[View]:
        """A tensor of each model, then of each side-car. Raises: UsageError; ShapeError, if shapes differ."""
        views: list[View] = []
        for label, arrays in self._all:
            x = arrays[name]
            views.append(x if isinstance(x, StoredTensor) else self.view(x, self._label(name, label)))
            if views[-1].shape != views[0].shape:
                shapes = f"{list(views[0].shape)} in {self._labels[0]} but {list(views[-1].shape)} in {label}"
                raise ShapeError(f"{name} is {shapes}. Only tensors of the same shape merge", tensor=name)
        return views

    def _is_like_first(self, x: Any) -> bool:
        return (TorchTensors if isinstance(x, StoredTensor) else library_of(x)) is self.library

    def _label(self, name: str, label: str) -> str:
        """The name of a tensor in messages: of single tensors the label says all."""
        return f"{name} of {label}" if self._by_name else label


def operand_of(view: View, kind: str, sources: list[SourceHandle]) -> Stored:
    """A view as an operand of a step. An array becomes one more of `sources`, memory of this kind."""
    code = view.dtype.code or 0
    if isinstance(view, StoredTensor):
        return view.operand or Stored(view.source, view.start, code)
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
