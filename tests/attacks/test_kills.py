"""A short form of `make torture`: some kills of every kind of command, and an account that can fail."""

from __future__ import annotations

from random import Random

import pytest

from tests.attacks import kills


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("kills")
    kills.make_models(made, 6)
    return made


@pytest.mark.slow(15)
@pytest.mark.parametrize("name", ["merge", "interpolate", "ties over an older output"])
def test_the_same_command_again_ends_with_the_same_bytes(folder, name):
    tally = kills.cases(name, folder, 4, Random(name))
    assert tally.wrong == []
    assert tally.kills >= 4 and tally.equal == tally.cases


@pytest.mark.slow(4)
def test_other_bytes_are_noticed(folder, monkeypatch):
    """With a program that ends well whatever it wrote."""
    monkeypatch.setitem(kills.JOBS, "wrong", ["sh", "-c", 'mkdir -p "$0" && date +%N > "$0/model.safetensors"', "OUT"])
    tally = kills.cases("wrong", folder, 2, Random(1))
    assert len(tally.wrong) == tally.cases > 0 and "other bytes of model.safetensors" in tally.wrong[0]
