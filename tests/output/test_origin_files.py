"""Every file of the origin is merged, copied, or named as left out; and none may change while it is copied."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import fastinterp
from fastinterp.checkpoint.open import open_checkpoint
from fastinterp.checkpoint.regular_file import read_regular
from fastinterp.errors import CheckpointError, StorageError
from fastinterp.execute.run import run
from fastinterp.output.origin_files import OriginFiles, origin_files
from fastinterp.output.receipt import RECEIPT
from tests.support.written import tree


def model(folder: Path, files: dict[str, str] | None = None, value: float = 1.0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"w.weight": np.full((4, 4), value, "f4")}, folder / "model.safetensors")
    for name, content in {"config.json": "{}", **(files or {})}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return folder


def sorted_out(folder: Path) -> OriginFiles:
    opened = open_checkpoint(str(folder))
    return origin_files(opened.root, opened)


COPIED = """generation_config.json tokenizer.json tokenizer_config.json chat_template.jinja chat_template.json vocab.txt
    additional_chat_templates/tool_use.jinja preprocessor_config.json video_preprocessor_config.json
    audio_config.json vision_config.json text_config.json hf_quant_config.json params.json emoji.json
    selected_tags.csv modules.json config_sentence_transformers.json sentence_bert_config.json
    1_Pooling/config.json 2_Normalize/config.json LICENSE LICENSE.md Notice USE_POLICY.md
    assets/tables/table.json spiece.model configs/decoding.yaml""".split()

LEFT_OUT = {
    "state of a training run": """optimizer.pt optimizer_0/ scheduler.pt rng_state.pth rng_state_3.pth
        trainer_state.json training_args.bin zero_to_fp32.py events.out.tfevents.1 checkpoint-500/ global_step12/ runs/
        wandb/""",
    "other weights": """pytorch_model.bin pytorch_model.bin.index.json tf_model.h5 flax_model.msgpack q4.gguf onnx/
        openvino/ original/ lora/ adapter_config.json consolidated.00.pth""",
    "pictures and other media": "thumbnail.png assets/logo.SVG",
    "hidden": ".gitattributes .cache/",
    "the output has a model card of its own": "README.md",
    "the output has a receipt of its own": RECEIPT,
    "code that no configuration names": "train.py",
    "of unknown use": "notes.xyz",
    "of unknown use, and larger than 10 MB": "corpus.txt",
    "a link to a folder": "elsewhere/",
    "no regular file": "pipe broken.json",
}  # fmt: skip


def test_every_file_has_a_fate(tmp_path):
    """All kinds of them, by name; a checkpoint in a folder of its own is left out whole, whatever is beside it."""
    folder = model(tmp_path / "a", dict.fromkeys(COPIED, "[]"))
    outside = model(tmp_path / "outside")
    for names in LEFT_OUT.values():
        for name in names.split():
            path = folder / name.rstrip("/")
            path.parent.mkdir(exist_ok=True)
            if name == "elsewhere/":
                path.symlink_to(outside)
            elif name == "pipe":
                os.mkfifo(path)
            elif name == "broken.json":
                path.symlink_to("nowhere")
            elif name == "optimizer_0/":
                continue
            elif name.endswith("/"):
                (path / "deep").mkdir(parents=True)
                (path / "deep" / "config.json").write_text("{}")
                (path / "x.bin").touch()
            else:
                path.touch()
    with open(folder / "corpus.txt", "r+b") as stream:
        stream.truncate(10**7 + 1)
    files = sorted_out(folder)
    assert set(files.copied) == {*COPIED, "config.json"}
    want = {why: set(names.split()) - {"optimizer_0/"} for why, names in LEFT_OUT.items()}
    assert {why: set(names) for why, names in files.left_out.items()} == want
    merged = fastinterp.interpolate(folder, model(tmp_path / "b", value=3.0), 0.5, tmp_path / "out")[0]
    assert {n for n, content in tree(tmp_path / "out").items() if (tmp_path / "out" / n).is_file()} == {
        *COPIED, "config.json", "README.md", RECEIPT, "model.safetensors"
    }  # fmt: skip
    assert {why: set(names) for why, names in merged.left_out.items()} == want
    lines = [r for r in merged.remarks if r.startswith(f"not copied from {folder}, ")]
    assert len(lines) == len(want) and all(any(f", {why}: " in line for line in lines) for why in want)
    how = {"merge_method": "linear", "models": [{"model": str(folder)}, {"model": str(tmp_path / "b")}],
           "parameters": {"weight": 1}}  # fmt: skip
    explained = fastinterp.explain(how)
    assert set(explained.as_dict()["sidecars"]) == {*COPIED, "config.json", "README.md", RECEIPT}
    assert "optimizer.pt" in str(explained) and "optimizer.pt" in str(fastinterp.check(how))


def test_links_of_the_hubs_cache_are_copied(tmp_path):
    """Files there are links into a folder of blobs; they are copied as files."""
    blobs = tmp_path / "models--org--a" / "blobs"
    blobs.mkdir(parents=True)
    stored = model(tmp_path / "stored", {"tokenizer.json": "{}", "1_Pooling/config.json": "{}"})
    snapshot = tmp_path / "models--org--a" / "snapshots" / "0123"
    for number, path in enumerate(sorted(p for p in stored.rglob("*") if p.is_file())):
        link = snapshot / path.relative_to(stored)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path.rename(blobs / f"{number:064x}"))
    fastinterp.interpolate(snapshot, model(tmp_path / "b"), 0.5, tmp_path / "out")
    for name in ("tokenizer.json", "1_Pooling/config.json"):
        assert (tmp_path / "out" / name).read_text() == "{}" and not (tmp_path / "out" / name).is_symlink()


def test_links_out_of_the_folder_are_refused(tmp_path):
    """Their content would be published with the output. The printed command makes files of them."""
    secret = tmp_path / "secret.json"
    secret.write_text('{"key": 1}')
    a, b = model(tmp_path / "a"), model(tmp_path / "b")
    (a / "tokenizer.json").symlink_to(secret)
    (a / "inner.json").write_text("{}")
    (a / "special_tokens_map.json").symlink_to("inner.json")  # within the folder
    with pytest.raises(
        CheckpointError, match=r"tokenizer\.json: this is a link to .* outside of the model's folder"
    ) as refused:
        fastinterp.interpolate(a, b, 0.5, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    models = [{"model": str(m), "parameters": {"weight": 1}} for m in (a, b)]
    found = fastinterp.check({"merge_method": "linear", "models": models})
    assert any("outside of the model's folder" in error.message for error in found.errors)
    subprocess.run(str(refused.value).split("`")[-2], shell=True, check=True)
    fastinterp.interpolate(a, b, 0.5, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == '{"key": 1}'
    assert (tmp_path / "out" / "special_tokens_map.json").read_text() == "{}"


def test_a_lone_file_brings_no_strangers(tmp_path):
    """In a folder of single-file models nothing else belongs to it; in a model's folder it has what is known."""
    lone = tmp_path / "models"
    lone.mkdir()
    for name in ("a.safetensors", "b.safetensors", "c.safetensors"):
        save_file({"w": np.ones(4, "f4")}, lone / name)
    (lone / "secrets.json").write_text("{}")
    report = fastinterp.interpolate(lone / "a.safetensors", lone / "b.safetensors", 0.5, tmp_path / "out")[0]
    assert set(tree(tmp_path / "out")) == {"README.md", RECEIPT, "model.safetensors"} and not report.left_out
    folder = model(tmp_path / "m", {"tokenizer.json": "{}", "results.json": "{}", "LICENSE": "x", "sub/x.json": "{}"})
    report = fastinterp.interpolate(folder / "model.safetensors", model(tmp_path / "n"), 0.5, tmp_path / "o")[0]
    assert set(tree(tmp_path / "o")) == {
        "README.md", RECEIPT, "model.safetensors", "config.json", "tokenizer.json", "LICENSE"
    }  # fmt: skip
    assert report.left_out == {"beside the one file that was named": ("results.json", "sub/")}


