"""A torch module whose weights are set to points of a path while it is in use."""

from __future__ import annotations

import math
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from types import TracebackType
from typing import Any

from fastinterp.backends.registry import cpu_isa, cpu_threads
from fastinterp.backends.torch_device import current_queue
from fastinterp.backends.waiting import wait
from fastinterp.checkpoint.quantised import quantised_tensors
from fastinterp.errors import BackendError, CheckpointError, UsageError
from fastinterp.execute.jobs.tensor_io import TensorIO
from fastinterp.messages import suggestion
from fastinterp.ops.combine import LARGEST, MAX_INPUTS, Combine, Row
from fastinterp.ops.operands import Stored
from fastinterp.plan.quantised import quantised_arrays, quantised_error
from fastinterp.torch_models.copied_tensors import CopiedTensors
from fastinterp.torch_models.endpoint_operands import EndpointOperands
from fastinterp.torch_models.endpoints import Endpoint, Model, not_in_all, warn_unlike
from fastinterp.torch_models.exclusive import ExclusiveTensors
from fastinterp.torch_models.memory_block import MemoryBlock
from fastinterp.torch_models.module_tensors import (
    WHOSE,
    Mismatches,
    Weight,
    device_of_all,
    floating,
    increment_versions,
    matches,
    weights_of,
    with_versions,
)
from fastinterp.torch_models.step_lock import StepLock, call
from fastinterp.torch_models.stream_order import StreamOrder
from fastinterp.torch_models.unchanged import TensorWatch
from fastinterp.torch_models.writer import ModuleWriter

_LINE = "alpha"
_LARGEST_ALPHA = 4e7  # on a line; as of `interpolate`


