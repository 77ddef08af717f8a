"""The comparison of two builds' outputs: it passes for equal builds, and names what differs otherwise."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest

from benchmarks.build_cases import MODELS, commands, write_inputs
from benchmarks.compare_builds import Build, Result, Variant, compare, first_difference, main, tree_of
from fastinterp.bench.checkpoints import SIZES
from fastinterp.methods import names

ROOT = Path(__file__).resolve().parents[2]
SCALAR = [Variant("scalar", 1, "cpu")]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that commands read."""
    folder = tmp_path_factory.mktemp("work")
    write_inputs(folder / MODELS, None, SIZES["tiny"])
    return folder


def compared(name: str, work: Path, after: Path | str = sys.executable) -> Result:
    command = next(c for c in commands(["linear"]) if c.name == name)
    return compare(command, Build.named("before", sys.executable), Build.named("after", str(after)), SCALAR, work)


def interpreter(folder: Path, source: str) -> Path:
    """A program that is started in place of the interpreter, with its arguments."""
    program = folder / "python"
    program.write_text(f"#!{sys.executable}\nimport os, subprocess, sys\nfrom pathlib import Path\n{source}")
    program.chmod(0o755)
    return program


@pytest.mark.slow
def test_a_build_equals_itself(work, tmp_path, capsys):
    """Once by its interpreter, once as a source tree; the models that are named are read, and not written to."""
    models = tmp_path / "models"
    for name in ("base", "ft1", "ft2"):
        shutil.copytree(work / MODELS / name, models / name)
    written, scratch = tree_of(models), tmp_path / "scratch"
    scratch.mkdir()
    arguments = [sys.executable, str(ROOT), "--models", str(models), "--dir", str(scratch), "--only", "lin*ar,no such"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "1 commands" in printed and "scalar x " in printed and "linear" in printed
    assert "differences: 0" in printed and " 0 files" not in printed
    assert tree_of(models) == written and list(scratch.iterdir()) == []


def test_every_kind_of_file_is_compared(work):
    result = compared("tokenizer/union", work)
    assert (result.runs, result.files, result.differences) == (1, 6, [])


def test_one_wrong_byte_is_found(work, tmp_path):
    program = interpreter(
        tmp_path,
        f"code = subprocess.call([{sys.executable!r}, *sys.argv[1:]])\n"
        "data = Path('out/model.safetensors').read_bytes()\n"
        "Path('out/model.safetensors').write_bytes(data[:-1] + bytes([data[-1] ^ 1]))\n"
        "sys.exit(code)\n",
    )
    (line,) = compared("linear", work, program).differences
    assert line.startswith(
        "after (scalar x 1): model.safetensors: lm_head.weight (BF16 [512, 64]), byte 65535 of its data"
    )


def test_a_command_that_fails_is_a_difference(work, tmp_path):
    program = interpreter(tmp_path, "sys.exit('it broke')\n")
    assert compared("linear", work, program).differences == ["after (scalar x 1) failed with exit code 1: it broke"]


@pytest.mark.parametrize(
    ("build", "message"),
    [("/nowhere/python", "neither an interpreter nor a folder"), ("/bin/false", "/bin/false -c .* failed")],
)
def test_a_build_that_cannot_be_run(build, message, tmp_path, capsys):
    assert main([sys.executable, build, "--dir", str(tmp_path)]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_differences_are_named(tmp_path):
    """A file that is missing, one that is longer, a header, in the order of the names."""
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
    assert first_difference(one, other) is None
    (other / "weights.safetensors").write_bytes(b"")
    assert first_difference(one, other) == "weights.safetensors: written by the second only"
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}  '
    for folder, start in ((one, header), (other, header.replace(b'"a"', b'"b"'))):
        (folder / "weights.safetensors").write_bytes(len(header).to_bytes(8, "little") + start + bytes(4))
    assert first_difference(one, other) == "weights.safetensors: header, byte 10"
    (other / "config.json").write_text("{}\n")
    assert first_difference(one, other) == "config.json: byte 2 (lengths 2 and 3)"


def test_every_method_is_among_the_commands():
    every = [command.name for command in commands(names())]
    assert len(set(every)) == len(every) and set(names()) <= set(every)
