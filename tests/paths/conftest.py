"""Models that several tests of paths read."""

from __future__ import annotations

import pytest

from tests.support.language_models import save_model


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """A folder with a language model `base`, and `x` and `q`, which write those letters."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("base", "x", "q"):
        save_model(folder / name, "" if name == "base" else name)
    return folder
