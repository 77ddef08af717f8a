"""`verify`: outputs that are as they were written, and what it says of others."""

from __future__ import annotations

import pytest

import fastinterp
from tests.support.merged import recipe_of, related, saved_in
from tests.verification.test_replay import METHODS


@pytest.mark.parametrize("full", [False, True], ids=["sample", "full"])
@pytest.mark.parametrize("method", METHODS)
def test_what_was_just_written_is_as_it_should_be(tmp_path, method, full):
    paths = saved_in(tmp_path / "models", related(3))
    fastinterp.merge(recipe_of(method, paths), tmp_path / "out")
    result = fastinterp.verify(tmp_path / "out", full=full)
    assert result.ok, result.summary()
    assert result.recomputed == result.of if full else result.recomputed