class Live:
    """A torch module, whose parameters and floating buffers are set to any point of a path, in place.

        with fastinterp.Live(model, base="base/", directions={"positive": "p/", "formal": "f/"}) as live:
            live.set(positive=0.7, formal=-0.2)
            model.generate(...)

        live = fastinterp.Live(model, a="a/", b="b/")
        live.set(0.3)

    base        a checkpoint, or a state dict of torch tensors; None with directions: the module's own weights
    directions  name -> checkpoint or state dict: out = base + sum of alpha * (model - base)
    a, b        instead of directions, the ends of a line: out = a + alpha * (b - a)
    layers      only tensors whose names match this pattern, or one of several, as `model.layers.1?.*`; None: all
    integers    whose tensors the module gets where some are not floating: "a", "b", "base" or a direction's name. None:
                integer and boolean buffers stay as they are
    resident    hold the end points in memory: that of the module's device, or of the host where there is no room, with
                a warning. False: read them from their files at every `set`, through the page cache
    hooks       let every forward pass of the module be a step, as `with live.step():` does
    threads     None: one per CPU, at most 32. The result does not depend on it

    Every `set` starts from the end points, never from what the module holds: its result is what `interpolate` or
    `task_arithmetic` would write in the module's dtypes. Tied weights are written once. `set` waits
    for steps that run, in any thread, and steps wait for it.
    At the end of the `with`, or after `close`, the module has its own weights again, bit for bit: a copy is kept.
    A tensor is set by one open Live at a time; a second is refused.
    Extra state (get_extra_state) is left alone. Python's warnings say where tokenizers of checkpoints differ.

    On a device with CUDA `set` is one launch in torch's current stream, after what steps have put into other streams,
    and nothing waits for it: errors of the device come later. Steps that follow come after it, in any stream. CUDA
    graphs are replayed inside of `with live.step():`, which keeps the order; nothing is set while one is captured.

    Raises: ShapeError, with everything that does not match; CheckpointError; BackendError, if the module is on several
    devices, or on one without CUDA; UsageError.
    """

    def __init__(
        self,
        module: Any,
        *,
        base: Model | None = None,
        directions: Mapping[str, Model] | None = None,
        a: Model | None = None,
        b: Model | None = None,
        layers: str | Sequence[str] | None = None,
        integers: str | None = None,
        resident: bool = True,
        hooks: bool = True,
        threads: int | None = None,
    ):
        roles = _roles(base, directions, a, b)
        self._line = directions is None
        self._names = (_LINE,) if self._line else tuple(directions or ())
        every = weights_of(module, layers)
        self._weights = floating(every)
        self._device = device_of_all(self._weights)
        self._lock, self._order = StepLock(), None if self._device is None else StreamOrder(self._device)
        self._alphas: dict[str, float] | None = None
        self._watch = TensorWatch(module, self._weights)  # the tensors may be given other memory
        with ExitStack() as stack:
            stack.callback(ExclusiveTensors(self._weights).release)
            own = {name: weight for weight in weights_of(module, None) for name in weight.names}
            ends = {role: Endpoint.of(model, role).following(own) for role, model in roles.items()}
            models = list(ends.values())
            _refuse_quantised(models, every)
            if integers is not None:
                copied = CopiedTensors(every, models, _chosen(ends, integers))
                self._weights = [w for w in self._weights if not copied.names & set(w.names)]
                stack.callback(copied.restore)
            computed = not_in_all(own, models)  # they stay as they are
            self._weights = [w for w in self._weights if computed.isdisjoint(w.names)]
            _check_fit(models, self._weights, layers, computed if integers is None else computed | copied.names)
            warn_unlike(models, stacklevel=2)
            self._tensors = with_versions(self._weights)
            self._operands = EndpointOperands(
                models, self._weights, resident=resident, threads=cpu_threads(threads), isa=cpu_isa(), stack=stack,
                device=self._device,
            )  # fmt: skip
            self._original = self._copy_of_own_weights()
            inputs = [*self._operands.operands]  # of the sum, each with an operand for each weight
            if not self._line and base is None:
                inputs.insert(0, self._original)
            self._own_weights = Row(len(inputs))  # a copy of the last input
            inputs.append(self._original)
            places = [_tensor_io(i, w, [operands[i] for operands in inputs]) for i, w in enumerate(self._weights)]
            kind = "memory" if self._device is None else "device"
            self._writer = ModuleWriter(self._operands, places, [(kind, w.address, w.nbytes) for w in self._weights])
            if hooks:
                for handle in self._hooks(module):
                    stack.callback(handle.remove)
            self._stack = stack.pop_all()
        self._open = True

    @property
    def alphas(self) -> dict[str, float] | None:
        """The point at which the module is: the last of `set`, 0 for directions not named. None: at its own weights."""
        return None if self._alphas is None else dict(self._alphas)

    @property
    def directions(self) -> tuple[str, ...]:
        """The keywords of `set`: the names of the directions, or `alpha` on a line."""
        return self._names

    def set(self, alpha: float | Mapping[str, float] | None = None, /, **alphas: float) -> None:
        """Move the module to a point: one number on a line; a distance for each direction, 0 where none is given.

        alpha   on a line the number; else a mapping, for directions whose names are no Python names
        alphas  by keyword: the distance in each direction

        Waits until no step runs. If anything fails, the module has its own weights again.
        Raises: UsageError, if a direction is unknown, an alpha is no finite number, or this thread is in a step;
        CheckpointError, if a file of an end point changed.
        """
        point = self._point(alpha, alphas)
        row = self._row(point)
        with self._change():
            self._check_open()
            self._check_in_place()
            self._operands.refuse_changed()
            self._alphas = None
            try:
                self._writer.write(row)
                self._operands.refuse_changed_files()
                self._alphas = point
            except BaseException as error:
                self._restore()
                if isinstance(error, CheckpointError):
                    self._operands.refuse_changed_files()  # which says more than what came of it
                raise
            finally:
                increment_versions(self._tensors)

    def restore(self) -> None:
        """Give the module its own weights back. `set` can be called again."""
        with self._change():
            self._check_open()
            self._check_in_place()
            self._restore()
            increment_versions(self._tensors)

    @contextmanager
    def step(self) -> Iterator[None]:
        """The weights do not change inside. For generation that does not call the module itself, but parts of it."""
        thread = self._lock.enter()
        try:
            self._begin()
            yield
        finally:
            self._lock.leave(thread)

    def close(self) -> None:
        """Give the module its own weights back, and let files and memory go. More calls do nothing.

        Raises: UsageError, if the module was converted, moved or loaded anew meanwhile: it is left as it is.
        """
        with self._change():
            if not self._open:
                return
            try:
                self._check_in_place()
                self._restore()
                increment_versions(self._tensors)
            finally:
                self._open = False
                self._stack.close()
                if self._device is not None:  # what is in its queues uses memory that is let go
                    wait(current_queue(self._device).record())
                del self._operands, self._writer, self._original

    def __enter__(self) -> Live:
        self._check_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        where = "closed" if not self._open else "own weights" if self._alphas is None else str(self._alphas)
        return f"<Live: {len(self._weights)} tensors, {', '.join(self._names)}; at {where}>"

    @contextmanager
    def _change(self) -> Iterator[None]:
        """Alone, on the host and on the device."""
        with self._lock.change(), nullcontext() if self._order is None else self._order.change():
            yield

    def _begin(self) -> None:
        if self._order is not None:
            self._order.step()

    def _copy_of_own_weights(self) -> list[Stored]:
        sizes = {w.name: w.nbytes for w in self._weights}
        block = MemoryBlock(sizes) if self._device is None else self._operands.device_block(sizes)
        if block is None:
            raise BackendError(f"{sum(sizes.values())} bytes for a copy of the module's own weights cannot be had")
        sinks = [block.handle(w.name) for w in self._weights]
        weights = [self._operands.add(w.tensor, w.dtype) for w in self._weights if w.dtype]
        self._operands.copy(weights, sinks, [*sizes.values()])
        return self._operands.add_block(block, self._weights)

    def _restore(self) -> None:
        self._writer.write(self._own_weights)
        self._alphas = None

    def _check_open(self) -> None:
        if not self._open:
            raise UsageError("this Live is closed, and the module has its own weights. Make another one")

    def _check_in_place(self) -> None:
        gone = self._watch.gone()
        if gone:
            raise UsageError(
                f"{gone[0]} is not where it was: the module was converted, moved or loaded anew, and its own weights "
                "cannot be given back. Load it anew, and make another Live"
            )

    def _hooks(self, module: Any) -> list[Any]:
        def before(*_: Any) -> None:
            self._lock.enter(call())
            self._begin()

        def after(*_: Any) -> None:
            self._lock.leave(threading.get_ident(), call())

        # `after` runs even if another hook failed before `before` did.
        return [module.register_forward_pre_hook(before), module.register_forward_hook(after, always_call=True)]

    def _point(self, alpha: Any, alphas: Mapping[str, float]) -> dict[str, float]:
        distances: dict[str, Any] = dict(alphas)
        if isinstance(alpha, Mapping):
            distances = {**alpha, **distances}
        elif alpha is not None:
            if not self._line:
                raise UsageError(f"name the directions: set({self._names[0]}={alpha!r}), say")
            distances[_LINE] = alpha
        elif self._line and not distances:
            raise UsageError("set() needs the point on the line: set(0.3), say")
        for name in distances:
            if name not in self._names:
                raise UsageError(f"unknown direction `{name}`{suggestion(str(name), self._names)}")
        return {name: _finite(name, distances.get(name, 0.0)) for name in self._names}

    def _row(self, point: Mapping[str, float]) -> Row:
        if not self._line:
            row = Combine((0.0, *point.values()), base=0).row()
            if len(row.inputs) > MAX_INPUTS:
                raise UsageError(
                    f"at most {MAX_INPUTS - 1} directions can have a distance at a time, got {len(row.inputs) - 1}. "
                    "Set the others to 0"
                )
            return row
        alpha = point[_LINE]
        if abs(alpha) > _LARGEST_ALPHA:
            raise UsageError(f"alpha must be in -{_LARGEST_ALPHA:.1e}..{_LARGEST_ALPHA:.1e}, got {alpha:g}")
        return Combine((1.0 - alpha, alpha), sums_to_one=True).row()


