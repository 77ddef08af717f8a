"""Equality of bytes of two tensors in files."""

from __future__ import annotations

import pytest

from fastinterp.checkpoint import same_bytes as module
from fastinterp.checkpoint.same_bytes import same_bytes
from fastinterp.errors import CheckpointError


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 200])
def test_equal_up_to_the_last_byte(tmp_path, monkeypatch, size):
    monkeypatch.setattr(module, "_PIECE", 64)
    data = bytes(i % 251 for i in range(size))
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_bytes(b"head" + data)
    b.write_bytes(data + b"tail")
    assert same_bytes((a, 4, size), (b, 0, size))
    assert not same_bytes((a, 4, size), (b, 0, size + 1))
    for at in {0, size // 2, size - 1} if size else ():
        changed = bytearray(data)
        changed[at] ^= 1
        b.write_bytes(changed)
        assert not same_bytes((a, 4, size), (b, 0, size))


def test_nothing_is_read_behind_a_difference(tmp_path, monkeypatch):
    """Else the end of the shorter file would be an error."""
    monkeypatch.setattr(module, "_PIECE", 8)
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_bytes(bytes(16))
    b.write_bytes(bytes(7) + b"x")
    assert not same_bytes((a, 0, 16), (b, 0, 16))
    b.write_bytes(bytes(12))
    with pytest.raises(CheckpointError, match="only 4 of 8 bytes are left at byte 8"):
        same_bytes((a, 0, 16), (b, 0, 16))


def test_one_place_is_not_read(tmp_path):
    assert same_bytes((tmp_path / "none", 0, 8), (tmp_path / "none", 0, 8))
