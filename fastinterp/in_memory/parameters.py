"""Parameters of a merge method from Python values: checked, and one for each model where models have their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastinterp.errors import MethodError
from fastinterp.messages import suggestion
from fastinterp.methods import Method, Parameter, Sidecar


def resolved(
    method: Method, values: Mapping[str, Any], models: int, sidecars: list[Mapping[str, Any]]
) -> dict[str, Any]:
    """The keyword arguments that the method is called with.

    values    parameters by name; of those that each model has one value for all, or a list or vector with one per
              model, the base left out
    sidecars  side-cars among the values, mappings of names to tensors, are appended here
    Raises: MethodError.
    """
    declared = {p.name: p for p in method.parameters}
    for name in values:
        if name not in declared:
            raise MethodError(f"unknown parameter `{name}` of `{method.name}`{suggestion(str(name), list(declared))}")
    for p in declared.values():
        if p.required and p.name not in values:
            raise MethodError(f"`{method.name}` needs the parameter `{p.name}`")
    return {p.keyword: _value(p, values, models, sidecars) for p in declared.values()}


def _value(p: Parameter, values: Mapping[str, Any], models: int, sidecars: list[Mapping[str, Any]]) -> Any:
    if p.name not in values:
        return (p.default,) * models if p.each else p.default
    value = values[p.name]
    if not p.each:
        return _one(p, value, sidecars)
    if p.kind is not Sidecar and hasattr(value, "tolist") and len(getattr(value, "shape", ())) == 1:
        value = value.tolist()  # a vector of numbers
    if not isinstance(value, (list, tuple)):
        return tuple(_one(p, value, sidecars) for _ in range(models))
    if len(value) != models:
        raise MethodError(f"`{p.name}` has {len(value)} values for {models} models, the base left out")
    return tuple(_one(p, v, sidecars) for v in value)


def _one(p: Parameter, value: Any, sidecars: list[Mapping[str, Any]]) -> Any:
    if p.kind is Sidecar and isinstance(value, Mapping):
        sidecars.append(value)
        return Sidecar(f"side-car {len(sidecars) - 1}")
    if p.kind is Sidecar and value is not None:
        raise MethodError(f"`{p.name}` takes tensors, one for each model, got {type(value).__name__}")
    if hasattr(value, "item") and getattr(value, "shape", None) == ():
        value = value.item()
    try:
        return p.value(value)
    except ValueError as error:
        raise MethodError(str(error)) from None