def _tensor_io(i: int, weight: Weight, operands: Sequence[Stored]) -> TensorIO:
    """The operands of weight number `i`, and sink number `i`, to which it is written."""
    code = (weight.dtype.code if weight.dtype else None) or 0
    return TensorIO(weight.name, weight.shape, tuple(operands), (weight.nbytes,) * len(operands), code, weight.nbytes,
                 (i,), (0,), ())  # fmt: skip


def _finite(name: str, number: Any) -> float:
    try:
        value = float(number) if not isinstance(number, (bool, str, bytes)) else math.nan
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not abs(value) <= LARGEST:
        raise UsageError(f"`{name}` must be a finite number, got {number!r}"[:200])
    return value


def _chosen(ends: Mapping[str, Endpoint], integers: str) -> Endpoint:
    """The end point called `integers`. Raises: UsageError."""
    by_name = {role.removeprefix("direction "): end for role, end in ends.items()}
    if integers not in by_name:
        raise UsageError(f"`integers` must be one of {', '.join(by_name)}, got {integers!r}"[:200])
    return by_name[integers]


def _refuse_quantised(models: Sequence[Endpoint], weights: Sequence[Weight]) -> None:
    """Raises: CheckpointError, if a tensor of the module holds codes or scales of quantised weights in an end point."""
    names = {name for w in weights for name in w.names}
    for model in models:
        if model.checkpoint is not None:
            if any(t.quantised for name, t in model.checkpoint.tensors.items() if name in names):
                raise quantised_error([model.checkpoint])
        elif found := [q for q in quantised_tensors(model.headers()) if q.codes in names]:
            raise quantised_arrays([(model.label, found)])


