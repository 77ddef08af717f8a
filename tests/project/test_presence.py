"""No part of the package takes a failure of the system for "not there": what asks that goes through presence.py."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import fastinterp

PACKAGE = Path(fastinterp.__file__).parent
OF_OS_PATH = {"exists", "lexists", "isfile", "isdir", "islink", "ismount"}
OF_PATHS = {"exists", "is_file", "is_dir", "is_symlink", "is_mount", "glob", "rglob"}
OTHERS = {("os", "walk"), ("os", "access"), ("glob", "glob"), ("glob", "iglob")}
# Where only the wording of a message, or what is looked at first, depends on the answer.
WORDING = {
    "checkpoint/adapters.py": "a name in a remedy",
    "checkpoint/no_weights.py": "a hint",
    "checkpoint/open.py": "`Did you mean`",
    "checkpoint/remedies.py": "a name in a remedy",
    "cli/grammar.py": "numbers that follow an option",
    "cli/merge.py": "which outputs were finished, and older ones, in a note",
    "cli/sweep.py": "which outputs were finished, in a note",
    "inspect/check.py": "a hint",
    "paths/average.py": "a hint",
    "plan/single.py": "a hint",
    "recipe/references.py": "a hint",
    "verification/models.py": "where models may be near an output",
    "verification/recipes.py": "a hint",
}
# What is looked at is no part of a model.
ELSEWHERE = {
    "backends/registry.py": "drivers",
    "checkpoint/http_ranges.py": "certificates",
    "integrations/transformers.py": "a folder of its own making",
    "output/hub_upload.py": "an output that was written just now, counted for a message",
    "output/refusals.py": "whether a folder can be written to",
    "presence.py": "os.walk, told to raise",
}


def _looks(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, call) of what answers no where the system fails."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        of, name = ast.unparse(node.func.value), node.func.attr
        if (
            (of == "os.path" and name in OF_OS_PATH)
            or (of, name) in OTHERS
            or (name in OF_PATHS and of not in ("os.path", "remote", "glob", "self._fs"))
        ):
            yield node.lineno, f"{of}.{name}"


def test_all_looks_go_through_presence():
    found = {
        path.relative_to(PACKAGE).as_posix(): list(_looks(ast.parse(path.read_text())))
        for path in sorted(PACKAGE.rglob("*.py"))
    }
    found = {file: calls for file, calls in found.items() if calls and not file.startswith(("bench/", "system/"))}
    assert {file: calls for file, calls in found.items() if file not in {**WORDING, **ELSEWHERE}} == {}
    assert {*WORDING, *ELSEWHERE} - found.keys() == set(), "these have none any more"


def test_looks_are_found():
    lines = (
        "os.path.isdir(x)",
        "(root / n).is_file()",
        "remote.exists(x)",
        "os.walk(x)",
        "is_file(x)",
        "path.glob('*')",
    )
    text = "\n".join(lines)
    assert list(_looks(ast.parse(text))) == [
        (1, "os.path.isdir"), (2, "root / n.is_file"), (4, "os.walk"), (6, "path.glob")
    ]  # fmt: skip
