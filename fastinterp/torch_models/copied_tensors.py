"""Tensors of a module that a path does not change: those that are not floating there, or in one of its end points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from fastinterp.errors import ShapeError
from fastinterp.torch_models.endpoints import Endpoint, Endpoints
from fastinterp.torch_models.module_tensors import Weight, increment_versions, with_versions


class CopiedTensors:
    """Tensors of a module that are those of one end point, until `restore`.

    weights  of the module; those that are floating here and in all models are left alone
    models   all end points
    chosen   the one whose tensors are copied
    Raises: ShapeError, if a tensor has another shape there; CheckpointError, StorageError.
    """

    def __init__(self, weights: Sequence[Weight], models: Sequence[Endpoint], chosen: Endpoint):
        specs = [model.specs() for model in models]
        self.names = {
            name for w in weights for name in w.names
            if w.dtype is None or any(name in s and not s[name][0].merges for s in specs)
        }  # fmt: skip
        self._weights = [w for w in weights if any(name in self.names for name in w.names)]
        self._own = [w.tensor.clone() for w in self._weights]
        with ExitStack() as stack:
            tensors = Endpoints([chosen], stack, self.names).read(chosen)
        values = [_value(w, tensors, chosen.label) for w in self._weights]
        self._copy(values)

    def restore(self) -> None:
        self._copy(self._own)

    def _copy(self, values: Sequence[Any]) -> None:
        import torch

        for weight, value in zip(self._weights, values, strict=True):
            with torch.inference_mode(weight.tensor.is_inference()), torch.no_grad():
                weight.tensor.copy_(value)
        increment_versions(with_versions(self._weights))


def _value(weight: Weight, tensors: Mapping[str, Any], label: str) -> Any:
    """The tensor of an end point for a weight; the weight's own, if it has none."""
    value = next((tensors[name] for name in weight.names if name in tensors), weight.tensor)
    if tuple(value.shape) != weight.shape:
        raise ShapeError(
            f"{weight.name} is {list(weight.shape)} in the module but {list(value.shape)} in {label}",
            tensor=weight.name,
        )
    return value
