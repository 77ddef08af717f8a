"""The model card of an output: README.md, with the front matter that the Hub reads."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from fastinterp.checkpoint import hub
from fastinterp.checkpoint.regular_file import read_regular
from fastinterp.errors import CheckpointError

CARD = "README.md"
_MAX_CARD = 1 << 20  # bytes of a README.md that is read for its licence
# What is beside the weights of a library's models, and the library's name on the Hub.
_LIBRARIES = (
    ("model_index.json", "diffusers"),
    ("modules.json", "sentence-transformers"),
    ("config.json", "transformers"),
)


def model_card(
    recipe_text: str,
    models: Sequence[str],
    method: str,
    version: str,
    roots: Sequence[Path] = (),
    local: Collection[str] = (),
    commits: Mapping[str, str] = {},
) -> str:
    """README.md for the output: YAML front matter for the Hub, then how the model was made.

    models  names; `base_model` lists those that can be Hub ids: the Hub refuses other names there
    local   those of the names that stand for folders elsewhere on this machine, and are no Hub ids
    commits of models from the Hub, by their names
    roots   the folders of the models, that of the configuration first: the licence is stated if all state the same one
    """
    named = [m for m in models if m not in local]
    ids = list(dict.fromkeys(parsed[0] for m in named if not os.path.exists(m) and (parsed := hub.parse(m))))
    front: dict[str, Any] = {"base_model": ids} if ids else {}
    library = next((name for file, name in _LIBRARIES if roots and (roots[0] / file).is_file()), None)
    if library is not None:
        front["library_name"] = library
    licences = [_licence(root) for root in dict.fromkeys(roots)]
    if licences and licences[0] is not None and all(licence == licences[0] for licence in licences):
        front |= licences[0]
    front["tags"] = ["mergekit", "merge", "fastinterp"]
    front_matter = "\n".join(
        f"{key}: {_quoted(value)}"
        if isinstance(value, str)
        else "\n".join([f"{key}:", *(f"- {_quoted(v)}" for v in value)])
        for key, value in front.items()
    )
    names = "\n".join(f"- {_code(m)}{_at_commit(m, commits)}" for m in models)
    fence = "`" * max(3, 1 + _longest_run(recipe_text))
    return (
        f"---\n{front_matter}\n---\n\n"
        f"# Merged model\n\nMade with fastinterp {version}, method {_code(method)}, from:\n\n{names}\n\n"
        f"The recipe:\n\n{fence}yaml\n{recipe_text.rstrip()}\n{fence}\n"
    )


def _at_commit(model: str, commits: Mapping[str, str]) -> str:
    """` at commit ...`, of a model from the Hub, and of adapters on it."""
    found = [name for name in re.split(r"\+", model) if name.partition(":")[0] in commits]
    if not found:
        return ""
    return f" at commit {', '.join(_code(commits[name.partition(':')[0]]) for name in found)}"


def _licence(root: Path) -> dict[str, str] | None:
    """The keys about the licence in the front matter of a model's card; None, if there are none that can be read."""
    try:
        text = read_regular(str(root / CARD), _MAX_CARD).decode("utf-8-sig")
        front = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
        keys = yaml.safe_load(front[1]) if front else None
    except (OSError, CheckpointError, UnicodeDecodeError, yaml.YAMLError, RecursionError):
        return None
    if not isinstance(keys, dict) or not isinstance(keys.get("license"), str):
        return None
    wanted = ("license", "license_name", "license_link")  # the two others name a licence that the Hub has no word for
    return {key: keys[key] for key in wanted if isinstance(keys.get(key), str)}


def _quoted(text: str) -> str:
    """Quoted in any version of YAML: `1e3` is a number in one, and text in another."""
    return json.dumps(text, ensure_ascii=True)


def _code(text: str) -> str:
    """`text` as inline code on one line, whatever backquotes it holds."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    ticks = "`" * (1 + _longest_run(line))
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{ticks}{pad}{line}{pad}{ticks}"


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)
