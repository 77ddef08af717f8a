"""Declarations like those of methods, for recipes that are only read: parameters and models without arithmetic."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest

from fastinterp.compute.ops import Combine
from fastinterp.methods import Each, Keyed, Method, NotNegative, Range, Sidecar, Unit, find, method
from fastinterp.recipe import schema


@method(base="required", models=(2, 64))
def ties(
    n: int, *, weight: Each[float], density: Each[Unit] = (1.0,), normalize: bool = True, int8_mask: bool = False,
    lambda_: float = 1.0,
) -> Any:  # fmt: skip
    """Sums of trimmed task vectors.     out = x0 + sum"""
    yield from ()
    return Combine((0.0,) * n, base=0)


@method(base="required", models=(2, 64))
def dare_linear(n: int, *, weight: Each[float], density: Each[Unit] = (1.0,)) -> Any:
    yield from ()
    return Combine((0.0,) * n, base=0)


@method(base="required", models=(2, 2))
def slerp(n: int, *, t: Unit) -> Any:
    """The great circle.     out = s0*x0 + s1*x1"""
    yield from ()
    return Combine((1.0 - t, t))


@method(base="required", models=(2, 2))
def arcee_fusion(n: int) -> Any:
    yield from ()
    return Combine((0.0, 1.0), base=0)


@method(base="optional", models=(2, 3))
def nuslerp(n: int, *, weight: Each[float], nuslerp_flatten: bool = True) -> Any:
    yield from ()
    return Combine((1.0,) * n)


@method(base="none", models=(1, 64))
def words(
    n: int,
    *,
    fisher: Each[Sidecar],
    preset: Literal["paper", "mergekit"] = "mergekit",
    weights: Annotated[Literal["linear", "1-sqrt"], Keyed("decay")] | None = None,
    steps: Annotated[int, Range(1, 10)] = 3,
    radius: NotNegative = 1.0,
) -> Any:
    """One parameter of every kind."""
    yield from ()
    return Combine((1.0,) * n)


_ALL = {m.name: m for m in (ties, dare_linear, slerp, arcee_fusion, nuslerp, words)}


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipes find the stand-ins by their names, and all other methods as ever."""

    def found(name: str) -> Method:
        return _ALL[name] if name in _ALL else find(name)

    monkeypatch.setattr(schema, "find", found)
