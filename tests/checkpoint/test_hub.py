"""What is fetched of a model on the Hub, of which a folder is the stand-in."""

from __future__ import annotations

import shutil

import huggingface_hub
from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined]

import fastinterp
from fastinterp.ops.dtypes import F32
from tests.support.checkpoints import tensor, write


def test_code_and_chat_templates_on_the_hub(tmp_path, monkeypatch):
    """All small files of a model are fetched, and copied into the output; nothing else in folders is."""
    there, cache = write(tmp_path / "there", {"w": tensor([1.0, 2.0], F32)}), tmp_path / "cache"
    small = {
        "config.json": '{"auto_map": {"AutoModel": "modeling_own.Own"}}', "modeling_own.py": "raise SystemExit",
        "chat_template.jinja": "a", "additional_chat_templates/tool_use.jinja": "b", "LICENSE": "c",
    }  # fmt: skip
    for name, text in {**small, "onnx/model.json": "d", "pytorch_model.bin": "e"}.items():
        (there / name).parent.mkdir(exist_ok=True)
        (there / name).write_text(text)

    def snapshot(repo, *, allow_patterns, ignore_patterns, **_):
        names = [p.relative_to(there).as_posix() for p in there.rglob("*") if p.is_file()]
        for name in filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (cache / name).parent.mkdir(exist_ok=True, parents=True)
            shutil.copy(there / name, cache / name)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.chdir(tmp_path)
    models = [{"model": "org/name", "parameters": {"weight": 1}}]
    fastinterp.merge({"merge_method": "linear", "models": models}, tmp_path / "out")
    assert {p.relative_to(cache).as_posix() for p in cache.rglob("*") if p.is_file()} == {*small, "model.safetensors"}
    assert {name: (tmp_path / "out" / name).read_text() for name in small} == small
