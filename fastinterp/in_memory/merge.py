"""Merges of what is in memory: tensors and state dicts, by any method. The same rounds as between files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastinterp.backends.cpu import Handle, PumpOptions
from fastinterp.backends.registry import cpu_isa, cpu_threads
from fastinterp.backends.torch_device import capturing, current_queue, device_of, one_place
from fastinterp.errors import MethodError, ShapeError, StorageError, UsageError
from fastinterp.execute.adaptive_job import Asking
from fastinterp.execute.device.resident import ResidentMachine
from fastinterp.execute.report import RoundingEffect
from fastinterp.execute.rounds import Machine, Runs, drive
from fastinterp.execute.run import STATS_EVERY
from fastinterp.execute.sources import Sources
from fastinterp.execute.tensor_io import Place, Step
from fastinterp.in_memory.parameters import resolved
from fastinterp.in_memory.weighted_sum import Exchanged, Numpy, Torch, View, library_of
from fastinterp.methods import Method, Sidecar, find
from fastinterp.ops.combine import Tensor, philox_key
from fastinterp.ops.dtypes import DType, parse_dtype
from fastinterp.ops.steps import Stored
from fastinterp.recipe.layers import Layers

Arrays = Mapping[str, Any]
_View = tuple["int | StoredTensor", tuple[int, ...], DType]  # address, shape, dtype

_STORE = 0  # Philox stream of the store's rounding
_UNBOUNDED = 1 << 62  # bytes of scratch: whoever holds whole models in memory sets the bound
_SHOWN = 5  # names that a message lists


def merge_tensors(
    tensors: Sequence[Any],
    method: str | Method,
    *,
    base: Any = None,
    parameters: Mapping[str, Any] | None = None,
    name: str = "tensor",
    dtype: str | None = None,
    seed: int = 0,
    rounding: str = "nearest",
    threads: int | None = None,
) -> Any:
    """Merge tensors of one shape as `fastinterp merge` merges those of checkpoints: the same bytes.

    tensors     contiguous numpy arrays or torch tensors, not both, or what has `__dlpack__`, as cupy's; float64,
                float32, float16, bfloat16, float8_e4m3fn or float8_e5m2, of any number of dimensions. They need not
                have the same dtype. All on one device: the CPU, or one with CUDA
    method      a name: fastinterp methods lists them
    base        a tensor like them, for methods that have one
    parameters  as in a recipe. Those that each model has: one value for all, or a list or vector with one
                per tensor. Side-cars: a list with one tensor for each
    name        of the tensor, from which random numbers are drawn
    dtype       of the result; None: that of the base, else of the first tensor
    seed, rounding   as in a recipe: 0..2**64-1; "nearest" or "stochastic"
    threads     of the CPU; None: one per CPU, at most 32. The result does not depend on it

    On a device everything is put into torch's current stream. What is written is not waited for: where the method asks
    nothing about the tensors (linear, task_arithmetic, and the like), nothing is.
    Returns a new tensor of the same library.
    Raises: UsageError, MethodError (one of them), ShapeError, BackendError.
    """
    models = _listed(tensors, "tensors")
    name = _text(name, "`name`")
    dicts = [{name: x} for x in models]
    origin = None if base is None else {name: base}
    labels = [*([] if base is None else ["base"]), *(f"tensor {i}" for i in range(len(dicts)))]
    found = _found(method)
    given = dict(_mapping(parameters))
    for key in (p.name for p in found.parameters if p.kind is Sidecar):
        if isinstance(given.get(key), (list, tuple)):
            given[key] = [{name: x} if hasattr(x, "dtype") else x for x in given[key]]
    return _Merge(dicts, origin, labels, found, given, dtype, seed, rounding, threads).run()[name]


def merge_state_dicts(
    state_dicts: Sequence[Arrays],
    method: str | Method,
    *,
    base: Arrays | None = None,
    parameters: Mapping[str, Any] | None = None,
    dtype: str | None = None,
    seed: int = 0,
    rounding: str = "nearest",
    threads: int | None = None,
) -> dict[str, Any]:
    """Merge state dicts, mappings of names to tensors, as `fastinterp merge` merges checkpoints: the same bytes.

    state_dicts  with the same names, and tensors of the same shapes; tensors as in `merge_tensors`. Integer and boolean
                 ones must be equal in all of them, and are copied
    base         a state dict like them, for methods that have one

    The other arguments are those of `merge_tensors`; side-cars are state dicts. Returns a new dict of new tensors. On a
    device, that integer tensors are equal is waited for.
    Raises: UsageError, MethodError (one of them), ShapeError, BackendError.
    """
    models = _listed(state_dicts, "state_dicts")
    labels = [*([] if base is None else ["base"]), *(f"state dict {i}" for i in range(len(models)))]
    for label, found in zip(labels, [*([] if base is None else [base]), *models], strict=True):
        if not isinstance(found, Mapping):
            raise UsageError(f"{label} must be a mapping of names to tensors, got {type(found).__name__}")
    return _Merge(models, base, labels, method, _mapping(parameters), dtype, seed, rounding, threads).run()


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A floating tensor that is read from an open file as it is merged. source: number of the file in `files`."""

    source: int
    start: int
    shape: tuple[int, ...]
    dtype: DType


