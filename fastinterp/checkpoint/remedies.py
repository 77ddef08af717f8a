"""What a user can do about weights that are not read: commands that convert them, as messages print them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastinterp.checkpoint import hub
from fastinterp.checkpoint.names import WEIGHTS, shell_word
from fastinterp.messages import listed

# Files of a tokenizer that hold its vocabulary.
_VOCABULARIES = re.compile(
    r"(tokenizer|vocab|tekken)\.json|vocab\.(txt|model)|(tokenizer|s(entence)?piece).*\.model|.*\.spm"
)


def python(code: str) -> str:
    """A shell command that runs `code`, in backquotes."""
    return f"`python -c {shell_word(code)}`"


def literal(text: object) -> str:
    """A string in Python code."""
    return json.dumps(str(text), ensure_ascii=False)


def hub_files(repo: str) -> str:
    """What to do about a model on the Hub whose weights have names that are not looked for."""
    id_, revision = hub.parse(repo) or (repo, None)
    at = f" --revision {shell_word(revision)}" if revision else ""
    return (
        "Weights of other names are not fetched: download the file that has them, as by "
        f"`hf download {shell_word(id_)} FILE{at}`, and name the path that it prints"
    )


def saved_tokenizer(folder: str, present: Iterable[str]) -> str:
    """Python behind that which saves a model as NEW with transformers, for the tokenizer; empty, if there is none.

    present  names of the files in `folder`
    """
    if not any(map(_VOCABULARIES.fullmatch, present)):
        return ""
    return f'; transformers.AutoTokenizer.from_pretrained({literal(folder)}).save_pretrained("NEW")'


def save_again(models: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """How models whose tensors have different layouts get the same one: their library loads and saves all of them.

    models  (folder or Hub id, config.json, or empty)
    """
    commands = []
    for number, (name, config) in enumerate(models, 1):
        library, found = _library_class(config)
        if not found:
            return (
                "Load both with the same version of the library that they are made for, as transformers "
                "(from_pretrained), save them with it (save_pretrained), and name what that writes"
            )
        id_, revision = (name, None) if os.path.isdir(name) else hub.parse(name) or (name, None)
        at = f", revision={literal(revision)}" if revision else ""
        code = f'import {library}; {library}.{found}.from_pretrained({literal(id_)}{at}).save_pretrained("NEW{number}")'
        commands.append(python(code))
    news = listed([f"NEW{number}" for number in range(1, len(models) + 1)], len(models))
    return f"Save all with the same version of their library: {', '.join(commands)}; then name {news}"


def _library_class(config: Mapping[str, Any]) -> tuple[str, str]:
    """(library, class) that config.json names; ("", "") for a class that comes with the model as code, and for none."""
    architectures = config.get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else None
    for library, found in (("diffusers", config.get("_class_name")), ("transformers", first)):
        if isinstance(found, str) and found.isidentifier() and "auto_map" not in config:
            return library, found
    return "", ""


def other_format(root: Path, files: Sequence[str]) -> str:
    """What is known about weights of another format; `files` are their names."""
    first, suffix = files[0], Path(files[0]).suffix
    target = root / (Path(first).stem + WEIGHTS)
    if suffix == ".npz":
        command = python(
            "import numpy as np, safetensors.numpy as st; "
            f"st.save_file({{k: np.ascontiguousarray(v) for k, v in np.load({literal(root / first)}).items()}}, "
            f"{literal(target)})"
        )
        return f"this format is not read. Convert it first: {command}; then name {target}"
    return "this format is not read. Use the model's weights in safetensors"


def from_gguf(root: Path, file: str) -> str:
    """The command with which transformers 5 makes safetensors of a language model in GGUF."""
    return python(
        "import transformers as t; t.AutoModelForCausalLM.from_pretrained("
        f"{literal(root)}, gguf_file={literal(file)}, quantization_config=t.GgufConfig(dequantize=True))"
        '.save_pretrained("NEW")'
    )


def rewrite(file: str) -> str:
    """The command that writes a safetensors file anew: the same tensors back to back, metadata as strings."""
    return python(
        f'import json, itertools; b = open({literal(file)}, "rb").read(); n = 8 + int.from_bytes(b[:8], "little"); '
        'h = json.loads(b[8:n]); m = h.pop("__metadata__", None) or {}; '
        'x = [b[n + t["data_offsets"][0] : n + t["data_offsets"][1]] for t in h.values()]; '
        "ends = itertools.accumulate(map(len, x)); "
        "[t.update(data_offsets=[e - len(d), e]) for t, d, e in zip(h.values(), x, ends)]; "
        'h["__metadata__"] = {k: v if isinstance(v, str) else json.dumps(v) for k, v in m.items()}; '
        'j = json.dumps(h).encode(); j += b" " * (-len(j) % 8); '
        'open("NEW.safetensors", "wb").write(len(j).to_bytes(8, "little") + j + b"".join(x))'
    )


def dcp_pieces(root: Path) -> str:
    """How files of torch.distributed.checkpoint in which each has a piece of every tensor become whole."""
    source = literal(root)
    command = python(
        "import os; from torch.distributed.checkpoint import HuggingFaceStorageReader as R; "
        "from torch.distributed.checkpoint._consolidate_hf_safetensors import consolidate_safetensors_files as join; "
        f'os.makedirs("NEW", exist_ok=True); join({source}, "NEW", '
        f"dict.fromkeys(R({source}).read_metadata().state_dict_metadata, 1))"
    )
    return (
        "it holds a piece of every tensor, as torch.distributed.checkpoint writes one file for each process "
        f"(`DCP_SHARDING_INFO` in its metadata). Join them first: {command}; copy config.json and the tokenizer's "
        "files to NEW; then name NEW"
    )


def dcp_folder(root: Path) -> str:
    """How a folder of torch.distributed.checkpoint (`.metadata`, `__0_0.distcp`) becomes a file."""
    join = f"`python -m torch.distributed.checkpoint.format_utils dcp_to_torch {shell_word(root)} NEW.pt`"
    return f"the folder is a checkpoint of torch.distributed.checkpoint. Join its files first: {join}; then name NEW.pt"
