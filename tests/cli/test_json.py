"""What commands print with --json: `ok` says of every command whether it succeeded."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner

from fastinterp.cli import commands
from tests.support.models import layers, save


def test_the_json_of_every_command_says_whether_it_succeeded(tmp_path, monkeypatch):
    """Objects by `ok`, also of the commands that write; lists are those of several outputs."""
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate("ab"):
        save(tmp_path / name, layers(1, noise=0.1 * i))
    recipe = (
        "{merge_method: linear, models: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: 1}}]}"
    )
    Path("r.yml").write_text(recipe)
    for line in (
        "merge r.yml out", "average a b -o mean --in-order", "extract-lora a lora --base b --rank 1", "explain r.yml",
        "inspect out", "diff a b", "check r.yml", "verify out", "replay out again",
    ):  # fmt: skip
        done = CliRunner().invoke(commands, [*line.split(), "--json"], prog_name="fastinterp", catch_exceptions=False)
        assert done.exit_code == 0 and json.loads(done.stdout)["ok"] is True, line
    for line in ("interpolate a b one --alpha 0.5", "interpolate a b two --alpha 0.5,1", "sweep a b s --alpha 0,1"):
        done = CliRunner().invoke(commands, [*line.split(), "--json"], prog_name="fastinterp", catch_exceptions=False)
        assert done.exit_code == 0 and isinstance(json.loads(done.stdout), list), line
    for line in (
        "merge no.yml x",
        "average a no -o x --in-order",
        "interpolate a no x --alpha 1",
        "diff a no",
        "average a",
    ):
        done = CliRunner().invoke(commands, [*line.split(), "--json"], prog_name="fastinterp", catch_exceptions=False)
        found = json.loads(done.stdout)
        assert found["ok"] is False and found["wrong"][0]["exit_code"] == done.exit_code > 0, line
        assert set(found["wrong"][0]) == {"message", "kind", "path", "line", "exit_code"}, line
