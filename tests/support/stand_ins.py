"""A declaration with a parameter of every kind, for recipes that are only read."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest

from fastinterp.methods import Each, Keyed, Method, NotNegative, Range, Sidecar, find, method
from fastinterp.ops.combine import Combine
from fastinterp.recipe import schema


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
    yield from ()
    return Combine((1.0,) * n)


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipes find `words` by its name, and all other methods as ever."""

    def found(name: str) -> Method:
        return words if name == "words" else find(name)

    monkeypatch.setattr(schema, "find", found)