def test_an_output_file_says_what_is_not_beside_it(tmp_path):
    a, b = model(tmp_path / "a", {"tokenizer.json": "{}"}), model(tmp_path / "b")
    report = fastinterp.interpolate(a, b, 0.5, tmp_path / "x.safetensors")[0]
    assert report.remarks == (
        f"the output is one file, so nothing of {a} is written beside it: config.json, tokenizer.json. Name a folder "
        "to have these files",
    )


# --- code -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", {"auto_map": {"AutoModel": "modeling_x.Model"}}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["modeling_x.Slow", None]}}),
        ("processor_config.json", {"auto_map": {"AutoProcessor": "modeling_x.P"}}),
        ("modules.json", [{"path": "", "type": "modeling_x.Transformer"}]),
        ("model_index.json", {"_class_name": ["modeling_x", "Pipeline"]}),
    ],
)
def test_code_that_a_configuration_names_is_copied(tmp_path, file, content):
    """With what it imports, never run, and with a remark."""
    code = {"modeling_x.py": "raise SystemExit", "layers.py": "raise SystemExit", file: json.dumps(content)}
    a = model(tmp_path / "a", code)
    report = fastinterp.interpolate(a, model(tmp_path / "b"), 0.5, tmp_path / "out")[0]
    assert {*code, "README.md", RECEIPT, "config.json", "model.safetensors"} == set(tree(tmp_path / "out"))
    assert f"code is copied from {a}, and never run: layers.py, modeling_x.py" in report.remarks
    assert not any("auto_map" in w for w in report.warnings)


