"""`verify`: outputs that are as they were written, and what it says of others."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import fastinterp
from fastinterp.checkpoint.file_kinds import read_header
from fastinterp.checkpoint.journal_file import journal_path
from fastinterp.cli import commands
from fastinterp.errors import CheckpointError, UsageError
from fastinterp.methods import names
from fastinterp.output.journal import begin
from fastinterp.output.receipt import RECEIPT
from tests.support.hub_server import hub_server, in_this_process
from tests.support.merged import recipe_of, related, saved_in, tree
from tests.verification.kinds import KINDS


def run(*args: object) -> tuple[int, str]:
    result = CliRunner().invoke(commands, ["verify", *map(str, args)])
    return result.exit_code, result.output


def entry_of(file: Path, tensor: str) -> int:
    """Where a tensor begins in a file."""
    (start,) = [e.start for e in read_header(file, 0).entries if e.name == tensor]
    return start


def put(file: Path, offset: int, data: bytes) -> None:
    with open(file, "r+b") as stream:
        stream.seek(offset)
        stream.write(data)


@pytest.mark.parametrize("method", [name for name in names() if name != "passthrough"])
def test_outputs_of_every_method_are_as_they_should_be(tmp_path, method):
    paths = saved_in(tmp_path / "models", related(3))
    fastinterp.merge(recipe_of(method, paths), tmp_path / "out")
    sample, full = (fastinterp.verify(tmp_path / "out", full=full) for full in (False, True))
    assert sample.ok, sample.summary()
    assert full.ok, full.summary()
    assert 0 < sample.recomputed <= full.recomputed == full.of == sample.of


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_output_is_as_it_should_be_until_a_byte_changes(tmp_path, kind):
    """Files of weights: the last byte of the data. All of them are told, and the tensor."""
    out = KINDS[kind](tmp_path)
    before = tree(out)
    for full in (False, True):
        result = fastinterp.verify(out, full=full, inputs=full)
        assert result.ok, result.summary()
        assert result.recomputed
    assert tree(out) == before
    for file in [out] if out.is_file() else sorted(p for p in out.rglob("*") if p.suffix in (".safetensors", ".gguf")):
        size = file.stat().st_size
        last = max(read_header(file, 0).entries, key=lambda e: e.start)
        at = (last.start + size) // 2 if out.suffix != ".gguf" else last.start
        with open(file, "rb") as stream:
            stream.seek(at)
            byte = stream.read(1)
        put(file, at, bytes([byte[0] ^ 1]))
        name = file.name if out.is_file() else file.relative_to(out).as_posix()
        result = fastinterp.verify(out)
        assert result.exit_code == 1
        assert [finding.file for finding in result.findings] == [name]
        if not out.is_file():
            part = os.path.dirname(name)
            assert [d.tensor for d in result.differences] == [f"{part}/{last.name}" if part else last.name]
            assert result.differences[0].elements == 1
        put(file, at, byte)
    assert fastinterp.verify(out, full=True).ok


def test_the_first_difference_is_named(tmp_path):
    """File, tensor, element and how many."""
    paths = saved_in(tmp_path / "models", related(3))
    fastinterp.merge(recipe_of("ties", paths), tmp_path / "out")
    file, tensor = tmp_path / "out" / "model.safetensors", "model.layers.0.mlp.up_proj.weight"
    put(file, entry_of(file, tensor) + 2 * 7, b"\1\2\3\4")
    code, text = run(tmp_path / "out")
    assert code == 1
    assert "different: 1 file of" in text
    assert "model.safetensors: its data is not what was written: 1 of 1 part of 64 MiB differs" in text
    assert "which hold" not in text and f", in {tensor}\n" in text
    assert f"model.safetensors: {tensor}: 2 of 1536 elements that were compared differ, first 7" in text
    code, text = run(tmp_path / "out", "--json")
    found = json.loads(text)
    assert (code, found["ok"], found["exit_code"]) == (1, False, 1)
    assert found["differences"] == [
        {"file": "model.safetensors", "tensor": tensor, "element": 7, "elements": 2, "compared": 1536}
    ]


def test_other_files_and_headers(tmp_path):
    """Small files that changed or are missing, a cut file, a header of another merge."""
    paths = saved_in(tmp_path / "models", related(2))
    (paths[0] / "config.json").write_text("{}")
    out = tmp_path / "out"
    fastinterp.merge(recipe_of("linear", paths), out)
    fastinterp.merge(recipe_of("linear", paths, seed=3), tmp_path / "other")
    (out / "README.md").write_text("mine")
    (out / "config.json").unlink()
    code, text = run(out)
    assert code == 1
    assert "README.md: it has 4 bytes, and the receipt says" in text
    assert "config.json: it is missing" in text
    shutil.copy(tmp_path / "other" / "model.safetensors", out / "model.safetensors")
    assert "model.safetensors: its header is not the one that was written" in run(out)[1]
    os.truncate(out / "model.safetensors", 100)
    assert "model.safetensors: it has 100 bytes, and the receipt says" in run(out)[1]
    (out / "model.safetensors").unlink()
    assert "model.safetensors: it is missing" in run(out)[1]


def test_what_is_no_output(tmp_path):
    """Exit code 3, and words that say what it is instead."""
    paths = saved_in(tmp_path / "models", related(2))
    (tmp_path / "empty").mkdir()
    for name in (paths[0], paths[0] / "model.safetensors", tmp_path / "empty"):
        code, text = run(name)
        assert code == 3
        assert "this is no output of fastinterp: it has no receipt" in text
    assert run(tmp_path / "gone")[0] == 3
    fastinterp.merge(recipe_of("linear", paths), tmp_path / "out")
    with pytest.raises(UsageError, match=r"is a part of the output .* Name that"):
        fastinterp.verify(tmp_path / "out" / "model.safetensors")
    (tmp_path / "out" / RECEIPT).write_text("{}")
    with pytest.raises(CheckpointError, match="this is no receipt of a merge"):
        fastinterp.verify(tmp_path / "out")


def test_missing_and_changed_inputs(tmp_path):
    """The checksums are compared anyway; exit code 3 says that nothing is known of the recipe."""
    place = tmp_path / "deep" / "in"  # folders near tmp_path are those of other tests, some with models of these names
    paths = saved_in(place / "models", related(2))
    out = place / "out"
    fastinterp.merge(recipe_of("linear", paths), out)
    paths[1].rename(tmp_path / "elsewhere")
    code, text = run(out)
    assert code == 3
    assert "not computed again: " in text
    assert "the model `ft1` is neither here nor near the output. Say where: --models ft1=PATH" in text
    assert run(out, "--sample", "0")[0] == 0  # checksums alone
    assert f"Looked at: `{Path('ft1').absolute()}`, `{place}`, `{place.parent}`, " in text
    code, text = run(out, "--models", f"ft1={tmp_path / 'elsewhere'}")
    assert code == 0, text
    (tmp_path / "elsewhere").rename(paths[1])
    saved_in(place / "models", related(2, seed=9))
    code, text = run(out)
    assert code == 3
    assert "inputs have changed since: base: the data of model.safetensors is not what was read" in text


def test_an_input_that_changed_unseen(tmp_path):
    """A few bytes between the pages that the receipt knows: the files are as written, and the recipe gives others."""
    paths = saved_in(tmp_path / "models", related(2, rows=240))
    out = tmp_path / "out"
    fastinterp.merge(recipe_of("linear", paths), out)
    file = paths[1] / "model.safetensors"
    start = entry_of(file, "model.embed_tokens.weight")
    put(file, start + 50_000, np.full(2, 3.0, "<f4").tobytes())
    result = fastinterp.verify(out, full=True)
    assert result.exit_code == 1
    assert not result.findings
    assert [(d.tensor, d.element) for d in result.differences] == [("model.embed_tokens.weight", 25_000)]
    assert "so the data of an input has changed since: one of base, ft1, the receipt does not tell" in result.summary()
    assert "different: 1 tensor differs from what the recipe gives" in result.summary()


def test_an_output_without_the_file_of_its_receipt(tmp_path):
    """Its weights can be compared; it is told that the other files cannot."""
    paths = saved_in(tmp_path / "models", related(2))
    (paths[0] / "config.json").write_text("{}")
    out = tmp_path / "out"
    fastinterp.merge(recipe_of("linear", paths), out)
    (out / RECEIPT).unlink()
    (out / "config.json").write_text('{"changed": 1}')
    code, text = run(out)
    assert code == 0
    assert "the same bytes of weights: " in text
    assert f"note: {RECEIPT} is missing, so only the weights were compared, with what their headers say, and" in text
    assert "and not the files beside them: README.md, config.json\n" in text
    assert json.loads(run(out, "--json")[1])["receipt"] is False
    code, text = run(out, "--sample", "0")
    assert "are those of their headers" in text and "is missing" in text
    fastinterp.merge(recipe_of("linear", paths), tmp_path / "out.safetensors")
    assert "is missing" not in run(tmp_path / "out.safetensors")[1]


def test_checksums_of_inputs_that_there_are_not(tmp_path):
    """`--inputs` says of which models it could compare nothing more."""
    base, first, second = saved_in(tmp_path / "models", related(3))
    fastinterp.merge(recipe_of("linear", [base, first]), tmp_path / "mix")
    fastinterp.merge(recipe_of("linear", [tmp_path / "mix", second]), tmp_path / "out")
    note = "note: inputs: the receipt has no checksums of the data of "
    text = run(tmp_path / "mix", "--full", "--inputs")[1]
    assert f"{note}base, ft1, so sizes, headers and sixteen pages of each file were compared" in text
    assert f"{note}ft2, so sizes" in run(tmp_path / "out", "--inputs")[1]
    assert note not in run(tmp_path / "out")[1]
    fastinterp.merge(recipe_of("linear", [base, first]), tmp_path / "a.safetensors")
    assert f"{note}base, ft1, so nothing of them was compared" in run(tmp_path / "a.safetensors", "--inputs")[1]


def test_outputs_that_are_not_finished(tmp_path):
    """A folder of them, as a sweep leaves that is killed."""
    for name in ("alpha_0", "alpha_1"):
        (tmp_path / "sweep" / name).mkdir(parents=True)
        begin(journal_path(tmp_path / "sweep" / name)).close()
    code, text = run(tmp_path / "sweep")
    assert code == 3
    assert "no output in it is finished (alpha_0, alpha_1): if none is being written, run what wrote it once" in text


def test_inputs_that_are_outputs_have_checksums(tmp_path):
    """Their headers state them, and --inputs reads all of their data."""
    base, first, second = saved_in(tmp_path / "models", related(3, rows=240))
    fastinterp.merge(recipe_of("linear", [base, first]), tmp_path / "mix")
    fastinterp.merge(recipe_of("linear", [tmp_path / "mix", second]), tmp_path / "out")
    assert fastinterp.verify(tmp_path / "out", inputs=True).ok
    file = tmp_path / "mix" / "model.safetensors"
    put(file, entry_of(file, "model.embed_tokens.weight") + 50_000, b"\7")
    result = fastinterp.verify(tmp_path / "out", sample=0, inputs=True)
    assert result.exit_code == 3
    assert "has another checksum than the receipt says" in result.unverified


@pytest.mark.slow
def test_inputs_on_the_hub_have_checksums(tmp_path, monkeypatch):
    """They are fetched for that, if only their headers are here."""
    monkeypatch.chdir(tmp_path)
    base, first = saved_in(tmp_path / "models", related(2))
    fastinterp.merge(recipe_of("linear", [base, first]), "mix")
    with hub_server() as server, in_this_process(server, tmp_path / "cache"):
        server.add("org/mix", tmp_path / "mix")
        fastinterp.merge(recipe_of("linear", ["org/mix", base]), "out", stream=True)
        assert fastinterp.verify("out", sample=0, inputs=True).ok
        assert [*(tmp_path / "cache").rglob("model.safetensors")]


def test_a_folder_of_several_outputs(tmp_path):
    """Each is verified; the exit code is that of the worst."""
    base, tuned = saved_in(tmp_path / "models", related(2))
    fastinterp.interpolate(base, tuned, [0.0, 0.5], tmp_path / "path")
    code, text = run(tmp_path / "path")
    assert code == 0, text
    assert text.count("the same bytes") == 2
    file = tmp_path / "path" / "alpha_0.5" / "model.safetensors"
    put(file, file.stat().st_size - 1, b"\xee")
    code, text = run(tmp_path / "path", "--json")
    assert code == 1
    assert [one["ok"] for one in json.loads(text)] == [True, False]


def test_versions_and_numerics(tmp_path, monkeypatch):
    """Another version is a note; other numerics cannot be compared."""
    paths = saved_in(tmp_path / "models", related(2))
    fastinterp.merge(recipe_of("linear", paths), tmp_path / "out")
    for module in ("plan.outputs", "verification.verify", "execute.checksums"):
        monkeypatch.setattr(f"fastinterp.{module}.__version__", "9.9.9")
    result = fastinterp.verify(tmp_path / "out", full=True)
    assert result.ok
    assert any("made it, and this is 9.9.9" in note for note in result.notes)
    monkeypatch.setattr("fastinterp.verification.made_output.NUMERICS", 2)
    result = fastinterp.verify(tmp_path / "out")
    assert result.exit_code == 3
    assert "made under version 1 of the numeric contract, and this fastinterp has version 2" in result.unverified
    with pytest.raises(CheckpointError, match="made under version 1 of the numeric contract"):
        fastinterp.replay(tmp_path / "out", tmp_path / "again")


@pytest.mark.parametrize("text", ["2", "-1%", "x", "101%"])
def test_samples_are_fractions(tmp_path, text):
    code, output = run(tmp_path, "--sample", text)
    assert code == 2
    assert "is no fraction: write 1%, or 0.01" in output


def test_thresholds_of_the_whole_model_are_computed_from_all_of_it(tmp_path):
    """Of one file, which has no coefficients from data: a sample of tensors, and statistics of all."""
    paths = saved_in(tmp_path / "models", related(3))
    recipe = recipe_of("ties", paths)
    recipe["parameters"] = {"preset": "paper"}
    fastinterp.merge(recipe, tmp_path / "out.safetensors")
    for full in (False, True):
        result = fastinterp.verify(tmp_path / "out.safetensors", sample=0.3, full=full)
        assert result.ok, result.summary()
