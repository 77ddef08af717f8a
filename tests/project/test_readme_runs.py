"""The README runs as printed: its console and python blocks, from top to bottom, in one empty folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text("utf-8")

# What differs from run to run, and from machine to machine: times, rates, and what computed.
MASKED = (
    (r"\d[\d.]* (ms|s)\b", "TIME"),
    (r"\d[\d.]* [KMGT]?B/s", "RATE"),
    (r"\(cpu \w+, \d+ threads?\)", "(DEVICE)"),
)


def blocks(text: str) -> list[tuple[str, str]]:
    """(language, content) of each block that is run: console and python."""
    return re.findall(r"^```(console|python)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(block: str) -> list[tuple[str, str]]:
    """(command with the lines of its here-document, the output that is shown below it) of each `$ ` in a block."""
    found = []
    for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
        lines = part.split("\n")
        end = 1
        if here := re.search(r"<<(\w+)", lines[0]):
            end = 1 + lines.index(here[1])
        while lines[end - 1].endswith("\\"):
            end += 1
        found.append(("\n".join(lines[:end]), "\n".join(lines[end:]).strip("\n")))
    return found


def matches(shown: str, printed: str) -> bool:
    """Whether the output is what is shown, where `...` alone in a line stands for any lines."""
    for pattern, word in MASKED:
        shown, printed = (re.sub(pattern, word, text) for text in (shown, printed))
    lines = ["(?:.*\\n)*" if line == "..." else f"{re.escape(line)}\\n" for line in shown.strip("\n").split("\n")]
    return re.fullmatch("".join(lines), printed.strip("\n") + "\n") is not None


def test_blocks_and_commands_are_found():
    text = "```console\n$ cat > x <<END  # y\na\nEND\n$ b \\\n  c\nout\n...\n  1.5 ms\n$ d\n```\n"
    text += "\n```sh\nno\n```\n```python\np\n```\n"
    (_, console), python = blocks(text)
    assert commands(console) == [("cat > x <<END  # y\na\nEND", ""), ("b \\\n  c", "out\n...\n  1.5 ms"), ("d", "")]
    assert python == ("python", "p\n")


@pytest.mark.parametrize(
    ("shown", "printed", "same"),
    [
        ("a 1 ms", "a 22 ms", True),
        ("a 1 ms", "b 1 ms", False),
        ("a\n...\nz", "a\nb\nc\nz", True),
        ("a\n...\nz", "a\nz", True),
        ("a\n...", "a\nb", True),
        ("a\nz", "a\nb\nz", False),
        ("x, 0.5 s, 8.60 GB/s (cpu avx2, 2 threads)", "x, 12 ms, 1 KB/s (cpu scalar, 1 thread)", True),
    ],
)
def test_outputs_are_compared(shown, printed, same):
    assert matches(shown, printed) == same


@pytest.mark.slow(30)
def test_the_readme_runs_as_printed(tmp_path):
    """One shell for all console blocks between two python blocks, as a reader has; each command must succeed."""
    program = tmp_path / ".bin" / "fastinterp"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\nfrom fastinterp.__main__ import main\nmain()\n")
    program.chmod(0o755)
    folder = tmp_path / "empty"
    folder.mkdir()
    env = {
        **os.environ,
        "PATH": f"{program.parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
    }
    count = 0
    for language, block in blocks(README):
        if language == "python":
            done = subprocess.run(
                [sys.executable, "-c", block], cwd=folder, env=env, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stderr
            continue
        for command, shown in commands(block):
            done = subprocess.run(
                ["bash", "-c", command], cwd=folder, env=env, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
            assert not shown or matches(shown, done.stdout), f"{command}\nshown:\n{shown}\nprinted:\n{done.stdout}"
            count += 1
    assert count >= 14
    assert sorted(p.name for p in folder.iterdir()) == [
        "adapter", "again", "averaged", "curve", "ema", "merged", "mixed", "models", "path", "recipe.yml", "replayed",
    ]  # fmt: skip
