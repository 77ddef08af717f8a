"""What every test run says first: which backends it tests, and which it cannot."""

from __future__ import annotations

import pytest

from tests.support import backends


def pytest_configure(config: pytest.Config) -> None:
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
