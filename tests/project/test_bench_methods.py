"""The races of methods: every method has a case, and its answer and reads are checked before anything is timed."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import methods as bench
from fastinterp.bench.check import WrongAnswerError
from fastinterp.bench.checkpoints import SIZES, write_checkpoints
from fastinterp.methods import names


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_checkpoints(folder, SIZES["tiny"], say=lambda _: None)
    return folder


def test_every_method_has_a_case():
    assert names() == sorted(bench.CASES)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fisher", "model_stock", "nearswap", "task_arithmetic"])
def test_a_race_checks_before_it_times(name, models):
    found = bench.measured(name, bench.CASES[name], models, runs=1, mergekit=None)
    assert found["reads"] == pytest.approx(bench.CASES[name].reads, abs=1e-3)
    assert found["racers"]["fastinterp"]["checked_elements"] > 0


def test_a_wrong_answer_is_not_timed(models, monkeypatch):
    case = bench.Case(2, ("ft1", "ft2"), once={"t": 0.3})
    monkeypatch.setattr(bench, "evaluate", lambda *args, **kwargs: 1.0 + kwargs["base"])
    with pytest.raises(WrongAnswerError, match="slerp"):
        bench.measured("slerp", case, models, runs=1, mergekit=None)
