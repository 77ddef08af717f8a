"""`replay`: the same bytes again, from the receipt of an output alone."""

from __future__ import annotations

from typing import Any

import pytest

import fastinterp
from fastinterp.methods import names
from tests.support.merged import recipe_of, related, saved_in, tree

METHODS = [m for m in names() if m not in ("passthrough",)]


@pytest.mark.parametrize("method", METHODS)
def test_the_same_bytes_by_every_method(tmp_path, method):
    paths = saved_in(tmp_path / "models", related(3))
    recipe: dict[str, Any] = recipe_of(method, paths)
    fastinterp.merge(recipe, tmp_path / "out")
    result = fastinterp.replay(tmp_path / "out", tmp_path / "again")
    assert result.same
    assert tree(tmp_path / "out") == tree(tmp_path / "again")