def merge_measured(
    state_dicts: Sequence[Arrays], method: str | Method, *, base: Arrays | None = None, files: Sources | None = None,
    **settings: Any,
) -> tuple[dict[str, Any], dict[str, RoundingEffect]]:  # fmt: skip
    """`merge_state_dicts`, and what the rounding made of the change, by tensor: as a report of `merge` has it.

    files  of StoredTensors, which go with torch tensors

    Tensors that are copies have no effect. `dtype` may be a mapping of names to dtypes, too: tensors that it does not
    name keep theirs. Other arguments and errors as there; CheckpointError and StorageError, if a file cannot be read.
    """
    settings = {"parameters": None, "dtype": None, "seed": 0, "rounding": "nearest", "threads": None, **settings}
    labels = [*([] if base is None else ["base"]), *(f"state dict {i}" for i in range(len(state_dicts)))]
    given = _mapping(settings.pop("parameters"))
    merge = _Merge(state_dicts, base, labels, method, given, **settings, files=files)
    return merge.run(STATS_EVERY), merge.effects


def _listed(given: Any, what: str) -> list[Any]:
    if isinstance(given, (Mapping, str)) or hasattr(given, "dtype") or not hasattr(given, "__iter__"):
        raise UsageError(f"`{what}` must be a list, got {type(given).__name__}")
    found = list(given)
    if not found:
        raise UsageError(f"`{what}` is empty, so there is nothing to merge")
    return found


def _text(given: object, what: str) -> str:
    if not isinstance(given, str):
        raise UsageError(f"{what} must be text, got {given!r}")
    try:
        given.encode()
    except UnicodeEncodeError:
        raise UsageError(f"{what} must be text that UTF-8 can write, got {given!r}") from None
    return given


def _library_of(x: Any) -> type[Numpy] | type[Torch]:
    return Torch if isinstance(x, StoredTensor) else library_of(x)


def _found(method: str | Method) -> Method:
    return method if isinstance(method, Method) else find(_text(method, "`method`"))


def _mapping(parameters: Any) -> Mapping[str, Any]:
    if parameters is not None and not isinstance(parameters, Mapping):
        raise UsageError(f"`parameters` must be a mapping of names to values, got {type(parameters).__name__}")
    return parameters or {}


