"""The average of checkpoints of one training run as a recipe: in the order of their steps, by weights with a name."""

from __future__ import annotations

import fnmatch
import glob
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastinterp.arguments import path_of
from fastinterp.checkpoint.names import WEIGHTS
from fastinterp.errors import UsageError
from fastinterp.messages import counted, suggestion
from fastinterp.methods import find
from fastinterp.ops.combine import MAX_INPUTS
from fastinterp.paths.steps import by_step
from fastinterp.presence import exists, is_folder, names_at
from fastinterp.urls import full, is_url, scheme_of

DECAYS = ("linear", "cosine", "1-sqrt")  # of a learning rate, which weights of checkpoints stand for
WEIGHT_NAMES = ("uniform", "ema", *DECAYS)
_DEFAULT_DECAY = 0.9


@dataclass(frozen=True)
class Average:
    """Checkpoints that are averaged, oldest first, and their weights, whose sum is 1."""

    checkpoints: tuple[str, ...]
    weights: tuple[float, ...]
    tokenizer_source: str | None = None  # as the key of recipes; "base" is the newest

    @property
    def recipe(self) -> dict[str, Any]:
        """The `linear` merge of those whose weight is not 0; the newest gives configuration, tokenizer and integers."""
        read = [(c, w) for c, w in zip(self.checkpoints, self.weights, strict=True) if w]
        newest = read[-1][0]
        return {
            "merge_method": "linear",
            "base_model": newest,
            "models": [{"model": checkpoint, "parameters": {"weight": weight}} for checkpoint, weight in read],
            "integers": newest,
            **({} if self.tokenizer_source is None else {"tokenizer_source": self.tokenizer_source}),
        }


def average_of(
    checkpoints: object,
    weights: str,
    decay: float | None,
    last: int | None,
    in_order: bool = False,
    tokenizer_source: object = None,
) -> Average:
    """The arguments of `fastinterp.average`, checked. Raises: UsageError."""
    if weights not in WEIGHT_NAMES:
        raise UsageError(f"unknown weights {weights!r}{suggestion(str(weights), WEIGHT_NAMES)}")
    if decay is not None and weights != "ema":
        raise UsageError(f"`decay` belongs to weights 'ema', got {decay} with {weights!r}")
    if last is not None and (type(last) is not int or last < 2):
        raise UsageError(f"`last` must be a whole number, 2 or more, got {last!r}")
    paths = _listed(checkpoints)
    if not in_order:
        paths = by_step(paths)
    if last is not None:
        if last > len(paths):
            raise UsageError(f"there are {counted(len(paths), 'checkpoint')}, but the last {last} are asked for")
        paths = paths[-last:]
    if len(paths) < 2:
        raise UsageError(f"an average needs two checkpoints or more, got {paths[0]!r} alone{_inside(paths[0])}")
    if len(paths) > MAX_INPUTS:
        raise UsageError(
            f"at most {MAX_INPUTS} checkpoints can be averaged at a time, got {len(paths)}. Give fewer, or `last` "
            f"(--last {MAX_INPUTS})"
        )
    source = None if tokenizer_source is None else path_of(tokenizer_source, "tokenizer_source")
    return Average(tuple(paths), weights_of(len(paths), weights, decay), source)


def weights_of(n: int, name: str, decay: float | None = None) -> tuple[float, ...]:
    """The weights of n checkpoints, oldest first, whose sum is 1.

    uniform: 1/n each. ema: decay^(n-1-i) over their sum, so the newest counts most; it is the moving average with the
    correction for its start, e_n / (1 - decay^n) with e_0 = 0. Others: as `weights` of method `ema` defines them.
    Raises: UsageError.
    """
    if name == "uniform":
        return (1.0 / n,) * n
    if name != "ema":
        combine: Any = find("ema")(n, weights=name)
        return tuple(combine.weights)
    decay = _DEFAULT_DECAY if decay is None else decay
    if not 0 <= decay < 1:
        raise UsageError(f"`decay` must be a number from 0, the newest alone, to below 1, got {decay!r}")
    powers = [float(decay) ** (n - 1 - i) for i in range(n)]
    total = math.fsum(powers)
    return tuple(power / total for power in powers)


def _listed(checkpoints: object) -> list[str]:
    """Paths; in place of each pattern with * those that it stands for. Raises: UsageError."""
    if isinstance(checkpoints, (str, os.PathLike)):
        return _expanded(path_of(checkpoints, "checkpoints"))
    if isinstance(checkpoints, Mapping) or not isinstance(checkpoints, Iterable):
        raise UsageError(f"`checkpoints` must be paths in a list, or a pattern, got {type(checkpoints).__name__}")
    paths = [path for c in checkpoints for path in _expanded(path_of(c, "checkpoints"))]
    if not paths:
        raise UsageError("`checkpoints` is empty, so there is nothing to average")
    return paths


def _expanded(path: str) -> list[str]:
    """The paths that match a pattern; a path itself, also if there are * or [ in its name. What stands behind `+`, an
    adapter, may be a pattern, too. Raises: UsageError.
    """
    if is_url(path) and "+" not in path:
        return _elsewhere(path)
    pattern = os.path.expanduser(path)
    if not glob.has_magic(pattern) or exists(pattern):
        return [path]
    if "+" in path:
        from itertools import product

        return ["+".join(parts) for parts in product(*map(_expanded, path.split("+")))]
    found = _matching(pattern)
    if not found:
        raise UsageError(f"nothing matches {path!r}")
    return found


def _matching(pattern: str) -> list[str]:
    """As glob.glob, sorted, which leaves out what it cannot list: a mean of fewer checkpoints than were meant."""
    folder, name = os.path.split(pattern)
    places = _matching(folder) if glob.has_magic(folder) else [folder]
    if not glob.has_magic(name):
        return [path for place in places if exists(path := os.path.join(place, name))]
    found = []
    for place in (p for p in places if is_folder(p or ".")):
        inside = [n for n in names_at(place or ".") if name.startswith(".") or not n.startswith(".")]
        found += [os.path.join(place, n) for n in fnmatch.filter(inside, name)]
    return sorted(found)


def _elsewhere(url: str) -> list[str]:
    """The addresses that match a pattern, or the one that it is. Raises: UsageError; what a store raises."""
    parts = url.split("/")
    first = next((i for i in range(3, len(parts)) if glob.has_magic(parts[i])), None)
    if first is None or "=" in url.partition("?")[2]:
        return [url]
    from fastinterp.checkpoint.url_store import asked, file_system

    if scheme_of(url) in ("http", "https"):
        raise UsageError(f"{url!r} is a pattern, and addresses of HTTP are not listed. Give the checkpoints one by one")
    fs, pattern = file_system(url, full(url))
    count = len(parts) - first
    found = sorted(name.rstrip("/").split("/")[-count:] for name in asked(lambda: fs.glob(pattern.rstrip("/")), url))
    if not found:
        raise UsageError(f"nothing matches {url!r}")
    return ["/".join((*parts[:first], *names)) for names in found]


def _inside(path: str) -> str:
    """What to write for the folder of a run, which holds its checkpoints."""
    if path.endswith(WEIGHTS) or is_url(path):
        return ""
    inside = [p for p in Path(os.path.expanduser(path)).glob("checkpoint-*") if p.is_dir()]
    return f". For the {len(inside)} in it: {os.path.join(path, 'checkpoint-*')}" if len(inside) > 1 else ""
