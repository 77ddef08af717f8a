"""Outputs that a crash of the machine left without a part of their data: what reads them says so."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

import fastinterp
from fastinterp.cli import commands
from fastinterp.errors import CheckpointError
from fastinterp.ops.dtypes import BF16
from tests.support.checkpoints import tensor
from tests.support.merged import recipe_of, related, saved_in, tree

HOLE = range(65536, 131072)  # bytes of the file


def with_hole(file: Path) -> None:
    """The file with no place on the disk for the bytes of HOLE: they read as zeros, and the size is right."""
    content = file.read_bytes()
    file.unlink()
    with open(file, "wb") as stream:
        stream.write(content[: HOLE.start])
        stream.seek(HOLE.stop)
        stream.write(content[HOLE.stop :])


def run(*args: object) -> tuple[int, str]:
    result = CliRunner().invoke(commands, list(map(str, args)))
    return result.exit_code, result.output + (result.stderr if result.stderr_bytes else "")


@pytest.mark.parametrize("name", ["out", "out.safetensors"])
def test_data_that_was_never_written(tmp_path, name, monkeypatch):
    """inspect, check and a merge refuse it, with exit code 3; the printed command makes the output again."""
    paths = saved_in(tmp_path / "models", related(3))
    out = tmp_path / name
    fastinterp.merge(recipe_of("ties", paths), out)
    before = tree(out)
    with_hole(out if out.is_file() else out / "model.safetensors")
    recipe = recipe_of("linear", [out, paths[1]])
    code, text = run("inspect", out)
    assert code == 3
    assert "65.5 KB of its data were never written, from byte 65536 on: the machine stopped before" in text
    found = fastinterp.check(recipe)
    assert found.exit_code == 3
    assert "were never written, from byte 65536 on" in str(found.errors[0])
    with pytest.raises(CheckpointError, match="were never written, from byte 65536 on") as refused:
        fastinterp.merge(recipe, tmp_path / "next")
    assert not (tmp_path / "next").exists()
    assert fastinterp.verify(out).exit_code == 1
    assert "were never written" in fastinterp.verify(out).summary()
    command = next(part for part in str(refused.value).split("`") if part.startswith("fastinterp replay"))
    monkeypatch.chdir(tmp_path)
    code, text = run(*command.split()[1:])
    assert code == 0, text
    assert tree(tmp_path / f"NEW{out.suffix}") == before


def test_a_sparse_copy_whose_zeros_are_true(tmp_path):
    """A checkpoint with a tensor of zeros, copied by a program that leaves them out."""
    zeros = tensor([0.0] * 65536 * 2, BF16, (256, 512))
    models = [{**model, "zeros": zeros} for model in related(2)]
    paths = saved_in(tmp_path / "models", models)
    out = tmp_path / "out"
    fastinterp.merge(recipe_of("linear", paths), out)
    content = (out / "model.safetensors").read_bytes()
    (out / "model.safetensors").unlink()
    with open(out / "model.safetensors", "wb") as stream:
        for at in range(0, len(content), 4096):
            page = content[at : at + 4096]
            if any(page):
                stream.seek(at)
                stream.write(page)
        stream.truncate(len(content))
    with open(out / "model.safetensors", "rb") as stream:
        assert os.lseek(stream.fileno(), 4096, os.SEEK_HOLE) < len(content)  # this file system keeps holes
    assert run("inspect", out)[0] == 0
    assert fastinterp.check(recipe_of("linear", [out, paths[1]])).exit_code == 0
    fastinterp.merge(recipe_of("linear", [out, paths[1]]), tmp_path / "next")
    assert fastinterp.verify(out, full=True).ok


def test_damage_without_holes(tmp_path):
    """What reads weights compares a part of the data with its checksums; of a small file, all of it."""
    paths = saved_in(tmp_path / "models", related(2))
    for out in (tmp_path / "out", tmp_path / "out.safetensors"):
        fastinterp.merge(recipe_of("linear", paths), out)
        file = out if out.is_file() else out / "model.safetensors"
        with open(file, "r+b") as stream:
            stream.seek(70_000)
            stream.write(bytes(4))
        code, text = run("inspect", out)
        assert code == 3
        assert "its data is not what was written" in text
        recipe = recipe_of("linear", [out, paths[1]])
        (tmp_path / "recipe.yml").write_text(json.dumps(recipe))
        assert fastinterp.check(recipe).exit_code == 3
        new = tmp_path / f"new{out.suffix}"
        for command in (
            ["check", tmp_path / "recipe.yml"], ["merge", tmp_path / "recipe.yml", new],
            ["interpolate", out, paths[1], new, "--alpha", "0.5"], ["average", out, paths[1], "--in-order", "-o", new],
            ["sweep", out, paths[1], "--alphas", "0.5", "-o", tmp_path / "new"], ["diff", paths[1], out],
            ["extract-lora", out, "--base", paths[1], "--rank", "2", "-o", tmp_path / "new"],
        ):  # fmt: skip
            code, text = run(*command)
            assert (code, "its data is not what was written" in " ".join(text.split())) == (3, True), (command, text)
        assert not new.exists()


def test_damaged_adapters(tmp_path):
    """Their headers state checksums, too; they are made again from what they were made of."""
    paths = saved_in(tmp_path / "models", related(2))
    adapter = tmp_path / "adapter"
    fastinterp.extract_lora(paths[1], base=paths[0], out=adapter, rank=2)
    shutil.copytree(adapter, tmp_path / "other")
    file = adapter / "adapter_model.safetensors"
    adapted = f"{paths[0]}+{adapter}"
    assert run("inspect", adapted)[0] == run("diff", paths[0], adapted)[0] == 0
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    (tmp_path / "r.yml").write_text(json.dumps(recipe_of("linear", [adapted, str(paths[0])])))
    recipe = recipe_of("linear", [adapter, tmp_path / "other"], out="lora")
    (tmp_path / "lora.yml").write_text(json.dumps(recipe))
    for command in (
        ["inspect", adapter], ["inspect", adapted], ["diff", paths[0], adapted], ["check", tmp_path / "r.yml"],
        ["merge", tmp_path / "r.yml", tmp_path / "new"], ["check", tmp_path / "lora.yml"],
        ["merge", tmp_path / "lora.yml", tmp_path / "new"],
    ):  # fmt: skip
        code, text = run(*command)
        text = " ".join(text.split())
        assert code == 3, (command, text)
        assert "have another checksum than its header says. Copy it again, or make it again as it was made" in text
    assert not (tmp_path / "new").exists()


def test_other_models_may_have_holes(tmp_path):
    """Without a checksum nothing is known of them."""
    paths = saved_in(tmp_path / "models", related(2))
    with_hole(paths[0] / "model.safetensors")
    assert run("inspect", paths[0])[0] == 0
    fastinterp.merge(recipe_of("linear", paths), tmp_path / "out")


def test_a_file_without_its_header(tmp_path):
    """The header is written last: zeros in its place say that the file was never completed."""
    paths = saved_in(tmp_path / "models", related(2))
    fastinterp.merge(recipe_of("linear", paths), tmp_path / "out")
    with open(tmp_path / "out" / "model.safetensors", "r+b") as stream:
        stream.write(bytes(4096))
    code, text = run("inspect", tmp_path / "out")
    assert code == 3
    assert "it begins with zeros" in text
    result = fastinterp.verify(tmp_path / "out")
    assert result.exit_code == 1
    assert "It was never written" in result.summary()
    fastinterp.replay(tmp_path / "out", tmp_path / "again")
    assert fastinterp.verify(tmp_path / "again", full=True).ok
