"""Following what a message says: its commands, as a shell would run them."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import subprocess
import sys
from typing import Any

import pytest


def commands(message: str) -> list[str]:
    """The shell commands in backquotes in a message."""
    return re.findall(r"`((?:python|rm|head) [^`]*)`", message)


def follow(message: str, monkeypatch: pytest.MonkeyPatch, **names: Any) -> None:
    """Run the commands of a message one after the other, here: those of Python in this process, whose libraries are
    loaded already.

    names  placeholders of the message, as BASE, and what the user puts for them
    """
    found = commands(message)
    assert found, f"no command in: {message}"
    for command in found:
        for name, value in names.items():
            assert name in command
            command = command.replace(name, str(value))
        words = shlex.split(command)
        if words[:2] == ["python", "-c"]:
            (code,) = words[2:]
            exec(compile(code, "remedy", "exec"), {"__name__": "__main__"})
        elif words[:2] == ["python", "-m"]:
            monkeypatch.setattr(sys, "argv", words[2:])
            runpy.run_module(words[2], run_name="__main__")
        else:
            subprocess.run(command, shell=True, check=True, cwd=os.getcwd())
