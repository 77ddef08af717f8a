"""The readers, on the inputs that fuzzing kept and on some that are damaged anew: a result, or an error of our own."""

from __future__ import annotations

import json
import signal
from random import Random

import pytest

from fastinterp.errors import FastinterpError
from tests.attacks.fuzz import LIMIT_S, attempt, corpus, damaged, damaged_json
from tests.attacks.targets import TARGETS, Target

COUNT = 200


@pytest.fixture(autouse=True)
def _time_limit():
    """An input that hangs ends the test with its message."""

    def late(*_: object) -> None:
        raise TimeoutError(f"an input took more than {LIMIT_S} s")

    before = signal.signal(signal.SIGALRM, late)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("name", TARGETS)
def test_files_as_they_should_be_are_read(tmp_path, name):
    """Else a target tests nothing but its first check. Not every seed is whole: an empty file is one."""
    target = TARGETS[name]
    assert attempt(target, tmp_path, target.seeds[0]) is None


@pytest.mark.slow(3)
@pytest.mark.parametrize("name", TARGETS)
def test_damaged_files_are_errors(tmp_path, name):
    target, random = TARGETS[name], Random(name)
    kept = corpus(name)
    assert kept, f"no corpus: make fuzz, then python -m tests.attacks.fuzz {name} --keep"
    seeds = [*target.seeds, *kept]
    refused = 0
    for data in [*kept, *(damaged(seeds, random) for _ in range(COUNT))]:
        signal.alarm(LIMIT_S)
        refused += attempt(target, tmp_path, data) is not None
    assert refused > COUNT / 10, "hardly anything is refused: the damage does not reach the reader"


def test_other_exceptions_are_mistakes(tmp_path):
    def reader(_folder: object, data: bytes) -> None:
        if data == b"ours":
            raise FastinterpError("x")
        raise KeyError(data)

    target = Target(reader, ())
    assert str(attempt(target, tmp_path, b"ours")) == "x"
    with pytest.raises(KeyError):
        attempt(target, tmp_path, b"")


def test_damage_to_json_keeps_it_json():
    random = Random(0)
    seed = b'{"a": [1, {"b": "c"}], "d": null}'
    found = {damaged_json(seed, random) for _ in range(200)} - {None}
    assert len(found) > 50 and all(json.loads(data) is not None for data in found if data)
    assert damaged_json(b"{", random) is None and damaged_json(b"1", random) is None
