"""Linear paths between models, and metrics evaluated along them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from importlib.util import find_spec
from operator import index
from typing import Annotated, Any

from fastinterp.arguments import snapped
from fastinterp.errors import CheckpointError, FastinterpError, StorageError, UsageError
from fastinterp.execute.report import RoundingEffect
from fastinterp.in_memory.allocate import torch_dtype
from fastinterp.in_memory.merge import merge_measured
from fastinterp.ops.dtypes import parse_dtype
from fastinterp.paths.report import PathPoint, PathReport
from fastinterp.plan.quantised import refuse_models
from fastinterp.torch_models.endpoints import Endpoint, Endpoints, Model, not_in_all, warn_unlike
from fastinterp.torch_models.module_tensors import weights_of
from fastinterp.torch_models.module_weights import ModuleWeights, dtypes_of

Alpha = Annotated[
    float | Mapping[str, float],
    """A point of a path: 0.3 on the line from a (0) to b (1), below 0 and above 1 beyond them; of directions a mapping
    of their names to distances, {"formal": 0.5, "kind": -0.2}, where those that are left out are 0, the base.
    """,
]
Alphas = Annotated[
    Sequence[Alpha] | Mapping[str, Sequence[float]],
    """Points of a path: a list of points (see `Alpha`), or of directions a mapping of their names to lists of
    distances, {"formal": [0, 0.5, 1], "kind": [-1, 0, 1]}, which stands for all combinations.
    """,
]
ALPHA = "alpha"  # the name of the one direction of a line from a to b


def path(
    a: Model | None = None,
    b: Model | None = None,
    *,
    base: Model | None = None,
    directions: Mapping[str, Model] | None = None,
    model: Any = None,
    integers: str | None = None,
    dtype: str | None = None,
    rounding: str = "nearest",
    seed: int = 0,
    threads: int | None = None,
) -> Path:
    """The line from `a` to `b`, or all that lies in several directions from `base`; nothing is read yet.

    a, b        out = a + alpha * (b - a); with a base: base + (1 - alpha) * (a - base) + alpha * (b - base)
    directions  in place of a and b: a name for each model. out = base + sum of alpha[name] * (model - base)
    model       a torch module that takes on the weights of each point; its own are back at the end. None: the points
                are state dicts
    integers    whose tensors the points have where some are not floating: "a", "b", "base" or the name of a direction.
                None: they must be equal in all models
    dtype       of the points; None: as the base's tensors, else those of `a`. In bf16 small steps of alpha may not
                arrive: the report tells, float32 mends it. With a model: the dtypes that it has, and no others
    rounding, seed, threads   as of `fastinterp.merge`

    Each model is a checkpoint's path or a state dict in memory (torch tensors, on one device, or numpy arrays).
    Python's warnings say where tokenizers of checkpoints differ.
    Raises: UsageError; CheckpointError, also if weights are quantised, unless codes and scales are equal in all models.
    """
    if (a is None) != (b is None) or (a is None) == (directions is None):
        raise UsageError("a path needs `a` and `b`, or `base` and `directions`")
    if directions is not None and base is None:
        raise UsageError("`directions` start at a `base`. Give one")
    _check_named(directions)
    origin = None if base is None else _endpoint(base, "base")
    models = directions if directions is not None else {"a": a, "b": b}
    ends = {name: _endpoint(x, name) for name, x in models.items()}
    lead = next(iter(ends.values())) if origin is None else origin
    if model is not None:
        reference = {name: weight for weight in weights_of(model, None) for name in weight.names}
        ends = {name: end.following(reference) for name, end in ends.items()}
        origin = None if origin is None else origin.following(reference)
    else:
        ends = {name: end.following(lead.shapes()) for name, end in ends.items()}
        computed = not_in_all(lead.shapes(), list(ends.values()))
        ends = {name: end.without(computed) for name, end in ends.items()}
        origin = None if origin is None else origin.without(computed)
    if model is not None and dtype is not None:
        _check_dtype(dtype, model)
    warn_unlike([*([] if origin is None else [origin]), *ends.values()], stacklevel=2)
    stored = [end.checkpoint for end in (origin, *ends.values()) if end is not None and end.checkpoint is not None]
    if stored:
        refuse_models(stored)
    roles = [*ends, *([] if origin is None else ["base"])]
    if integers is not None and integers not in roles:
        raise UsageError(f"`integers` must be one of {', '.join(roles)}, got {integers!r}"[:200])
    settings = _Settings(integers, dtype, rounding, seed, threads)
    return Path(ends, origin, tuple(directions) if directions is not None else (ALPHA,), model, settings)


@dataclass(frozen=True)
class _Settings:
    """The settings of points.

    integers  the role of the model whose tensors are taken where some are not floating; None: they must be equal
    dtype     of the points; by name of tensor, or None: as the end points have them
    """

    integers: str | None
    dtype: str | Mapping[str, str] | None
    rounding: str
    seed: int
    threads: int | None


class Path:
    """A linear path between models, whose points are computed when they are accessed. Made by `path`.

    names  of the directions: `alpha` alone for a line from a to b
    """

    def __init__(
        self,
        ends: Mapping[str, Endpoint],
        base: Endpoint | None,
        names: tuple[str, ...],
        model: Any,
        settings: _Settings,
    ):
        self.names = names
        self._ends, self._base, self._model, self._settings = ends, base, model, settings
        self._line = list(ends) == ["a", "b"] and names == (ALPHA,)

    def __repr__(self) -> str:
        base = "" if self._base is None else f" from {self._base.label}"
        return f"<Path{base}: {', '.join(end.label for end in self._ends.values())}>"

    def weights(self, alpha: Alpha) -> dict[str, Any]:
        """The state dict of one point, in new tensors.

        alpha  a number on a line from a to b, else distances by name of direction: see `Alpha`

        Raises: UsageError; CheckpointError or StorageError, if a file of a model cannot be read.
        """
        return self._measured(self._point(alpha))[0]

    def evaluate(
        self,
        fn: Callable[[Any, Any, int], Mapping[str, float]],
        alphas: Alphas,
        seeds: int | Sequence[int] = 1,
        *,
        probabilities: Sequence[str] = (),
        progress: Callable[[int, int], object] | None = None,
    ) -> PathReport:
        """Call `fn(weights, alpha, seed)` for every point and seed, and report what its metrics do along the path.

        fn             is given the model that `path` was given, else a state dict; alpha as in `alphas`; the seed. It
                       returns a metric's value by its name, the same names every time. With the same random numbers
                       for a seed at all points, differences between points have smaller errors than the points
        alphas         numbers; for directions: mappings of their names to numbers, where names left out are 0, or one
                       mapping of names to lists of numbers: the grid of all combinations. What a sum of steps makes of
                       0 and 1 is 0 and 1
        seeds          whole numbers given to `fn` in turn, or how many: 0, 1, ...
        probabilities  metrics that are probabilities: a line is fitted to their log-odds
        progress       called with the calls of `fn` done and to do

        Every point is made from the ends, never from another point. Those in files are read anew for each, through the
        page cache, which keeps them as long as they fit. If `fn` raises, the model has its own weights back, and from
        Python 3.11 on a note at the error tells the point and the seed.
        Raises: UsageError; ShapeError, if weights do not fit; StorageError, if a checkpoint changes meanwhile.
        """
        if not callable(fn):
            raise UsageError(f"`fn` must be a function of weights, alpha and seed, got {type(fn).__name__}")
        points = self._points(alphas)
        numbers = _seeds(seeds)
        done: list[PathPoint] = []
        mixed = self._settings.integers is not None
        with nullcontext() if self._model is None else ModuleWeights(self._model, self._models, mixed=mixed) as module:
            for at in points:
                weights, effects = self._measured(at, module)
                if module is not None:
                    module.write(weights)
                    weights = self._model
                alpha = at[ALPHA] if self._line else dict(at)
                samples: dict[str, list[float]] = {}
                for k, seed in enumerate(numbers):
                    metrics = _metrics(_called(fn, weights, alpha, seed), alpha)
                    names = list(done[0].samples) if done else list(samples or metrics)
                    if set(metrics) != set(names):
                        raise UsageError(f"the metrics must be the same at all points: {names}, then {list(metrics)}")
                    for name in names:
                        samples.setdefault(name, []).append(metrics[name])
                    if progress:
                        progress(len(done) * len(numbers) + k + 1, len(points) * len(numbers))
                done.append(PathPoint(at, {m: tuple(v) for m, v in samples.items()}, *_effect(effects)))
                self._refuse_changed()
                del weights  # before those of the next point are made
        ends = {name: end.label for name, end in self._ends.items()}
        base = None if self._base is None else self._base.label
        return PathReport(ends, base, tuple(numbers), tuple(done), tuple(probabilities), self._line)

    def _measured(
        self, at: Mapping[str, float], module: ModuleWeights | None = None
    ) -> tuple[dict[str, Any], dict[str, RoundingEffect]]:
        """The tensors of one point, and what their rounding made of the change."""
        alphas = [at[name] for name in self.names]
        weights = [1.0 - alphas[0], alphas[0]] if self._line else alphas
        settings = self._settings
        if self._model is not None and settings.dtype is None:
            # Rounded once, to what the model has: what is measured is what the model holds.
            settings = replace(settings, dtype=dtypes_of(self._model))
        self._refuse_changed()
        try:
            merged = self._merged(weights, settings, module)
        except FastinterpError:
            self._refuse_changed()  # which says more than what came of it
            raise
        self._refuse_changed()
        return merged

    def _merged(
        self, weights: Sequence[float], settings: _Settings, module: ModuleWeights | None
    ) -> tuple[dict[str, Any], dict[str, RoundingEffect]]:
        with ExitStack() as stack:
            endpoints = Endpoints(self._models, stack)
            tensors = [endpoints.tensors(model) for model in self._models]
            if module is not None:
                tensors = [module.select(x) for x in tensors]
            base = None if self._base is None else tensors.pop(0)
            return merge_measured(
                tensors, "linear" if base is None else "task_arithmetic", base=base, parameters={"weight": weights},
                integers=self._chosen, files=endpoints.files, dtype=settings.dtype, rounding=settings.rounding,
                seed=settings.seed, threads=settings.threads,
            )  # fmt: skip

    @property
    def _chosen(self) -> int | str | None:
        integers = self._settings.integers
        return list(self._ends).index(integers) if integers is not None and integers in self._ends else integers

    @property
    def _models(self) -> list[Endpoint]:
        """The base, if there is one, and the others."""
        return [*([] if self._base is None else [self._base]), *self._ends.values()]

    def _refuse_changed(self) -> None:
        """Raises: StorageError, if a file is no longer what it was when the path was made."""
        for model in self._models:
            for file in model.changed_files():
                raise StorageError(f"{file} was changed while the path was evaluated. Evaluate it again")

    def _points(self, alphas: Alphas) -> list[dict[str, float]]:
        points = list(self._grid(alphas) if isinstance(alphas, Mapping) else map(self._point, _listed(alphas)))
        if not points:
            raise UsageError("at least one alpha is needed")
        for i, at in enumerate(points):
            if at in points[:i]:
                raise UsageError(f"every point may be given once, got {at} twice")
        return points

    def _grid(self, alphas: Mapping[str, Any]) -> Iterator[dict[str, float]]:
        lists = {name: _listed(values) for name, values in alphas.items()}
        for combination in itertools.product(*lists.values()):
            yield self._point(dict(zip(lists, combination, strict=True)))

    def _point(self, alpha: Any) -> dict[str, float]:
        if not isinstance(alpha, Mapping):
            if len(self.names) > 1:
                raise UsageError(f"a point is a mapping of directions ({', '.join(self.names)}) to numbers: {alpha!r}")
            alpha = {self.names[0]: alpha}
        for name in alpha:
            if name not in self.names:
                raise UsageError(f"unknown direction `{name}`. Known: {', '.join(self.names)}")
        return {name: _finite(alpha.get(name, 0.0), name) for name in self.names}


def _endpoint(model: Model | None, role: str) -> Endpoint:
    """Raises: UsageError, without torch; CheckpointError, also if torch does not have one of the dtypes."""
    endpoint = Endpoint.of(model, role)
    if endpoint.checkpoint is None:
        return endpoint
    if find_spec("torch") is None:
        raise UsageError(
            "a path between checkpoints needs torch: pip install torch. Without it, give state dicts of numpy arrays"
        )
    for name, entry in endpoint.checkpoint.tensors.items():
        try:
            torch_dtype(entry.dtype)
        except UsageError:
            raise CheckpointError(
                f"{name} is of dtype {entry.dtype}, which torch does not have",
                file=str(entry.files[0]), tensor=name,
            ) from None  # fmt: skip
    return endpoint


def _check_named(directions: Any) -> None:
    if directions is not None and (not isinstance(directions, Mapping) or not directions):
        raise UsageError(f"`directions` must map names to models, at least one, got {directions!r}"[:200])
    for name in directions or ():
        if not isinstance(name, str) or not name:
            raise UsageError(f"a direction must have a name, got {name!r}")


def _check_dtype(dtype: str, model: Any) -> None:
    others = [f"{n} ({d})" for n, d in dtypes_of(model).items() if parse_dtype(d) != parse_dtype(dtype)]
    if others:
        raise UsageError(
            f"`dtype` is {dtype}, but `model` has {others[0]}, and would round a second time. Leave `dtype` out, or "
            "convert the model first"
        )


def _listed(alphas: Any) -> list[Any]:
    if isinstance(alphas, (str, bytes)) or not hasattr(alphas, "__iter__"):
        raise UsageError(f"the alphas must be a list, got {alphas!r}")
    return list(alphas)


def _finite(value: Any, name: str) -> float:
    number = _number(value)
    if number is None or not math.isfinite(number):
        raise UsageError(f"{name} must be a finite number, got {value!r}"[:200])
    return snapped(number)


def _number(value: Any) -> float | None:
    """A number of Python, numpy or torch, NaN and Inf too; None for anything else."""
    if isinstance(value, (bool, str, bytes)) or not hasattr(value, "__float__"):
        return None
    try:
        return float(value.item() if hasattr(value, "item") else value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # several numbers in an array, or one too large
        return None


def _seeds(value: Any) -> list[int]:
    """Seeds from a list, or from how many. Raises: UsageError."""
    listed = hasattr(value, "__iter__") and getattr(value, "shape", None) != ()
    try:
        if isinstance(value, (str, bytes, Mapping)) or any(isinstance(x, bool) for x in (value if listed else [value])):
            raise TypeError
        seeds = [index(seed) for seed in value] if listed else list(range(index(value)))
    except TypeError:
        raise UsageError(f"the seeds must be whole numbers in a list, or how many there are, got {value!r}") from None
    if not seeds or len(set(seeds)) != len(seeds):
        raise UsageError(f"the seeds must be at least one and all different, got {value!r}")
    return seeds


def _called(fn: Callable[[Any, Any, int], Any], weights: Any, alpha: object, seed: int) -> Any:
    """The return value of `fn`. Raises: its errors, with a note of the point."""
    try:
        return fn(weights, alpha, seed)
    except Exception as error:
        if hasattr(error, "add_note"):  # from Python 3.11 on
            error.add_note(f"fastinterp: raised by the function that evaluate called at alpha {alpha}, seed {seed}")
        raise


def _metrics(result: Any, alpha: object) -> dict[str, float]:
    if not isinstance(result, Mapping) or not result:
        raise UsageError(f"at {alpha} the function returned {result!r}, expected metrics by name, as {{'loss': 0.3}}")
    numbers = {name: _number(value) for name, value in result.items()}
    for name, number in numbers.items():
        if not isinstance(name, str) or number is None:
            raise UsageError(f"at {alpha} the metric {name!r} is {result[name]!r}, expected a number")
    return {name: number for name, number in numbers.items() if number is not None}


def _effect(effects: Mapping[str, RoundingEffect]) -> tuple[float | None, float | None, float | None]:
    total = RoundingEffect.total(effects.values())
    return total.strength, total.changed_fraction, total.relative_change
