"""The register of files that are elsewhere, which threads share."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastinterp.checkpoint import remote
from fastinterp.checkpoint.http_ranges import HttpFile


def test_another_thread_may_register_files_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = HttpFile("http://h/x", "x", 1)
    others = iter(range(100))

    def exists_here(path: Path) -> bool:
        remote.register(tmp_path / "other" / str(next(others)), file, None)
        return False

    for name in ("a", "b"):
        remote.register(tmp_path / name, file, None)
    monkeypatch.setattr(remote, "exists_here", exists_here)
    assert remote.names_in(tmp_path) == ["a", "b"]
    remote.forget(tmp_path)
    assert remote.names_in(tmp_path) == [] == remote.names_in(tmp_path / "other")
