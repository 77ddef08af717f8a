"""The densities that reports tell: what thresholds kept, where magnitudes tie."""

from __future__ import annotations

import json

import numpy as np
import pytest

import fastinterp
from fastinterp.execute.jobs.densities import Density, densities
from fastinterp.ops.requests import Mask, MaskedCombine, Select, Selected
from tests.support import models as small


@pytest.fixture
def three(tmp_path):
    """A base; deltas 1, 2, 2, 2, 2, 3, 4, 5 of one model and 1..8 of the other, in two tensors."""
    deltas = [np.zeros(8), np.array([1, 2, 2, 2, 2, 3, 4, 5]), np.arange(1, 9)]
    for name, delta in zip(("base", "a", "b"), deltas, strict=True):
        small.save(tmp_path / name, {t: delta.astype(np.float32) for t in ("v", "w")})
    return [str(tmp_path / name) for name in ("base", "a", "b")]


def asked(three, **keys):
    base, *models = three
    return {"merge_method": "ties", "base_model": base, "models": [{"model": m} for m in models],
            "parameters": {"weight": 1, "density": 0.5, **keys}}  # fmt: skip


def test_ties_at_the_threshold_are_told(tmp_path, three):
    """Half of 8 is 4: the fourth largest of the first is one of four that tie."""
    report = fastinterp.merge(asked(three), tmp_path / "out")
    found = json.loads(json.dumps(report.as_dict()))["densities"]
    one = {"asked": 0.5, "kept": 7 / 8}
    assert found[three[1]] == {**one, "tensors": {"v": one, "w": one}}
    assert found[three[2]]["kept"] == found[three[2]]["asked"] == 0.5
    assert (
        f"  density 0.88 instead of 0.50 for {three[1]}: equal magnitudes are all kept" in report.summary().splitlines()
    )


def test_densities_of_the_whole_model(tmp_path, three):
    report = fastinterp.merge(asked(three, preset="paper"), tmp_path / "out")
    found = report.as_dict()["densities"]
    assert {name: entry["kept"] for name, entry in found.items()} == {three[1]: 14 / 16, three[2]: 0.5}


def test_nothing_is_said_where_nothing_ties(tmp_path, three):
    report = fastinterp.merge(asked([three[0], three[2]]), tmp_path / "out")
    assert report.as_dict()["densities"] and "magnitudes" not in report.summary()
    plain = fastinterp.merge(asked(three, density=1.0), tmp_path / "plain")
    assert plain.as_dict()["densities"] == {} and "magnitudes" not in plain.summary()


def test_both_ends_of_a_band():
    """Ranks 3 to 6 of 10 are asked for; the sixth is one of three that tie."""
    request = Select(((1, 6), (1, 3)))
    sum_ = MaskedCombine((0.0, 1.0), masks=(Mask(), Mask(min_bits=50, max_bits=80)))
    answers = [(request, (Selected(50, 8), Selected(80, 3)))]
    assert densities(sum_, answers, 10) == {1: Density(4, 6, 10)}
    scored = MaskedCombine((0.0, 1.0), masks=(Mask(), Mask(max_bits=80)))
    assert densities(scored, answers, 10) == {}
