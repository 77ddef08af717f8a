"""What holds for every merge method, found by scanning their folder and named nowhere here.

Parameters come from the declarations: what is required, then each other parameter away from its default, then all of
them. What a property does not hold for is derived: from declarations, from what the method asks for, and from its
docstring.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest

from fastinterp.errors import MethodError
from fastinterp.methods import Method, Parameter, Sidecar, find, names
from fastinterp.ops.requests import Divergence
from tests.support import drive

WEIGHTS = (0.5, 0.3, 0.2)  # of sum 1, so that sums are averages


def value(p: Parameter, order: int, models: int) -> Any:
    """One that is not the default; `order` tells parameters of the same kind apart."""
    if p.kind is bool:
        return not p.default
    if p.choices:
        return next(c for c in p.choices if c != p.default)
    if p.kind is int:
        return 3
    if p.range is None:
        return WEIGHTS[:models] if p.each else 0.7
    if p.each:
        return tuple(v / (1 + order) for v in (0.4, 0.6, 0.5)[:models])
    return 3.0 * p.default if isinstance(p.default, float) and p.range.high > 1 else 0.4


def variants(m: Method, models: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name -> parameters: the required ones; with one more each; with all."""
    ranged = [p for p in m.parameters if p.range]
    values = {
        p.name: value(p, ranged.index(p) if p in ranged else 0, models) for p in m.parameters if p.kind is not Sidecar
    }
    required = {p.name: values[p.name] for p in m.parameters if p.required and p.kind is not Sidecar}
    yield "required", required
    yield from ((name, required | {name: v}) for name, v in values.items() if name not in required)
    yield "all", values


def count(m: Method) -> int:
    """Of the models other than the base."""
    return min(3, m.models[1] - (m.base != "none"))


def sidecars(m: Method, shape: tuple[int, ...], models: int) -> dict[str, Any]:
    rng = np.random.default_rng(99)
    return {p.name: [rng.random(shape) for _ in range(models)] for p in m.parameters if p.kind is Sidecar}


@dataclass(frozen=True)
class Case:
    """A method, whether it is given a base, and parameters that it accepts."""

    m: Method
    based: bool
    label: str
    parameters: Mapping[str, Any]

    def __str__(self) -> str:
        return f"{self.m.name}-{self.label}{'-base' * self.based}"

    def draw(self, shape: tuple[int, ...] = (6, 10)) -> list[np.ndarray]:
        """float64 inputs, the base first if there is one: a tensor, and others that are near it."""
        rng = np.random.default_rng(0)
        first = rng.standard_normal(shape)
        return [first, *(first + 0.4 * rng.standard_normal(shape) for _ in range(count(self.m) + self.based - 1))]

    def merge(self, inputs: list[np.ndarray], **changed: Any) -> np.ndarray:
        """What the method makes of one tensor, some parameters changed."""
        models = inputs[1:] if self.based else inputs
        given = {**sidecars(self.m, inputs[0].shape, len(models)), **self.parameters, **changed}
        return drive.run(self.m, models, base=inputs[0] if self.based else None, parameters=given, seed=5)

    def asks(self) -> list[Any]:
        """The method's requests, and its sum."""
        seen: list[Any] = []

        def noted(handle: Callable[..., Any]) -> Callable[..., Any]:
            return lambda wanted, *rest: (seen.append(wanted), handle(wanted, *rest))[1]  # type: ignore[func-returns-value]

        with pytest.MonkeyPatch.context() as patch:
            for name in ("answer", "evaluate"):
                patch.setattr(drive, name, noted(getattr(drive, name)))
            self.merge(self.draw())
        return seen

    def extra(self) -> list[Parameter]:
        """The parameters that are given although they need not be."""
        return [p for p in self.m.parameters if p.name in self.parameters and not p.required]


@cache
def suggested() -> list[tuple[Case, bool]]:
    """Of everything that declarations suggest, and whether the method accepts it."""
    found = []
    for name in names():
        m = find(name)
        for based in (True, False) if m.base == "optional" else (m.base == "required",):
            some = [Case(m, based, label, given) for label, given in variants(m, count(m))]
            found += [(case, _accepted(case)) for case in some]
    return found


def cases() -> list[Case]:
    return [case for case, accepted in suggested() if accepted]


def _accepted(case: Case) -> bool:
    try:
        case.merge(case.draw())
    except MethodError:
        return False
    return True