def test_code_that_is_not_there(tmp_path):
    """Code of another repository is found by its name; code that should be here is warned of."""
    auto_map = {"AutoConfig": "org/repo--other.Config", "AutoModel": "gone.Model"}
    a = model(tmp_path / "a", {"config.json": json.dumps({"auto_map": auto_map})})
    report = fastinterp.interpolate(a, model(tmp_path / "b"), 0.5, tmp_path / "out")[0]
    [warning] = [w for w in report.warnings if "auto_map" in w]
    assert "that is not in its folder: gone.py. Copy it into the output" in warning


# --- chat templates ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "content"),
    [("chat_template.jinja", "HI"), ("tokenizer_config.json", '{"chat_template": "HI"}'),
     ("chat_template.json", '{"chat_template": "HI"}')],
)  # fmt: skip
def test_a_chat_template_that_the_base_lacks(tmp_path, file, content):
    """The fine-tune's does not come along by itself: a warning says so, and its remedy works."""
    tokenizer = {"tokenizer_config.json": "{}"}
    base, tuned = model(tmp_path / "base", tokenizer), model(tmp_path / "ft", {**tokenizer, file: content})
    how = {"merge_method": "task_arithmetic", "base_model": str(base), "models": [{"model": str(tuned)}],
           "parameters": {"weight": 1}}  # fmt: skip
    report = fastinterp.merge(how, tmp_path / "out")
    [warning] = [w for w in report.warnings if "has a chat template" in w]
    assert warning.startswith(f"{tuned} has a chat template ({file}), but the output has the tokenizer of {base}")
    assert warning in [w.message for w in fastinterp.check(how).warnings]
    followed = fastinterp.merge({**how, "chat_template": "auto"}, tmp_path / "auto")
    assert (tmp_path / "auto" / "chat_template.jinja").read_text() == "HI"
    assert json.loads((tmp_path / "auto" / "tokenizer_config.json").read_text())["chat_template"] == "HI"
    assert not any("has a chat template" in w for w in followed.warnings)
    own = fastinterp.merge({**how, "base_model": str(tuned), "models": [{"model": str(base)}]}, tmp_path / "own")
    assert not any("has a chat template" in w for w in own.warnings)


# --- changes during the merge -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["truncate", "replace", "touch", "remove"])
@pytest.mark.parametrize("name", ["tokenizer.json", "1_Pooling/config.json", "model.safetensors"])
def test_a_file_that_changes_during_the_merge(tmp_path, monkeypatch, change, name):
    """After it was copied, in the middle of the weights: the merge fails, and nothing is left."""
    a = model(tmp_path / "a", {"tokenizer.json": "x" * 5000, "1_Pooling/config.json": "{}"})
    b = model(tmp_path / "b")
    path, real = a / name, run

    def changing(*args, **kwargs):
        done = real(*args, **kwargs) if name != "model.safetensors" else None
        if change == "truncate":
            os.truncate(path, 1 if name != "model.safetensors" else path.stat().st_size - 4)
        elif change == "replace":
            (tmp_path / "new").write_bytes(path.read_bytes())
            os.replace(tmp_path / "new", path)
        elif change == "touch":
            before = path.stat()
            path.write_bytes(path.read_bytes())
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # ctime tells
        else:
            path.unlink()
        return done or real(*args, **kwargs)

    monkeypatch.setattr("fastinterp.execute.to_files.run", changing)
    with pytest.raises((CheckpointError, StorageError)) as caught:
        fastinterp.interpolate(a, b, 0.5, tmp_path / "out")
    if name != "model.safetensors":
        assert str(caught.value) == f"{path}: it changed while it was being read. Retry once nothing is writing to it"
    assert str(path) in str(caught.value) and not (tmp_path / "out").exists()


def test_a_short_read_is_noticed(tmp_path, monkeypatch):
    """A file that shrinks between the look at its size and the read."""
    path = tmp_path / "tokenizer.json"
    path.write_bytes(b"x" * 100)
    real = os.fstat
    calls = []

    def shrinking(fd):
        calls.append(fd)
        if len(calls) == 2:
            os.truncate(path, 10)
        return real(fd)

    monkeypatch.setattr("fastinterp.checkpoint.regular_file.os.fstat", shrinking)
    with pytest.raises(CheckpointError, match="it changed while it was being read"):
        read_regular(str(path))


def test_chat_templates_of_a_replaced_checkpoint_are_removed(tmp_path):
    """transformers would take those in additional_chat_templates/ for the new one's."""
    a, b = model(tmp_path / "a"), model(tmp_path / "b", value=2.0)
    fastinterp.interpolate(a, b, 0.5, tmp_path / "out")
    (tmp_path / "out" / "additional_chat_templates").mkdir()
    (tmp_path / "out" / "additional_chat_templates" / "old.jinja").write_text("OLD")
    report = fastinterp.interpolate(a, b, 0.5, tmp_path / "out", force=True)[0]
    assert report.removed == ("additional_chat_templates/old.jinja",)
    assert not [*tmp_path.glob("out/additional_chat_templates/*")]
