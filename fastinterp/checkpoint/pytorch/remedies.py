"""Files of torch that are not read in place, and the commands that write them anew in the form that is."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from fastinterp.checkpoint.header import Entry, is_markup
from fastinterp.checkpoint.names import quote
from fastinterp.checkpoint.remedies import literal, python
from fastinterp.errors import CheckpointError

_TRUST = " (it runs what the file says: only if you trust who made it)"


def save_again(file: str, weights_only: bool = True, expression: str = "d") -> str:
    """The command that loads a file with torch, and saves it, or a part of it, as NEW.pt.

    weights_only  torch admits all that the file names
    expression    what is saved of `d`, the value in the file
    """
    load = f'd = torch.load({literal(file)}, map_location="cpu", weights_only={weights_only})'
    command = python(f'import torch; {load}; torch.save({expression}, "NEW.pt")')
    return f"{command}{'' if weights_only else _TRUST}; then name NEW.pt"


def refuse_converted(files: Sequence[Path], entries: Iterable[Entry]) -> None:
    """Raises: CheckpointError, if the elements of a tensor of an adapter do not lie one after the other in its file.

    files  of the checkpoint
    """
    for entry in entries:
        if entry.conversion is None:
            continue
        file = str(files[entry.file])
        raise CheckpointError(
            f"the elements of {quote(entry.name)} do not lie one after the other, and those of adapters have to. "
            f"{one_after_the_other(file)}",
            file=file,
            tensor=entry.name,
        )


def one_after_the_other(file: str) -> str:
    """The remedy for a file whose tensors are views with strides."""
    load = f'd = torch.load({literal(file)}, map_location="cpu", weights_only=True)'
    save = 'torch.save(torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.contiguous, d), "NEW.pt")'
    return f"Save them so: {python(f'import torch; {load}; {save}')}; then put NEW.pt in its place"


def other_form(first: bytes, file: str) -> str:
    """The message about a file that is no zip file, by its first bytes; empty, if it is one."""
    if first.startswith(b"PK"):
        return ""
    if first[:1] == b"\x80" and b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19" in first[:16]:
        return (
            "torch before 1.6 wrote this file (or `_use_new_zipfile_serialization=False`): its tensors are not read in "
            f"place. Save it again: {save_again(file)}"
        )
    if first[257:262] == b"ustar":
        return (
            "this is a tar file, as torch before 0.1.10 wrote: not read. Save it again: "
            f"{save_again(file, weights_only=False)}"
        )
    if first[:1] == b"\x80":
        return (
            "this is a pickle, not a file of torch.save, and pickles are never loaded, because they can run any code. "
            'Where it was made, save the weights alone: `torch.save(weights, "NEW.pt")`; then name that'
        )
    return _no_file_of_torch(first, os.path.splitext(os.path.basename(file))[0])


def _no_file_of_torch(first: bytes, stem: str) -> str:
    """The same about one that torch never wrote. stem: its name without the suffix."""
    if not first:
        return "the file is empty. Download or copy it again"
    if first.startswith(b"GGUF"):
        return f"this is a GGUF file. Call it {quote(f'{stem}.gguf')}"
    if first[6:9] == b"\0\0{":  # behind the length of the header
        return f"this is a safetensors file. Call it {quote(f'{stem}.safetensors')}"
    if is_markup(first):
        return "this is a web page (HTML or XML), not the file: a download failed, or needs a login. Download it again"
    if first.startswith(b"version https://git-lfs"):
        return "this is a Git LFS pointer; the file itself was not downloaded. Run `git lfs pull`"
    return (
        "this is no zip file, as torch.save writes it: a file of another program, or damaged. If it is one of "
        "torch.save, download or copy it again"
    )


def torch_script(file: str) -> str:
    command = python(
        f'import torch; torch.save(torch.jit.load({literal(file)}, map_location="cpu").state_dict(), "NEW.pt")'
    )
    return (
        "this is a TorchScript archive, which has code beside its weights: not read. Save its state dict: "
        f"{command}{_TRUST}; then name NEW.pt"
    )


def compressed(file: str) -> str:
    return (
        "the entries of this zip file are compressed: its tensors cannot be read in place. Save it again: "
        f"{save_again(file)}"
    )


def byte_order(file: str, found: bytes) -> str:
    if found != b"big":
        return f"its byte order is {quote(found.decode('latin-1'))}: `little` is read"
    return f"its numbers are big-endian, and only little-endian ones are read. Save it again: {save_again(file)}"
