"""The tensors of a torch module: where they lie, which of them are one, and whether a model's tensors fit them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Any

from fastinterp.compute.dtypes import DType, parse_dtype
from fastinterp.errors import BackendError, ShapeError, UsageError

_SHOWN = 100  # mismatches that a message lists before it only counts the others


@dataclass(frozen=True, eq=False)
class Weight:
    """A parameter or buffer, or several that share their memory.

    names   as the module's state_dict has them; more than one if they are tied
    tensor  the torch tensor
    dtype   None: it is not merged (integers, booleans)
    """

    names: tuple[str, ...]
    tensor: Any
    dtype: DType | None

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def nbytes(self) -> int:
        return int(self.tensor.numel() * self.tensor.element_size())

    @property
    def address(self) -> int:
        return int(self.tensor.data_ptr())


def weights_of(module: Any, layers: str | Sequence[str] | None) -> list[Weight]:
    """The tensors of a module's state_dict, each once, of which any name matches any of the patterns `layers`.

    Raises: UsageError, if it is no module, nothing matches, or tensors overlap without being the same; BackendError,
    if a tensor is not in the CPU's memory.
    """
    import torch

    if not isinstance(module, torch.nn.Module):
        raise UsageError(f"`module` must be a torch.nn.Module, got {type(module).__name__}")
    groups: dict[Any, tuple[list[str], Any]] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if not isinstance(tensor, torch.Tensor):
            continue  # what get_extra_state returns
        _check_device(name, tensor)
        # Empty tensors lie nowhere, so no two of them are one.
        key = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape)) if tensor.numel() else name
        groups.setdefault(key, ([], tensor))[0].append(name)
    found = [Weight(tuple(names), t.detach(), parse_dtype(str(t.dtype))) for names, t in groups.values()]
    _check_apart(found)
    chosen = [w for w in found if layers is None or matches(w.names, layers)]
    if not chosen:
        raise UsageError(f"no tensor of the module matches {layers!r}. They have names like {_example(found)}")
    return chosen


def matches(names: Iterable[str], layers: str | Sequence[str]) -> bool:
    """Whether any name matches any pattern, in which * stands for anything: `model.layers.1?.*`."""
    patterns = [layers] if isinstance(layers, str) else list(layers)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise UsageError(f"`layers` must be a pattern of names, or several in a list, got {pattern!r}")
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


def _check_device(name: str, tensor: Any) -> None:
    if tensor.device.type == "meta":
        raise UsageError(
            f"{name} has no memory yet (device meta). Load the module first: module.to_empty(device='cpu')"
        )
    if tensor.device.type != "cpu":
        raise BackendError(
            f"{name} is on {tensor.device}, but this version computes on the CPU. Move the module: module.to('cpu')"
        )


def _check_apart(weights: Sequence[Weight]) -> None:
    """Tied tensors are one; those that share some of their memory otherwise cannot be written one by one."""
    by_place = sorted((w for w in weights if w.nbytes and w.tensor.is_contiguous()), key=lambda w: w.address)
    for one, other in pairwise(by_place):
        if other.address < one.address + one.nbytes:
            raise UsageError(f"{one.name} and {other.name} share memory without being the same tensor")


def _example(weights: Sequence[Weight]) -> str:
    return weights[len(weights) // 2].name if weights else "none at all: the module has no tensors"


class Mismatches:
    """Gathers what does not fit, to be raised as one error."""

    def __init__(self) -> None:
        self._found: list[str] = []

    def add(self, message: str) -> None:
        self._found.append(message)

    def check(
        self, weights: Sequence[Weight], model: str, tensors: Mapping[str, tuple[DType, tuple[int, ...]]]
    ) -> None:
        """See that `tensors`, the dtypes and shapes of a model, are those of the module.

        model  what messages call it
        """
        known = {name for w in weights for name in w.names}
        for weight in weights:
            own = [name for name in weight.names if name in tensors]
            if not own:
                kind = "" if weight.dtype else f" ({weight.tensor.dtype})"
                self.add(f"{weight.name}{kind} {list(weight.shape)} is not in {model}")
            for name in own:
                self._compare(weight, name, model, *tensors[name])
        for name in tensors:
            if name not in known:
                self.add(f"{name} of {model} is not in the module")

    def _compare(self, weight: Weight, name: str, model: str, dtype: DType, shape: tuple[int, ...]) -> None:
        if weight.shape != shape:
            self.add(f"{name} is {list(weight.shape)} in the module but {list(shape)} in {model}")
        if bool(weight.dtype) != dtype.merges:
            self.add(
                f"{name} is {str(weight.tensor.dtype).removeprefix('torch.')} in the module but {dtype} in {model}"
            )
        if not weight.tensor.is_contiguous():
            self.add(f"{name} is not contiguous in the module: use .contiguous()")

    def refuse(self) -> None:
        """Raises: ShapeError, if anything was gathered, with all of it."""
        if self._found:
            found = list(dict.fromkeys(self._found))
            more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
            count = f"{len(found)} mismatch{'' if len(found) == 1 else 'es'}"
            raise ShapeError(f"the module does not fit, {count}: {'; '.join(found[:_SHOWN])}{more}")


def touched(weights: Iterable[Weight]) -> None:
    """Tell autograd that the memory changed, so that a backward pass over old values is an error."""
    import torch

    for weight in weights:
        if not weight.tensor.is_inference():
            torch.autograd.graph.increment_version(weight.tensor)
