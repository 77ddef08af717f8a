"""docs/CHECKPOINTS.md is true of the code: messages, keys, formats and kinds of adapters that it names are there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from fastinterp.checkpoint import adapters, quantised
from fastinterp.cli.merge import merge
from fastinterp.recipe.layer_kinds import FORMS
from fastinterp.recipe.schema import RawRecipe, Reference

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "CHECKPOINTS.md").read_text("utf-8")
ROWS = [line.strip("| ").split(" | ") for line in PAGE.splitlines() if line.startswith("| ") and "**" not in line][1:]


def texts() -> str:
    """All strings in the source, those in parts put together as Python does."""
    found = []
    for path in sorted((ROOT / "fastinterp").rglob("*.py")):
        nodes = ast.walk(ast.parse(path.read_text("utf-8")))
        found += [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return "\n".join(found)


def test_the_messages_exist():
    quoted = [text for row in ROWS for text in re.findall(r'"([^"]+)"', row[2])]
    every = texts()
    assert len(quoted) > 30
    assert [text for text in quoted if text not in every] == []


def test_the_keys_and_options_exist():
    options = {name for parameter in merge.params for name in parameter.opts}
    keys = [text for row in ROWS if len(row) > 3 for text in re.findall(r"`([^`]+)`", row[3])]
    assert len(keys) > 10
    fields = {*RawRecipe.__struct_fields__, *Reference.__struct_fields__, "skip"}
    wrong = []
    for key in keys:
        name = key.split(":")[0].split(" ")[0]
        known = name in (options if name.startswith("-") else fields)
        wrong += [] if known else [key]
    assert wrong == []


def test_the_formats_and_adapters_are_named():
    formats = PAGE.partition("## Quantised formats")[2].partition("## Adapters")
    named = {name.strip(" .\n") for name in re.split(r",\s", formats[0].split(":", 1)[1])}
    source = Path(quantised.__file__).read_text("utf-8")
    layouts = {layout.format for layout in quantised._LAYOUTS} - {"AWQ or GPTQ"} | {"AWQ", "GPTQ"}
    others = {
        "fp8 with scales",
        "fp8 with scales of blocks",
        "MXFP8",
        "MXFP4",
        "NVFP4",
        "BitNet",
        "torchao",
        "SVDQuant",
    }
    assert all(f'"{name}"' in source for name in others)
    assert sorted((layouts | others) - {re.sub(r"\..*", "", name, flags=re.DOTALL) for name in named}) == []
    kinds = formats[2]
    assert [kind for kind in adapters._KINDS if kind not in kinds] == []


def test_every_way_to_number_layers_is_named():
    stack = PAGE.partition("**Layer stacks**")[2].partition("**Written**")[0]
    assert [form.keys for form in FORMS if form.keys and not any(f"`{key}`" in stack for key in form.keys)] == []


def test_it_is_linked():
    assert "(docs/CHECKPOINTS.md)" in (ROOT / "README.md").read_text("utf-8")
    assert "(CHECKPOINTS.md" in (ROOT / "docs" / "RECIPES.md").read_text("utf-8")
