"""Addresses with characters that are sent in percents, of IPv6, with odd names; and those that there cannot be."""

from __future__ import annotations

from pathlib import Path

import fsspec
import numpy as np
import pytest

from fastinterp.checkpoint.http_folder import HttpStore
from fastinterp.checkpoint.http_ranges import joined
from fastinterp.checkpoint.open import open_checkpoint
from fastinterp.checkpoint.url_model import _store
from fastinterp.errors import CheckpointError, StorageError
from fastinterp.ops.dtypes import F32
from tests.support.checkpoints import tensor, write
from tests.support.file_server import file_server


@pytest.fixture(autouse=True)
def model(tmp_path: Path) -> None:
    write(tmp_path / "modèle 1", {"w": tensor(np.arange(4.0), F32)})


@pytest.fixture
def server(tmp_path: Path):
    with file_server(tmp_path) as files:
        yield files


@pytest.mark.parametrize("name", ["modèle 1", "mod%C3%A8le%201", "modèle%201"])
@pytest.mark.parametrize("file", ["", "/model.safetensors"])
def test_characters_in_percents(server, name, file):
    assert [*open_checkpoint(f"{server.url}/{name}{file}").tensors] == ["w"]
    assert all(path.startswith("/mod%C3%A8le%201") for path, _ in server.asked)


@pytest.mark.parametrize("name", ["odd/..", "odd/.", "odd/" + "模" * 100, "odd/a b+c'd"])
def test_names_that_no_folder_here_can_have(tmp_path, name):
    memory = fsspec.filesystem("memory")
    memory.pipe_file(f"/{name}/model.safetensors", (tmp_path / "modèle 1" / "model.safetensors").read_bytes())
    opened = open_checkpoint(f"memory://{name}")
    assert [*opened.tensors] == ["w"] and opened.root.is_dir()
    memory.rm("/odd", recursive=True)


def test_ipv6():
    assert isinstance(_store("http://[::1]:81/a", "http://[::1]:81/a"), HttpStore)


@pytest.mark.parametrize(
    ("url", "kind"),
    [
        ("http://[::1/a", CheckpointError),
        ("http://127.0.0.1:port/a", StorageError),
        ("http://two..dots/a", StorageError),
        ("http://white space/a", StorageError),
    ],
)
def test_addresses_that_cannot_be(url, kind):
    with pytest.raises(kind, match="there can be no such address"):
        open_checkpoint(url)


def test_links_that_are_none():
    assert joined("http://h/a/", "b.txt") == "http://h/a/b.txt"
    assert joined("http://h/a/", "http://[::1/") is joined("http://h/a/", "ftp://h/") is None
