"""A process that is killed at any system call that changes the output: the next run of the same command needs nobody.

Whole merges of tiny models, by kinds of outputs. After each kill the folder is what a reader meets at that moment: the
old checkpoint, the new one, or nothing that opens. After the next run it is what an undisturbed run makes.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import fastinterp
from fastinterp.checkpoint.journal_file import journal_path
from fastinterp.checkpoint.open import open_checkpoint
from fastinterp.errors import CheckpointError, OutputError
from tests.support.kills import every_kill, killed
from tests.support.models import layers, load, save
from tests.support.written import tree

MANY = "100"  # as a shard size: each tensor in a file of its own


@dataclass(frozen=True)
class Kind:
    """A kind of output.

    run  writes into a folder. before: what is there already
    outs what it writes, in that folder
    """

    run: Callable[[Path, Path], object]
    outs: tuple[str, ...]
    before: Callable[[Path, Path], object] = lambda models, folder: None


def model(folder: Path, seed: int, noise: float) -> Path:
    save(folder, layers(seed, count=2, noise=noise))
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


def pipeline(folder: Path, noise: float) -> None:
    for part in ("unet", "vae"):
        save(folder / part, layers(3, count=1, noise=noise))
    index = {"_class_name": "P", **{part: ["diffusers", "M"] for part in ("unet", "vae")}}
    (folder / "model_index.json").write_text(json.dumps(index))


def between(models: Path, a: str, b: str, alpha: float | list[float], out: Path, **options: Any) -> None:
    alphas = alpha if isinstance(alpha, list) else [alpha]
    fastinterp.interpolate(models / a, models / b, alphas, out, device="cpu", threads=1, **options)


def over(alpha: float, size: str, other: str) -> Kind:
    """Over a checkpoint of other shards, whose chat template the new one lacks."""

    def before(models: Path, folder: Path) -> None:
        between(models, "a", "b", 0.125, folder / "out", max_shard_size=other)
        (folder / "out" / "chat_template.jinja").write_text("old")
        (folder / "out" / "notes.txt").write_text("the user's")

    return Kind(lambda m, f: between(m, "a", "b", alpha, f / "out", max_shard_size=size, force=True), ("out",), before)


LONG = f"{'n' * 240}.safetensors"
POINTS = [0.25, 0.5, 0.75]
KINDS = {
    "new": Kind(lambda m, f: between(m, "a", "b", 0.5, f / "new" / "out"), ("new/out",)),
    "shards": Kind(lambda m, f: between(m, "a", "b", 0.5, f / "out", max_shard_size=MANY), ("out",)),
    "file": Kind(lambda m, f: between(m, "a", "b", 0.5, f / "out.safetensors"), ("out.safetensors",)),
    "file of a long name": Kind(lambda m, f: between(m, "a", "b", 0.5, f / LONG), (LONG,)),
    "pipeline": Kind(lambda m, f: between(m, "pa", "pb", 0.5, f / "out"), ("out",)),
    "durable": Kind(lambda m, f: between(m, "a", "b", 0.5, f / "out", durable=True), ("out",)),
    "several": Kind(lambda m, f: between(m, "a", "b", POINTS, f / "o"), tuple(f"o/alpha_{p}" for p in POINTS)),
    "several files": Kind(
        lambda m, f: between(m, "a", "b", POINTS, f / "o.safetensors"),
        tuple(f"o_alpha_{p}.safetensors" for p in POINTS),
    ),
    "over one by one": over(0.5, "1GB", "1GB"),
    "over shards by the same": over(0.5, MANY, MANY),
    "over shards by one": over(0.5, "1GB", MANY),
    "over one by shards": over(0.5, MANY, "1GB"),
    "over a file": Kind(
        lambda m, f: between(m, "a", "b", 0.5, f / "out.safetensors", force=True), ("out.safetensors",),
        lambda m, f: between(m, "a", "b", 0.125, f / "out.safetensors"),
    ),
    "over a pipeline": Kind(
        lambda m, f: between(m, "pa", "pb", 0.5, f / "out", force=True), ("out",),
        lambda m, f: between(m, "pa", "pb", 0.125, f / "out"),
    ),
    "over several": Kind(
        lambda m, f: between(m, "a", "b", POINTS, f / "o", force=True), tuple(f"o/alpha_{p}" for p in POINTS),
        lambda m, f: between(m, "b", "a", POINTS, f / "o"),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("models")
    model(root / "a", 1, 0)
    model(root / "b", 1, 0.5)
    pipeline(root / "pa", 0)
    pipeline(root / "pb", 0.5)
    return root


def opened(out: Path) -> dict[str, bytes] | None:
    """The tensors that this package reads; None, if it refuses."""
    try:
        found = open_checkpoint(str(out))
    except CheckpointError:
        return None
    return {e.name: found.files[e.file].read_bytes()[e.start : e.start + e.nbytes] for e in found.tensors.values()}


def loaded(out: Path) -> dict[str, bytes] | None:
    """The tensors that the loaders of transformers and diffusers would read, which know nothing of journals."""
    if out.suffix == ".safetensors":
        return _tensors([out]) if out.exists() else None
    if (out / "model_index.json").exists():
        parts = {p: loaded(out / p) for p in ("unet", "vae")}
        if None in parts.values():
            return None
        return {f"{part}/{name}": data for part, of in parts.items() for name, data in (of or {}).items()}
    index = out / "model.safetensors.index.json"
    if (out / "model.safetensors").exists():
        return _tensors([out / "model.safetensors"])
    if not index.exists():
        return None
    files = [out / name for name in dict.fromkeys(json.loads(index.read_text())["weight_map"].values())]
    return _tensors(files) if all(file.exists() for file in files) else None


def _tensors(files: list[Path]) -> dict[str, bytes]:
    return {name: data for file in files for name, (_, _, data) in load(file).items()}


def expected(kind: Kind, models: Path, folder: Path) -> tuple[dict[str, bytes], list[list[dict[str, bytes] | None]]]:
    """The tree that an undisturbed run makes; of each output the states that readers may find."""
    kind.before(models, folder)
    old = [opened(folder / out) for out in kind.outs]
    kind.run(models, folder)
    new = [opened(folder / out) for out in kind.outs]
    assert None not in new and old != new
    return tree(folder), [[before, after, None] for before, after in zip(old, new, strict=True)]


def outcome(kind: Kind, folder: Path, states: list[list[dict[str, bytes] | None]]) -> list[str]:
    """What the loaders that know nothing of journals find of each output. Ours finds that, too, or refuses."""
    found = []
    for out, (old, new, _) in zip(kind.outs, states, strict=True):
        ours, theirs = opened(folder / out), loaded(folder / out)
        assert theirs in (old, new, None) and ours in (theirs, None), out
        found.append("nothing" if theirs is None else "new" if theirs == new else "old")
    return found


def starts(kind: Kind, models: Path, tmp_path: Path) -> Callable[[int], Path]:
    """Makes the folder of each run as it is before."""
    (tmp_path / "start").mkdir()
    kind.before(models, tmp_path / "start")

    def prepare(at: int) -> Path:
        return Path(shutil.copytree(tmp_path / "start", tmp_path / f"run-{at}"))

    return prepare


SHORT = ("shards", "over shards by the same", "several", "file")


def short_and_long(short: tuple[str, ...]) -> list[Any]:
    return [name if name in short else pytest.param(name, marks=pytest.mark.long) for name in KINDS]


@pytest.mark.slow
@pytest.mark.parametrize("name", short_and_long(SHORT))
def test_next_run_after_a_kill_needs_nobody(models, tmp_path, name):
    kind = KINDS[name]
    whole, states = expected(kind, models, tmp_path / "whole")
    seen: set[str] = set()
    for at, folder in every_kill(starts(kind, models, tmp_path), lambda folder: kind.run(models, folder)):
        seen.update(outcome(kind, folder, states))
        again(kind, models, folder, whole)
        assert tree(folder) == whole, at
        shutil.rmtree(folder)
    first = {"old"} if name.startswith("over") else {"nothing"}
    assert seen == {"new"} | first | ({"nothing"} if name != "over a file" else set())


@pytest.mark.slow
@pytest.mark.parametrize("name", short_and_long(("shards", "file")))
def test_kill_of_the_run_that_mends(models, tmp_path, name):
    """Killed, and the run after it killed as well, at calls drawn at random; then the next one."""
    kind, draw = KINDS[name], random.Random(name)
    whole, states = expected(kind, models, tmp_path / "whole")
    for at, folder in every_kill(starts(kind, models, tmp_path), lambda folder: kind.run(models, folder)):
        for _ in range(2):
            killed(partial(again, kind, models, folder, whole), draw.randrange(1, at + 12))
            outcome(kind, folder, states)
        again(kind, models, folder, whole)
        assert tree(folder) == whole, at
        shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "shards",
        "over shards by the same",
        "file",
        *(pytest.param(n, marks=pytest.mark.long) for n in ("several", "over several")),
    ],
)
def test_another_merge_after_a_kill(models, tmp_path, name):
    """It ends the finish of the first one, and is refused for that; with force, or where nothing was finished, it
    writes its own. Never a mix."""
    kind = KINDS[name]
    _, states = expected(kind, models, tmp_path / "whole")
    other = "other.safetensors" if kind.outs[0].endswith(".safetensors") else "other"
    between(models, "b", "a", 0.375, tmp_path / other)
    wanted = opened(tmp_path / other)
    for _, folder in every_kill(starts(kind, models, tmp_path), lambda folder: kind.run(models, folder)):
        out = folder / kind.outs[0]
        finishing = b" finishing " in _journal(out)
        refusal = refused(partial(between, models, "b", "a", 0.375, out))
        if refusal:
            assert "add --force" in refusal.lower()
            assert ("a run that had died had completed it: it is in place now. Now th" in refusal) == finishing
            assert opened(out) == states[0][1 if finishing else opened(out) != states[0][0]]
            between(models, "b", "a", 0.375, out, force=True)
        assert opened(out) == wanted == loaded(out)
        assert not [n for n in tree(folder) if n.startswith(f"{kind.outs[0]}/.")]
        shutil.rmtree(folder)


def again(kind: Kind, models: Path, folder: Path, whole: dict[str, bytes]) -> None:
    """The same command. It is refused only if the run had ended, but for a sync of the folder, say."""
    ended = tree(folder) == whole
    refusal = refused(partial(kind.run, models, folder))
    there = ": the folder is not empty: `", ": this file exists already"
    assert not refusal or (ended and any(text in refusal for text in there)), refusal


def refused(action: Callable[[], object]) -> str:
    try:
        action()
    except OutputError as error:
        return str(error)
    return ""


def _journal(out: Path) -> bytes:
    path = journal_path(out.parent, out.name) if out.suffix == ".safetensors" else journal_path(out)
    return path.read_bytes() if path.exists() else b""
