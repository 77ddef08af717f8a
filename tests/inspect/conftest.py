"""The models that tests of `check` look at."""

from __future__ import annotations

import pytest

from tests.support.llamas import llama, save


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """base/, a/ and b/ in the current folder, two fine-tunes."""
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate(["base", "a", "b"]):
        save(name, llama(noise=1e-2 * i))
    return tmp_path
