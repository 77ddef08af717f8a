"""A short form of `make faults`: the first occurrence of every system call fails, in every command."""

from __future__ import annotations

import pytest

from tests.support.fault_server import FaultServer, Run
from tests.support.fault_survey import MODULES, Place, survey, traced
from tests.support.faults import library
from tests.support.written import tree

COMMANDS = ["interpolate", "merge", "force", "durable", "file", "sweep", "check", "explain", "inspect"]


@pytest.fixture(scope="module")
def server():
    library()  # skips, where there is no C compiler
    with FaultServer(MODULES) as running:
        yield running


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("faults").resolve() / "faults")


@pytest.mark.slow(8)
@pytest.mark.parametrize("command", COMMANDS)
def test_calls_that_fail_are_errors(server, place, command):
    """The right exit code and one line that names the file; no part of an output; inputs as they were."""
    before = [tree(place.a), tree(place.b)]
    every = traced(server, place, command)[2]
    ends = list(survey(server, place, command, [call for call in every if call.nth == 1]))
    assert [str(end) for end in ends if end is not None] == []
    assert len(ends) > 10 and [tree(place.a), tree(place.b)] == before


@pytest.mark.slow
def test_what_ends_otherwise_is_noticed(place):
    """With a program that writes something and fails as no command does."""

    class Careless:
        def run(self, _args: object, rules: str = "", *_: object, **options: object) -> Run:
            if trace := options.get("trace"):
                trace.write_text(f"1 open {place.a}\n")  # type: ignore[attr-defined]  # a Path
                return Run(0, "", "")
            place.out.mkdir(exist_ok=True)
            (place.out / "left").write_bytes(rules.encode())
            return Run(4, "", f"OutputError: {place.root}")

    found = list(survey(Careless(), place, "merge", None))  # type: ignore[arg-type]
    assert [end is not None and "it leaves" in end.why for end in found] == [True] * 3
    place.clear()
