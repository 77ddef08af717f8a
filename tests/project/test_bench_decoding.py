"""The benchmark of decoders: every form is merged, and its answer is checked before anything is timed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import decoding as bench
from fastinterp import _C
from fastinterp.bench.check import WrongAnswerError
from fastinterp.bench.checkpoints import SIZES, write_checkpoints


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_checkpoints(folder, SIZES["tiny"])
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", bench.FORMS)
def test_a_race_checks_before_it_times(name, models):
    found = bench.measured(name, models, runs=1)
    assert found["racers"][name]["checked_elements"] > 0
    assert found["wall_ratio"] > 0


@pytest.mark.parametrize("name", bench.IN_CACHE)
def test_decoders_are_timed_in_cache(name, monkeypatch):
    monkeypatch.setattr(bench, "_BATCHES", 1)
    monkeypatch.setattr(bench, "_BATCH", 3)
    assert bench.gb_s(name, _C.isas()[0]) > 0


def test_a_wrong_answer_is_not_timed(monkeypatch):
    monkeypatch.setattr(bench, "decode", lambda *args: np.zeros(bench.ROWS * bench.COLUMNS, np.float32))
    with pytest.raises(WrongAnswerError, match="int8-row"):
        bench.gb_s("int8-row", _C.isas()[0])
