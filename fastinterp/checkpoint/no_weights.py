"""What a folder has that has no weights which are read: the end of a message, with what to do about it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from fastinterp.checkpoint import remedies
from fastinterp.checkpoint.adapters import ADAPTER_CONFIG, Adapter, read_adapter_config, refusal
from fastinterp.checkpoint.components import has_weights
from fastinterp.checkpoint.folder import ADAPTER
from fastinterp.checkpoint.journal_file import temporary_of
from fastinterp.checkpoint.names import OTHER_WEIGHTS, PICKLES, WEIGHTS, listing, quote
from fastinterp.checkpoint.unfinished import about_unfinished
from fastinterp.presence import is_folder, names_at


def no_weights(name: str, root: Path, present: Sequence[str]) -> str:
    """What is there instead, and what to do about it."""
    if other := _other_weights(name, root, present):
        return other
    below = [n for n in present if is_folder(root / n) and has_weights(root / n)]
    if below:
        return f"the folder itself has no {WEIGHTS} file, but {listing(below)} in it do: name one of them"
    if unfinished := about_unfinished(root):
        return f"the folder has no {WEIGHTS} file: {unfinished}"
    if any(temporary_of(n) for n in names_at(root)):
        return f"the folder has no {WEIGHTS} file, only those of a merge that did not finish: run it again"
    if not present:
        return f"the folder has no {WEIGHTS} file; it is empty"
    hint = "" if os.path.isdir(os.path.expanduser(name)) else remedies.hub_files(name)
    return f"the folder has no {WEIGHTS} file, only {listing(present)}" + (f". {hint}" if hint else "")


def _other_weights(name: str, root: Path, present: Sequence[str]) -> str:
    """About weights of other formats in a folder; empty, if there are none."""
    only = f"the folder has no {WEIGHTS} file, only"
    if ADAPTER_CONFIG in present or any(n.startswith(f"{ADAPTER}.") for n in present):
        config = read_adapter_config(root / ADAPTER_CONFIG)
        kind = {"LORA": "LoRA"}.get(str(config.get("peft_type")), "PEFT")
        return refusal(name, root, Adapter(kind, "peft", (), None, False, frozenset(), config), {}, root)
    if any(n.endswith(".distcp") for n in present):
        return remedies.dcp_folder(root)
    # As FSDP's trainers save: a folder for the model, others for its optimizer.
    folders = [n for n in present if not n.startswith("optimizer") and is_folder(root / n)]
    for part in (n for n in folders if any(file.endswith(".distcp") for file in names_at(root / n))):
        return f"in {quote(part)}, {remedies.dcp_folder(root / part)}"
    if pickles := [n for n in present if n.endswith(PICKLES)]:
        return f"{only} {listing(pickles)}, which by their names hold no weights. If one does: name {root / pickles[0]}"
    if others := [n for n in present if n.endswith(OTHER_WEIGHTS)]:
        return f"{only} {listing(others)}: {remedies.other_format(root, others)}"
    return ""
