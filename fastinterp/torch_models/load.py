"""Loads a merged model into memory: tensors by name, tensors one at a time, or the weights of a torch module."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from msgspec import structs

from fastinterp.arguments import path_of, size_of
from fastinterp.checkpoint.names import INDEX, PICKLES, WEIGHTS
from fastinterp.checkpoint.open import refuse_components
from fastinterp.errors import BackendError, UsageError
from fastinterp.execute.to_memory import fill, filling
from fastinterp.in_memory.allocate import Framework, maker, torch_dtype
from fastinterp.paths.points import Point
from fastinterp.plan.plan import Plan, plan_recipe
from fastinterp.plan.planned import PlannedTensor
from fastinterp.presence import is_folder
from fastinterp.recipe.document import Source
from fastinterp.torch_models.module_tensors import (
    Mismatches,
    Weight,
    equal_bytes,
    increment_versions,
    is_extra_state,
    tied_error,
    weights_of,
    with_versions,
)
from fastinterp.urls import is_url

Places = dict[str, tuple[int, int]]  # tensor name -> address, bytes


def load(
    recipe: Source | Point,
    *,
    dtype: str | None = None,
    device: Any = None,
    framework: Framework = "torch",
    rounding: str | None = None,
    seed: int | None = None,
    threads: int | None = None,
    max_memory: str | int = "512MB",
) -> dict[str, Any]:
    """A merged model as tensors by name, as `model.load_state_dict` takes them. No file is written.

    recipe      path of a recipe, YAML text, a mapping, a point of a sweep, or a checkpoint, which is loaded as it is
    dtype       of the merged tensors, a name; None: as the recipe says, else as the models have it
    device      where torch tensors go; they are computed on the CPU. None: they stay there
    framework   "torch" or "numpy"
    rounding, seed, threads, max_memory   as of `merge`

    The bytes are those that `merge` would write, in the order of its files. Tied tensors are what the recipe makes of
    the checkpoints: an absent lm_head stays absent.
    Raises: what `merge` does, but OutputError; BackendError, if the device cannot be used.
    """
    plan = planned(recipe, dtype, rounding, seed)
    destination = _Destination(framework, device)
    tensors, places = allocate(plan.tensors, framework)
    fill(plan, [places], threads=threads, max_memory=size_of(max_memory))
    return {name: destination.move(tensors.pop(name)) for name in [*tensors]}  # one at a time in both places


def load_iter(
    recipe: Source | Point,
    *,
    dtype: str | None = None,
    device: Any = None,
    framework: Framework = "torch",
    rounding: str | None = None,
    seed: int | None = None,
    threads: int | None = None,
    max_memory: str | int = "512MB",
) -> Generator[tuple[str, Any], None, None]:
    """(name, tensor) of a merged model, as tensors are done: what inference servers take weights from.

    Some hundred megabytes of the models are merged at a time; a tensor that the caller lets go of is freed. The
    arguments and errors are those of `load`; those about data come from the iterator.
    """
    plan = planned(recipe, dtype, rounding, seed)
    destination = _Destination(framework, device)
    return _streamed(plan, destination, threads, size_of(max_memory))


def _streamed(
    plan: Plan, destination: _Destination, threads: int | None, max_memory: int
) -> Generator[tuple[str, Any], None, None]:
    # The system gives memory to a large tensor when it is written, so that all of them can be allocated beforehand.
    tensors, places = allocate(plan.tensors, destination.framework)
    for names in filling(plan, places, threads=threads, max_memory=max_memory):
        for name in names:
            yield name, destination.move(tensors.pop(name))


def load_into(
    module: Any,
    recipe: Source | Point,
    *,
    layers: str | Sequence[str] | None = None,
    rounding: str | None = None,
    seed: int | None = None,
    threads: int | None = None,
    max_memory: str | int = "512MB",
) -> None:
    """Write a merged model into the parameters and buffers of a torch module, on any devices.

    module   a torch module; its parameters and floating buffers are overwritten in place
    recipe   as of `load`
    layers   only tensors whose names match this pattern, or one of several, as `model.layers.1?.*`; None: all

    Each merged tensor is rounded once, to the dtype that the module has. Names, shapes and kinds are checked before
    anything is written, tied weights too: what is one tensor in the module must be one in the recipe. What goes to a
    device is computed on the CPU, and copied there as it is done. The other arguments are those of `load`.
    Raises: what `load` does; ShapeError with all mismatches. If the data cannot be read, the module is left with some
    of its tensors written: load it again.
    """
    _check_module(module, recipe)
    plan = planned(recipe, None, rounding, seed)
    weights = weights_of(module, layers)
    plan, places = _fitted(plan, weights, layers)
    scratch_bytes = size_of(max_memory)
    _check_tied(plan, weights, threads, scratch_bytes)
    targets = {next(n for n in w.names if n in places): w.tensor for w in weights}
    on_cpu = {name: places[name] for name, tensor in targets.items() if tensor.device.type == "cpu"}
    on_devices = {name: tensor for name, tensor in targets.items() if name not in on_cpu}
    try:
        if on_devices:
            _fill_devices(plan, on_cpu, on_devices, threads, scratch_bytes)
        else:
            _fill(plan, on_cpu, threads, scratch_bytes)
    finally:
        increment_versions(with_versions(weights))


def _check_module(module: Any, recipe: Any) -> None:
    """Raises: UsageError, if it is no torch module. Before the recipe is read: the two may be swapped."""
    import torch

    if not isinstance(module, torch.nn.Module):
        swapped = isinstance(recipe, torch.nn.Module)
        raise UsageError(
            f"`module` must be a torch.nn.Module, got {type(module).__name__}"
            + (". Are they swapped? It is load_into(module, recipe)" if swapped else "")
        )


def planned(recipe: Source | Point, dtype: str | None, rounding: str | None, seed: int | None) -> Plan:
    """The plan of one model in memory. Raises: CheckpointError, if it has several components; what plan_recipe does."""
    plan = plan_recipe(_recipe(recipe), None, dtype, rounding, seed, quantize="none", as_numbers=True)
    if plan.origin.source is not None:
        refuse_components(plan.origin.source)
    return plan


def _recipe(source: Source | Point) -> str | Mapping[str, Any] | Sequence[Mapping[str, Any]]:
    """Raises: UsageError, if it is nothing that can be loaded."""
    if isinstance(source, Point):
        return source.recipe
    if isinstance(source, (Mapping, list, tuple)) or (isinstance(source, str) and "\n" in source):
        return source
    path = path_of(source, "recipe")
    if is_url(path) and not path.endswith((".yml", ".yaml")):
        return {"merge_method": "passthrough", "models": [{"model": path}]}
    if is_folder(os.path.expanduser(path)) or path.endswith((WEIGHTS, INDEX, *PICKLES)):
        return {"merge_method": "passthrough", "models": [{"model": path}]}
    return path


def allocate(planned: Iterable[PlannedTensor], framework: str) -> tuple[dict[str, Any], Places]:
    """New tensors for planned ones, by name, and where they are."""
    make = maker(framework)
    tensors: dict[str, Any] = {}
    places: Places = {}
    for t in planned:
        tensors[t.name], address = make(t.dtype, t.shape)
        places[t.name] = address, t.dtype.nbytes(t.numel) or 0
    return tensors, places


@dataclass(frozen=True)
class _Destination:
    """The destination of tensors. device: of torch; None: they stay in the CPU's memory. Raises: BackendError."""

    framework: Framework
    device: Any

    def __post_init__(self) -> None:
        if self.device is None or str(self.device) == "cpu":
            return
        if self.framework != "torch":
            raise BackendError(f"numpy arrays are in the CPU's memory, not on {self.device}. Ask for framework='torch'")
        import torch

        try:
            torch.empty(1, device=self.device)
        except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
            reason = str(error).partition("\n")[0]
            raise BackendError(f"device {str(self.device)!r} cannot be used: {reason}") from None

    def move(self, tensor: Any) -> Any:
        return tensor if self.device is None or self.framework != "torch" else tensor.to(self.device)


