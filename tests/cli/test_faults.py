"""System calls that fail, in a short form. `python -m tests.support.fault_survey`: every occurrence of every call."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.fault_server import FaultServer
from tests.support.fault_survey import MODULES, Place, survey, traced
from tests.support.faults import Call


@pytest.fixture(scope="module")
def server() -> Iterator[FaultServer]:
    with FaultServer(MODULES, limit_s=60) as running:
        yield running


@pytest.mark.slow(30)
@pytest.mark.parametrize("name", ["interpolate", "check", "diff"])
def test_faults_end_in_one_line_that_names_the_file(server, tmp_path, name):
    """The second and the last occurrence of each call."""
    place = Place(tmp_path / "place")
    _, _, every = traced(server, place, name)
    picked: dict[tuple[str, bool], Call] = {}
    for call in every:
        picked[call.name, call.nth > 2] = call
    tried = list(survey(server, place, name, list(picked.values()), most=10**6))
    assert len(tried) > 20
    assert [str(bad) for bad in tried if bad is not None] == []
