"""Where the models of a receipt are now: a receipt names them without the folders of the machine that made it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated

from fastinterp.checkpoint import hub
from fastinterp.checkpoint.names import quote, shell_word
from fastinterp.errors import CheckpointError, UsageError
from fastinterp.messages import closest, listed, plain
from fastinterp.presence import is_folder
from fastinterp.urls import is_url
from fastinterp.verification.made_output import MadeOutput
from fastinterp.verification.recipes import named_paths

ModelPlaces = Annotated[
    str | os.PathLike[str] | Iterable[str | os.PathLike[str]] | Mapping[str, str | os.PathLike[str]],
    """Where the models of a receipt are now, if they are not where it says, or near the output.

    "models/"              a folder that has them, by the names in the receipt
    "NAME=PATH"            the place of one model; the last part of its name will do, if it is that of no other
    ["a=/x/a", "models/"]  several of both
    {"NAME": "PATH"}       the same as a mapping
    """,
]

_ABOVE = 3  # folders above the output that are searched, and the folders in each of them
_MOST = 2000  # entries of a folder that are looked at


def found_models(made: MadeOutput, given: ModelPlaces | None) -> dict[str, str]:
    """Name in the receipt -> where that model is, for those that are not where their names say.

    given  where models are: `NAME=PATH` for one of them, or a folder that has several; or a mapping by name
    Raises: CheckpointError, naming all that are not found, and how to say where they are; UsageError.
    """
    wanted = named_paths(made.told, made.name)
    by_name, folders = _split(given, wanted)
    found: dict[str, str] = {}
    missing: list[str] = []
    for name in wanted:
        place = by_name.get(name) or _find(name, made, folders)
        if place is None:
            missing.append(name)
        elif place != name:
            found[name] = place
    for folder in folders:
        if not any(_is_there(place) for name in wanted for place in _in(folder, name)):
            raise UsageError(f"--models {quote(str(folder))}: none of the models is there: {listed(wanted, 8)}")
    if missing:
        raise CheckpointError(_missing(missing, made, folders), file=made.name)
    return found


def elsewhere_lines(places: Mapping[str, str]) -> list[str]:
    """Lines of a report about the models that were read elsewhere than the receipt says.

    places  as of found_models
    """
    return [f"  model {plain(name)}: read from {plain(place)}" for name, place in places.items()]


def _split(given: ModelPlaces | None, wanted: Sequence[str]) -> tuple[dict[str, str], list[Path]]:
    """What is given for single models, and folders to look in."""
    if given is None:
        return {}, []
    if isinstance(given, Mapping):
        pairs = [(name, os.fspath(path)) for name, path in given.items()]
        items: list[str] = []
    else:
        pairs = []
        items = [os.fspath(item) for item in ([given] if isinstance(given, (str, os.PathLike)) else given)]
    folders = []
    for item in items:
        name, equals, path = item.partition("=")
        folder = Path(os.path.expanduser(item))
        if equals and (_named(name, wanted) or not is_folder(folder)):
            pairs.append((name, path))
        elif is_folder(folder):
            folders.append(folder)
        else:
            raise UsageError(f"{quote(item)}: no folder. The models are {listed(wanted, 8)}")
    by_name = {}
    for name, path in pairs:
        meant = _named(name, wanted)
        if len(meant) > 1:
            raise UsageError(f"{quote(name)} may be {' or '.join(meant)}. Write one of these")
        if not meant:
            close = closest(name, wanted)
            hint = f", did you mean {quote(close)}?" if close else "."
            raise UsageError(f"the receipt names no model {quote(name)}{hint} The models are {listed(wanted, 8)}")
        if not path:
            raise UsageError(f"{quote(name + '=')} says no place")
        by_name[meant[0]] = path
    return by_name, folders


def _named(name: str, wanted: Sequence[str]) -> list[str]:
    """The models of a receipt that a name may stand for: the one of this name, else those whose last part it is."""
    if name in wanted:
        return [name]
    return [one for one in wanted if os.path.basename(os.path.normpath(one)) == name]


def _find(name: str, made: MadeOutput, folders: Sequence[Path]) -> str | None:
    for folder in folders:
        for candidate in _in(folder, name):
            if _is_there(candidate):
                return str(candidate)
    if _is_there(Path(os.path.expanduser(name))):
        return name
    own = os.path.realpath(made.path)
    for candidate in _near(name, made):
        if _is_there(candidate) and os.path.realpath(candidate) != own:
            return str(candidate)
    if is_url(name):
        return name
    # What has no `/` may be an id, too, of the first years; but most are the last parts of absolute paths.
    return name if "/" in name and not made.told.private and hub.parse(name) is not None else None


def _in(folder: Path, name: str) -> tuple[Path, Path]:
    """Where a model may be in a folder that has several."""
    return folder / name, folder / os.path.basename(os.path.normpath(name))


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def _near(name: str, made: MadeOutput) -> Iterator[Path]:
    """Places near an output where a model of this name may be: folders above it, and folders in these."""
    for root in _above(made):
        yield root / name
        try:
            inside = sorted(os.listdir(root))[:_MOST]
        except OSError:
            continue
        for one in inside:
            if not one.startswith(".") and (root / one).is_dir():
                yield root / one / name


def _above(made: MadeOutput) -> list[Path]:
    """The folders above an output that are searched."""
    return [*Path(os.path.realpath(made.path)).parents][:_ABOVE]


def _missing(missing: Sequence[str], made: MadeOutput, folders: Sequence[Path]) -> str:
    places = " ".join(f"--models {shell_word(name)}=PATH" for name in missing[:4])
    if made.told.private:
        names = listed(missing, 8)
        return (
            f"its receipt names no models, because it was made with --private. Say where they are, in the order of the "
            f"recipe ({names}): {places} (in Python models=...)"
        )
    what = f"the model {quote(missing[0])} is" if len(missing) == 1 else f"the models {listed(missing, 8)} are"
    return (
        f"{what} neither here nor near the output. Say where: {places}, or --models FOLDER for a folder that has "
        f"{'it' if len(missing) == 1 else 'them'} (in Python models=...). Looked at: {_places(missing, made, folders)}"
    )


def looked_at(made: MadeOutput, given: ModelPlaces | None, name: str) -> str:
    """The places where a model was looked for, for people. given: as of found_models"""
    _, folders = _split(given, named_paths(made.told, made.name))
    return _places([name], made, folders)


def _places(missing: Sequence[str], made: MadeOutput, folders: Sequence[Path]) -> str:
    """The places where models were looked for."""
    here = [os.path.abspath(os.path.expanduser(name)) for name in missing if not is_url(name)]
    places = [*map(str, folders), *here[:4], *map(str, _above(made))]
    return f"{', '.join(quote(place) for place in dict.fromkeys(places))}, and the folders in the latter"