def _fitted(plan: Plan, weights: Sequence[Weight], layers: str | Sequence[str] | None) -> tuple[Plan, Places]:
    """The plan with the module's dtypes, and where its tensors are in the module.

    Raises: ShapeError.
    """
    weight_of = {name: weight for weight in weights for name in weight.names}
    tensors = [t for t in plan.tensors if t.name in weight_of or (layers is None and not is_extra_state(t.name))]
    mismatches = Mismatches()
    mismatches.check(weights, "the recipe's model", {t.name: (t.dtype, t.shape) for t in tensors})
    for t in tensors:
        if t.name in weight_of and not t.merged and torch_dtype(t.dtype) != weight_of[t.name].tensor.dtype:
            dtype = weight_of[t.name].tensor.dtype
            mismatches.add(f"{t.name} is {dtype} in the module but {t.dtype} in the recipe's model")
    mismatches.check_contiguous(weights)
    mismatches.refuse()
    dtypes = {name: weight.dtype for name, weight in weight_of.items()}
    fitted = tuple(structs.replace(t, dtype=dtypes.get(t.name) or t.dtype) if t.merged else t for t in plan.tensors)
    places = {t.name: (weight_of[t.name].address, weight_of[t.name].nbytes) for t in tensors}
    return replace(plan, tensors=fitted), places