def _check_fit(
    models: Sequence[Endpoint], weights: Sequence[Weight], layers: str | Sequence[str] | None, copied: Collection[str]
) -> None:
    """Raises: ShapeError, with everything that does not fit the module. Tensors that `layers` leaves out may differ.

    copied  names of tensors that are not looked at
    """
    names = {name for w in weights for name in w.names}
    mismatches = Mismatches(remedy=WHOSE)
    for model in models:
        specs = {n: spec for n, spec in model.specs().items() if spec[0].merges or n in names}
        specs = {n: spec for n, spec in specs.items() if n not in copied}
        if layers is not None:
            specs = {n: spec for n, spec in specs.items() if n in names or matches([n], layers)}
        mismatches.check(weights, model.label, specs)
    mismatches.check_contiguous(weights)
    mismatches.refuse()


def _roles(base: Any, directions: Any, a: Any, b: Any) -> dict[str, Model]:
    """The end points by their role, in the order of the sum's terms."""
    if directions is None:
        if a is None or b is None or base is not None:
            raise UsageError(
                "give either the ends of a line, a and b, or directions, and the base that they start from"
            )
        return {"a": a, "b": b}
    if a is not None or b is not None:
        raise UsageError("give either directions or the ends of a line, a and b, not both")
    if isinstance(directions, Mapping) and not directions:
        raise UsageError("`directions` is empty: name at least one checkpoint or state dict")
    if not isinstance(directions, Mapping):
        raise UsageError(
            f"`directions` must be a mapping of names to checkpoints or state dicts, got {directions!r}"[:200]
        )
    for name in directions:
        if not isinstance(name, str) or not name:
            raise UsageError(f"a direction must have a name, got {name!r}")
    origin = {} if base is None else {"base": base}
    return origin | {f"direction {name}": model for name, model in directions.items()}
