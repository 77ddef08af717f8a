"""A run of models at addresses goes on with what an earlier one left only if the inputs are known to be the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fastinterp.checkpoint.http_ranges import HttpFile
from fastinterp.execute.resume.identity import Identity, identity_of
from fastinterp.ops.dtypes import F32
from fastinterp.plan.plan import plan_recipe
from tests.support.checkpoints import tensor, write
from tests.support.file_server import file_server


def identity(url: str) -> Identity:
    recipe = {"merge_method": "linear", "models": [{"model": url, "parameters": {"weight": 1}}]}
    return identity_of([plan_recipe(recipe, None, None, None, None)])


def test_what_tells_inputs_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = write(tmp_path / "a", {"w": tensor(np.arange(4.0), F32)})
    (tmp_path / "a" / "config.json").write_text('{"x": 1}')
    with file_server(tmp_path) as server:
        first = identity(f"{server.url}/a")
        assert first.sure and first.key == identity(f"{server.url}/a").key
        (tmp_path / "a" / "config.json").write_text('{"x": 2}')  # of the same size; listings do not say versions
        assert identity(f"{server.url}/a").key != first.key
        monkeypatch.setattr(HttpFile, "version", "")  # a server without ETag and Last-Modified
        assert not identity(f"{server.url}/a").sure
    assert identity(str(folder)).sure