def _fill_devices(
    plan: Plan, on_cpu: Places, on_devices: Mapping[str, Any], threads: int | None, max_memory: int
) -> None:
    """Compute the tensors `on_cpu` in place, and those of `on_devices` on the CPU, to be copied as they are done."""
    # As in _fill. A copied tensor is freed at once, unless a later document may read it.
    whole = _has_stages(plan)
    computed = [t for t in plan.tensors if t.name in on_devices or (whole and t.name not in on_cpu)]
    tensors, places = allocate(computed, "torch")
    for names in filling(plan, on_cpu | places, threads=threads, max_memory=max_memory):
        for name in names:
            if name in on_devices:
                on_devices[name].copy_(tensors[name] if whole else tensors.pop(name))


def _fill(plan: Plan, places: Places, threads: int | None, max_memory: int) -> None:
    """Compute the tensors of a plan that have a place."""
    others = [t for t in plan.tensors if t.name not in places] if _has_stages(plan) else []
    tensors, more = allocate(others, "torch")
    fill(plan, [places | more], threads=threads, max_memory=max_memory)
    del tensors


def _has_stages(plan: Plan) -> bool:
    """Whether tensors of earlier documents are computed before others: a method that measures them needs them all."""
    return any(t.before for t in plan.tensors)


def _check_tied(plan: Plan, weights: Sequence[Weight], threads: int | None, max_memory: int) -> None:
    """Raises: ShapeError, if the recipe makes tensors that differ of what is one tensor in the module.

    Rounded to nearest: tensors of two names draw different random numbers, but only one of them is written.
    """
    plan = replace(plan, recipes=tuple(replace(recipe, rounding="nearest") for recipe in plan.recipes))
    by_name = {t.name: t for t in plan.tensors}
    tied = [[n for n in w.names if n in by_name] for w in weights]
    tied = [names for names in tied if len(names) > 1]
    if not tied:
        return
    tensors, places = allocate([by_name[n] for names in tied for n in names], "torch")
    _fill(plan, places, threads, max_memory)
    for first, *others in tied:
        for other in others:
            if not equal_bytes(tensors[first], tensors[other]):
                raise tied_error(first, other, "the recipe makes two that differ")