class _Merge:
    """One call: arguments checked, then carried out."""

    def __init__(
        self,
        models: Sequence[Arrays],
        base: Arrays | None,
        labels: Sequence[str],
        method: str | Method,
        parameters: Mapping[str, Any],
        dtype: str | Mapping[str, str] | None,
        seed: int,
        rounding: str,
        threads: int | None,
        files: Sources | None = None,
    ):
        self.method = _found(method)
        self._check_base(base)
        self.inputs: list[Arrays] = [*([] if base is None else [base]), *models]
        self.labels = list(labels)
        low, high = self.method.models
        if not low <= len(self.inputs) <= high:
            count = f"exactly {low}" if low == high else f"{low} to {high}"
            raise MethodError(f"`{self.method.name}` takes {count} models, the base included, got {len(self.inputs)}")
        self.files = files
        self.dtype: DType | Mapping[str, DType] | None = None
        if isinstance(dtype, Mapping):
            self.dtype = {name: _dtype(d) for name, d in dtype.items()}
        elif dtype is not None:
            self.dtype = _dtype(dtype)
        if rounding not in ("nearest", "stochastic"):
            raise UsageError(f"rounding must be nearest or stochastic, got {rounding!r}")
        self.seed, self.stochastic = _seed(seed), rounding == "stochastic"
        self.isa, self.threads = cpu_isa(), cpu_threads(threads)
        self.sidecars: list[Arrays] = []
        self.effects: dict[str, RoundingEffect] = {}
        self.parameters = resolved(self.method, parameters, len(models), self.sidecars)

    def run(self, stats_every: int = 0) -> dict[str, Any]:
        """`effects` is filled if chunks are sampled for it, one in `stats_every`."""
        self._check_names()
        first = next(iter(self.inputs[0].values()), None)
        if library_of(first) is not Exchanged:
            return self._run(stats_every)
        self.inputs, self.sidecars = self._exchanged(self.inputs), self._exchanged(self.sidecars)
        return {name: Exchanged.given(x, first) for name, x in self._run(stats_every).items()}

    def _run(self, stats_every: int) -> dict[str, Any]:
        lead = self.inputs[0]
        self.library = _library_of(next(iter(lead.values()), None))
        self.where = self._place()
        self.layers = Layers(lead) if len(lead) > 1 else None
        merged = {name: self._views(name) for name, x in lead.items() if self._merges(name)}
        numel = sum(math.prod(views[0][1]) for views in merged.values())
        out = {n: self._empty(n, merged[n][0][2]) if n in merged else self.library.copy(x) for n, x in lead.items()}
        sources: list[Handle] = [*self.files.fds] if self.files else []
        sinks: list[Handle] = []
        jobs = []
        for name, views in merged.items():
            if math.prod(views[0][1]):
                jobs.append(self._job(name, views, self.library.view(out[name], name), numel, sources, sinks))
        drive(jobs, self._machine(sources, sinks, stats_every))
        if stats_every:
            self.effects = {j.place.name: RoundingEffect.of(j.place.numel, j.stats[0]) for j in jobs if not j.copies(0)}
        return out

    def _machine(self, sources: list[Handle], sinks: list[Handle], stats_every: int) -> Runs:
        if self.where is not None:
            return ResidentMachine(
                device_of(self.where), current_queue(self.where), sources, sinks,
                stats_every=stats_every, capturing=capturing(self.where),
            )  # fmt: skip
        options = PumpOptions(isa=self.isa, threads=self.threads, stochastic=self.stochastic, stats_every=stats_every)
        return Machine(sources, sinks, options, self._explained, 0, None, most=_UNBOUNDED)

    def _job(
        self,
        name: str,
        views: Sequence[_View],
        out: View,
        numel: int,
        sources: list[Handle],
        sinks: list[Handle],
    ) -> Asking:
        kind = "memory" if self.where is None else "device"
        shape = views[0][1]
        nbytes = [math.prod(shape) * dtype.bits // 8 for _, _, dtype in views]
        operands = []
        for (at, _, dtype), size in zip(views, nbytes, strict=True):
            if isinstance(at, StoredTensor):
                operands.append(Stored(at.source, at.start, dtype.code or 0))
            else:
                operands.append(Stored(len(sources), 0, dtype.code or 0))
                sources.append((kind, at, size))
        out_bytes = math.prod(shape) * out[2].bits // 8
        sinks.append((kind, out[0], out_bytes))
        place = Place(
            name=name,
            shape=shape,
            operands=tuple(operands),
            nbytes=tuple(nbytes),
            out_dtype=out[2].code or 0,
            out_bytes=out_bytes,
            sinks=(len(sinks) - 1,),
            offsets=(0,),
            keys=(philox_key(self.seed, _STORE, name),) if self.stochastic else (),
        )
        n = len(self.inputs)
        position = self.layers.position(name) if self.layers else None
        layer, layers = position or (None, 0)
        call = partial(self.method, n, Tensor(name, shape, layer, layers, numel), **self.parameters)
        return Asking(place, n, [call], name, [self.seed], notes=self.where is None)

    # --- arguments

    def _check_base(self, base: Arrays | None) -> None:
        name = self.method.name
        if base is None and self.method.base == "required":
            raise MethodError(f"`{name}` needs a base. Give `base`")
        if base is not None and self.method.base == "none":
            raise MethodError(f"`{name}` has no base. Leave `base` out, or list it with the others")

    def _place(self) -> Any:
        """The torch.device of all tensors, None for the CPU."""
        labels = [*self.labels, *(f"side-car {i}" for i in range(len(self.sidecars)))]
        pairs = zip(labels, [*self.inputs, *self.sidecars], strict=True)
        found = [(self._told(name, label), x) for label, own in pairs for name, x in own.items()]
        return one_place([
            (told, None if isinstance(x, StoredTensor) else self.library.place(x))
            for told, x in found if _library_of(x) is self.library
        ])  # fmt: skip

    def _exchanged(self, models: Sequence[Arrays]) -> list[Arrays]:
        return [{name: Exchanged.own(x) for name, x in found.items()} for found in models]

    def _check_names(self) -> None:
        lead = self.inputs[0]
        for name in lead:
            _text(name, "the name of a tensor")
        labels = [*self.labels, *(f"side-car {i}" for i in range(len(self.sidecars)))]
        for label, other in zip(labels[1:], [*self.inputs, *self.sidecars][1:], strict=True):
            missing = [n for n in lead if n not in other]
            more = [n for n in other if n not in lead]
            if missing or more:
                found = ", ".join((missing or more)[:_SHOWN])
                raise ShapeError(f"{label} {'lacks' if missing else 'alone has'} {found}. All must have the same names")

    def _merges(self, name: str) -> bool:
        """Whether a tensor is merged; one that is not must be the same everywhere."""
        first = self.inputs[0][name]
        for label, found in zip(self.labels, self.inputs, strict=True):
            x = found[name]
            if not hasattr(x, "dtype") or _library_of(x) is not self.library:
                raise UsageError(f"{self._told(name, label)} must be a tensor like the first, got {type(x).__name__}")
        every = [found[name] for found in self.inputs]
        floats = [isinstance(x, StoredTensor) or self.library.dtype(x) is not None for x in every]
        if all(floats):
            return True
        if any(floats):
            kinds = ", ".join(str(found[name].dtype) for found in self.inputs[:_SHOWN])
            raise ShapeError(f"{name} is of dtypes {kinds}. Only floating ones merge; others must agree", tensor=name)
        for label, found in zip(self.labels[1:], self.inputs[1:], strict=True):
            if not self.library.same(first, found[name]):
                raise ShapeError(f"{name} ({first.dtype}) is not averaged, and differs in {label}", tensor=name)
        return False

    def _views(self, name: str) -> list[_View]:
        labels = [*self.labels, *(f"side-car {i}" for i in range(len(self.sidecars)))]
        views: list[_View] = []
        for label, found in zip(labels, [*self.inputs, *self.sidecars], strict=True):
            x = found[name]
            stored = isinstance(x, StoredTensor)
            views.append((x, x.shape, x.dtype) if stored else self.library.view(x, self._told(name, label)))
            if views[-1][1] != views[0][1]:
                shapes = f"{list(views[0][1])} in {labels[0]} but {list(views[-1][1])} in {label}"
                raise ShapeError(f"{name} is {shapes}. Only tensors of the same shape merge", tensor=name)
        return views

    def _told(self, name: str, label: str) -> str:
        return f"{name} of {label}" if self.labels[-1].startswith("state dict") else label

    def _empty(self, name: str, kept: DType) -> Any:
        wanted = self.dtype.get(name) if isinstance(self.dtype, Mapping) else self.dtype
        return self.library.empty(self.inputs[0][name], wanted or kept)

    def _explained(self, error: tuple[Any, ...], steps: Sequence[Step]) -> Exception:
        return self.files.explained(error) if self.files else StorageError(f"the run stopped: {error[1:]}")


def _dtype(given: object) -> DType:
    found = parse_dtype(given) if isinstance(given, str) else None
    if found is None:
        raise UsageError(f"unknown dtype {given!r}. Give a name, as 'float32'; float64 to float8 can be stored")
    return found


def _seed(given: object) -> int:
    if isinstance(given, bool) or not isinstance(given, int) or not 0 <= given < 2**64:
        raise UsageError(f"the seed must be a whole number in 0..2**64-1, got {given!r}")
    return given
