"""Merges of tensors and state dicts in memory, by any method: the same steps as between files."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from fastinterp.backends.cpu import Handle, PumpOptions, SourceHandle, SumRow
from fastinterp.backends.registry import cpu_isa, cpu_threads
from fastinterp.backends.torch_device import capturing, current_queue, device_of, is_followed
from fastinterp.errors import CheckpointError, MethodError, ShapeError, StorageError, UsageError
from fastinterp.execute.device.resident import ResidentExecutor
from fastinterp.execute.jobs.adaptive_job import AdaptiveJob
from fastinterp.execute.jobs.tensor_io import TensorIO, TensorStep
from fastinterp.execute.report import RoundingEffect
from fastinterp.execute.rounds import Executor, PumpExecutor, run_jobs
from fastinterp.execute.run import STATS_EVERY
from fastinterp.execute.sources import Sources
from fastinterp.in_memory.arrays import ArrayView, stored_dtype
from fastinterp.in_memory.inputs import Arrays, Inputs, View, operand_of, text
from fastinterp.in_memory.parameters import resolved
from fastinterp.in_memory.plain_sums import plain_sum
from fastinterp.methods import Method, Sidecar, find
from fastinterp.ops.combine import Combine, Tensor, check_coefficients, philox_key
from fastinterp.ops.dtypes import DType, parse_dtype, promoted
from fastinterp.recipe.layers import Layers

Array = TypeVar("Array")  # of numpy, torch, or another library: the result has the type of the inputs
_STORE = 0  # Philox stream of the store's rounding
_UNBOUNDED = 1 << 62  # bytes of scratch: whoever holds whole models in memory sets the bound


def merge_tensors(
    tensors: Sequence[Array],
    method: str | Method,
    *,
    base: Array | None = None,
    parameters: Mapping[str, Any] | None = None,
    name: str = "tensor",
    dtype: str | None = None,
    seed: int = 0,
    rounding: str = "nearest",
    threads: int | None = None,
) -> Array:
    """Merge tensors of one shape as `fastinterp merge` merges those of checkpoints: the same bytes.

    tensors     contiguous numpy arrays or torch tensors, not both, or what has `__dlpack__`, as cupy's; float64,
                float32, float16, bfloat16, float8_e4m3fn or float8_e5m2, of any number of dimensions. They need not
                have the same dtype. All on one device: the CPU, or one with CUDA
    method      a name: fastinterp methods lists them
    base        a tensor like them, for methods that have one
    parameters  as in a recipe. Those that each model has: one value for all, or a list or vector with one
                per tensor. Side-cars: a list with one tensor for each
    name        of the tensor, from which random numbers are drawn
    dtype       of the result; None: that of the tensors and the base; if they differ, the one that holds all
    seed, rounding   as in a recipe: 0..2**64-1; "nearest" or "stochastic"
    threads     of the CPU; None: one per CPU, at most 32. The result does not depend on it

    On a device everything is put into torch's current stream. What is written is not waited for: where the method asks
    nothing about the tensors (linear, task_arithmetic, and the like), nothing is.
    Autograd follows torch tensors that require gradients where the result is a weighted sum of them whose weights are
    numbers, or come from lengths and angles of whole tensors (slerp, karcher, multislerp, model_stock, ...). Masks have
    no gradients: methods with them are an error, unless under torch.no_grad().
    Returns a new tensor of the same library.
    Raises: UsageError, MethodError (one of them), ShapeError, BackendError.

    >>> import fastinterp, numpy
    >>> x, y = numpy.float32([1, 2]), numpy.float32([3, 5])
    >>> fastinterp.merge_tensors([x, y], "linear", parameters={"weight": [0.75, 0.25]})
    array([1.5 , 2.75], dtype=float32)
    >>> fastinterp.merge_tensors([y], "task_arithmetic", base=x, parameters={"weight": 0.5})
    array([2. , 3.5], dtype=float32)
    """
    models = _listed(tensors, "tensors")
    name = text(name, "`name`")
    method, values, seed = _method(method), dict(_mapping(parameters)), _seed(seed)
    if dtype is None and rounding == "nearest":
        done = _plain_sum(models, base, method, values, name, threads)
        if done is not None:
            return done  # type: ignore[no-any-return]
    dicts = [{name: x} for x in models]
    origin = None if base is None else {name: base}
    labels = [*([] if base is None else ["base"]), *(f"tensor {i}" for i in range(len(dicts)))]
    for key in (p.name for p in method.parameters if p.kind is Sidecar):
        if isinstance(values.get(key), (list, tuple)):
            values[key] = [{name: x} if hasattr(x, "dtype") else x for x in values[key]]
    return _Merge(dicts, origin, labels, method, values, dtype, seed, rounding, threads).run()[name]  # type: ignore[no-any-return]


def merge_state_dicts(
    state_dicts: Sequence[Mapping[str, Array]],
    method: str | Method,
    *,
    base: Mapping[str, Array] | None = None,
    parameters: Mapping[str, Any] | None = None,
    integers: int | str | None = None,
    dtype: str | None = None,
    seed: int = 0,
    rounding: str = "nearest",
    threads: int | None = None,
) -> dict[str, Array]:
    """Merge state dicts, mappings of names to tensors, as `fastinterp merge` merges checkpoints: the same bytes.

    state_dicts  with the same names, and tensors of the same shapes; tensors as in `merge_tensors`. Integer and boolean
                 ones must be equal in all of them, and are copied. Sums of complex64 are those of its parts
    base         a state dict like them, for methods that have one
    integers     whose tensors are copied where some are not floating: the index of a state dict, or "base". None: they
                 must be equal

    The other arguments are those of `merge_tensors`; side-cars are state dicts. Returns a new dict of new tensors. On a
    device, that integer tensors are equal is waited for.
    Raises: UsageError, MethodError (one of them), ShapeError, BackendError; CheckpointError, if one is an adapter, or
    if weights are quantised: codes and scales are only copied, and must be equal in all state dicts.

    >>> import fastinterp, numpy
    >>> a, b = {"w": numpy.float32([1, 2])}, {"w": numpy.float32([3, 5])}
    >>> fastinterp.merge_state_dicts([a, b], "linear", parameters={"weight": [0.75, 0.25]})
    {'w': array([1.5 , 2.75], dtype=float32)}
    """
    models = _listed(state_dicts, "state_dicts")
    labels = [*([] if base is None else ["base"]), *(f"state dict {i}" for i in range(len(models)))]
    for label, arrays in zip(labels, [*([] if base is None else [base]), *models], strict=True):
        if not isinstance(arrays, Mapping):
            raise UsageError(f"{label} must be a mapping of names to tensors, got {type(arrays).__name__}")
    merge = _Merge(models, base, labels, method, _mapping(parameters), dtype, seed, rounding, threads)
    merge.chosen = _chosen(integers, len(models), base is not None)
    return merge.run()


def merge_measured(
    state_dicts: Sequence[Arrays],
    method: str | Method,
    *,
    base: Arrays | None = None,
    files: Sources | None = None,
    parameters: Mapping[str, Any] | None = None,
    integers: int | str | None = None,
    dtype: str | Mapping[str, str] | None = None,
    seed: int = 0,
    rounding: str = "nearest",
    threads: int | None = None,
) -> tuple[dict[str, Any], dict[str, RoundingEffect]]:
    """`merge_state_dicts`, and the effect of rounding on each merged tensor, as a report of `merge` has it.

    files  that each `StoredTensor` is read from. Those may be mixed with torch tensors
    dtype  of the result; a mapping: of tensors by name, others keep theirs

    Tensors that are copies have no effect. Other arguments and errors as there; CheckpointError and StorageError, if a
    file cannot be read.
    """
    labels = [*([] if base is None else ["base"]), *(f"state dict {i}" for i in range(len(state_dicts)))]
    values = _mapping(parameters)
    merge = _Merge(state_dicts, base, labels, method, values, dtype, seed, rounding, threads, files)
    merge.chosen = _chosen(integers, len(state_dicts), base is not None)
    return merge.run(STATS_EVERY), merge.effects


def _chosen(integers: object, count: int, has_base: bool) -> int | None:
    """The index of a model, the base being the first, from the argument `integers`. Raises: UsageError."""
    if integers is None:
        return None
    if integers == "base" and has_base:
        return 0
    if isinstance(integers, bool) or not isinstance(integers, int) or not 0 <= integers < count:
        base = ', or "base"' if has_base else ""
        raise UsageError(f"`integers` must be the index of a state dict, 0..{count - 1}{base}, got {integers!r}")
    return integers + has_base


def _plain_sum(
    models: Sequence[Any], base: Any, method: Method, values: Mapping[str, Any], name: str, threads: int | None
) -> Any:
    """The merged tensor, if the method makes a weighted sum of plain arrays of one dtype: other work costs more than
    small sums. None: look at all arguments.
    """
    inputs = models if base is None else [base, *models]
    low, high = method.models
    first, dtype = inputs[0], getattr(inputs[0], "dtype", None)
    if method.generator or method.base == ("required" if base is None else "none") or not low <= len(inputs) <= high:
        return None
    if dtype is None or any(getattr(x, "dtype", None) != dtype for x in inputs[1:]):
        return None
    shape = getattr(first, "shape", None)
    if not isinstance(shape, tuple):
        return None
    sidecars: list[Arrays] = []
    try:
        keywords = resolved(method, values, len(models), sidecars)
        request = method(len(inputs), Tensor(name, tuple(shape), None, 0, math.prod(shape)), **keywords)
        if sidecars or not isinstance(request, Combine):
            return None
        row = request.row()
        check_coefficients([row.total, *request.weights], name)
    except MethodError:
        return None
    return plain_sum(inputs, SumRow(row, len(inputs)), threads=threads)


def _listed(values: Any, what: str) -> list[Any]:
    if isinstance(values, (Mapping, str)) or hasattr(values, "dtype") or not hasattr(values, "__iter__"):
        raise UsageError(f"`{what}` must be a list, got {type(values).__name__}")
    listed = list(values)
    if not listed:
        raise UsageError(f"`{what}` is empty, so there is nothing to merge")
    return listed


def _method(method: str | Method) -> Method:
    return method if isinstance(method, Method) else find(text(method, "`method`"))


def _mapping(parameters: Any) -> Mapping[str, Any]:
    if parameters is not None and not isinstance(parameters, Mapping):
        raise UsageError(f"`parameters` must be a mapping of names to values, got {type(parameters).__name__}")
    return parameters or {}


class _Merge:
    """One merge in memory: its arguments are checked first, then `run` carries it out."""

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
        self.method = _method(method)
        self._check_base(base)
        inputs = [*([] if base is None else [base]), *models]
        low, high = self.method.models
        if not low <= len(inputs) <= high:
            count = f"exactly {low}" if low == high else f"{low} to {high}"
            raise MethodError(f"`{self.method.name}` takes {count} models, the base included, got {len(inputs)}")
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
        self.effects: dict[str, RoundingEffect] = {}
        self.recorded: Callable[[str, Callable[[], Any]], Callable[[], Any]] | None = None
        self.chosen: int | None = None  # the model whose tensors are copied where some are not floating
        sidecars: list[Arrays] = []
        self.parameters = resolved(self.method, parameters, len(models), sidecars)
        self.inputs, self.labels = Inputs(inputs, sidecars, labels), labels

    def run(self, stats_every: int = 0) -> dict[str, Any]:
        """`effects` is filled if chunks are sampled for it, one in `stats_every`."""
        self.inputs.refuse_adapters()
        self.quantised = self.inputs.refuse_quantised()
        self.inputs.check_names()
        self.layers = Layers(self.inputs.first) if len(self.inputs.first) > 1 else None
        if not stats_every and is_followed(x for arrays in self.inputs.models for x in arrays.values()):
            return self._followed()
        library, like = self.inputs.library, next(iter(self.inputs.first.values()), None)
        self.inputs = self.inputs.prepared()
        return {name: library.export(x, like) for name, x in self._run(stats_every).items()}

    def _run(self, stats_every: int) -> dict[str, Any]:
        inputs, library, first = self.inputs, self.inputs.library, self.inputs.first
        self.device = inputs.device()
        copied = inputs.unmerged(self.quantised, self.chosen, self._only_sums)
        if self.quantised and len(inputs.models) == 1:
            self._check_copies()
        merged = {name: inputs.views(name) for name in first if name not in copied}
        numel = sum(math.prod(views[0].shape) for views in merged.values())
        count = len(inputs.models)
        kept = {n: promoted(view.dtype for view in views[:count]) for n, views in merged.items()}
        out = {n: library.copy(copied[n]) if n in copied else self._empty(n, kept[n]) for n in first}
        sources: list[SourceHandle] = [*self.files.handles] if self.files else []
        sinks: list[Handle] = []
        jobs = []
        for name, views in merged.items():
            if math.prod(views[0].shape):
                if inputs.is_complex(name):
                    self._check_complex(name)
                jobs.append(self._job(name, views, inputs.view(out[name], name), numel, sources, sinks))
        run_jobs(jobs, self._executor(sources, sinks, stats_every))
        if stats_every:
            self.effects = {j.io.name: RoundingEffect.of(j.io.numel, j.stats[0]) for j in jobs if not j.copies(0)}
        return out

    def _followed(self) -> dict[str, Any]:
        """The tensors, which autograd follows."""
        from fastinterp.in_memory.gradients import Record, merged

        def run(models: list[dict[str, Any]], records: dict[str, Record]) -> dict[str, Any]:
            self.inputs = Inputs(models, self.inputs.sidecars, self.labels)
            self.recorded = lambda name, call: records.setdefault(name, Record(call))
            return self._run(0)

        copied = self.inputs.unmerged(self.quantised, self.chosen, self._only_sums)
        names = [name for name in self.inputs.first if name not in copied]
        return merged(self.method.name, self.inputs.models, names, run)

    def _executor(self, sources: list[SourceHandle], sinks: list[Handle], stats_every: int) -> Executor:
        if self.device is not None:
            return ResidentExecutor(
                device_of(self.device), current_queue(self.device), sources, sinks,
                stats_every=stats_every, capturing=capturing(self.device),
            )  # fmt: skip
        options = PumpOptions(isa=self.isa, threads=self.threads, stochastic=self.stochastic, stats_every=stats_every)
        return PumpExecutor(sources, sinks, options, self._explained, 0, None, most=_UNBOUNDED)

    def _job(
        self,
        name: str,
        views: Sequence[View],
        out: ArrayView,
        numel: int,
        sources: list[SourceHandle],
        sinks: list[Handle],
    ) -> AdaptiveJob:
        kind = "memory" if self.device is None else "device"
        shape = views[0].shape
        operands = [operand_of(view, kind, sources) for view in views]
        out_bytes = math.prod(shape) * out.dtype.bits // 8
        sinks.append((kind, out.address, out_bytes))
        io = TensorIO(
            name=name,
            shape=shape,
            operands=tuple(operands),
            nbytes=tuple(math.prod(shape) * view.dtype.bits // 8 for view in views),
            out_dtype=out.dtype.code or 0,
            out_bytes=out_bytes,
            sinks=(len(sinks) - 1,),
            offsets=(0,),
            keys=(philox_key(self.seed, _STORE, name),) if self.stochastic else (),
        )
        call = self._call(name, shape, numel)
        call = call if self.recorded is None else self.recorded(name, call)
        n = len(self.inputs.models)
        return AdaptiveJob(io, n, [call], name, [self.seed], fills_masks=self.device is None)

    def _call(self, name: str, shape: tuple[int, ...], numel: int) -> Callable[[], Any]:
        """The method with all of its arguments."""
        position = self.layers.position(name) if self.layers else None
        layer, layers = position or (None, 0)
        tensor = Tensor(name, shape, layer, layers, numel)
        return partial(self.method, len(self.inputs.models), tensor, **self.parameters)

    def _check_copies(self) -> None:
        """Raises: CheckpointError, if the method would change the one model, whose codes are only copied."""
        for name in sorted(self.quantised):
            request = None if self.method.generator else self._call(name, tuple(self.inputs.first[name].shape), 0)()
            if not isinstance(request, Combine) or not request.row().is_copy:
                raise CheckpointError(
                    f"{self.method.name} would change {name}, which holds codes or scales of quantised weights",
                    tensor=name,
                )

    def _only_sums(self, name: str) -> bool:
        """Whether the method makes a weighted sum of a tensor, and nothing else."""
        if self.method.generator:
            return False
        return isinstance(self._call(name, tuple(self.inputs.first[name].shape), 0)(), Combine)

    def _check_complex(self, name: str) -> None:
        """Raises: ShapeError, if the method does more than sum: that is not defined for complex numbers."""
        if not self._only_sums(name):
            raise ShapeError(
                f"{name} is complex and differs, and {self.method.name} does more than weigh: it is not defined for "
                "complex numbers. Say whose to take, `integers=`, or use `linear` or `task_arithmetic`",
                tensor=name,
            )

    # --- arguments

    def _check_base(self, base: Arrays | None) -> None:
        name = self.method.name
        if base is None and self.method.base == "required":
            raise MethodError(f"`{name}` needs a base. Give `base`")
        if base is not None and self.method.base == "none":
            raise MethodError(f"`{name}` has no base. Leave `base` out, or list it with the others")

    def _empty(self, name: str, default: DType) -> Any:
        dtype = self.dtype.get(name) if isinstance(self.dtype, Mapping) else self.dtype
        if self.inputs.is_complex(name):
            dtype = stored_dtype(self.inputs.first[name])
        return self.inputs.library.empty(self.inputs.first[name], dtype or default)

    def _explained(self, error: tuple[Any, ...], steps: Sequence[TensorStep]) -> Exception:
        return self.files.explained(error) if self.files else StorageError(f"the run stopped: {error[1:]}")


def _dtype(name: object) -> DType:
    dtype = parse_dtype(name) if isinstance(name, str) else None
    if dtype is None:
        raise UsageError(f"unknown dtype {name!r}. Give a name, as 'float32'; float64 to float8 can be stored")
    return dtype


def _seed(seed: object) -> int:
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise UsageError(f"the seed must be a whole number in 0..2**64-1, got {seed!r}")
    return seed
