"""On a terminal of 80 columns no line is longer, and none is cut inside a word: output, help, warnings, errors."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import sys
import termios
import time
from pathlib import Path

import pytest

from fastinterp.messages import broken
from tests.support.models import layers, save

COLUMNS = 80
ROOT = Path(__file__).resolve().parents[2]
# All commands in one process, which forgets nothing between them that matters here.
PROGRAM = """
import shlex, sys
from fastinterp.cli import commands
for line in sys.argv[1:]:
    print("\\n$ " + line[:60], flush=True)
    try:
        commands.main(shlex.split(line), prog_name="fastinterp", standalone_mode=True)
    except SystemExit:
        pass
    sys.stdout.flush()
"""
RECIPE = """\
merge_method: ties
base_model: base
models:
  - {model: a, parameters: {weight: 0.5, density: 0.3}}
  - {model: b, parameters: {weight: 0.5, density: [{filter: mlp, value: 0.2}, {value: 0.4}]}}
"""
WRONG = RECIPE.replace("weight: 0.5, density: 0.3", "wieght: 0.5, dencity: 3").replace("base_model", "bass_modell")
LISTED = RECIPE.replace("weight: 0.5, density: 0.3", "density: 0.3") + "parameters: {weight: [0.3, 0.7]}\n"


def shown(lines: list[str], folder: Path) -> str:
    """What a terminal gets that runs these command lines, its control sequences left out."""
    pid, screen = pty.fork()
    if pid == 0:
        os.chdir(folder)
        env = {**os.environ, "TERM": "xterm", "PYTHONPATH": str(ROOT)}
        env.pop("COLUMNS", None)
        fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", 40, COLUMNS, 0, 0))
        os.execve(sys.executable, [sys.executable, "-c", PROGRAM, *lines], env)
    text, end = b"", time.monotonic() + 120
    try:
        while time.monotonic() < end:
            if not select.select([screen], [], [], 1)[0]:
                continue
            try:
                part = os.read(screen, 1 << 16)
            except OSError:  # the other end is closed
                break
            if not part:
                break
            text += part
    finally:
        os.close(screen)
        os.waitpid(pid, 0)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text.decode())
    return plain.replace("\r\n", "\n")


@pytest.mark.slow(8)
def test_nothing_is_cut(tmp_path):
    for i, name in enumerate(("base", "a", "b")):
        save(tmp_path / name, layers(1, noise=0.1 * i))
    for name, text in (("r", RECIPE), ("wrong", WRONG), ("listed", LISTED)):
        (tmp_path / f"{name}.yml").write_text(text)
    lines = [
        "check r.yml", "explain r.yml", "merge r.yml out1", "merge wrong.yml out2", "check wrong.yml",
        "merge listed.yml out2", "explain listed.yml", "check listed.yml", "interpolate a b out3 --alpha 0:1:0.25",
        "interpolate a b out4 --alpha 0.001",
        "sweep a b out5 --alpha 0,0.5", "average a b -o out6", "extract-lora a out7 --base base --rank 1", "inspect a",
        "inspect a --all", "inspect out1", "diff base a", "methods", "methods ties", "methods karcher", "marge", "zzz",
        "merge a b", "merge r.yml out8 --forse", "merge r.yml a", "interpolate a b out9 --alpha 0 0.5 1", "--help",
        *(f"{name} --help" for name in ("merge", "interpolate", "average", "sweep", "extract-lora", "check", "explain",
          "inspect", "diff", "plot", "explore", "methods", "doctor", "bench")),
    ]  # fmt: skip
    text = shown(lines, tmp_path)
    assert all(f"$ {line[:60]}\n" in text for line in lines)
    for line in text.split("\n"):
        printed = line.rsplit("\r", 1)[-1]
        assert len(printed) <= COLUMNS, printed
    assert "Traceback" not in text
    # Words that a terminal would have cut are whole.
    assert "MethodError" in text or "RecipeError" in text
    words = set(text.split())
    assert {"rounding", "kept", "change", "interpolate", "parameters:"} <= words


def test_lines_are_broken_between_words():
    text = "short\n  " + "word " * 30 + "\nname      " + "what it is " * 12 + "\n" + "x" * 100
    found = broken(text, COLUMNS).split("\n")
    assert found[0] == "short" and found[-1] == "x" * 100  # a word is never cut
    assert all(len(line) <= COLUMNS for line in found[:-1])
    assert found[2].startswith("    word") and any(re.match(r" {10}\S", line) for line in found)
    assert " ".join(" ".join(found).split()) == " ".join(text.split())
    assert broken(text, 10) == text  # no terminal is so narrow
