"""What every test run says first: which backends it tests, and which it cannot. How workers share the tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support import backends

MOST_WORKERS = 8  # each loads torch, and the tests are over before more would help


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """For `-n auto`: as many as there are processors for this process."""
    return min(len(os.sched_getaffinity(0)), MOST_WORKERS)


def pytest_configure(config: pytest.Config) -> None:
    if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
        # torch's threads, of children too: more than there are processors wait for each other in loops.
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // int(workers))))
    missing = backends.missing_required()
    if missing:
        raise pytest.UsageError(
            f"FASTINTERP_REQUIRE names backends that cannot be tested here: {', '.join(missing)}. "
            f"Usable here: {', '.join(backends.usable()) or 'none'}."
        )


def pytest_report_header() -> list[str]:
    skipped = [f"{name} ({reason})" for name, reason in backends.skipped().items()]
    return [
        f"fastinterp backends tested: {', '.join(['reference', *backends.combining()])}",
        f"fastinterp backends skipped: {', '.join(skipped) or 'none'}",
    ]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests that are long wait for `make torture`. Where workers share the tests, modules with the longest come first,
    so that none is left alone at the end.
    """
    if "FASTINTERP_LONG" not in os.environ:
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="long: make torture runs it"))
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return
    longest: dict[Path, float] = {}
    for item in items:
        for mark in item.iter_markers("slow"):
            seconds = mark.args[0] if mark.args else 1
            longest[item.path] = max(seconds, longest.get(item.path, 0))
    items.sort(key=lambda item: -longest.get(item.path, 0))
