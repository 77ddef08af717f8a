"""Shell completion: what is offered to bash, zsh and fish, and what bash itself makes of it."""

from __future__ import annotations

import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from fastinterp.cli import commands
from fastinterp.methods import find, names
from fastinterp.ops.dtypes import DTYPE_NAMES


def offered(line: str, shell: str = "bash") -> list[str]:
    """What the program says for the last word of a command line, as click's script for the shell asks it."""
    words = line.split(" ")
    env = {"_FASTINTERP_COMPLETE": f"{shell}_complete", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    if shell == "fish":
        env["COMP_CWORD"] = words[-1]
    done = CliRunner().invoke(commands, [], prog_name="fastinterp", env=env)
    assert done.exit_code == 0, done.output
    return done.stdout.split("\n")[:-1]


def words(line: str) -> list[str]:
    return [one.partition(",")[2] for one in offered(line) if one.startswith("plain,")]


def kinds(line: str) -> set[str]:
    return {one.partition(",")[0] for one in offered(line)}


def test_commands_and_options():
    assert words("fastinterp ex") == ["extract-lora", "explain", "explore"]
    assert words("fastinterp merge --max-") == ["--max-shard-size", "--max-memory"]
    assert words("fastinterp merge --rounding ") == ["nearest", "stochastic"]


def test_methods_and_their_parameters():
    assert words("fastinterp methods ") == names()
    assert words("fastinterp methods dare") == ["dare_linear", "dare_ties"]
    assert words("fastinterp sweep a b out --method slerp") == ["slerp", "slerp_lengths"]
    assert words("fastinterp sweep --method ties --parameter ") == [f"{p.name}=" for p in find("ties").parameters]


def test_dtypes_and_devices():
    for command in ("merge r.yml out", "explain r.yml", "interpolate a b out", "average a b", "extract-lora a out"):
        assert words(f"fastinterp {command} --dtype ") == list(DTYPE_NAMES)
    assert words("fastinterp merge --device cu") == ["cuda"]


@pytest.mark.parametrize("line", [
    "merge ", "merge r.yml ", "merge -o ", "interpolate ", "interpolate a ", "interpolate a b --base ", "average ",
    "average a ", "sweep --add x=", "explain ", "check ", "inspect ", "diff a ", "extract-lora --base ", "plot ",
    "plot r.json -o ", "explore --report ", "interpolate --tokenizer-source ",
])  # fmt: skip
def test_files(line):
    assert "file" in kinds(f"fastinterp {line}")


def test_every_argument_and_checkpoint_offers_something():
    """Also those of commands to come: an argument, or an option for a checkpoint, file or folder."""
    assert isinstance(commands, click.Group)
    for name in commands.list_commands(click.Context(commands)):
        command = commands.get_command(click.Context(commands), name)
        assert command is not None
        for param in command.params:
            if isinstance(param, click.Option) and param.metavar in ("CKPT", "FILE", "DIR", "OUT"):
                assert kinds(f"fastinterp {name} {param.opts[0]} ") <= {"file", "dir"}, (name, param.opts)
                assert kinds(f"fastinterp {name} {param.opts[0]} "), (name, param.opts)


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_get_the_same_words(shell):
    found = offered("fastinterp methods dare", shell)
    assert [word for word in found if "dare" in word.split(",")[-1]]
    assert "dare_ties" in " ".join(found) and "linear" in " ".join(found)


def script(shell: str) -> str:
    env = {"_FASTINTERP_COMPLETE": f"{shell}_source"}
    return CliRunner().invoke(commands, [], prog_name="fastinterp", env=env).stdout


def test_the_scripts_name_the_program():
    assert "complete -o nosort -F _fastinterp_completion fastinterp" in script("bash")
    assert "#compdef fastinterp" in script("zsh")
    assert "complete --no-files --command fastinterp" in script("fish")


def environment(tmp_path: Path) -> dict[str, str]:
    """One in which `fastinterp` is this one, and everything new is put into an empty folder."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "fastinterp"
    program.write_text(f"#!{sys.executable}\nfrom fastinterp.__main__ import main\nmain()\n")
    program.chmod(0o755)
    path = f"{program.parent}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(Path(__file__).parents[2]), "HOME": str(tmp_path)}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
def test_bash_completes(tmp_path):
    """The line of the README in a bash, which then completes words as it does for a user who presses Tab."""
    (tmp_path / "some-model").mkdir()
    asked = """
eval "$(_FASTINTERP_COMPLETE=bash_source fastinterp)"
for line in "fastinterp methods dare" "fastinterp merge --dtype bf" "fastinterp merge r.yml out --dtype fl"; do
  COMP_WORDS=($line); COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); COMPREPLY=()
  _fastinterp_completion fastinterp 2>/dev/null
  echo "${COMPREPLY[@]}"
done
"""
    env = environment(tmp_path)
    done = subprocess.run(["bash", "-c", asked], cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    methods, one, some = done.stdout.split("\n")[:3]
    assert (methods, one) == ("dare_linear dare_ties", "bfloat16")
    assert some.split() == [name for name in DTYPE_NAMES if name.startswith("fl")]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("fish") is None, reason="no fish here")
def test_fish_completes(tmp_path):
    (tmp_path / "recipe.yml").touch()
    asked = """
_FASTINTERP_COMPLETE=fish_source fastinterp | source
for line in "fastinterp methods dare" "fastinterp merge --dtype bf" "fastinterp merge rec"
  echo (complete -C $line)
end
"""
    env = environment(tmp_path)
    done = subprocess.run(["fish", "-c", asked], cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:3] == ["dare_linear dare_ties", "bfloat16", "recipe.yml"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("zsh") is None, reason="no zsh here")
def test_zsh_completes(tmp_path):
    """In a zsh at a terminal: its completion asks for one. Each line is noted when it is entered."""
    import pty

    (tmp_path / "recipe.yml").touch()
    env = {**environment(tmp_path), "TERM": "dumb", "PS1": "READY"}
    terminal, other = pty.openpty()
    shell = subprocess.Popen(["zsh", "-f", "-i"], stdin=other, stdout=other, stderr=other, cwd=tmp_path, env=env,
                             start_new_session=True)  # fmt: skip
    os.close(other)
    try:
        lines = [
            'autoload -Uz compinit; compinit -u -D; eval "$(_FASTINTERP_COMPLETE=zsh_source fastinterp)"',
            "note() { print -r -- $BUFFER >> lines; BUFFER= }; zle -N zle-line-finish note",
            "fastinterp methods dare_l\t", "fastinterp merge --dtype bf\t", "fastinterp merge rec\t",
        ]  # fmt: skip
        for line in lines:
            said(terminal, b"READY")
            os.write(terminal, line.encode())
            if line.endswith("\t"):  # the rest of the word
                said(terminal, {"l": b"linear", "f": b"bfloat16", "c": b"recipe.yml"}[line[-2]])
            os.write(terminal, b"\n")
        said(terminal, b"READY")
    finally:
        shell.kill()
        shell.wait()
        os.close(terminal)
    noted = [line.strip() for line in (tmp_path / "lines").read_text().splitlines()]
    assert noted == [
        "fastinterp methods dare_linear",
        "fastinterp merge --dtype bfloat16",
        "fastinterp merge recipe.yml",
    ]


def said(terminal: int, text: bytes) -> None:
    """Wait until a terminal shows a text, at most a minute."""
    shown, end = b"", time.monotonic() + 60
    while text not in shown:
        if select.select([terminal], [], [], end - time.monotonic())[0]:
            shown += os.read(terminal, 4096)
        assert time.monotonic() < end, shown.decode(errors="replace")
