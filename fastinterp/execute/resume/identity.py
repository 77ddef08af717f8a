"""What a run computes, as plain values: two runs with the same identity write the same bytes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import CodeType

import msgspec

from fastinterp._version import __version__
from fastinterp.checkpoint.open import Checkpoint
from fastinterp.checkpoint.regular_file import stamp_of
from fastinterp.checkpoint.remote import opened, read_up_to
from fastinterp.messages import listed
from fastinterp.methods import is_own
from fastinterp.ops.combine import NUMERICS
from fastinterp.plan.models import Model
from fastinterp.plan.plan import Plan
from fastinterp.presence import names_at
from fastinterp.recipe.load import Recipe

_DIGEST = 16  # bytes
_READ_BY_PLANS = (".json", ".jinja", ".model", ".txt", ".spm", ".tiktoken")  # files beside weights
_START = 1 << 16  # bytes of an input whose header has no length of its own
_SHOWN = 3  # names in a message


class Identity(msgspec.Struct, frozen=True):
    """The identity of a run.

    options   of every output, in order: names and values, those of documents above among them
    recipes   a hash of the text of each of its documents, in the same order
    methods   a hash of the code of each method that is not of this package, as far as it shows: not of what it calls
    headers   a hash of the headers and names of the files of each output
    inputs    path -> size, mtime and ctime in ns, and a hash of the header: every file of weights, and of small files
              that plans read. Of weights from the Hub: size, zeros, and the commit; of addresses the version
    """

    version: str
    numerics: int
    options: tuple[Mapping[str, str | int | bool | None], ...]
    recipes: tuple[str, ...]
    methods: tuple[str, ...]
    headers: tuple[str, ...]
    inputs: Mapping[str, tuple[int, int, int, str]]

    @property
    def key(self) -> str:
        """A hash over all of it, of 32 hexadecimal digits."""
        return _hashed([msgspec.json.encode(self, order="sorted")])

    @property
    def sure(self) -> bool:
        """Whether runs of the same identity write the same bytes without doubt: not with methods of others, nor where
        only the size of an input is known, of a store that says nothing of versions.
        """
        return not self.methods and all(any(stamp[1:]) for stamp in self.inputs.values())

    def difference(self, other: Identity) -> str:
        """In what `other`, which is told to people as the present one, differs: `the recipe differs`."""
        if (self.version, self.numerics) != (other.version, other.numerics):
            return f"it was begun by fastinterp {self.version}, and this is {other.version}"
        if len(self.recipes) != len(other.recipes) or len(self.headers) != len(other.headers):
            return "the number of its outputs, or of the documents of the recipe, was another one"
        if self.recipes != other.recipes or self.methods != other.methods:
            return "the recipe, or its models, differ"
        if self.options != other.options:
            pairs = zip(self.options, other.options, strict=True)
            named = dict.fromkeys(f"`{k}` was {old.get(k)}, and is {v}" for old, new in pairs for k, v in new.items()
                                  if old.get(k) != v)  # fmt: skip
            return listed(named, _SHOWN)
        changed = [path for path, stamp in other.inputs.items() if self.inputs.get(path, stamp) != stamp]
        if changed:
            return f"inputs have changed since: {listed(changed, _SHOWN)}"
        if self.inputs.keys() != other.inputs.keys():
            paths = sorted(self.inputs.keys() ^ other.inputs.keys())
            return f"files of its models have come or gone: {listed(paths, _SHOWN)}"
        return "its files are laid out otherwise: another --max-shard-size, say"


def identity_of(plans: Sequence[Plan]) -> Identity:
    """The identity of the run that carries out these plans."""
    recipes = [recipe for plan in plans for recipe in (*plan.above, *plan.recipes)]
    others = [recipe.method.fn.__code__ for recipe in recipes if not is_own(recipe.method)]
    models = [model for plan in plans for model in plan.checkpoints]
    return Identity(
        __version__,
        NUMERICS,
        tuple(_options(recipe) for recipe in recipes),
        tuple(_hashed([recipe.text.encode("utf-8", "surrogatepass")]) for recipe in recipes),
        tuple(_hashed(_parts(code)) for code in others),
        tuple(
            _hashed(part for file in layout.files for part in (os.fsencode(file.name), b"\0", file.header))
            for plan in plans
            for layout in plan.layouts
        ),
        _inputs(models),
    )


def _parts(code: CodeType) -> Iterator[bytes]:
    """The instructions and constants of a function, and of those in it."""
    yield code.co_code
    for value in code.co_consts:
        if isinstance(value, CodeType):
            yield from _parts(value)
        else:
            yield repr(value).encode("utf-8", "surrogatepass")


def _options(recipe: Recipe) -> dict[str, str | int | bool | None]:
    stored = recipe.out_dtype or recipe.dtype
    return {
        "dtype": None if stored is None else stored.name, "rounding": recipe.rounding, "seed": recipe.seed,
        "fp8_overflow": recipe.fp8_overflow, "missing": recipe.missing, "channels": recipe.channels,
        "quantize": recipe.quantize, "truncate_embeddings": recipe.truncate_embeddings,
    }  # fmt: skip


def _inputs(models: Sequence[Model]) -> dict[str, tuple[int, int, int, str]]:
    found: dict[str, tuple[int, int, int, str]] = {}
    for checkpoint in _with_adapters(model.checkpoint for model in models):
        if checkpoint.site is not None:  # its folder here is another one in every run
            versions = checkpoint.site.versions.items()
            found |= {f"{checkpoint.site.url}/{name}": (size, 0, 0, version) for name, (size, version) in versions}
            continue
        for path, stamp in zip(checkpoint.files, checkpoint.stamps, strict=True):
            if checkpoint.snapshot is not None:  # the commit is in the path, whether the file is here or still there
                found[str(path)] = (stamp[0], 0, 0, checkpoint.snapshot.commit)
                continue
            real = os.path.realpath(path)
            if real not in found:
                found[real] = (*stamp[:3], _header(path, stamp[0]))
        for folder in dict.fromkeys((checkpoint.root, *(path.parent for path in checkpoint.files))):
            for path in (folder / name for name in names_at(folder) if name.endswith(_READ_BY_PLANS)):
                small = stamp_of(path)
                if small is not None:
                    found.setdefault(os.path.realpath(path), (*small[:3], ""))
    return found


def _with_adapters(checkpoints: Iterable[Checkpoint | None]) -> list[Checkpoint]:
    found: dict[int, Checkpoint] = {}
    for checkpoint in checkpoints:
        if checkpoint is not None:
            found |= {id(one): one for one in (checkpoint, *_with_adapters(checkpoint.adapters))}
    return list(found.values())


def _header(path: Path, size: int) -> str:
    """A hash of the header of a file of weights."""
    with opened(str(path)) as file:
        start = read_up_to(file, path, 0, 8)
        length = int.from_bytes(start, "little") if path.name.endswith(".safetensors") else _START
        return _hashed([start, read_up_to(file, path, 8, min(length, size))])


def _hashed(parts: Iterable[bytes]) -> str:
    import hashlib  # takes milliseconds: not on the path of `explain`

    digest = hashlib.blake2b(digest_size=_DIGEST)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
