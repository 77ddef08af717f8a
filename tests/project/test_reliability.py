"""docs/reliability.md: every promise names tests, and these exist."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.support.backends import usable

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "reliability.md").read_text("utf-8")


def promises() -> list[tuple[str, list[str], str]]:
    """Promise, names of tests, and what their last run counted, of every row of the tables of promises."""
    found = []
    for table in re.findall(r"^\| promise \| test \|.*\n\|[-|: ]+\n((?:\|.*\n)+)", PAGE, re.MULTILINE):
        for row in table.splitlines():
            promise, tests, figure = [cell.strip() for cell in row.strip("|").split("|")]
            found.append((promise, re.findall(r"`(tests/[^`]+)`", tests), figure))
    return found


def test_there_are_promises():
    assert len(promises()) > 15


@pytest.mark.parametrize(("promise", "tests", "figure"), promises(), ids=lambda x: x[:50] if isinstance(x, str) else "")
def test_a_promise_has_tests_that_exist(promise, tests, figure):
    assert tests, "no row without a test"
    for name in tests:
        file, _, function = name.partition("::")
        tree = ast.parse((ROOT / file).read_text("utf-8"))
        assert function in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, name


@pytest.mark.slow(10)
def test_figures_are_the_numbers_of_tests():
    """`N of M`: M is what pytest finds now under these names, with those of `make torture`; N, that passed, is M."""
    names = sorted({name for _, tests, _ in promises() for name in tests})
    options = ["--collect-only", "-q", "-m", "long or not long", "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *names], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-1000:]
    counts = Counter(line.partition("[")[0] for line in done.stdout.splitlines() if line.startswith("tests/"))
    every_isa = {"scalar", "avx2", "avx512"} <= {*usable()}  # else some have fewer cases here
    wrong = []
    for promise, tests, figure in promises():
        passed = re.match(r"(\d+) of (\d+)\b", figure)
        count = sum(counts[name] for name in tests)
        if passed is None:
            wrong += [] if figure == "see *Attacks*" else [f"{promise}: {figure!r} is no figure"]
        elif passed[1] != passed[2] or (int(passed[2]) != count if every_isa else int(passed[2]) < count):
            wrong.append(f"{promise}: {figure!r}, and pytest finds {count}")
    assert wrong == []


def test_commands_that_the_page_names_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    named = set(re.findall(r"`make ([a-z-]+)", PAGE + (ROOT / "SECURITY.md").read_text("utf-8")))
    assert {"torture", "faults", "fuzz", "sanitize"} <= named <= targets