def those(chosen: Callable[[Case], bool]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", [case for case in cases() if chosen(case)], ids=str)


def _free_of_scale(case: Case) -> bool:
    """A softmax of the weights knows a scale of its own."""
    return not any(isinstance(request, Divergence) for request in case.asks())


def _free_of_order(case: Case) -> bool:
    """Random masks are drawn by the model's place; a run of checkpoints has an order, and the docstring says so."""
    masks = getattr(case.asks()[-1], "masks", None) or ()
    return "oldest first" not in case.m.doc and not any(mask.is_random for mask in masks)


def _free_of_factors(case: Case) -> bool:
    """Numbers without a range may be factors of the whole."""
    return not any(p.kind is float and p.range is None for p in case.extra())


def _only_weights(case: Case) -> bool:
    return "weight" in case.parameters and all(p.name == "weight" for p in case.extra())


def _between_two(case: Case) -> bool:
    return case.based and count(case.m) == 1 and "t" in case.parameters


@those(_free_of_scale)
@pytest.mark.parametrize("exponent", [-3, 5])
def test_scaling_by_a_power_of_two_scales_the_output(case, exponent):
    """Exactly, when parameters in units of the weights are scaled with them."""
    scale, inputs = 2.0**exponent, case.draw()
    absolute = [p for p in case.m.parameters if p.range and p.range.absolute]
    lengths = {p.name: case.parameters.get(p.name, p.default) * scale for p in absolute}
    assert (case.merge([scale * x for x in inputs], **lengths) == scale * case.merge(inputs)).all()


@those(_free_of_order)
@pytest.mark.parametrize("shrinks", [1.0, 1e-3], ids=["alike", "lengths"])
def test_the_order_of_the_models_does_not_matter(case, shrinks):
    """Beyond rounding, also for models of lengths 1, 1e-3 and 1e-6; each model takes its parameters along."""
    inputs, each = case.draw(), {p.name for p in case.m.parameters if p.each}
    models = [shrinks**i * x for i, x in enumerate(inputs[case.based :])]
    given = {**sidecars(case.m, inputs[0].shape, len(models)), **case.parameters}
    base = inputs[: case.based]
    expected = case.merge([*base, *models])
    for order in ([*range(len(models))][::-1], [*range(1, len(models)), 0]):
        turned = {name: [v[i] for i in order] for name, v in given.items() if name in each}
        drive.close(case.merge([*base, *(models[i] for i in order)], **turned), expected)


@those(_free_of_factors)
def test_a_model_merged_with_itself_is_itself(case):
    x = case.draw()[0]
    drive.close(case.merge([x] * (count(case.m) + case.based)), x)


@those(_only_weights)
def test_a_lone_weight_returns_its_model(case):
    """Where all other weights are 0, and nothing is dropped: the end points are reached."""
    inputs = case.draw()
    factors = {name: 1.0 for name, v in case.parameters.items() if isinstance(v, float)}
    for place, model in enumerate(inputs[case.based :]):
        lone = tuple(float(i == place) for i in range(count(case.m)))
        drive.close(case.merge(inputs, weight=lone, **factors), model)


@those(_between_two)
def test_the_ends_of_t(case):
    """t = 0 is the base, bit for bit. t = 1, or the largest where t is a length, is the other model."""
    (t,) = (p for p in case.m.parameters if p.name == "t")
    inputs = case.draw()
    assert (case.merge(inputs, t=0.0) == inputs[0]).all()
    end = case.merge(inputs, t=t.range.high if t.range else 1.0)
    drive.close(end, inputs[1])
    assert (t.range and t.range.absolute) or (end == inputs[1]).all()


def test_few_methods_are_left_out():
    """The properties are derived to hold for nearly all methods: a change of the derivation does not go unseen."""
    left_out = {
        chosen.__name__: set(names()) - {case.m.name for case in cases() if chosen(case)}
        for chosen in (_free_of_scale, _free_of_order, _free_of_factors)
    }
    assert all(len(v) <= 2 for v in left_out.values()), left_out
    assert len({case.m.name for case in cases() if _only_weights(case)}) > len(names()) / 2


REFUSED = {"ema-required", "ema-all"}  # it takes exactly one of its two rules


def test_what_methods_refuse():
    """Only these variants: parameters that do not go together. Each way to call a method has some that it accepts."""
    assert {str(case) for case, accepted in suggested() if not accepted} == REFUSED
    ways = {(case.m.name, case.based) for case, _ in suggested()}
    assert {(case.m.name, case.based) for case in cases()} == ways


EXTREMES = {
    "zeros": lambda x: [np.zeros_like(v) for v in x],
    "zeros but one": lambda x: [*(np.zeros_like(v) for v in x[1:]), x[0]],
    "equal": lambda x: [x[0]] * len(x),
    "equal but the first": lambda x: [x[0], *(x[-1] for _ in x[1:])],
    "opposite": lambda x: [v * (-1) ** i for i, v in enumerate([x[0]] * len(x))],
    "opposite deltas": lambda x: [x[0], *(x[0] + (-1) ** i for i, _ in enumerate(x[1:]))],
    "one value": lambda x: [np.full_like(v, i) for i, v in enumerate(x)],
    "a row of zeros": lambda x: [v if v.ndim < 2 else np.concatenate([v[:1] * 0, v[1:]]) for v in x],
    "large": lambda x: [v * np.float32(1e30) for v in x],
    "tiny": lambda x: [v * np.float32(1e-40) for v in x],
    "lengths": lambda x: [v * np.float32(10.0 ** (-3 * i)) for i, v in enumerate(x)],
    "lengths, shortest first": lambda x: [v * np.float32(10.0 ** (3 * i)) for i, v in enumerate(x)],
    "random": lambda x: x,
}


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (9, 1), (1, 9), (7,), (4, 5), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("kind", EXTREMES)
def test_finite_input_gives_finite_output(kind, shape):
    """Of the same shape: zeros, equal and opposite vectors, single elements, no dimension and three."""
    for case in cases():
        inputs = EXTREMES[kind]([x.astype(np.float32) for x in case.draw(shape)])
        out = case.merge([np.asarray(x, np.float32).reshape(shape) for x in inputs])
        assert out.shape == shape, case
        assert np.isfinite(out).all(), case
