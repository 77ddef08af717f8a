"""Replaces the weights of a module by those of one point after another, in place, and restores them at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any

from fastinterp.errors import UsageError
from fastinterp.in_memory.inputs import StoredTensor
from fastinterp.torch_models.endpoints import Endpoint, Endpoints, not_in_all
from fastinterp.torch_models.module_tensors import WHOSE, Mismatches, identity_of, tensors_of, weights_of


class ModuleWeights:
    """A context manager: inside it `write` puts weights into the module, and its end restores what was there.

    models  the end points that the weights are computed from
    mixed   a tensor may be floating in one and not in another

    Tied tensors are one, under the first of their names. The module may be on any device.
    Raises: UsageError, if it is no torch module; ShapeError, with everything that does not fit.
    """

    def __init__(self, module: Any, models: Sequence[Endpoint], *, mixed: bool = False):
        self._module, self._models = module, models
        every = weights_of(module, None)
        computed = not_in_all({name: weight for weight in every for name in weight.names}, models)
        self._weights = [w for w in every if computed.isdisjoint(w.names)]
        self._saved: dict[str, Any] = {}
        self._copies: dict[object, Any] = {}  # of end points' tensors in the module's own memory, by identity
        mismatches = Mismatches(mixed=mixed, remedy=WHOSE)
        for model in models:
            specs = {name: spec for name, spec in model.specs().items() if name not in computed}
            mismatches.check(self._weights, model.label, specs)
        mismatches.refuse()
        with ExitStack() as stack:
            endpoints = Endpoints(models, stack)
            for model in models:
                endpoints.check_tied(model, endpoints.tensors(model), self._weights)

    def __enter__(self) -> ModuleWeights:
        self._saved = {w.name: w.tensor.clone() for w in self._weights}
        storages = {w.tensor.untyped_storage().data_ptr() for w in self._weights}
        tensors = [x for model in self._models for x in model.state.values() if hasattr(x, "untyped_storage")]
        self._copies = {identity_of(x): x.clone() for x in tensors if x.untyped_storage().data_ptr() in storages}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        current = dict(tensors_of(self._module))
        converted = [n for n, x in self._saved.items() if n not in current or current[n].dtype != x.dtype]
        self.write({name: x for name, x in self._saved.items() if name in current})
        self._saved, self._copies = {}, {}
        if converted and kind is None:
            raise UsageError(
                f"{converted[0]} was converted or replaced while the path was evaluated, so the module does not have "
                "its own weights again. Load it anew"
            )

    def select(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """The tensors of an end point that the module has, tied ones once, by the name that `write` takes."""
        selected = {w.name: tensors[next(n for n in w.names if n in tensors)] for w in self._weights}
        return {
            name: x if isinstance(x, StoredTensor) else self._copies.get(identity_of(x), x)
            for name, x in selected.items()
        }

    def write(self, tensors: Mapping[str, Any]) -> None:
        """Copy tensors into the module, by the names of `select`. They have the module's dtypes."""
        import torch

        current = dict(tensors_of(self._module))  # anew: it may have been moved
        for name, x in tensors.items():
            with torch.inference_mode(current[name].is_inference()), torch.no_grad():
                current[name].copy_(x)


def dtypes_of(module: Any) -> dict[str, str]:
    """The dtypes of a module's floating tensors that can be merged, by all of their names. Raises: UsageError."""
    return {n: str(w.tensor.dtype) for w in weights_of(module, None) if w.dtype is not None for n in w.names}
