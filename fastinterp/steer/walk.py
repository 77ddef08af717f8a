"""A module that takes on the weights of one point after the other, and gets its own back at the end."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

from fastinterp.errors import ShapeError, UsageError

_SHOWN = 8  # mismatches that a message lists


class Walker:
    """A context manager: inside it `take` puts weights into the module, and the end restores what was there."""

    def __init__(self, module: Any):
        if not hasattr(module, "state_dict") or not hasattr(module, "load_state_dict"):
            raise UsageError(f"`model` must be a torch module, got {type(module).__name__}")
        self._own: dict[str, Any] = module.state_dict()
        self._saved: dict[str, Any] = {}

    def __enter__(self) -> Walker:
        self._saved = {name: self._own[name].detach().clone() for name in _first_names(self._own)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._copy(self._saved)
        self._saved = {}

    def take(self, tensors: Mapping[str, Any]) -> None:
        """Names as in the module's state dict. Tied tensors need one of their names; dtype and device stay.

        Raises: ShapeError, with all that does not fit; UsageError, if they are no torch tensors.
        """
        for name, x in tensors.items():
            if not hasattr(x, "data_ptr"):
                raise UsageError(f"{name} must be a torch tensor, to be put into a module, got {type(x).__name__}")
        given = {_place(self._own[name]) for name in tensors if name in self._own}
        wrong = [f"{name} is not in the module" for name in tensors if name not in self._own]
        wrong += [f"{n} of the module is missing" for n in self._own if n not in tensors and not self._tied(n, given)]
        for name, x in tensors.items():
            if name in self._own and tuple(x.shape) != tuple(self._own[name].shape):
                wrong.append(f"{name} is {list(x.shape)}, in the module {list(self._own[name].shape)}")
        if wrong:
            more = f"; and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
            raise ShapeError(f"the weights do not fit the module: {'; '.join(wrong[:_SHOWN])}{more}")
        self._copy(tensors)

    def _tied(self, name: str, given: set[tuple[object, ...]]) -> bool:
        return _place(self._own[name]) in given

    def _copy(self, tensors: Mapping[str, Any]) -> None:
        import torch

        with torch.no_grad():
            for name, x in tensors.items():
                self._own[name].copy_(x)


def dtype_of(module: Any) -> str | None:
    """The floating dtype that all of a module's tensors have, or None: they have several, or it is no module."""
    tensors = module.state_dict().values() if hasattr(module, "state_dict") else ()
    found = {str(x.dtype) for x in tensors if x.is_floating_point()}
    return found.pop() if len(found) == 1 else None


def _place(x: Any) -> tuple[object, ...]:
    return x.device, x.data_ptr(), tuple(x.shape)


def _first_names(tensors: Mapping[str, Any]) -> list[str]:
    """One name for each place in memory."""
    places: dict[tuple[object, ...], str] = {}
    for name, x in tensors.items():
        places.setdefault(_place(x), name)
    return list(places.values())
