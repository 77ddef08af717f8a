"""docs/reliability.md: every promise names tests, and these exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "reliability.md").read_text("utf-8")


def promises() -> list[tuple[str, list[str]]]:
    """Promise and names of tests, of every row of the tables of promises."""
    found = []
    for table in re.findall(r"^\| promise \| test \|.*\n\|[-|: ]+\n((?:\|.*\n)+)", PAGE, re.MULTILINE):
        for row in table.splitlines():
            promise, tests = [cell.strip() for cell in row.strip("|").split("|")][:2]
            found.append((promise, re.findall(r"`(tests/[^`]+)`", tests)))
    return found


def test_there_are_promises():
    assert len(promises()) > 15


@pytest.mark.parametrize(("promise", "tests"), promises(), ids=lambda x: x[:50] if isinstance(x, str) else "")
def test_a_promise_has_tests_that_exist(promise, tests):
    assert tests, "no row without a test"
    for name in tests:
        file, _, function = name.partition("::")
        tree = ast.parse((ROOT / file).read_text("utf-8"))
        assert function in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, name


def test_commands_that_the_page_names_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    named = set(re.findall(r"`make ([a-z-]+)", PAGE + (ROOT / "SECURITY.md").read_text("utf-8")))
    assert {"torture", "faults", "fuzz", "sanitize"} <= named <= targets
