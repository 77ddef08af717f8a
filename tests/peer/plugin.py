"""A pytest plugin: mergekit's own tests with this engine installed, and a table of what ran where.

    python -m pytest -p tests.peer.plugin FOLDER/tests      (`make peer-suite` does it)

Every test must pass, and every merge of a test that stays with mergekit must be expected: `listed` has the tests and
the reasons. What is listed and merges here after all is a failure, too, and so is a name in the lists that no test has,
or no float64 that mergekit had to compute, once the whole suite ran.
"""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Generator

import pytest

from fastinterp.integrations import mergekit
from tests.peer import common
from tests.peer.listed import FLOAT64, STAYS, WITHOUT

_FIRST = "merged by mergekit, not by fastinterp: "
_WHOLE = 500  # tests: more than any part of the suite has
_LOGGERS = ("fastinterp.integrations.mergekit", "fastinterp.integrations.mergekit_methods")


class _Reasons(logging.Handler):
    """Collects why merges stayed with mergekit."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if "by mergekit, not by fastinterp" in message:
            self.found.append(message)


_reasons = _Reasons()
_files: dict[str, Counter[str]] = {}
_used: set[str] = set()  # names in the lists that a test needed


def pytest_configure(config: pytest.Config) -> None:
    sys.modules["tests.common"] = common
    for name in _LOGGERS:
        logging.getLogger(name).addHandler(_reasons)


def _listed(nodeid: str, table: dict[str, str]) -> str | None:
    """The reason for a test: of the longest key that is a part of its id."""
    keys = [key for key in table if key in nodeid]
    _used.update(keys)
    return table[max(keys, key=len)] if keys else None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Run a test with the engine installed; those in WITHOUT without it."""
    without = _listed(item.nodeid, WITHOUT)
    stays = _listed(item.nodeid, STAYS)
    if without is not None:
        item.user_properties.append(("listed", without))
        return (yield)
    _reasons.found.clear()
    mergekit.install()
    try:
        result = yield
    finally:
        mergekit.uninstall()
    found = _reasons.found
    if stays is not None:
        item.user_properties.append(("listed", stays))
        assert found, f"the test is listed ({stays}), but all of its merges ran here: remove it from the list"
        return result
    names = [name for name in FLOAT64 if name in item.nodeid]
    if names and found:
        _used.update(names)
        item.user_properties.append(("listed", "float64"))
        found = [reason for reason in found if "float32, not in torch.float64" not in reason]
    assert not found, f"merges stayed with mergekit: {found}"
    return result


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    counts = _files.setdefault(report.nodeid.partition("::")[0], Counter())
    if report.when == "call" or (report.when == "setup" and report.outcome != "passed"):
        listed = report.outcome == "passed" and any(name == "listed" for name, _ in report.user_properties)
        counts["listed" if listed else report.outcome] += 1


def pytest_sessionfinish(session: pytest.Session) -> None:
    unused = {*WITHOUT, *STAYS, *FLOAT64} - _used
    if unused and session.testscollected > _WHOLE and not session.config.getoption("keyword"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        _files["listed, but no test needs it: " + ", ".join(sorted(unused))] = Counter(failed=len(unused))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    rows: list[tuple[str, ...]] = [("file", "tests", "passed", "listed", "skipped", "failed")]
    for file, counts in sorted(_files.items()):
        numbers = [counts["passed"], counts["listed"], counts["skipped"], counts["failed"]]
        rows.append((file.rpartition("/")[2], *map(str, [sum(numbers), *numbers])))
    terminalreporter.write_sep("=", "mergekit's tests with this engine installed")
    for row in rows:
        terminalreporter.write_line(f"{row[0]:<36}" + "".join(f"{cell:>9}" for cell in row[1:]))
