"""A short form of `make faults`: the first occurrence of every call fails, in every command."""

from __future__ import annotations

import pytest

from tests.attacks import faults
from tests.support.fault_server import FaultServer, Run
from tests.support.faults import library


@pytest.fixture(scope="module")
def server():
    library()  # skips, where there is no C compiler
    with FaultServer(faults.MODULES) as running:
        yield running


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("faults") / "case"
    faults.prepare(made)
    return made


@pytest.mark.slow(8)
@pytest.mark.parametrize("command", faults.COMMANDS)
def test_calls_that_fail_are_errors(server, folder, command):
    tally = faults.cases(server, command, folder, 1)
    assert tally.wrong == []
    assert tally.cases > 10 and tally.refused > 5


@pytest.mark.parametrize(
    ("done", "got", "said"),
    [
        (Run(4, "", "OutputError: x"), {}, ""),
        (Run(0, "", ""), {"a": b"1"}, ""),
        (Run(1, "", "Traceback (most recent call last)"), {}, "traceback"),
        (Run(1, "", "x"), {}, "exit code 1"),
        (Run(-11, "", ""), {}, "exit code -11"),
        (Run(2, "", "RecipeError: cannot read the recipe"), {}, ""),
        (Run(2, "", "UsageError"), {}, "exit code 2"),
        (Run(4, "", ""), {}, "no message"),
        (Run(4, "", "OutputError"), {"a": b""}, "error, and files: ['a']"),
        (Run(0, "", ""), {"a": b""}, "success, but other files: ['a']"),
    ],
)
def test_what_is_wrong_is_noticed(done, got, said):
    assert faults.complaint(done, Run(0, "", ""), "merge", "close:1:EIO", got, {"a": b"1"}) == said
